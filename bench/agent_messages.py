"""What agents say: registrations and heartbeats of a busy fleet, made once and sent as bytes.

A message in bytes behind another one of its kind replaces what it sets: a beat is its
body, which is prepared, and its number and time behind it.
"""

from __future__ import annotations

import itertools
import random
import time

from google.protobuf.timestamp_pb2 import Timestamp

from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2, metrics_pb2, parallelism_pb2

INCARNATION = 1_764_000_000_000_000
GPU_NAME = "NVIDIA H100 80GB HBM3"
GPU_BYTES = 80 << 30
MODEL = "meta-llama/Llama-3.3-70B-Instruct"


def instance_id(number: int) -> str:
    """Return the name of an instance."""
    return f"vllm-{number:05d}"


def _uuid(number: int, index: int) -> str:
    return f"GPU-{number:08x}-5be0-4a6f-9d1c-{index:012x}"


def registration(number: int, gpu_count: int) -> pb.RegisterInstanceRequest:
    """Return what an agent registers, its GPUs and the ways between them with it."""
    devices = [
        instance_pb2.GpuDevice(
            index=index,
            uuid=_uuid(number, index),
            name=GPU_NAME,
            pci_bus_id=f"00000000:{0x17 + 16 * index:02X}:00.0",
            numa_node=index // 4,
            total_memory_bytes=GPU_BYTES,
            max_sm_clock_mhz=1980,
            slowdown_temperature_celsius=90.0,
            links=[
                instance_pb2.GpuLink(peer_uuid=_uuid(number, peer), kind=instance_pb2.GPU_LINK_KIND_NVLINK)
                for peer in range(gpu_count)
                if peer != index
            ],
        )
        for index in range(gpu_count)
    ]
    spec = instance_pb2.InstanceSpec(
        instance_id=instance_id(number),
        engine_url=f"http://127.0.0.1:{10_000 + number % 50_000}",
        model_name=MODEL,
        parallel_sizes=parallelism_pb2.ParallelSizes(
            tensor_parallel_size=max(1, gpu_count),
            pipeline_parallel_size=1,
            data_parallel_size=1,
            expert_parallel_size=1,
        ),
        gpu_count=gpu_count,
        gpu_memory_gib=80.0 if gpu_count else None,
        gpu_name=GPU_NAME if gpu_count else "",
        gpu_devices=devices,
        max_context_token_count=131_072,
        key_value_token_capacity=1_200_000,
        max_concurrent_request_count=256,
        engine_version="0.11.0",
        host_id=f"host-{number:05d}",
        engine_configuration={"block_size": "16", "quantization": "fp8", "kv_cache_dtype": "auto"},
        engine_capabilities=[instance_pb2.ENGINE_CAPABILITY_SLEEP, instance_pb2.ENGINE_CAPABILITY_LORA],
    )
    return pb.RegisterInstanceRequest(spec=spec, incarnation=INCARNATION, agent_version="1.0.0")


def bodies(number: int, gpu_count: int, lease_token: bytes, count: int) -> list[bytes]:
    """Return bodies of beats to be sent in turn: from one to the next, all figures of a busy host change."""
    draw = random.Random(number)
    return [_body(number, gpu_count, lease_token, step, draw).SerializeToString() for step in range(count)]


def _body(
    number: int, gpu_count: int, lease_token: bytes, step: int, draw: random.Random
) -> pb.HeartbeatRequest:
    def quantiles(mean_s: float) -> metrics_pb2.DurationQuantiles:
        mean_s *= draw.uniform(0.8, 1.2)
        return metrics_pb2.DurationQuantiles(
            sample_count=draw.randint(100, 900),
            mean_s=mean_s,
            p50_s=0.8 * mean_s,
            p95_s=2.5 * mean_s,
            p99_s=4.0 * mean_s,
        )

    # Counters that went back would be a restart of the engine; bodies are sent in a circle.
    produced = 5_000_000_000
    return pb.HeartbeatRequest(
        instance_id=instance_id(number),
        incarnation=INCARNATION,
        engine_condition=pb.ENGINE_CONDITION_HEALTHY,
        engine=instance_pb2.EngineGauges(
            running_request_count=draw.randint(20, 60),
            waiting_request_count=0,
            key_value_cache_usage=draw.uniform(0.3, 0.8),
            max_key_value_cache_usage=draw.uniform(0.3, 0.8),
            prefix_cache_query_token_count=produced + draw.randint(0, 1_000_000),
            prefix_cache_hit_token_count=produced // 2 + draw.randint(0, 1_000_000),
            prompt_token_count=produced,
            generation_token_count=produced + draw.randint(0, 1_000_000),
            preemption_count=3,
            finished_request_count=1_000_000 + step,
            sleeping=False,
            ttft=quantiles(0.2),
            inter_token_latency=quantiles(0.02),
            queue_wait=quantiles(0.01),
        ),
        gpus=[_reading(number, index, draw) for index in range(gpu_count)],
        gpu_absent_reason="" if gpu_count else "NVML is not there",
        lease_token=lease_token,
    )


def _reading(number: int, index: int, draw: random.Random) -> instance_pb2.GpuReading:
    return instance_pb2.GpuReading(
        index=index,
        uuid=_uuid(number, index),
        name=GPU_NAME,
        utilization=draw.randint(60, 100) / 100,
        memory_utilization=draw.randint(20, 60) / 100,
        used_memory_bytes=GPU_BYTES - draw.randint(2 << 30, 8 << 30),
        total_memory_bytes=GPU_BYTES,
        engine_memory_bytes=GPU_BYTES - draw.randint(8 << 30, 12 << 30),
        foreign_process_count=0,
        temperature_celsius=float(draw.randint(50, 75)),
        memory_temperature_celsius=float(draw.randint(60, 85)),
        power_watts=draw.randint(300_000, 690_000) / 1000,
        power_limit_watts=700.0,
        sm_clock_mhz=draw.randint(1400, 1980),
        memory_clock_mhz=2619,
        throttle_reasons=["SwPowerCap"] if draw.random() < 0.25 else [],
        uncorrected_ecc_error_count=0,
        corrected_ecc_error_count=draw.randint(0, 3),
        row_remap_pending=False,
        row_remap_failed=False,
        nvlink_count=18,
        active_nvlink_count=18,
        nvlink_error_count=0,
    )


class BeatSource:
    """The beats of one instance, as bytes.

    Args:
        number: Of the instance.
        gpu_count: GPUs that it reports.
        lease_token: What its registration returned.
        body_count: Different bodies, which are sent in turn.
    """

    __slots__ = ("_bodies", "_sequence")

    def __init__(self, number: int, gpu_count: int, lease_token: bytes, body_count: int = 3) -> None:
        self._bodies = itertools.cycle(bodies(number, gpu_count, lease_token, body_count))
        self._sequence = 0

    def next(self) -> bytes:
        """Return the next beat."""
        self._sequence += 1
        now_ns = time.time_ns()
        stamp = Timestamp(seconds=now_ns // 1_000_000_000, nanos=now_ns % 1_000_000_000)
        end = pb.HeartbeatRequest(sequence=self._sequence, agent_time=stamp)
        return next(self._bodies) + end.SerializeToString()
