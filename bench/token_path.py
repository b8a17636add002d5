"""CPU of the control plane per request and per streamed token.

    python -m bench.token_path [--rounds 5] [--streams 64] [--tokens 128]

Closed loop: every stream asks again as soon as it has its answer. In each round
two lengths (1 token and --tokens) run unpaced and paced; the difference between
them is the price of tokens, the rest is the price of a request. CPU time is the
server process's own, from /proc; wall time would measure the neighbours. A
server that does nothing but send the same messages is measured in turn: the
floor under every gRPC server in Python.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.processes import (
    Measured,
    bare_grpc,
    control_plane,
    machine,
    print_table,
    simulated_engine,
    write_json,
)
from sagecp.v1 import fleet_service_pb2, fleet_service_pb2_grpc, instance_pb2, request_pb2
from sagecp.v1 import inference_service_pb2 as pb

MODEL = "bench"
_GENERATE = "/sagecp.v1.InferenceService/Generate"


@dataclass(frozen=True, slots=True)
class Load:
    """One measured load. ``messages_per_request`` counts everything a stream carried."""

    cpu_us_per_request: float
    messages_per_request: float
    requests_per_second: float


@dataclass(slots=True)
class _Figures:
    """Figures of all rounds: CPU in us of a request and of a token, tokens per message, tokens per second."""

    request: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    per_message: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


async def _stream(call: Any, request: bytes, deadline_s: float, counts: list[int]) -> None:  # noqa: ANN401
    while time.monotonic() < deadline_s:
        last = b""
        async for message in call(request):
            counts[1] += 1
            last = message
        if pb.GenerateResponse.FromString(last).terminal.state != request_pb2.REQUEST_STATE_SUCCEEDED:
            raise RuntimeError("a request did not succeed")
        counts[0] += 1


async def load(server: Measured, streams: int, tokens: int, seconds: float) -> Load:
    """Have streams ask again and again for a time, and return what that cost the server."""
    request = pb.GenerateRequest(
        spec=request_pb2.RequestSpec(
            model=MODEL,
            prompt=request_pb2.Prompt(text="measure me"),
            sampling=request_pb2.SamplingParameters(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
    ).SerializeToString()
    async with grpc.aio.insecure_channel(server.address) as channel:
        # Bytes in and out: the load generator must not be the limit.
        call: Any = channel.unary_stream(_GENERATE)
        warm = [0, 0]
        await asyncio.gather(*(_stream(call, request, time.monotonic() + 0.5, warm) for _ in range(streams)))
        counts = [0, 0]
        cpu_s, started_s = server.cpu_s(), time.monotonic()
        await asyncio.gather(*(_stream(call, request, started_s + seconds, counts) for _ in range(streams)))
        cpu_s, wall_s = server.cpu_s() - cpu_s, time.monotonic() - started_s
    return Load(cpu_s / counts[0] * 1e6, counts[1] / counts[0], counts[0] / wall_s)


async def register(server: Measured, engine: Measured) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = fleet_service_pb2_grpc.FleetServiceStub(channel)
        await stub.RegisterInstance(
            fleet_service_pb2.RegisterInstanceRequest(
                spec=instance_pb2.InstanceSpec(
                    instance_id="bench-engine",
                    engine_url=f"http://{engine.address}",
                    model_name=MODEL,
                    max_concurrent_request_count=1024,
                )
            ),
            timeout=10,
        )


async def _measure(arguments: argparse.Namespace) -> dict[str, _Figures]:
    figures: dict[str, _Figures] = {}
    pace = ("--ttft-ms", "20", "--inter-token-ms", f"{arguments.pace_ms:g}")
    engines = {
        "unpaced": (("--profile", "instant"), 0.0),
        f"paced {arguments.pace_ms:g} ms": (pace, arguments.pace_ms),
    }
    for name, (flags, pace_ms) in engines.items():
        with (
            simulated_engine(MODEL, *flags) as engine,
            control_plane() as server,
            bare_grpc(pace_ms) as floor,
        ):
            await register(server, engine)
            for _ in range(arguments.rounds):
                await _round(server, arguments, figures.setdefault(f"sagecp, {name}", _Figures()))
                await _round(floor, arguments, figures.setdefault(f"bare gRPC, {name}", _Figures()))
    return figures


async def _round(server: Measured, arguments: argparse.Namespace, figures: _Figures) -> None:
    short = await load(server, arguments.streams, 1, arguments.seconds)
    long = await load(server, arguments.streams, arguments.tokens, arguments.seconds)
    per_token = (long.cpu_us_per_request - short.cpu_us_per_request) / (arguments.tokens - 1)
    figures.token.append(per_token)
    figures.request.append(short.cpu_us_per_request - per_token)
    figures.per_message.append(arguments.tokens / (long.messages_per_request - 2))
    figures.rate.append(long.requests_per_second * arguments.tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each load")
    parser.add_argument("--pace-ms", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = asyncio.run(_measure(arguments))
    print(
        f"\n{machine()}; {arguments.streams} streams x {arguments.tokens} tokens, {arguments.rounds} rounds\n"
    )
    print_table(
        ("server", "CPU us per request", "CPU us per token", "tokens per message", "tokens/s", "token range"),
        [
            (
                name,
                f"{statistics.median(rows.request):.0f}",
                f"{statistics.median(rows.token):.1f}",
                f"{statistics.median(rows.per_message):.2f}",
                f"{statistics.median(rows.rate):.0f}",
                f"{min(rows.token):.1f}-{max(rows.token):.1f}",
            )
            for name, rows in figures.items()
        ],
    )
    write_json(arguments.json, {name: asdict(rows) for name, rows in figures.items()})


if __name__ == "__main__":
    main()
