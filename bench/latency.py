"""Latency that the control plane adds to an engine.

    python -m bench.latency [--seconds 60] [--rate 10] [--tokens 32]

Requests arrive at a steady rate and go, in turn, straight to the simulated
engine and through the control plane, so that both see the same machine. Both
times run from the first byte sent to the first token decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import grpc

from bench.processes import control_plane, machine, print_table, simulated_engine, write_json
from bench.token_path import MODEL, register
from sagecp.runtime.engines.base import EngineApi, EngineCall, EngineEndpoint, EngineTimeouts
from sagecp.runtime.engines.vllm import VllmEngineClient
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import inference_service_pb2_grpc, request_pb2


class _Clock:
    """Notes when the first and the last piece of output came."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.first_s = 0.0
        self.last_s = 0.0

    def on_prompt(self, token_ids: object) -> None:
        """Ignore it."""

    def on_deltas(self, deltas: object) -> None:
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s


async def _direct(client: VllmEngineClient, body: bytes, number: int) -> _Clock:
    clock = _Clock()
    await client.generate(
        EngineCall(EngineApi.COMPLETIONS, body, f"direct-{number}"), clock, EngineTimeouts()
    )
    return clock


async def _through(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub, spec: request_pb2.RequestSpec
) -> _Clock:
    clock = _Clock()
    async for message in stub.Generate(pb.GenerateRequest(spec=spec)):
        if message.WhichOneof("event") == "chunk":
            clock.on_deltas(message)
    return clock


async def _measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    prompt = "measure me"
    body = (
        f'{{"model":"{MODEL}","prompt":"{prompt}","max_tokens":{arguments.tokens},"temperature":0,'
        '"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true},"return_token_ids":true}'
    ).encode()
    spec = request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text=prompt),
        sampling=request_pb2.SamplingParameters(
            max_tokens=arguments.tokens, temperature=0.0, ignore_eos=True
        ),
    )
    engine_flags = ("--ttft-ms", "20", "--inter-token-ms", "10")
    results: dict[str, list[_Clock]] = {"direct": [], "sagecp": []}
    with simulated_engine(MODEL, *engine_flags) as engine, control_plane() as server:
        await register(server, engine)
        client = VllmEngineClient(EngineEndpoint(f"http://{engine.address}"))
        async with grpc.aio.insecure_channel(server.address) as channel, asyncio.TaskGroup() as group:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for warm in range(10):
                await _direct(client, body, warm)
                await _through(stub, spec)
            total = int(arguments.seconds * arguments.rate)
            started_s = time.monotonic()
            tasks: dict[str, list[asyncio.Task[_Clock]]] = {"direct": [], "sagecp": []}
            for number in range(total):
                await asyncio.sleep(max(0.0, started_s + number / arguments.rate - time.monotonic()))
                tasks["direct"].append(group.create_task(_direct(client, body, number)))
                await asyncio.sleep(0.5 / arguments.rate)
                tasks["sagecp"].append(group.create_task(_through(stub, spec)))
        await client.close()
        results = {name: [task.result() for task in group_tasks] for name, group_tasks in tasks.items()}
    return {
        name: {
            "ttft_ms": [(c.first_s - c.started_s) * 1000 for c in clocks],
            "total_ms": [(c.last_s - c.started_s) * 1000 for c in clocks],
        }
        for name, clocks in results.items()
    }


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[int(share * 1000) - 1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second, each way")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = asyncio.run(_measure(arguments))
    count = len(figures["direct"]["ttft_ms"])
    print(f"\n{machine()}; {count} requests each way at {arguments.rate:g}/s of {arguments.tokens} tokens\n")
    rows = []
    for metric in ("ttft_ms", "total_ms"):
        for share in (0.5, 0.95, 0.99):
            direct = _quantile(figures["direct"][metric], share)
            through = _quantile(figures["sagecp"][metric], share)
            rows.append(
                (f"{metric} p{share * 100:g}", f"{direct:.2f}", f"{through:.2f}", f"{through - direct:+.2f}")
            )
    print_table(("", "direct", "through sagecp", "added ms"), rows)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
