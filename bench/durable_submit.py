"""What it costs to accept a request for certain: Submit over gRPC, with a journal, without, and bare.

    python -m bench.durable_submit [--seconds 10] [--rounds 3] [--callers 64] [--prompt-bytes 2048]

Each round starts a control plane with a journal on the disk and one without, both
with an instance whose engine never answers, so that every request waits, and a
gRPC server that only answers, which is the most that callers can get here. Callers
submit as fast as they are answered, from a second process; then each control
plane that kept a journal is killed and started again, and must know every
request that it acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.processes import Measured, bare_grpc, control_plane, machine, print_table, write_json
from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)
from sagecp.v1 import (
    inference_service_pb2 as pb,
)

MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Round:
    """What one control plane did."""

    per_second: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    accepted_count: int
    restored_count: int
    ready_s: float


async def register(address: str) -> None:
    """Add an instance whose agent says that its engine is still loading."""
    async with grpc.aio.insecure_channel(address) as channel:
        await fleet_service_pb2_grpc.FleetServiceStub(channel).RegisterInstance(
            fleet_service_pb2.RegisterInstanceRequest(
                spec=instance_pb2.InstanceSpec(
                    instance_id="bench-engine", engine_url="http://127.0.0.1:9", model_name=MODEL
                ),
                incarnation=1,
            ),
            timeout=10,
        )


async def submit_for(address: str, seconds: float, callers: int, prompt_bytes: int) -> list[float]:
    """Submit as fast as answers come; return the seconds that each took."""
    took: list[float] = []
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(4)]
    stubs = [inference_service_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    end_s = time.perf_counter() + seconds
    spec = request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text="x" * prompt_bytes),
        sampling=request_pb2.SamplingParameters(max_tokens=100),
    )

    async def caller(number: int) -> None:
        submit = stubs[number % len(stubs)].Submit
        request = pb.SubmitRequest(spec=spec)
        while (begin_s := time.perf_counter()) < end_s:
            await submit(request)
            took.append(time.perf_counter() - begin_s)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    for channel in channels:
        await channel.close()
    return took


async def queued_count(address: str) -> int:
    """Return how many requests wait, once the control plane says so."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        response = await stub.GetStatus(admin_service_pb2.GetStatusRequest(), timeout=60, wait_for_ready=True)
        return sum(response.queued_count_by_model.values())


def measure(arguments: argparse.Namespace, journal: Path | None) -> Round:
    """Run one control plane; with a journal, kill it and start it again."""
    flags = ["--max-queue", "10000000"]
    if journal is not None:
        flags += ["--journal", str(journal)]
    with control_plane(*flags) as server:
        asyncio.run(register(server.address))
        took, cpu_us = _from_another_process(server, arguments)
        if journal is not None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
    restored, ready_s = 0, 0.0
    if journal is not None:
        begin_s = time.perf_counter()
        with control_plane(*flags) as server:
            restored = asyncio.run(queued_count(server.address))
            ready_s = time.perf_counter() - begin_s
        assert restored >= len(took), f"{len(took)} were acknowledged and {restored} are known"
    return _round(took, arguments.seconds, cpu_us, restored, ready_s)


def measure_bare(arguments: argparse.Namespace) -> Round:
    """Run a server that only answers."""
    with bare_grpc(0.0) as server:
        took, cpu_us = _from_another_process(server, arguments)
    return _round(took, arguments.seconds, cpu_us)


def _round(
    took: list[float], seconds: float, cpu_us: float, restored: int = 0, ready_s: float = 0.0
) -> Round:
    took.sort()
    return Round(
        len(took) / seconds,
        1e3 * took[len(took) // 2],
        1e3 * took[len(took) * 99 // 100],
        cpu_us,
        len(took),
        restored,
        ready_s,
    )


def _from_another_process(server: Measured, arguments: argparse.Namespace) -> tuple[list[float], float]:
    before_s = server.cpu_s()
    answer = subprocess.run(
        [
            sys.executable, "-m", "bench.durable_submit", "--submit-to", server.address,
            "--seconds", str(arguments.seconds), "--callers", str(arguments.callers),
            "--prompt-bytes", str(arguments.prompt_bytes),
        ],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    took: list[float] = json.loads(answer.stdout)
    return took, 1e6 * (server.cpu_s() - before_s) / max(1, len(took))


def main() -> int:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--prompt-bytes", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--submit-to", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.submit_to:
        took = asyncio.run(
            submit_for(arguments.submit_to, arguments.seconds, arguments.callers, arguments.prompt_bytes)
        )
        json.dump(took, sys.stdout)
        return 0
    print(f"{machine()}; {arguments.callers} callers, {arguments.prompt_bytes} bytes of prompt")
    rounds: dict[str, list[Round]] = {"journal": [], "no journal": [], "bare gRPC": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds["journal"].append(measure(arguments, Path(folder) / "journal.db"))
        rounds["no journal"].append(measure(arguments, None))
        rounds["bare gRPC"].append(measure_bare(arguments))
    rows = []
    for name, found in rounds.items():

        def middle(field: str, found: list[Round] = found) -> float:
            return float(statistics.median(getattr(each, field) for each in found))

        rows.append(
            (
                name,
                f"{middle('per_second'):,.0f}",
                f"{middle('p50_ms'):.1f}",
                f"{middle('p99_ms'):.1f}",
                f"{middle('server_cpu_us'):.0f}",
                f"{middle('restored_count'):,.0f} in {middle('ready_s'):.1f} s" if name == "journal" else "",
            )
        )
    print_table(("", "Submit/s", "p50 ms", "p99 ms", "server CPU us", "restored after kill -9"), rows)
    write_json(arguments.json, {name: [repr(each) for each in found] for name, found in rounds.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
