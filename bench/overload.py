"""Goodput and refusals of the control plane at up to ten times what its engines can do.

    python -m bench.overload [--seconds 20] [--capacity 60]

Open loop: requests of five classes arrive by chance at multiples of the
capacity of two simulated engines, each class with a deadline, whatever becomes
of those before. Goodput counts requests that succeeded within their deadline,
per second. The time of a refusal runs from the call to the error,
in the process that makes the load.

Then the truth of what refusals say: a burst fills the queue; those refused come
back exactly when they were told, and again when they are told again. Every
process is real; the journal is on, as by default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from bench.processes import Measured, control_plane, machine, print_table, simulated_engine, write_json
from bench.slow_readers import ENGINE_COUNT, register
from bench.token_path import MODEL
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import request_pb2

LOADS = (0.5, 1.0, 2.0, 5.0, 10.0)
TOKEN_COUNT = 16
TTFT_MS, TOKEN_GAP_MS = 50.0, 10.0
# Class, its share of the arrivals, its deadline. Critical requests alone never exceed the capacity.
CLASSES = (
    ("CRITICAL", 0.05, 10.0),
    ("HIGH", 0.10, 10.0),
    ("NORMAL", 0.50, 5.0),
    ("LOW", 0.20, 20.0),
    ("BACKGROUND", 0.15, 30.0),
)
TENANT_COUNT = 8
CONNECTION_COUNT = 4
# Of queued requests per second of capacity.
QUEUE_S = 4.0
RETURN_LIMIT = 20
# Of a load, before it is measured.
_FILL_SHARE = 0.3
_GENERATE = "/sagecp.v1.InferenceService/Generate"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one call.

    Attributes:
        how: ``SUCCEEDED``, the state it ended in, ``REFUSED``, or the code of the error.
        duration_s: Of the call.
        end_s: When it ended, on the performance counter.
        retry_after_s: Of a refusal, where it said.
    """

    name: str
    how: str
    duration_s: float
    end_s: float
    retry_after_s: float | None = None


@dataclass(slots=True)
class Phase:
    """One load.

    Attributes:
        begin_s: Of the arrivals, on the performance counter.
        cpu_s: Of the server, until the last call ended.
        longest_lag_s: Of this process: as much of any time above is its own.
    """

    load: float
    seconds: float
    begin_s: float = 0.0
    cpu_s: float = 0.0
    longest_lag_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def goodput_per_s(self) -> float:
        """Successes per second while requests arrive, once the queue had time to fill."""
        from_s, until_s = self.begin_s + _FILL_SHARE * self.seconds, self.begin_s + self.seconds
        good = sum(each.how == "SUCCEEDED" and from_s <= each.end_s < until_s for each in self.outcomes)
        return good / (until_s - from_s)

    def success(self, name: str) -> float:
        """Return the share of a class that succeeded."""
        own = [outcome.how == "SUCCEEDED" for outcome in self.outcomes if outcome.name == name]
        return sum(own) / max(1, len(own))

    def refusal_ms(self, share: float) -> float:
        """Return a quantile of the time of refusals."""
        times = sorted(outcome.duration_s for outcome in self.outcomes if outcome.how == "REFUSED")
        return 1000.0 * times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


