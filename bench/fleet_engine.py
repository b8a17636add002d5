"""What simulating a fleet's engines costs, in CPU time: requests/s, engine steps/s, and times real time.

Eight engines of profile ``70b-h100-tp4`` serve a synthetic load shaped like a
conversation trace: prompts of 13k tokens and outputs of 345 in the mean, blocks
of 512 tokens of which a third is shared, three requests per second of fleet
time, placed at random. Nothing but the engines and a heap of their next events
runs. The other rows press the same fleet harder, and use small blocks.

Figures are of this thread's CPU time, the best of some runs. Run it with::

    python -m bench.fleet_engine            # about a minute
    python -m bench.fleet_engine --quick    # a few seconds
"""

from __future__ import annotations

import argparse
import gc
import heapq
import math
import platform
import random
import time
from dataclasses import dataclass

from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.engine import EngineJob, FleetEngine, NewsKind
from sagecp.sim.profiles import get_profile

ENGINE_COUNT = 8
PROFILE = get_profile("70b-h100-tp4")


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a load and how blocks are cut."""

    name: str
    rate_per_s: float
    prompt_mean: int
    output_mean: int
    block_size: int
    with_contents: bool


CASES = (
    Case("conversation, 3 req/s", 3.0, 13_000, 345, 512, True),
    Case("conversation, 6 req/s", 6.0, 13_000, 345, 512, True),
    Case("conversation, 12 req/s (overload)", 12.0, 13_000, 345, 512, True),
    Case("conversation, 3 req/s, small blocks", 3.0, 13_000, 345, 16, True),
    Case("chat, 40 req/s, no contents", 40.0, 1_200, 220, 16, False),
    Case("long context, 0.4 req/s", 0.4, 100_000, 400, 64, True),
)


def make_jobs(case: Case, count: int, seed: int = 1) -> list[tuple[float, int, EngineJob]]:
    """Return arrivals: time, engine, job. A third of the blocks continue an earlier prompt."""
    draw = random.Random(seed)
    sigma = 1.1
    location = math.log(case.prompt_mean) - sigma * sigma / 2
    arrivals: list[tuple[float, int, EngineJob]] = []
    recent: list[tuple[int, ...]] = [()]
    now, fresh = 0.0, 0
    for number in range(count):
        now += draw.expovariate(case.rate_per_s)
        prompt = max(1, min(int(draw.lognormvariate(location, sigma)), 125_000))
        output = max(1, min(int(draw.expovariate(1 / case.output_mean)), 2_000))
        contents: tuple[int, ...] = ()
        if case.with_contents:
            block_count = prompt // case.block_size
            earlier = draw.choice(recent) if draw.random() < 0.6 else ()
            shared = earlier[: int(block_count * draw.random())]
            contents = shared + tuple(range(fresh, fresh + block_count - len(shared)))
            fresh += block_count
            recent.append(contents)
            del recent[:-200]
        job = EngineJob(f"r{number}", prompt, output, contents)
        arrivals.append((now, draw.randrange(ENGINE_COUNT), job))
    return arrivals


def simulate(case: Case, arrivals: list[tuple[float, int, EngineJob]]) -> tuple[list[FleetEngine], int]:
    """Run all arrivals to their end; return the engines, and how many finished."""
    limits = EngineLimits(PROFILE.kv_token_capacity, block_size=case.block_size)
    engines = [FleetEngine(PROFILE, limits) for _ in range(ENGINE_COUNT)]
    due_s = [math.inf] * ENGINE_COUNT
    events: list[tuple[float, int]] = []
    finished = 0

    def refresh(index: int) -> None:
        event_s = engines[index].next_event_s()
        if event_s != due_s[index]:
            due_s[index] = event_s
            if event_s < math.inf:
                heapq.heappush(events, (event_s, index))

    def run_until(now: float) -> int:
        ended = 0
        while events and events[0][0] <= now:
            event_s, index = heapq.heappop(events)
            if event_s == due_s[index]:
                due_s[index] = math.inf
                for news in engines[index].advance(event_s):
                    ended += news.kind is NewsKind.FINISHED
                refresh(index)
        return ended

    for arrival_s, index, job in arrivals:
        finished += run_until(arrival_s)
        engines[index].add(job, arrival_s)
        refresh(index)
    return engines, finished + run_until(math.inf)


def measure(case: Case, count: int, repetitions: int) -> None:
    best_s = math.inf
    for _ in range(repetitions):
        arrivals = make_jobs(case, count)
        gc.collect()
        start_s = time.thread_time()
        engines, finished = simulate(case, arrivals)
        best_s = min(best_s, time.thread_time() - start_s)
    if finished != count:
        raise RuntimeError(f"{finished} of {count} requests finished")
    counters = [engine.counters for engine in engines]
    steps = sum(item.steps for item in counters)
    hits = sum(item.prefix_hit_tokens for item in counters)
    queries = sum(item.prefix_query_tokens for item in counters)
    busy_s = sum(item.busy_s for item in counters)
    print(
        case.name.ljust(36),
        f"{count / best_s:11,.0f}",
        f"{steps / best_s:11,.0f}",
        f"{busy_s / best_s:13,.0f}",
        f"{hits / queries:9.3f}",
        f"{sum(item.preemptions for item in counters):11,}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what simulating engines costs.")
    parser.add_argument("--quick", action="store_true", help="fewer requests and one run each")
    arguments = parser.parse_args()
    count, repetitions = (1_000, 1) if arguments.quick else (5_000, 3)
    print(
        f"Python {platform.python_version()} on {platform.machine()}; {ENGINE_COUNT} engines, {PROFILE.name}"
    )
    print(
        "load".ljust(36),
        "requests/s".rjust(11),
        "steps/s".rjust(11),
        "engine-s/s".rjust(13),
        "hit share".rjust(9),
        "preemptions".rjust(11),
    )
    for case in CASES:
        measure(case, count, repetitions)


if __name__ == "__main__":
    main()
