"""What a trace costs the event loop: CPU time per request, for requests that are sampled and that are not.

    python -m bench.tracing [--requests 5000] [--rounds 7]

The core's own events of whole requests go to the tracer, as the server sends them;
what is exported is thrown away in the exporter's thread, whose time is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from bench.processes import machine, print_table
from sagecp.config import TracingConfig
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.effects import Effect
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import EngineCondition, ExecutionInstance, RequestMetadata
from sagecp.runtime.tracing.otel import OtelRequestTracer

INSTANCES = [
    ExecutionInstance(instance_id=f"i{n}", host="h", port=8000 + n, model_name="m") for n in range(8)
]


class Discard(SpanExporter):
    """Takes spans and keeps none."""

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing."""


def script(count: int) -> list[list[tuple[float, ev.Event, list[Effect]]]]:
    """Return, for each of some requests, its events with the core's answers."""
    scheduler = Scheduler(SchedulerConfig(scheduling_policy="fifo"))
    for instance in INSTANCES:
        scheduler.handle(ev.InstanceRegistered(instance, condition=EngineCondition.HEALTHY), 0.0)
    lives = []
    for number in range(count):
        now = 1.0 + number
        name = f"r{number}"
        events: list[ev.Event] = [
            ev.RequestArrived(
                RequestMetadata(request_id=name, prompt="x" * 2000, model_name="m", max_tokens=99)
            ),
            ev.AttemptProgressed(name, 1),
            ev.AttemptSucceeded(name, 1, 99, prompt_token_count=500, finish_reasons=("length",)),
        ]
        lives.append(
            [
                (now + step / 10, event, scheduler.handle(event, now + step / 10))
                for step, event in enumerate(events)
            ]
        )
    return lives


async def measure(
    ratio: float, lives: list[list[tuple[float, ev.Event, list[Effect]]]]
) -> tuple[float, float]:
    """Return us per request on this thread, and on all of the process's."""
    config = TracingConfig(otlp_endpoint="http://127.0.0.1:4317", sample_ratio=ratio)
    by_id = {each.instance_id: each for each in INSTANCES}
    tracer = OtelRequestTracer(config, by_id.get, Discard())
    begun_thread_s, begun_process_s = time.thread_time(), time.process_time()
    for life in lives:
        for now, event, effects in life:
            tracer.on_event(now, event, effects)
            if isinstance(event, ev.RequestArrived):
                tracer.attempt_headers(event.metadata.request_id, 1)
    thread_s = time.thread_time() - begun_thread_s
    await tracer.close()
    process_s = time.process_time() - begun_process_s
    return thread_s / len(lives) * 1e6, process_s / len(lives) * 1e6


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    lives = script(options.requests)
    print(machine())
    rows = []
    for what, ratio in (("sampled", 1.0), ("not sampled", 0.0)):
        figures = [await measure(ratio, lives) for _ in range(options.rounds)]
        loop, whole = (statistics.median(each) for each in zip(*figures, strict=True))
        rows.append((what, f"{loop:.0f}", f"{min(each for each, _ in figures):.0f}", f"{whole:.0f}"))
    print_table(("request", "us on the event loop", "least", "us with the exporter's thread"), rows)


if __name__ == "__main__":
    asyncio.run(main())
