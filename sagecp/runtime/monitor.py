"""How the fleet does: samples of ended requests, and what follows from them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagecp.core.types import (
    DurationQuantiles,
    GpuReading,
    PerformanceMetrics,
    RecentFault,
    RequestMetadata,
    RequestPriority,
    RequestState,
)

DEFAULT_WINDOW_S = 300.0
LONGEST_WINDOW_S = 3600.0
MAX_SAMPLE_COUNT = 50_000
MAX_GROUP_COUNT = 10_000
_GIB = 1 << 30

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MetricsKey:
    """What metrics can be filtered and grouped by. Empty and ``None`` match everything."""

    model: str = ""
    instance_id: str = ""
    tenant_id: str = ""
    priority: RequestPriority | None = None

    def matches(self, other: MetricsKey) -> bool:
        """Return whether ``other`` passes this filter."""
        return (
            (not self.model or self.model == other.model)
            and (not self.instance_id or self.instance_id == other.instance_id)
            and (not self.tenant_id or self.tenant_id == other.tenant_id)
            and (self.priority is None or self.priority is other.priority)
        )


@dataclass(frozen=True, slots=True)
class EndedSample:
    """What is remembered of one ended request. Durations in seconds; ``None``: does not apply.

    Attributes:
        slo_met: Whether every objective was met; ``None`` without one.
    """

    end_s: float
    key: MetricsKey
    state: RequestState
    latency_s: float
    ttft_s: float | None
    tpot_s: float | None
    queue_wait_s: float
    output_token_count: int
    slo_met: bool | None


@dataclass(slots=True)
class _Counters:
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    slo_violations: int = 0
    # Row of the key in the samples; -1 for sums.
    number: int = -1


class _Samples:
    """The latest samples as rows of numbers, so that figures over 50,000 of them take milliseconds.

    What does not apply is NaN. The order of the rows means nothing.
    """

    END, LATENCY, TTFT, TPOT, QUEUE_WAIT, TOKENS, SLO_MET, SUCCEEDED, KEY = range(9)

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows = np.empty((min(capacity, 1024), 9))
        self._next = 0
        self._count = 0

    def add(self, sample: EndedSample, key_number: int) -> None:
        """Keep a sample; beyond the capacity it replaces the oldest."""
        index = self._next
        if index == len(self._rows):
            larger = np.empty((min(self._capacity, 2 * index), 9))
            larger[:index] = self._rows
            self._rows = larger
        # None becomes NaN on the way.
        self._rows[index] = (
            sample.end_s,
            sample.latency_s,
            sample.ttft_s,
            sample.tpot_s,
            sample.queue_wait_s,
            sample.output_token_count,
            sample.slo_met,
            sample.state is RequestState.SUCCEEDED,
            key_number,
        )
        self._count = max(self._count, index + 1)
        self._next = (index + 1) % self._capacity

    def select(self, start_s: float, passing: npt.NDArray[np.bool_]) -> Rows:
        """Return the samples that ended at a time or later, and whose keys pass (by their numbers)."""
        rows = self._rows[: self._count]
        wanted = rows[:, self.END] >= start_s
        if not passing.all():
            wanted &= passing[rows[:, self.KEY].astype(np.intp)]
        selected: Rows = rows[wanted]
        return selected


class Monitor:
    """Collects samples and answers :meth:`metrics`.

    Bounded: at most ``MAX_SAMPLE_COUNT`` samples of the last hour, and counters
    for ``MAX_GROUP_COUNT`` combinations of model, instance, tenant and priority
    (further ones are counted together, without names).
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._samples = _Samples(MAX_SAMPLE_COUNT)
        self._counters: dict[MetricsKey, _Counters] = {}
        self._faults: deque[RecentFault] = deque(maxlen=20)
        self.event_loop_lag_s = 0.0

    def record(self, sample: EndedSample) -> None:
        """Take one ended request."""
        counters = self._counters.get(sample.key)
        if counters is None:
            key = sample.key if len(self._counters) < MAX_GROUP_COUNT else MetricsKey()
            counters = self._counters.setdefault(key, _Counters(number=len(self._counters)))
        if sample.state is RequestState.SUCCEEDED:
            counters.completed += 1
        elif sample.state is RequestState.CANCELLED:
            counters.cancelled += 1
        else:
            counters.failed += 1
        if sample.slo_met is False:
            counters.slo_violations += 1
        if self._enabled:
            self._samples.add(sample, counters.number)

    def fault(self, message: str, *, instance_id: str = "", request_id: str = "") -> None:
        """Remember something that went wrong, for `GetStatus`."""
        self._faults.appendleft(RecentFault(time.time(), message, instance_id, request_id))

    def recent_faults(self) -> tuple[RecentFault, ...]:
        """Return the latest faults, newest first."""
        return tuple(self._faults)

    def combinations(self) -> Iterable[MetricsKey]:
        """Return every combination seen."""
        return self._counters.keys()

    def metrics(
        self,
        now: float,
        *,
        active_count: int = 0,
        queued_count: int = 0,
        gpus: Iterable[GpuReading] = (),
        window_s: float = DEFAULT_WINDOW_S,
        match: MetricsKey | None = None,
    ) -> PerformanceMetrics:
        """Return the metrics of what passes a filter.

        Args:
            now: On the core's clock.
            active_count: Requests on engines now, of what passes the filter.
            queued_count: Requests waiting now, likewise.
            gpus: Readings of the instances that pass the filter.
            window_s: Of the rates and quantiles.
            match: The filter; ``None``: everything.
        """
        totals = _Counters()
        passing = np.zeros(len(self._counters), dtype=bool)
        for key, counters in self._counters.items():
            if match is None or match.matches(key):
                passing[counters.number] = True
                totals.completed += counters.completed
                totals.failed += counters.failed
                totals.cancelled += counters.cancelled
                totals.slo_violations += counters.slo_violations
        samples = self._samples.select(now - window_s, passing)
        done = samples[samples[:, _Samples.SUCCEEDED] == 1.0]
        judged = _known(samples[:, _Samples.SLO_MET])
        latency = _quantiles(done[:, _Samples.LATENCY])
        # A server younger than the window has had only its own time.
        span_s = min(window_s, max(now - samples[:, _Samples.END].min(), 1.0)) if len(samples) else window_s
        readings = list(gpus)
        utilizations = [g.utilization for g in readings if g.utilization is not None]
        total_memory = [g.total_memory_bytes for g in readings if g.total_memory_bytes is not None]
        used_memory = [g.used_memory_bytes for g in readings if g.used_memory_bytes is not None]
        return PerformanceMetrics(
            total_requests=totals.completed + totals.failed + totals.cancelled + active_count + queued_count,
            completed_requests=totals.completed,
            failed_requests=totals.failed,
            cancelled_requests=totals.cancelled,
            active_requests=active_count,
            queued_requests=queued_count,
            avg_latency_ms=latency.mean_s * 1000,
            p50_latency_ms=latency.p50_s * 1000,
            p95_latency_ms=latency.p95_s * 1000,
            p99_latency_ms=latency.p99_s * 1000,
            latency=latency,
            ttft=_quantiles(done[:, _Samples.TTFT]),
            tpot=_quantiles(done[:, _Samples.TPOT]),
            queue_wait=_quantiles(done[:, _Samples.QUEUE_WAIT]),
            tokens_per_second=float(samples[:, _Samples.TOKENS].sum()) / span_s,
            requests_per_second=len(done) / span_s,
            average_gpu_utilization=sum(utilizations) / len(utilizations) if utilizations else None,
            total_gpu_memory_gb=sum(total_memory) / _GIB if total_memory else None,
            used_gpu_memory_gb=sum(used_memory) / _GIB if used_memory else None,
            slo_violations=totals.slo_violations,
            slo_compliance_rate=float(judged.mean()) if len(judged) else None,
        )

    async def watch_event_loop(self, interval_s: float) -> None:
        """Measure how late the event loop runs its callbacks, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            before_s = loop.time()
            await asyncio.sleep(interval_s)
            self.event_loop_lag_s = max(0.0, loop.time() - before_s - interval_s)


def _known(column: Rows) -> Rows:
    known: Rows = column[~np.isnan(column)]
    return known


def _quantiles(column_s: Rows) -> DurationQuantiles:
    values_s = _known(column_s)
    if not len(values_s):
        return DurationQuantiles()
    p50_s, p95_s, p99_s = (float(q) for q in np.quantile(values_s, (0.5, 0.95, 0.99)))
    return DurationQuantiles(len(values_s), float(values_s.mean()), p50_s, p95_s, p99_s)


def objectives_met(
    metadata: RequestMetadata,
    state: RequestState,
    latency_s: float,
    ttft_s: float | None,
    tpot_s: float | None,
) -> bool | None:
    """Return whether every objective was met; ``None`` without one, or when the user cancelled."""
    objectives = (
        (metadata.slo_deadline_ms, latency_s),
        (metadata.ttft_slo_ms, ttft_s),
        (metadata.tpot_slo_ms, tpot_s),
    )
    stated = [(limit_ms, value_s) for limit_ms, value_s in objectives if limit_ms is not None]
    if not stated or state is RequestState.CANCELLED:
        return None
    if state is not RequestState.SUCCEEDED:
        return False
    # No TPOT exists for a single token: there is nothing to miss.
    return all(value_s is None or value_s * 1000 <= limit_ms for limit_ms, value_s in stated)
