"""Time of `GetMetrics` on the server, and what it costs to record a request that ended.

    python -m bench.get_metrics [--instances 1000] [--samples 100000] [--rounds 20]

A control plane without sockets holds instances with eight GPUs each and the
samples of five minutes; the servicer's method is called as gRPC calls it, and
its answer is serialized as gRPC does. Before every call some requests have
ended, as it always is under load. CPU time is the figure to go by: the other
times also measure what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.duration_pb2 import Duration

from bench.processes import machine, print_table, write_json
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.gpu import GpuReading
from sagecp.core.types import ExecutionInstance, RequestPriority, RequestState
from sagecp.rpc.servicers.admin import AdminServicer
from sagecp.runtime.event_loop import run
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.monitor import EndedSample, Monitor
from sagecp.runtime.monitor_keys import MetricsKey
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.v1 import metrics_pb2, request_pb2

_WINDOW_S = 300.0
_GPU_COUNT = 8
_MODEL_COUNT = 4
_PRIORITIES = (RequestPriority.HIGH, RequestPriority.NORMAL, RequestPriority.LOW)


def _samples(count: int, instances: int, tenants: int, span_s: float, end_s: float) -> list[EndedSample]:
    draw = np.random.default_rng(1)
    times_s = np.sort(end_s - span_s * draw.random(count))
    ttfts_s = draw.lognormal(-1.5, 0.7, count)
    tpots_s = draw.lognormal(-4.0, 0.4, count)
    waits_s = draw.exponential(0.05, count)
    tokens = draw.integers(2, 600, count)
    numbers = draw.integers(0, instances, count)
    owners = draw.integers(0, tenants, count)
    found = []
    for place in range(count):
        ttft_s, tpot_s = float(ttfts_s[place]), float(tpots_s[place])
        key = MetricsKey(
            f"model-{numbers[place] % _MODEL_COUNT}",
            f"instance-{numbers[place]:05d}",
            f"tenant-{owners[place]}",
            _PRIORITIES[owners[place] % len(_PRIORITIES)],
        )
        found.append(
            EndedSample(
                float(times_s[place]),
                key,
                RequestState.FAILED if place % 100 == 0 else RequestState.SUCCEEDED,
                ttft_s + tpot_s * int(tokens[place]),
                ttft_s,
                tpot_s,
                float(waits_s[place]),
                int(tokens[place]),
                None if place % 3 == 0 else ttft_s < 1.0,
            )
        )
    return found


def _manager(instances: int) -> ControlPlaneManager:
    manager = ControlPlaneManager(scheduler=SchedulerConfig(max_instance_count=max(10_000, instances)))
    now = time.monotonic()
    gpus = tuple(
        GpuReading(index=index, utilization=0.8, used_memory_bytes=70 << 30, total_memory_bytes=80 << 30)
        for index in range(_GPU_COUNT)
    )
    for number in range(instances):
        spec = ExecutionInstance(
            instance_id=f"instance-{number:05d}",
            host="10.0.0.1",
            port=8000,
            model_name=f"model-{number % _MODEL_COUNT}",
        )
        manager.scheduler.handle(ev.InstanceRegistered(spec, 1), now)
        manager.scheduler.fleet.get(spec.instance_id).gpus = gpus
    return manager


_GROUPS = {
    "overall": metrics_pb2.METRICS_DIMENSION_UNSPECIFIED,
    "by model": metrics_pb2.METRICS_DIMENSION_MODEL,
    "by tenant": metrics_pb2.METRICS_DIMENSION_TENANT,
    "by instance": metrics_pb2.METRICS_DIMENSION_INSTANCE,
}


async def _time_calls(manager: ControlPlaneManager, spare: list[EndedSample], rounds: int) -> dict[str, Any]:
    servicer = AdminServicer(manager)
    figures: dict[str, Any] = {}
    for window_s in (60, 300, 3600):
        for name, dimension in _GROUPS.items():
            request = pb.GetMetricsRequest(window=Duration(seconds=window_s), group_by=dimension)
            await _call(servicer, request)
            figures[f"{window_s} s, {name}"] = await _time_call(servicer, request, manager, spare, rounds)
    request = pb.GetMetricsRequest(priority=request_pb2.REQUEST_PRIORITY_HIGH, model="model-1")
    figures["300 s, one model and class"] = await _time_call(servicer, request, manager, spare, rounds)
    return figures


async def _call(servicer: AdminServicer, request: pb.GetMetricsRequest) -> tuple[float, float, int, int]:
    started_s, cpu_s = time.perf_counter(), time.thread_time()
    # It asks nothing of its call.
    response = await servicer.GetMetrics(request, cast("Any", None))
    size_bytes = len(response.SerializeToString())
    cpu_s = time.thread_time() - cpu_s
    return (time.perf_counter() - started_s) * 1000, cpu_s * 1000, len(response.snapshot.groups), size_bytes


async def _time_call(
    servicer: AdminServicer,
    request: pb.GetMetricsRequest,
    manager: ControlPlaneManager,
    spare: list[EndedSample],
    rounds: int,
) -> dict[str, float]:
    times_ms, cpus_ms = [], []
    for _ in range(rounds):
        # As under load: something has always ended since the last time.
        for sample in spare[:20]:
            manager.monitor.record(sample._replace(end_s=time.monotonic()))
        elapsed_ms, cpu_ms, groups, size_bytes = await _call(servicer, request)
        times_ms.append(elapsed_ms)
        cpus_ms.append(cpu_ms)
    return {
        "groups": groups,
        "bytes": size_bytes,
        "least_cpu_ms": min(cpus_ms),
        "cpu_ms": statistics.median(cpus_ms),
        "median_ms": statistics.median(times_ms),
        "worst_ms": max(times_ms),
    }


def _time_records(samples: list[EndedSample], rounds: int) -> dict[str, float]:
    figures = {}
    for name, enabled in (("on", True), ("off", False)):
        times_us = []
        for _ in range(rounds):
            monitor = Monitor(enabled=enabled)
            started_s = time.process_time()
            for sample in samples:
                monitor.record(sample)
            times_us.append((time.process_time() - started_s) / len(samples) * 1e6)
        figures[name] = statistics.median(times_us)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100_000, help="of five minutes")
    parser.add_argument("--tenants", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    manager = _manager(arguments.instances)
    now = time.monotonic()
    samples = _samples(arguments.samples, arguments.instances, arguments.tenants, _WINDOW_S, now)
    for sample in samples:
        manager.monitor.record(sample)
    # As the server runs: with its own event loop and garbage collector.
    calls = run(_time_calls(manager, samples, arguments.rounds))
    records = _time_records(samples, max(1, arguments.rounds // 4))
    print(
        f"\n{machine()}; {arguments.instances} instances with {_GPU_COUNT} GPUs each, "
        f"{arguments.samples} samples in {_WINDOW_S:g} s of {arguments.tenants} tenants; "
        f"sketches take {manager.monitor.table_bytes / (1 << 20):.1f} MiB\n"
    )
    print_table(
        ("window and groups", "groups", "bytes", "CPU ms, least", "median", "ms, median", "worst"),
        [
            (
                name,
                f"{each['groups']}",
                f"{each['bytes']}",
                f"{each['least_cpu_ms']:.2f}",
                f"{each['cpu_ms']:.2f}",
                f"{each['median_ms']:.2f}",
                f"{each['worst_ms']:.2f}",
            )
            for name, each in calls.items()
        ],
    )
    print(
        f"\nto record an ended request: {records['on']:.2f} us of CPU; "
        f"{records['off']:.2f} us with monitoring off"
    )
    write_json(arguments.json, {"calls": calls, "record_us": records})


if __name__ == "__main__":
    main()