class Caller:
    """Makes calls over a few connections, in bytes: the load generator must not be the limit."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._calls: list[Any] = [channel.unary_stream(_GENERATE) for channel in channels]
        self._number = 0

    async def call(self, name: str, deadline_s: float, user: str) -> Outcome:
        """Generate once."""
        deadline = Duration()
        deadline.FromMilliseconds(int(deadline_s * 1000))
        spec = request_pb2.RequestSpec(
            model=MODEL,
            prompt=request_pb2.Prompt(text="measure me " * 40),
            sampling=request_pb2.SamplingParameters(max_tokens=TOKEN_COUNT, temperature=0.0, ignore_eos=True),
            priority=request_pb2.RequestPriority.Value(f"REQUEST_PRIORITY_{name}"),
            objectives=request_pb2.Objectives(end_to_end_deadline=deadline),
            user_id=user,
        )
        request = pb.GenerateRequest(spec=spec).SerializeToString()
        self._number += 1
        last = b""
        begin_s = time.perf_counter()
        try:
            async for message in self._calls[self._number % len(self._calls)](request):
                last = message
        except grpc.aio.AioRpcError as error:
            end_s = time.perf_counter()
            duration_s = end_s - begin_s
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return Outcome(name, "REFUSED", duration_s, end_s, _retry_after_s(error))
            return Outcome(name, error.code().name, duration_s, end_s)
        end_s = time.perf_counter()
        duration_s = end_s - begin_s
        state = pb.GenerateResponse.FromString(last).terminal.state
        how = request_pb2.RequestState.Name(state).removeprefix("REQUEST_STATE_")
        return Outcome(name, how if duration_s <= deadline_s else "LATE", duration_s, end_s)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for packed in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if packed.Unpack(info):
                    return float(info.retry_delay.ToMilliseconds()) / 1000.0
    return None


async def _arrivals(caller: Caller, phase: Phase, rate_per_s: float, draw: random.Random) -> None:
    tasks = []
    next_s = begin_s = phase.begin_s = time.perf_counter()
    names = [name for name, _, _ in CLASSES]
    shares = [share for _, share, _ in CLASSES]
    deadlines = {name: deadline_s for name, _, deadline_s in CLASSES}
    while next_s < begin_s + phase.seconds:
        if (pause_s := next_s - time.perf_counter()) > 0:
            await asyncio.sleep(pause_s)
        phase.longest_lag_s = max(phase.longest_lag_s, time.perf_counter() - next_s)
        [name] = draw.choices(names, shares)
        user = f"user-{draw.randrange(TENANT_COUNT)}"
        tasks.append(asyncio.create_task(caller.call(name, deadlines[name], user)))
        next_s += draw.expovariate(rate_per_s)
    phase.outcomes = await asyncio.gather(*tasks)


@dataclass(slots=True)
class Return:
    """A refused request that comes back when it was told.

    Attributes:
        told_s: What its first refusal said.
        extra_s: From that time to its acceptance.
        refusal_count: How often it was refused.
    """

    told_s: float
    extra_s: float = 0.0
    refusal_count: int = 1
    accepted: bool = False


async def _come_back(caller: Caller, name: str, number: int) -> Return | None:
    """Call until accepted, each time when told; ``None``: accepted at once."""
    # One user each, so that only the bounds of the class are met.
    outcome = await caller.call(name, 120.0, f"burst-{number}")
    if outcome.how != "REFUSED" or outcome.retry_after_s is None:
        return None
    told = Return(outcome.retry_after_s)
    due_s = time.perf_counter() + outcome.retry_after_s
    while outcome.how == "REFUSED" and outcome.retry_after_s is not None:
        if told.refusal_count > RETURN_LIMIT:
            return told
        await asyncio.sleep(outcome.retry_after_s)
        called_s = time.perf_counter()
        outcome = await caller.call(name, 120.0, f"burst-{number}")
        if outcome.how == "REFUSED":
            told.refusal_count += 1
    told.accepted = True
    told.extra_s = called_s - due_s
    return told


async def _measure(
    server: Measured, arguments: argparse.Namespace
) -> tuple[list[Phase], list[Return], float]:
    draw = random.Random(arguments.seed)
    phases = []
    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(server.address, options=options))
            for _ in range(CONNECTION_COUNT)
        ]
        caller = Caller(channels)
        warm = Phase(0.5, arguments.seconds / 3)
        await _arrivals(caller, warm, 0.5 * arguments.capacity, draw)
        for load in LOADS:
            phase = Phase(load, arguments.seconds)
            cpu_s = server.cpu_s()
            await _arrivals(caller, phase, load * arguments.capacity, draw)
            phase.cpu_s = server.cpu_s() - cpu_s
            phases.append(phase)
            print(f"{load:g}x: {dict(Counter(each.how for each in phase.outcomes))}", flush=True)
        count = int(arguments.capacity * QUEUE_S * 3)
        begin_s = time.perf_counter()
        answers = await asyncio.gather(*(_come_back(caller, "NORMAL", number) for number in range(count)))
        all_s = time.perf_counter() - begin_s
    return phases, [answer for answer in answers if answer is not None], count / all_s


def _print(arguments: argparse.Namespace, phases: list[Phase], returns: list[Return], pace: float) -> None:
    peak = max(phase.goodput_per_s for phase in phases)
    print(f"\n{machine()}; capacity {arguments.capacity:g}/s, {arguments.seconds:g} s per load\n")
    names = [name for name, _, _ in CLASSES]
    rows = [
        (
            f"{phase.load:g}x",
            f"{phase.goodput_per_s:.1f}",
            f"{100 * phase.goodput_per_s / peak:.0f} %",
            *(f"{100 * phase.success(name):.1f} %" for name in names),
            f"{phase.refusal_ms(0.5):.1f}",
            f"{phase.refusal_ms(0.99):.1f}",
            f"{1000 * phase.longest_lag_s:.0f}",
            f"{phase.cpu_s:.1f}",
        )
        for phase in phases
    ]
    print_table(
        ("load", "goodput/s", "of peak", *names, "refusal p50 ms", "p99 ms", "load lag ms", "CPU s"),
        rows,
    )
    first = [each for each in returns if each.accepted and each.refusal_count == 1]
    extra_s = sorted(each.extra_s for each in returns if each.accepted)
    told_s = [each.told_s for each in returns]
    lost_count = sum(not each.accepted for each in returns)
    print(
        f"\nburst: {len(returns)} refused and told {min(told_s):.1f} to {max(told_s):.1f} s; {len(first)} of "
        f"them accepted when they came back, {lost_count} never; accepted after the told time by "
        f"{statistics.median(extra_s):.2f} s in the median and at most {extra_s[-1]:.2f} s; "
        f"all of the burst served at {pace:.0f}/s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--capacity", type=int, default=60, help="requests per second of both engines")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    request_s = (TTFT_MS + (TOKEN_COUNT - 1) * TOKEN_GAP_MS) / 1000.0
    per_engine = max(1, round(arguments.capacity * request_s / ENGINE_COUNT))
    flags = ("--ttft-ms", f"{TTFT_MS:g}", "--inter-token-ms", f"{TOKEN_GAP_MS:g}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        engines = [stack.enter_context(simulated_engine(MODEL, *flags)) for _ in range(ENGINE_COUNT)]
        server = stack.enter_context(
            control_plane(
                "--max-queue", str(int(QUEUE_S * arguments.capacity)), "--journal", f"{folder}/journal.db"
            )
        )
        asyncio.run(register(server, engines, per_engine))
        phases, returns, pace = asyncio.run(_measure(server, arguments))
    _print(arguments, phases, returns, pace)
    write_json(
        arguments.json,
        {f"{p.load:g}": [(o.name, o.how, o.duration_s, o.retry_after_s) for o in p.outcomes] for p in phases},
    )


if __name__ == "__main__":
    main()
