"""From what the probes found to the contract's messages."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts
from sagecp.agent.engine_probe import Observation
from sagecp.agent.gpu.report import GpuReport
from sagecp.core.engine_state import EngineCapability, EngineProcess, KvCacheUpdate
from sagecp.v1 import fleet_service_pb2 as fleet
from sagecp.v1 import instance_pb2, parallelism_pb2
from sagecp.wire.engine import capabilities_to_proto, gauges_to_proto, process_to_proto
from sagecp.wire.gpu import device_to_proto, reading_to_proto
from sagecp.wire.times import timestamp

_MAX_REASON_LENGTH = 512
# Smaller than the control plane's bound of 64 KiB.
_MAX_BEAT_BYTES = 60 << 10


@dataclass(frozen=True, slots=True)
class Registration:
    """What every beat of a registered instance says of it.

    Attributes:
        lease_token: Secret of the registration.
    """

    instance_id: str
    incarnation: int
    lease_token: bytes = field(default=b"", repr=False)


def spec_to_proto(config: AgentConfig, facts: EngineFacts, gpus: GpuReport) -> instance_pb2.InstanceSpec:
    """Return what is registered: what was found, and over it what the configuration says.

    Args:
        config: What the agent was told.
        facts: What the engine is.
        gpus: What its GPUs say.
    """
    tensor = config.tensor_parallel_size or facts.tensor_parallel_size or 1
    pipeline = config.pipeline_parallel_size or facts.pipeline_parallel_size or 1
    data = config.data_parallel_size or facts.data_parallel_size or 1
    expert = config.expert_parallel_size or (tensor * data if facts.expert_parallel else 1)
    concurrency = config.max_concurrent_request_count
    if concurrency is None and facts.max_sequence_count is not None:
        # Each data-parallel rank has its own batch.
        concurrency = facts.max_sequence_count * data
    spec = instance_pb2.InstanceSpec(
        instance_id=config.effective_instance_id,
        engine_url=config.advertised.url,
        model_name=facts.model_name,
        model_aliases=facts.model_aliases,
        engine_api_key=config.engine_api_key,
        parallel_sizes=parallelism_pb2.ParallelSizes(
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            data_parallel_size=data,
            expert_parallel_size=expert,
        ),
        # Without a selection: as many of the host's as the engine must have.
        gpu_count=len(gpus.devices)
        if gpus.are_selected
        else min(len(gpus.devices), tensor * pipeline * data),
        gpu_devices=[device_to_proto(device) for device in gpus.devices],
        max_context_token_count=facts.max_context_token_count,
        key_value_token_capacity=facts.key_value_token_capacity,
        max_concurrent_request_count=concurrency,
        engine_kind=instance_pb2.ENGINE_KIND_SIMULATED if facts.simulated else instance_pb2.ENGINE_KIND_VLLM,
        engine_version=facts.engine_version,
        usd_per_gpu_hour=config.usd_per_gpu_hour,
        host_id=socket.gethostname() if facts.is_local else config.engine.host,
        labels=dict(config.labels),
        engine_configuration=facts.configuration,
        engine_capabilities=capabilities_to_proto(
            facts.capabilities | ({EngineCapability.SUPERVISED} if config.supervision else set())
        ),
    )
    if gpus.devices:
        spec.gpu_name = gpus.devices[0].name
        total = gpus.devices[0].total_memory_bytes
        if total is not None:
            spec.gpu_memory_gib = total / (1 << 30)
    return spec


def beat_to_proto(
    registration: Registration,
    sequence: int,
    observation: Observation,
    gpus: GpuReport,
    process: EngineProcess | None,
    order_trouble: str,
    kv_cache_update: KvCacheUpdate | None = None,
) -> fleet.HeartbeatRequest:
    """Return one beat.

    Args:
        registration: Of the instance.
        sequence: Number of the beat.
        observation: How the engine does.
        gpus: How its GPUs do.
        process: How its process does, where the agent owns it.
        order_trouble: Why an order of the control plane does not work; empty: all do.
        kv_cache_update: What changed in its prefix cache; ``None``: nothing, or it is not followed.
    """
    beat = fleet.HeartbeatRequest(
        instance_id=registration.instance_id,
        incarnation=registration.incarnation,
        lease_token=registration.lease_token,
        sequence=sequence,
        agent_time=timestamp(time.time()),
        engine_condition=fleet.EngineCondition.ValueType(observation.condition.value),
        condition_reason=observation.reason[:_MAX_REASON_LENGTH],
        gpus=[reading_to_proto(reading) for reading in gpus.readings],
        gpu_absent_reason=gpus.absent_reason[:_MAX_REASON_LENGTH],
        order_trouble=order_trouble[:_MAX_REASON_LENGTH],
    )
    if observation.gauges is not None:
        beat.engine.CopyFrom(gauges_to_proto(observation.gauges))
    if process is not None:
        beat.engine_process.CopyFrom(process_to_proto(process))
    if kv_cache_update is not None:
        beat.kv_cache_update.CopyFrom(
            fleet.KvCacheUpdate(
                sequence=kv_cache_update.sequence,
                reset=kv_cache_update.reset,
                stored_block_hashes=kv_cache_update.stored_block_hashes,
                removed_block_hashes=kv_cache_update.removed_block_hashes,
            )
        )
    while beat.ByteSize() > _MAX_BEAT_BYTES and beat.gpus:
        del beat.gpus[len(beat.gpus) // 2 :]
    return beat
