"""What a scrape of a large fleet costs, and how long it keeps the event loop from other work.

    python -m bench.scrape [--instances 1000] [--gpus 8] [--queued 10000] [--rounds 10]

Another task notes how long the event loop is busy between two of its turns while the
metrics are written: that is the time for which tokens would have waited. It is CPU time,
so that what else the machine does is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import statistics
import time
from pathlib import Path

from bench.processes import machine, print_table, write_json
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.engine_state import EngineGauges
from sagecp.core.gpu import GpuReading
from sagecp.core.types import EngineCondition, ExecutionInstance, RequestMetadata
from sagecp.rpc.telemetry.exporter import MetricsExporter
from sagecp.runtime.event_loop import run
from sagecp.runtime.manager import ControlPlaneManager


def _gpu(instance: int, index: int) -> GpuReading:
    return GpuReading(
        index=index,
        uuid=f"GPU-{instance:08x}-{index:04x}",
        name="NVIDIA H100 80GB HBM3",
        utilization=0.91,
        used_memory_bytes=70 << 30,
        total_memory_bytes=80 << 30,
        temperature_celsius=61.0,
        memory_temperature_celsius=70.0,
        power_watts=512.3,
        power_limit_watts=700.0,
        sm_clock_mhz=1980,
        throttle_reasons=("SwPowerCap",),
        uncorrected_ecc_error_count=0,
        corrected_ecc_error_count=1,
        row_remap_pending=False,
        row_remap_failed=False,
        nvlink_count=18,
        active_nvlink_count=18,
        nvlink_error_count=0,
        engine_memory_bytes=69 << 30,
        foreign_process_count=0,
    )


def _fill(manager: ControlPlaneManager, arguments: argparse.Namespace) -> None:
    gauges = EngineGauges(
        running_request_count=3,
        waiting_request_count=0,
        key_value_cache_usage=0.53123,
        prefix_cache_query_token_count=11_231_123,
        prefix_cache_hit_token_count=31_123,
        prompt_token_count=12_312_312,
        generation_token_count=12_312_123,
        preemption_count=1,
        sleeping=False,
    )
    for number in range(arguments.instances):
        instance_id = f"vllm-{number:05d}"
        manager.register_instance(
            ExecutionInstance(
                instance_id=instance_id,
                host="10.0.0.1",
                port=8000,
                model_name="llama",
                gpu_count=arguments.gpus,
            ),
            incarnation=1,
        )
        manager.heartbeat(
            ev.HeartbeatReceived(
                instance_id,
                1,
                EngineCondition.HEALTHY,
                gauges=gauges,
                gpus=tuple(_gpu(number, index) for index in range(arguments.gpus)),
            )
        )


async def _queue(manager: ControlPlaneManager, count: int) -> None:
    manager.register_instance(
        ExecutionInstance(instance_id="starting", host="10.0.0.1", port=8000, model_name="later"),
        incarnation=1,
    )
    for number in range(count):
        await manager.submit_request(
            RequestMetadata(request_id=f"r{number}", prompt="hello", model_name="later")
        )


async def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    # Leases do not end while it is measured.
    manager = ControlPlaneManager(
        scheduler=SchedulerConfig(
            lease_duration_s=3600.0, max_queued_request_count=max(1, 2 * arguments.queued)
        )
    )
    await manager.start()
    busy_s: list[float] = []

    async def watch() -> None:
        while True:
            before_s = time.thread_time()
            await asyncio.sleep(0)
            busy_s.append(time.thread_time() - before_s)

    exporter = MetricsExporter(manager)
    rows: list[tuple[float, float, float]] = []
    try:
        _fill(manager, arguments)
        await _queue(manager, arguments.queued)
        watching = asyncio.create_task(watch())
        for _ in range(arguments.rounds):
            busy_s.clear()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            text = await exporter.render()
            rows.append((time.perf_counter() - wall_s, time.process_time() - cpu_s, max(busy_s)))
        watching.cancel()
    finally:
        await manager.stop()
    walls, cpus, turns = zip(*rows, strict=True)
    return {
        "series": float(sum(not line.startswith(b"#") for line in text.splitlines())),
        "size_mb": len(text) / 1e6,
        "compressed_mb": len(gzip.compress(text, 1)) / 1e6,
        "cpu_ms": statistics.median(cpus) * 1e3,
        "wall_ms": statistics.median(walls) * 1e3,
        "longest_turn_ms": statistics.median(turns) * 1e3,
        "longest_turn_of_all_ms": max(turns) * 1e3,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=8, help="of each instance")
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    found = run(_measure(arguments))
    print(machine())
    print(f"{arguments.instances} instances of {arguments.gpus} GPUs, {arguments.queued} requests waiting")
    print_table(
        ("series", "MB", "gzip MB", "CPU ms", "wall ms", "longest turn ms", "of all rounds"),
        [
            (
                f"{found['series']:,.0f}",
                f"{found['size_mb']:.1f}",
                f"{found['compressed_mb']:.2f}",
                f"{found['cpu_ms']:.0f}",
                f"{found['wall_ms']:.0f}",
                f"{found['longest_turn_ms']:.1f}",
                f"{found['longest_turn_of_all_ms']:.1f}",
            )
        ],
    )
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
