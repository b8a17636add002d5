"""From what the probes found to the contract's messages."""

from __future__ import annotations

import socket
import time

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_probe import EngineFacts, Observation
from sagecp.agent.gpu_probe import GpuReport
from sagecp.v1 import fleet_service_pb2 as fleet
from sagecp.v1 import instance_pb2, parallelism_pb2
from sagecp.wire.engine import gauges_to_proto
from sagecp.wire.gpu import reading_to_proto
from sagecp.wire.times import timestamp

_MAX_REASON_LENGTH = 512
# Smaller than the control plane's bound of 64 KiB.
_MAX_BEAT_BYTES = 60 << 10


def spec_to_proto(
    config: AgentConfig, facts: EngineFacts, gpus: GpuReport, *, gpus_are_selected: bool
) -> instance_pb2.InstanceSpec:
    """Return what is registered: what was found, and over it what the configuration says.

    Args:
        config: What the agent was told.
        facts: What the engine is.
        gpus: What its GPUs say.
        gpus_are_selected: They are the engine's alone, not merely all of this host.
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
        gpu_count=len(gpus.readings)
        if gpus_are_selected
        else min(len(gpus.readings), tensor * pipeline * data),
        max_context_token_count=facts.max_context_token_count,
        key_value_token_capacity=facts.key_value_token_capacity,
        max_concurrent_request_count=concurrency,
        engine_kind=instance_pb2.ENGINE_KIND_SIMULATED if facts.simulated else instance_pb2.ENGINE_KIND_VLLM,
        engine_version=facts.engine_version,
        usd_per_gpu_hour=config.usd_per_gpu_hour,
        host_id=socket.gethostname() if facts.is_local else config.engine.host,
        labels=dict(config.labels),
    )
    if gpus.readings:
        spec.gpu_name = gpus.readings[0].name
        total = gpus.readings[0].total_memory_bytes
        if total is not None:
            spec.gpu_memory_gib = total / (1 << 30)
    return spec


def beat_to_proto(
    instance_id: str, incarnation: int, sequence: int, observation: Observation, gpus: GpuReport
) -> fleet.HeartbeatRequest:
    """Return one beat."""
    beat = fleet.HeartbeatRequest(
        instance_id=instance_id,
        incarnation=incarnation,
        sequence=sequence,
        agent_time=timestamp(time.time()),
        engine_condition=fleet.EngineCondition.ValueType(observation.condition.value),
        condition_reason=observation.reason[:_MAX_REASON_LENGTH],
        gpus=[reading_to_proto(reading) for reading in gpus.readings],
        gpu_absent_reason=gpus.absent_reason[:_MAX_REASON_LENGTH],
    )
    if observation.gauges is not None:
        beat.engine.CopyFrom(gauges_to_proto(observation.gauges))
    while beat.ByteSize() > _MAX_BEAT_BYTES and beat.gpus:
        del beat.gpus[len(beat.gpus) // 2 :]
    return beat
