"""How long the core takes to decide, event by event, against queue depth and fleet size.

The scheduler is fed what a fleet under load feeds it: arrivals, first tokens
and ends. Instances prefill one request after the other, as the formula of
their step time says, and give each a fixed time per token; arrivals come as
fast as requests end, so that the queue keeps its depth. At depth 0 they come
at half that pace and are dispatched as they arrive.

Every call of ``Scheduler.handle`` is timed by itself. Those that dispatch are
told from arrivals that only queue. One call may start several requests, each
of them a decision: what a decision took is the call's time by their number.
Half of the prompts begin with one of 64 shared starts where prompts have
digests, so that the prefix index and locality are at work. What waits is frozen
out of the garbage collector before a cell is measured; young objects are
collected as a server does it. Each fleet has a process of its own, or one would pay for
what another left behind.

A machine that is shared changes its pace: the time of a fixed loop, taken in
between, tells how fast it was in each row.

Under a policy that demotes, a row marked ``*`` follows those with a target: how
long calls take while one waiting request after the other becomes hopeless.

Depth and fleet size enter the cost as ``size**exponent``; the exponents are
fitted by least squares over logarithms of the medians. Run it with::

    python -m bench.decision            # about a quarter of an hour, 4 GB
    python -m bench.decision --targets  # only the cells that have a target
    python -m bench.decision --quick    # a few seconds
"""

from __future__ import annotations

import argparse
import gc
import heapq
import math
import platform
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.priors import prior_for
from sagecp.core.request import RequestRecord
from sagecp.core.scheduler import Scheduler
from sagecp.core.slo_line import SloLine
from sagecp.core.types import (
    EngineCondition,
    ExecutionInstance,
    PromptDigest,
    RequestMetadata,
    RequestPriority,
)
from sagecp.runtime.event_loop import patient_collector

MODEL = "bench-model"
POLICIES = ("slo_aware", "priority", "fifo", "adaptive", "cost_optimized")
CONCURRENCY_LIMIT = 8
OUTPUT_TOKEN_COUNT = 32
TOKEN_GAP_S = 0.01
MEAN_PROMPT_TOKEN_COUNT = 1500
BLOCK_TOKEN_COUNT = 256
SHARED_START_BLOCK_COUNT = 4
SHARED_START_COUNT = 64
TENANT_COUNT = 32
DIGEST_POOL_SIZE = 20_000
# Of known speed, so that gates, pacing and admission are at work.
STEP_TIME = prior_for("NVIDIA H100 80GB HBM3", "llama-3-8b").parameters
# What a decision may take at the 99th percentile, by instances and depth.
TARGETS_MS = {(100, 100_000): 0.3, (10_000, 1_000_000): 1.0}
IDLE = 0
# Idle decisions come from this share of the fleet's pace.
IDLE_PACE = 0.5
_LOOP_INTERVAL = 50
# Until what waits becomes hopeless, at most so many requests end: a large fleet needs too many.
STANDSTILL_CYCLE_COUNT = 10_000
_NONE = (math.nan, math.nan)

