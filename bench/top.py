"""CPU time of `sagecp top` while it shows a large fleet, under pseudo-terminals of several sizes.

    python -m bench.top [--instances 1000] [--seconds 30] [--size 80x24 --size 200x50]

A real server has the instances, each with eight GPUs and a heartbeat stream that
reports changing figures; the console runs as a process of its own, and what it
writes is read and dropped. Its start is not counted: figures are of the time
after the whole fleet was read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import pty
import random
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.processes import Measured, control_plane, machine, print_side_by_side, write_json
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2

_GPU_COUNT = 8
_GPU_MEMORY_BYTES = 80 << 30
_SETTLE_S = 15.0
_FIRST_SCREEN_BYTES = 2000


def _spec(number: int) -> instance_pb2.InstanceSpec:
    uuids = [f"GPU-{number:05d}-{index}" for index in range(_GPU_COUNT)]
    return instance_pb2.InstanceSpec(
        instance_id=f"gpu-host-{number:05d}",
        engine_url=f"http://127.0.0.1:{10000 + number % 50000}",
        model_name=("llama-3-70b", "qwen-2.5-72b", "mixtral-8x22b")[number % 3],
        host_id=f"host-{number:05d}",
        gpu_count=_GPU_COUNT,
        gpu_name="NVIDIA H100 80GB HBM3",
        max_concurrent_request_count=256,
        gpu_devices=[
            instance_pb2.GpuDevice(
                index=index,
                uuid=uuid,
                name="NVIDIA H100 80GB HBM3",
                pci_bus_id=f"00000000:{index:02X}:00.0",
                numa_node=index // 4,
                total_memory_bytes=_GPU_MEMORY_BYTES,
                links=[
                    instance_pb2.GpuLink(peer_uuid=peer, kind=instance_pb2.GPU_LINK_KIND_NVLINK)
                    for peer in uuids
                    if peer != uuid
                ],
            )
            for index, uuid in enumerate(uuids)
        ],
    )


def _beat(number: int, sequence: int, lease_token: bytes, generator: random.Random) -> pb.HeartbeatRequest:
    """Return a beat whose figures differ from those of the beat before."""
    return pb.HeartbeatRequest(
        instance_id=f"gpu-host-{number:05d}",
        incarnation=1,
        sequence=sequence,
        lease_token=lease_token,
        engine_condition=pb.ENGINE_CONDITION_HEALTHY,
        engine=instance_pb2.EngineGauges(
            running_request_count=generator.randrange(200),
            waiting_request_count=generator.randrange(20),
            key_value_cache_usage=generator.random(),
            generation_token_count=1000 * sequence,
            prompt_token_count=5000 * sequence,
        ),
        gpus=[
            instance_pb2.GpuReading(
                index=index,
                uuid=f"GPU-{number:05d}-{index}",
                name="NVIDIA H100 80GB HBM3",
                utilization=generator.random(),
                used_memory_bytes=generator.randrange(_GPU_MEMORY_BYTES),
                total_memory_bytes=_GPU_MEMORY_BYTES,
                temperature_celsius=generator.uniform(40, 85),
                power_watts=generator.uniform(100, 700),
                power_limit_watts=700,
                sm_clock_mhz=1980,
                nvlink_count=18,
                active_nvlink_count=18,
            )
            for index in range(_GPU_COUNT)
        ],
    )


async def _agent(
    stub: fleet_service_pb2_grpc.FleetServiceAsyncStub,
    number: int,
    interval_s: float,
    starting: asyncio.Semaphore,
    ready: asyncio.Semaphore,
) -> None:
    generator = random.Random(number)
    async with starting:
        registration = await stub.RegisterInstance(
            pb.RegisterInstanceRequest(spec=_spec(number), incarnation=1)
        )
        stream = stub.Heartbeat()
        await stream.write(_beat(number, 1, registration.lease_token, generator))
        await stream.read()
    ready.release()
    sequence = 1
    while True:
        await asyncio.sleep(interval_s * generator.uniform(0.9, 1.1))
        sequence += 1
        await stream.write(_beat(number, sequence, registration.lease_token, generator))
        if await stream.read() is grpc.aio.EOF:
            raise RuntimeError("the server ended a heartbeat stream")


@contextlib.contextmanager
def _console(address: str, columns: int, lines: int, keys: str) -> Iterator[tuple[Measured, list[int]]]:
    """Run `sagecp top` on a pseudo-terminal; yield it and the count of bytes it has written."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sagecp", "top", "--server", address],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True, env=environment,
    )  # fmt: skip
    os.close(follower)
    written = [0]

    def drop_output() -> None:
        # Linux says with an error that nobody writes any more.
        with contextlib.suppress(OSError):
            while data := os.read(leader, 65536):
                written[0] += len(data)

    reader = threading.Thread(target=drop_output, daemon=True)
    reader.start()
    try:
        for key in keys:
            # Once it shows something, so that the keys are taken for keys.
            while written[0] < _FIRST_SCREEN_BYTES and process.poll() is None:
                time.sleep(0.1)
            os.write(leader, key.encode())
        yield Measured(process, address), written
        if process.poll() is not None:
            raise RuntimeError(f"sagecp top ended with {process.returncode}")
        os.write(leader, b"q")
        if (code := process.wait(timeout=10)) != 0:
            raise RuntimeError(f"sagecp top ended with {code}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout=10)
        os.close(leader)


async def _measure(server: Measured, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    channels = [
        grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(10)
    ]
    stubs = [fleet_service_pb2_grpc.FleetServiceStub(channel) for channel in channels]
    starting, ready = asyncio.Semaphore(50), asyncio.Semaphore(0)
    agents = [
        asyncio.create_task(_agent(stubs[number % len(stubs)], number, arguments.interval, starting, ready))
        for number in range(arguments.instances)
    ]
    for _ in agents:
        await ready.acquire()
    await asyncio.sleep(_SETTLE_S)
    alone_cpu_s = server.cpu_s()
    await asyncio.sleep(arguments.seconds)
    alone = (server.cpu_s() - alone_cpu_s) / arguments.seconds * 100
    figures: dict[str, dict[str, float]] = {}
    for size in arguments.size:
        columns, _, lines = size.partition("x")
        with _console(server.address, int(columns), int(lines), arguments.keys) as (console, written):
            await asyncio.sleep(_SETTLE_S)
            start_cpu_s, before = console.cpu_s(), (console.cpu_s(), server.cpu_s(), written[0])
            await asyncio.sleep(arguments.seconds)
            after = (console.cpu_s(), server.cpu_s(), written[0])
            used_s, server_s, byte_count = (b - a for a, b in zip(before, after, strict=True))
            figures[size] = {
                "percent_of_a_core": used_s / arguments.seconds * 100,
                "cpu_s_until_settled": start_cpu_s,
                "resident_mib": console.resident_mib(),
                "terminal_kib_per_s": byte_count / arguments.seconds / 1024,
                "server_percent_of_a_core": server_s / arguments.seconds * 100,
                "server_percent_without_console": alone,
            }
    for agent in agents:
        agent.cancel()
    await asyncio.gather(*agents, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=5.0, help="between heartbeats, seconds")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--size", action="append", help="COLUMNSxLINES; may be repeated")
    parser.add_argument("--keys", default="", help="pressed at the start: ss sorts by load")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.size = arguments.size or ["80x24", "200x50"]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(f"[scheduler]\nlease_duration_s = {5 * arguments.interval:g}\n")
        config.flush()
        with control_plane("--config", config.name) as server:
            figures = asyncio.run(_measure(server, arguments))
    print(
        f"\n{machine()}; {arguments.instances} instances with {_GPU_COUNT} GPUs, a heartbeat per "
        f"{arguments.interval:g} s each, over {arguments.seconds:g} s\n"
    )
    print_side_by_side(figures)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
