"""What one decision costs the core, in CPU time, against queue depth and fleet size.

One cycle is a whole request as the core sees it: it is submitted, some request
is dispatched, it delivers its first token and it finishes: three events. In
the column `idle` the queue is empty and every instance has room, so that the
submission itself dispatches, over all instances or a sample of a large fleet.
In the others every instance is full and the queue has that depth, so that a submission waits and each
finish dispatches the head of the queue.

Figures are medians over batches of cycles, in microseconds of this thread's
CPU time, taken in one process. Run it with::

    python -m bench.decision            # about two minutes
    python -m bench.decision --quick    # a few seconds
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections import deque
from collections.abc import Sequence

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.prediction.priors import prior_for
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import EngineCondition, ExecutionInstance, RequestMetadata

MODEL = "bench-model"
PROMPT = "Say in one sentence what a control plane is. " * 8
CONCURRENCY_LIMIT = 4
# Of known speed, so that gates, pacing and admission are at work.
STEP_TIME = prior_for("NVIDIA H100 80GB HBM3", "llama-3-8b").parameters
STEP_S = 0.001
CYCLES_PER_BATCH = 10


class Fleet:
    """A scheduler with instances, and the attempts that run on them, oldest first."""

    def __init__(self, instance_count: int, names: tuple[str, str, str]) -> None:
        policy, strategy, balancer = names
        self.scheduler = Scheduler(
            SchedulerConfig(
                scheduling_policy=policy,
                routing_strategy=strategy,
                load_balancer=balancer,
                max_queued_request_count=1_000_000,
                queue_timeout_s=1e9,
            )
        )
        self.now = 0.0
        self.arrived_count = 0
        self.running: deque[tuple[str, int]] = deque()
        for number in range(instance_count):
            instance = ExecutionInstance(
                instance_id=f"engine-{number:04d}",
                host="127.0.0.1",
                port=8000,
                model_name=MODEL,
                max_concurrent_request_count=CONCURRENCY_LIMIT,
                key_value_token_capacity=500_000,
                step_time=STEP_TIME,
            )
            self.feed(ev.InstanceRegistered(instance, condition=EngineCondition.HEALTHY))

    def feed(self, event: ev.Event) -> None:
        self.now += STEP_S
        for effect in self.scheduler.handle(event, self.now):
            if type(effect) is fx.DispatchAttempt:
                self.running.append((effect.record.request_id, effect.epoch))

    def submit(self) -> None:
        self.arrived_count += 1
        metadata = RequestMetadata(
            request_id=f"request-{self.arrived_count}", model_name=MODEL, prompt=PROMPT, max_tokens=128
        )
        self.feed(ev.RequestArrived(metadata))

    def finish_oldest(self) -> None:
        request_id, epoch = self.running.popleft()
        self.feed(ev.AttemptProgressed(request_id, epoch))
        self.feed(ev.AttemptSucceeded(request_id, epoch, output_token_count=128))

    def fill(self) -> None:
        """Submit until every instance is full and one request waits."""
        while not len(self.scheduler.queue):
            self.submit()

    def grow_queue(self, depth: int) -> None:
        while len(self.scheduler.queue) < depth:
            self.submit()

    def cycle_us(self, batch_count: int) -> float:
        """Return the median CPU time of a cycle."""
        batches = []
        for _ in range(batch_count):
            start_ns = time.thread_time_ns()
            for _ in range(CYCLES_PER_BATCH):
                self.submit()
                self.finish_oldest()
            batches.append((time.thread_time_ns() - start_ns) / CYCLES_PER_BATCH / 1000)
        return statistics.median(batches)


def measure(
    instance_counts: Sequence[int], depths: Sequence[int], batch_count: int, names: tuple[str, str, str]
) -> None:
    """Print one row per fleet size."""
    print(f"policy {names[0]}, strategy {names[1]}, balancer {names[2]}; us of CPU per request")
    print("instances".rjust(9), "idle".rjust(9), *(f"{depth:,} queued".rjust(15) for depth in depths))
    for instance_count in instance_counts:
        fleet = Fleet(instance_count, names)
        fleet.cycle_us(2)
        cells = [f"{fleet.cycle_us(batch_count):.1f}".rjust(9)]
        fleet.fill()
        for depth in depths:
            fleet.grow_queue(depth)
            gc.collect()
            fleet.cycle_us(2)
            cells.append(f"{fleet.cycle_us(batch_count):.1f}".rjust(15))
        print(f"{instance_count:,}".rjust(9), *cells, flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one decision costs the core.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and batches")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--strategy", default="load_balanced")
    parser.add_argument("--balancer", default="predicted_latency")
    arguments = parser.parse_args()
    names = (arguments.policy, arguments.strategy, arguments.balancer)
    print(f"Python {platform.python_version()} on {platform.machine()}")
    if arguments.quick:
        measure((1, 10, 100), (100, 1000), 20, names)
    else:
        measure((1, 10, 100, 1000), (100, 1_000, 10_000, 100_000), 100, names)


if __name__ == "__main__":
    main()