# us at the median of a dispatch and of an arrival that queues, by instances and depth.
Medians = dict[tuple[int, int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Setup:
    """One scheduler's settings, and whether its prompts have digests."""

    policy: str
    strategy: str
    balancer: str
    with_digests: bool

    def __str__(self) -> str:
        digests = "with" if self.with_digests else "no"
        return f"{self.policy}, {self.strategy}, {self.balancer}, {digests} digests"


class Times:
    """Durations of one kind of call, by the clock and in CPU time of this thread."""

    def __init__(self) -> None:
        self.clock_ns: list[int] = []
        self.cpu_ns: list[int] = []

    def add(self, clock_ns: int, cpu_ns: int) -> None:
        self.clock_ns.append(clock_ns)
        self.cpu_ns.append(cpu_ns)

    def quantile_us(self, share: float, *, of_cpu: bool = False) -> float:
        ordered = sorted(self.cpu_ns if of_cpu else self.clock_ns)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000 if ordered else math.nan

    def cells(self) -> str:
        """Return p50, p99 and the longest by the clock, and p50 and p99 of CPU time."""
        if not self.clock_ns:
            return " ".join(("-".rjust(7), *(["-".rjust(8)] * 4)))
        return (
            f"{len(self.clock_ns):7,} {self.quantile_us(0.5):8.1f} {self.quantile_us(0.99):8.1f} "
            f"{max(self.clock_ns) / 1000:8.0f} {self.quantile_us(0.99, of_cpu=True):8.1f}"
        )


def fixed_loop_us() -> float:
    """Run a loop that is always the same; return its time: shared machines change their pace."""
    start_ns = time.perf_counter_ns()
    values: dict[int, float] = {}
    total = 0.0
    for number in range(1000):
        values[number % 64] = total
        total += values.get(number % 37, 0.5) * 0.25 + max(0.25, total * 0.5)
        total %= 1000.0
    return (time.perf_counter_ns() - start_ns) / 1000


def make_digests(with_digests: bool) -> list[PromptDigest]:
    """Return the prompts that requests take in turn: log-normal lengths, half with a shared start."""
    draw = random.Random(1)
    blocks = count(1)
    sigma = 0.8
    location = math.log(MEAN_PROMPT_TOKEN_COUNT) - sigma * sigma / 2
    starts = [[next(blocks) for _ in range(SHARED_START_BLOCK_COUNT)] for _ in range(SHARED_START_COUNT)]
    digests = []
    for _ in range(DIGEST_POOL_SIZE):
        length = max(16, min(12_000, int(draw.lognormvariate(location, sigma))))
        hashes: list[int] = []
        if with_digests:
            hashes = list(draw.choice(starts)) if draw.random() < 0.5 else []
            length = max(length, len(hashes) * BLOCK_TOKEN_COUNT + 16)
            hashes += [next(blocks) for _ in range(length // BLOCK_TOKEN_COUNT - len(hashes))]
        digests.append(PromptDigest(length, tuple(hashes), BLOCK_TOKEN_COUNT))
    return digests


class Fleet:
    """A scheduler, and engines that are only times at which they say something."""

    def __init__(self, setup: Setup, instance_count: int, digests: Sequence[PromptDigest]) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                scheduling_policy=setup.policy,
                routing_strategy=setup.strategy,
                load_balancer=setup.balancer,
                max_queued_request_count=2_000_000,
                max_queued_bytes=1 << 40,
                queue_timeout_s=1e9,
            )
        )
        self.now = 0.0
        self._digests = digests
        self._draw = random.Random(2)
        self._arrived_count = 0
        self.pace_per_s = math.nan
        # (time, number, request, epoch, whether it is the first token).
        self._due: list[tuple[float, int, RequestRecord, int, bool]] = []
        self._number = 0
        self._prefill_free_s: dict[str, float] = {}
        self.dispatches = Times()
        # The time of each call that dispatches, by the number of requests that it starts.
        self.decisions = Times()
        self.queueings = Times()
        self.others = Times()
        # What a collection of everything takes, of what waits and runs as well.
        self.collection_s = math.nan
        # Of a fixed loop, in between.
        self.fixed_loop_us = math.nan
        for number in range(instance_count):
            instance = ExecutionInstance(
                instance_id=f"engine-{number:05d}",
                host="127.0.0.1",
                port=8000,
                model_name=MODEL,
                max_concurrent_request_count=CONCURRENCY_LIMIT,
                key_value_token_capacity=500_000,
                usd_per_gpu_hour=3.0,
                step_time=STEP_TIME,
            )
            self.feed(ev.InstanceRegistered(instance, condition=EngineCondition.HEALTHY))

    def __len__(self) -> int:
        return len(self.scheduler.queue)

    def feed(self, event: ev.Event) -> None:
        """Have an event handled, take its time, and start what it dispatches."""
        handle, now = self.scheduler.handle, self.now
        cpu_ns = time.thread_time_ns()
        start_ns = time.perf_counter_ns()
        effects = handle(event, now)
        end_ns = time.perf_counter_ns()
        end_cpu_ns = time.thread_time_ns()
        started = [effect for effect in effects if type(effect) is fx.DispatchAttempt]
        times = self.queueings if type(event) is ev.RequestArrived else self.others
        if started:
            times = self.dispatches
            self.decisions.add((end_ns - start_ns) // len(started), (end_cpu_ns - cpu_ns) // len(started))
            for effect in started:
                self._start(effect)
        times.add(end_ns - start_ns, end_cpu_ns - cpu_ns)

    def _start(self, effect: fx.DispatchAttempt) -> None:
        record = effect.record
        work_s = STEP_TIME.prefill_s(record.prompt_token_count, record.prompt_token_count)
        start_s = max(self.now, self._prefill_free_s.get(effect.instance_id, 0.0))
        first_s = self._prefill_free_s[effect.instance_id] = start_s + work_s
        self._note_due(first_s, record, effect.epoch, is_first=True)

    def _note_due(self, time_s: float, record: RequestRecord, epoch: int, *, is_first: bool) -> None:
        self._number += 1
        heapq.heappush(self._due, (time_s, self._number, record, epoch, is_first))

    def next_news(self) -> bool:
        """Let the next first token or end happen; return whether it was an end."""
        self.now, _, record, epoch, is_first = heapq.heappop(self._due)
        if is_first:
            end_s = self.now + (OUTPUT_TOKEN_COUNT - 1) * TOKEN_GAP_S
            self._note_due(end_s, record, epoch, is_first=False)
            self.feed(ev.AttemptProgressed(record.request_id, epoch))
        else:
            self.feed(ev.AttemptSucceeded(record.request_id, epoch, OUTPUT_TOKEN_COUNT))
        return not is_first

    def submit(self) -> None:
        number = self._arrived_count = self._arrived_count + 1
        self.feed(
            ev.RequestArrived(
                RequestMetadata(
                    request_id=f"request-{number}",
                    model_name=MODEL,
                    max_tokens=128,
                    tenant_id=f"tenant-{number % TENANT_COUNT}",
                    session_id=f"session-{number % 1000}",
                    priority=RequestPriority.NORMAL if number % 4 else RequestPriority.HIGH,
                    prompt_digest=self._digests[number % len(self._digests)],
                )
            )
        )

    def saturate(self, instance_count: int) -> None:
        """Fill the fleet, let each instance learn from a few requests, and note its pace."""
        while not len(self):
            self.submit()
        ended_count = max(500, CONCURRENCY_LIMIT // 2 * instance_count)
        for _ in range(ended_count):
            self.cycle()
        start_s = self.now
        for _ in range(ended_count):
            self.cycle()
        self.pace_per_s = ended_count / max(1e-9, self.now - start_s)

    def cycle(self) -> None:
        """Let things happen up to an end, and replace the request that ended."""
        while not self.next_news():
            pass
        self.submit()

    def idle_cycle(self) -> None:
        """Let a request arrive as in a fleet that is half busy."""
        arrival_s = self.now + self._draw.expovariate(IDLE_PACE * self.pace_per_s)
        while self._due and self._due[0][0] <= arrival_s:
            self.next_news()
        self.now = arrival_s
        self.submit()

    def empty(self) -> None:
        """Let everything that waits or runs end."""
        while self._due:
            self.next_news()

    def grow_queue(self, depth: int) -> None:
        """Submit, at one time, until so many wait."""
        while len(self) < depth:
            self.submit()

    def measure(self, depth: int, cycle_count: int) -> None:
        """Time events at a depth."""
        cycle = self.cycle if depth else self.idle_cycle
        for _ in range(cycle_count // 10):
            cycle()
        start_s = time.perf_counter()
        gc.collect()
        self.collection_s = time.perf_counter() - start_s
        gc.freeze()
        self.dispatches, self.decisions, self.queueings, self.others = Times(), Times(), Times(), Times()
        loops_us = []
        with patient_collector():
            for number in range(cycle_count):
                if number % _LOOP_INTERVAL == 0:
                    loops_us.append(fixed_loop_us())
                cycle()
        self.fixed_loop_us = statistics.median(loops_us)
        gc.unfreeze()

    @property
    def demoted_count(self) -> int:
        """Waiting requests that were found hopeless."""
        return sum(
            line.best_effort_count for _, line in self.scheduler.queue.lines() if isinstance(line, SloLine)
        )

    def await_demotions(self, cycle_count: int) -> bool:
        """Let the fleet work until the first of what waits turned hopeless; return whether any did."""
        if not SCHEDULING_POLICIES.get(self.scheduler.policy_in_force).demotes:
            return False
        before = self.demoted_count
        for _ in range(cycle_count):
            if self.demoted_count > before:
                return True
            self.cycle()
        return False


def run_column(setup: Setup, instance_count: int, depths: Sequence[int], cycle_count: int) -> Medians:
    """Measure one fleet at growing depths, printing a row for each; return the medians."""
    medians_us: Medians = {}
    fleet = Fleet(setup, instance_count, make_digests(setup.with_digests))
    fleet.saturate(instance_count)
    for depth in depths:
        if depth == IDLE:
            fleet.empty()
        else:
            fleet.grow_queue(depth)
        fleet.measure(depth, cycle_count)
        medians_us[instance_count, depth] = (
            fleet.dispatches.quantile_us(0.5),
            fleet.queueings.quantile_us(0.5),
        )
        target_ms = TARGETS_MS.get((instance_count, depth))
        print_row(fleet, instance_count, depth, target_ms)
        if target_ms is not None and fleet.await_demotions(STANDSTILL_CYCLE_COUNT):
            fleet.measure(depth, cycle_count)
            print_row(fleet, instance_count, depth, None, mark="*")
    return medians_us


def print_row(
    fleet: Fleet, instance_count: int, depth: int, target_ms: float | None, *, mark: str = " "
) -> None:
    """Print what was measured last."""
    verdict = ""
    if target_ms is not None:
        verdict = f"  target {target_ms} ms:" + ",".join(
            f" {'met' if times.quantile_us(0.99) <= 1000 * target_ms else 'MISSED'} by {name}"
            for name, times in (("decisions", fleet.decisions), ("calls", fleet.dispatches))
        )
    print(
        f"{instance_count:9,} {depth:9,}{mark}|{fleet.dispatches.cells()} |{fleet.queueings.cells()} "
        f"|{fleet.others.cells()} |{fleet.decisions.quantile_us(0.5):8.1f} "
        f"{fleet.decisions.quantile_us(0.99):8.1f} |{fleet.collection_s:7.3f} "
        f"{fleet.fixed_loop_us:5.0f}{verdict}",
        flush=True,
    )


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the slope of a straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - mean_x) ** 2 for each in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def print_exponents(medians_us: Medians) -> None:
    """Print the exponents over depth in each fleet, and over fleet size at each depth."""
    counts = sorted({key[0] for key in medians_us})
    depths = sorted({key[1] for key in medians_us})
    for name, column in (("a dispatch", 0), ("an arrival that queues", 1)):
        for instance_count in counts:
            found = [
                (depth, medians_us[instance_count, depth][column])
                for depth in depths
                if depth != IDLE and not math.isnan(medians_us.get((instance_count, depth), _NONE)[column])
            ]
            if len(found) > 2:
                power = exponent(*zip(*found, strict=True))
                print(f"{name}, {instance_count:,} instances: p50 grows as depth^{power:.3f}")
        for depth in depths:
            found = [
                (instance_count, medians_us[instance_count, depth][column])
                for instance_count in counts
                if not math.isnan(medians_us.get((instance_count, depth), _NONE)[column])
            ]
            if len(found) > 2:
                power = exponent(*zip(*found, strict=True))
                where = f"{depth:,} queued" if depth else "idle"
                print(f"{name}, {where}: p50 grows as instances^{power:.3f}")


def run_setup(setup: Setup, grid: Sequence[tuple[int, Sequence[int]]], cycle_count: int) -> None:
    """Print a table of one setup, and the exponents where there is enough for a fit."""
    print(
        f"\n{setup}; us of clock time; cpu99: p99 of CPU time; "
        "gc: s of a whole collection; loop: us of a fixed loop"
    )
    columns = "  calls      p50      p99      max    cpu99"
    kinds = ("dispatching calls", "queueing arrivals", "others")
    print(f"{'':19} |" + " |".join(name.center(44) for name in kinds) + " |    a decision")
    print(f"{'instances'} {'queued':>9} |{columns} |{columns} |{columns} |     p50      p99 |     gc  loop")
    medians_us: Medians = {}
    # A new process for each.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for instance_count, depths in grid:
            medians_us |= processes.submit(run_column, setup, instance_count, depths, cycle_count).result()
    print_exponents(medians_us)


def processor_name() -> str:
    """Return what the machine calls its processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long the core takes to decide.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one policy with digests")
    parser.add_argument("--targets", action="store_true", help="only the two cells that have a target")
    parser.add_argument("--policy", choices=POLICIES, help="only this policy")
    parser.add_argument("--strategy", default="load_balanced")
    parser.add_argument("--balancer", default="predicted_latency")
    parser.add_argument("--digests", choices=("with", "without"), default="with")
    parser.add_argument("--cycles", type=int, default=2000, help="requests per cell")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()} on {processor_name()}")
    cells: list[tuple[int, Sequence[int]]] = [(100, (100_000,)), (10_000, (1_000_000,))]
    depths = (IDLE, 100, 1_000, 10_000, 100_000)
    grid: list[tuple[int, Sequence[int]]] = [*((size, depths) for size in (10, 100, 1_000)), cells[1]]
    if arguments.quick:
        setup = Setup("slo_aware", arguments.strategy, arguments.balancer, with_digests=True)
        small = (IDLE, 100, 1_000, 10_000)
        run_setup(setup, [(size, small) for size in (10, 30, 100)], 300)
        return
    for policy in (arguments.policy,) if arguments.policy else POLICIES:
        setup = Setup(
            policy, arguments.strategy, arguments.balancer, with_digests=arguments.digests == "with"
        )
        is_whole = policy == POLICIES[0] and not arguments.targets
        run_setup(setup, grid if is_whole else cells, arguments.cycles)


if __name__ == "__main__":
    main()
