"""Memory and CPU of the control plane under many idle heartbeat streams.

    python -m bench.heartbeats [--streams 10000] [--interval 5] [--connections 100]

Every stream is one instance that registers, opens a bidirectional stream and
sends a beat per interval, each acknowledged. The streams share --connections
connections; give --connections equal to --streams for an agent per connection.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import grpc

from bench.processes import Measured, control_plane, machine, print_table, write_json
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2


async def _agent(
    stub: fleet_service_pb2_grpc.FleetServiceAsyncStub,
    number: int,
    interval_s: float,
    started: asyncio.Semaphore,
    acknowledged: list[float],
    stop: asyncio.Event,
) -> None:
    instance_id = f"agent-{number:05d}"
    spec = instance_pb2.InstanceSpec(
        instance_id=instance_id, engine_url=f"http://127.0.0.1:{10000 + number % 50000}", model_name="bench"
    )
    async with started:
        await stub.RegisterInstance(pb.RegisterInstanceRequest(spec=spec, incarnation=1))
        stream = stub.Heartbeat()
        beat = pb.HeartbeatRequest(
            instance_id=instance_id,
            incarnation=1,
            engine_condition=pb.ENGINE_CONDITION_HEALTHY,
            engine=instance_pb2.EngineGauges(
                running_request_count=3,
                waiting_request_count=0,
                key_value_cache_usage=0.25,
                generation_token_count=123456,
                prompt_token_count=654321,
            ),
            gpu_absent_reason="no NVML",
        )
        await stream.write(beat)
        await stream.read()
    # Spread over the interval, as agents with jitter are.
    phase_s = (number * 0.6180339887) % 1.0 * interval_s
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), phase_s or interval_s)
            break
        except TimeoutError:
            phase_s = interval_s
        beat.sequence += 1
        sent_s = time.perf_counter()
        await stream.write(beat)
        if await stream.read() is grpc.aio.EOF:
            raise RuntimeError("the server ended a heartbeat stream")
        acknowledged.append(time.perf_counter() - sent_s)
    stream.cancel()


async def _measure(server: Measured, arguments: argparse.Namespace) -> dict[str, float]:
    idle_mib = server.resident_mib()
    channels = [
        grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(arguments.connections)
    ]
    stubs = [fleet_service_pb2_grpc.FleetServiceStub(channel) for channel in channels]
    stop, starting = asyncio.Event(), asyncio.Semaphore(200)
    acknowledged: list[float] = []
    async with asyncio.TaskGroup() as group:
        for number in range(arguments.streams):
            group.create_task(
                _agent(stubs[number % len(stubs)], number, arguments.interval, starting, acknowledged, stop)
            )
        await asyncio.sleep(arguments.streams / 1000 + 2 * arguments.interval)
        acknowledged.clear()
        cpu_s, started_s = server.cpu_s(), time.monotonic()
        await asyncio.sleep(arguments.seconds)
        cpu_s, wall_s = server.cpu_s() - cpu_s, time.monotonic() - started_s
        beats = len(acknowledged)
        resident_mib = server.resident_mib()
        latencies = sorted(acknowledged)
        stop.set()
    for channel in channels:
        await channel.close()
    return {
        "beats_per_second": beats / wall_s,
        "cpu_cores": cpu_s / wall_s,
        "cpu_us_per_beat": cpu_s / max(1, beats) * 1e6,
        "resident_mib": resident_mib,
        "idle_mib": idle_mib,
        "ack_p50_ms": statistics.median(latencies) * 1000,
        "ack_p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--interval", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Leases must outlive the interval: the default of 6 s is made for beats every second.
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(f"[scheduler]\nlease_duration_s = {3 * arguments.interval:g}\n")
        config.flush()
        with control_plane("--config", config.name) as server:
            figures = asyncio.run(_measure(server, arguments))
    print(
        f"\n{machine()}; {arguments.streams} streams on {arguments.connections} connections, "
        f"one beat per {arguments.interval:g} s each, over {arguments.seconds:g} s\n"
    )
    print_table(("figure", "value"), [(name, f"{value:.2f}") for name, value in figures.items()])
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
