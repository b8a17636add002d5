"""How long after a cancellation an engine still works for the request.

    python -m bench.cancel [--count 200] [--seed 0]

Requests are cancelled in an engine's prefill and in its decode, at random moments; from the call
of CancelRequest on, the simulated engine is asked every 2 ms what it still has. The second
column is how long the call itself took: it answers when the cancellation is certain.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

import aiohttp
import grpc

from bench.processes import control_plane, machine, print_table, simulated_engine, write_json
from bench.token_path import MODEL, register
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import inference_service_pb2_grpc, request_pb2

_POLL_S = 0.002
_LIMIT_S = 10.0


def spec(prompt_tokens: int) -> request_pb2.RequestSpec:
    """Return a request that runs for long."""
    return request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text="word " * prompt_tokens),
        sampling=request_pb2.SamplingParameters(max_tokens=5000, ignore_eos=True),
    )


async def cancel_one(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
    session: aiohttp.ClientSession,
    engine: str,
    phase: str,
    generator: random.Random,
) -> tuple[float, float]:
    """Return the seconds until the engine had dropped a request, and until the call was answered."""
    request = await stub.Submit(pb.SubmitRequest(spec=spec(4000 if phase == "prefill" else 20)))
    request_id = request.request.request_id
    if phase == "decode":
        stream = stub.Stream(pb.StreamRequest(request_id=request_id))
        async for event in stream:
            if event.HasField("chunk"):
                break
        stream.cancel()
    await asyncio.sleep(generator.uniform(0.0, 0.05 if phase == "prefill" else 0.2))
    begin_s = time.perf_counter()
    answered_s = 0.0

    async def call() -> None:
        nonlocal answered_s
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))
        answered_s = time.perf_counter() - begin_s

    calling = asyncio.create_task(call())
    while True:
        async with session.get(f"http://{engine}/sim/requests") as answer:
            body = await answer.text()
        if request_id not in body and calling.done():
            break
        if time.perf_counter() - begin_s > _LIMIT_S:
            raise RuntimeError(f"{request_id} still runs after {_LIMIT_S:g} s")
        await asyncio.sleep(_POLL_S)
    gone_s = time.perf_counter() - begin_s
    await calling
    return gone_s, answered_s


async def measure(arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Cancel requests of every phase."""
    generator = random.Random(arguments.seed)
    found: dict[str, list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated_engine(MODEL, "--ttft-ms", "100", "--inter-token-ms", "20") as engine,
        control_plane("--journal", str(Path(folder) / "journal.db")) as server,
    ):
        await register(server, engine)
        async with grpc.aio.insecure_channel(server.address) as channel, aiohttp.ClientSession() as session:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for phase in ("prefill", "decode"):
                found[phase] = [
                    await cancel_one(stub, session, engine.address, phase, generator)
                    for _ in range(arguments.count)
                ]
    return found


def main() -> int:
    """Measure, and print quantiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="cancellations per phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.count} cancellations per phase")
    found = asyncio.run(measure(arguments))
    rows = []
    for phase, times in found.items():
        row = [phase]
        for index in (0, 1):
            ordered = sorted(each[index] for each in times)
            p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
            row.append(f"{1e3 * p50:.0f} / {1e3 * p99:.0f} / {1e3 * ordered[-1]:.0f}")
        rows.append(tuple(row))
    print_table(("cancelled in", "engine idle, p50 / p99 / max ms", "call answered, ms"), rows)
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
