"""Memory of the control plane with very many streams whose readers are slow, or do not read at all.

    python -m bench.slow_readers [--streams 10000] [--pause-s 10] [--unread]

Every stream is a request of its own on one of two simulated engines, each
token arrives by itself, and readers take one message per pause through flow
control windows so small that the server's writes wait for them. With
``--unread`` nobody reads on after the first message: streams are detached after
the stall timeout (and end as UNAVAILABLE once somebody reads what is left of
them), and requests, which are detached from their streams, run on. Resident
memory is the server process's own, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.processes import Measured, control_plane, machine, print_table, simulated_engine, write_json
from bench.token_path import MODEL
from sagecp.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)
from sagecp.v1 import inference_service_pb2 as pb

STREAMS_PER_CONNECTION = 500
# Of each stream, and without growth: about ten tokens fit, and then the server's writes wait.
WINDOW_BYTES = 512
# After an unread run, for what is left of the streams.
_LAST_READ_S = 10.0
TOKEN_GAP_MS = 1000
ENGINE_COUNT = 2
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one time.

    Attributes:
        at_s: Since the streams were opened.
        resident_mib: Its memory.
        cpu_s: CPU it used so far.
        open_count: Streams that have not ended.
    """

    at_s: float
    resident_mib: float
    cpu_s: float
    open_count: int


@dataclass(slots=True)
class Reading:
    """What the readers saw.

    Attributes:
        go_on: Set: those that did not read shall read what there is.
    """

    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    message_count: int = 0
    token_count: int = 0
    open_count: int = 0


async def register(server: Measured, engines: Sequence[Measured], limit: int) -> None:
    """Let the server know its engines."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = fleet_service_pb2_grpc.FleetServiceStub(channel)
        for number, engine in enumerate(engines):
            await stub.RegisterInstance(
                fleet_service_pb2.RegisterInstanceRequest(
                    spec=instance_pb2.InstanceSpec(
                        instance_id=f"engine-{number}",
                        engine_url=f"http://{engine.address}",
                        model_name=MODEL,
                        max_concurrent_request_count=limit,
                    )
                ),
                timeout=10,
            )


async def _read(stub: Any, pause_s: float | None, tokens: int, seen: Reading) -> str:  # noqa: ANN401
    """Read one stream slowly, or not at all for the time being; return how it ended."""
    spec = request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text="measure me"),
        sampling=request_pb2.SamplingParameters(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )
    call = stub.Generate(pb.GenerateRequest(spec=spec, detach_on_disconnect=True))
    seen.open_count += 1
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            seen.message_count += 1
            seen.token_count += message.chunk.token_count
            if pause_s is None:
                await seen.go_on.wait()
            else:
                await asyncio.sleep(pause_s)
        code = await call.code()
    except grpc.aio.AioRpcError as error:
        code = error.code()
    finally:
        seen.open_count -= 1
    return str(code.name)


async def _measure(server: Measured, arguments: argparse.Namespace) -> tuple[list[Sample], Counter[str]]:
    seen = Reading()
    samples = [Sample(0.0, server.resident_mib(), server.cpu_s(), 0)]
    pause_s = None if arguments.unread else arguments.pause_s
    async with contextlib.AsyncExitStack() as stack:
        stubs = []
        for _ in range(-(-arguments.streams // STREAMS_PER_CONNECTION)):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(server.address, options=_CHANNEL_OPTIONS)
            )
            stubs.append(inference_service_pb2_grpc.InferenceServiceStub(channel))
        begin_s = time.monotonic()
        tasks = []
        for number in range(arguments.streams):
            tasks.append(
                asyncio.create_task(_read(stubs[number % len(stubs)], pause_s, arguments.tokens, seen))
            )
            if number % 50 == 49:
                # Opened at a steady pace, as many clients would.
                await asyncio.sleep(50 / arguments.opened_per_s)
        opened_s = time.monotonic() - begin_s
        print(f"{arguments.streams} streams opened in {opened_s:.1f} s", flush=True)
        while (passed_s := time.monotonic() - begin_s) < opened_s + arguments.seconds:
            await asyncio.sleep(5.0)
            samples.append(Sample(passed_s, server.resident_mib(), server.cpu_s(), seen.open_count))
            sample = samples[-1]
            print(
                f"{sample.at_s:6.1f} s: {sample.resident_mib:7.1f} MiB, {sample.cpu_s:6.1f} s of CPU, "
                f"{seen.message_count} messages and {seen.token_count} tokens read",
                flush=True,
            )
        if arguments.unread:
            seen.go_on.set()
            await asyncio.wait(tasks, timeout=_LAST_READ_S)
        outcomes: Counter[str] = Counter()
        for task in tasks:
            if task.done():
                outcomes[task.result()] += 1
            else:
                outcomes["open"] += 1
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return samples, outcomes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1_000, help="most tokens of a request")
    parser.add_argument("--pause-s", type=float, default=10.0, help="between two messages of a reader")
    parser.add_argument("--unread", action="store_true", help="read the first message and then nothing")
    parser.add_argument("--opened-per-s", type=float, default=400.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long after the last was opened")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    per_engine = -(-arguments.streams // ENGINE_COUNT)
    flags = ("--ttft-ms", "50", "--inter-token-ms", str(TOKEN_GAP_MS), "--max-num-seqs", str(per_engine))
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(simulated_engine(MODEL, *flags)) for _ in range(ENGINE_COUNT)]
        server = stack.enter_context(control_plane("--journal", "off"))
        asyncio.run(register(server, engines, per_engine))
        samples, outcomes = asyncio.run(_measure(server, arguments))
    begin, peak = samples[0], max(samples, key=lambda sample: sample.resident_mib)
    print(f"\n{machine()}; {arguments.streams} streams; they ended: {dict(outcomes)}\n")
    print_table(
        ("MiB before", "MiB at most", "KiB per stream", "CPU s"),
        [
            (
                f"{begin.resident_mib:.0f}",
                f"{peak.resident_mib:.0f}",
                f"{(peak.resident_mib - begin.resident_mib) * 1024 / arguments.streams:.1f}",
                f"{samples[-1].cpu_s - begin.cpu_s:.1f}",
            )
        ],
    )
    write_json(arguments.json, [asdict(sample) for sample in samples])


if __name__ == "__main__":
    main()
