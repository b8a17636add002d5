"""Metrics of many groups side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sagecp.core.duration_quantiles import DurationQuantiles
from sagecp.core.types import GpuReading, PerformanceMetrics

_GIB = 1 << 30


@dataclass(slots=True)
class GpuSums:
    """What GPUs report, added up over those that report it."""

    utilization: float = 0.0
    utilization_count: int = 0
    total_memory_bytes: int = 0
    total_memory_count: int = 0
    used_memory_bytes: int = 0
    used_memory_count: int = 0

    def add(self, readings: Iterable[GpuReading]) -> None:
        """Take in readings."""
        # A fleet has thousands: sums in attributes would take twice as long.
        utilization, utilization_count = 0.0, 0
        total_bytes, total_count, used_bytes, used_count = 0, 0, 0, 0
        for reading in readings:
            if (share := reading.utilization) is not None:
                utilization += share
                utilization_count += 1
            if (size_bytes := reading.total_memory_bytes) is not None:
                total_bytes += size_bytes
                total_count += 1
            if (size_bytes := reading.used_memory_bytes) is not None:
                used_bytes += size_bytes
                used_count += 1
        self.utilization += utilization
        self.utilization_count += utilization_count
        self.total_memory_bytes += total_bytes
        self.total_memory_count += total_count
        self.used_memory_bytes += used_bytes
        self.used_memory_count += used_count

    def merge(self, other: GpuSums) -> None:
        """Take in what other sums took in."""
        self.utilization += other.utilization
        self.utilization_count += other.utilization_count
        self.total_memory_bytes += other.total_memory_bytes
        self.total_memory_count += other.total_memory_count
        self.used_memory_bytes += other.used_memory_bytes
        self.used_memory_count += other.used_memory_count

    @property
    def average_utilization(self) -> float | None:
        """Mean utilization, 0 to 1; ``None``: none reports."""
        return self.utilization / self.utilization_count if self.utilization_count else None

    @property
    def total_memory_gib(self) -> float | None:
        """Memory in GiB; ``None``: none reports."""
        return self.total_memory_bytes / _GIB if self.total_memory_count else None

    @property
    def used_memory_gib(self) -> float | None:
        """Memory in use in GiB; ``None``: none reports."""
        return self.used_memory_bytes / _GIB if self.used_memory_count else None


@dataclass(slots=True)
class LiveCount:
    """Requests that have not ended: on engines, and waiting."""

    active: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsTable:
    """The figures of :class:`PerformanceMetrics` for many groups: one entry of every sequence each.

    Attributes:
        window_s: The time that rates and quantiles are of.
        values: What the groups are called.
        ended: Requests ended since the start: completed, failed, cancelled, missed an objective.
        live: Requests that have not ended.
        sample_counts: Of latency, TTFT, TPOT and wait in the queue, each.
        means_s: Likewise.
        quantiles_s: Likewise: p50, p95 and p99 of each; zeros without samples.
        tokens_per_second: In the window.
        requests_per_second: Completed ones, in the window.
        slo_compliance_rate: In the window; ``None``: no ended request had an objective.
        gpus: What the GPUs report.
        cost_usd: Of the requests that ended in the window; ``None``: none has a price.
        usd_per_million_output_tokens: In the window; ``None``: none has a price, or there were no tokens.
    """

    window_s: float
    values: Sequence[str]
    ended: Sequence[Sequence[int]]
    live: Sequence[LiveCount]
    sample_counts: Sequence[Sequence[int]]
    means_s: Sequence[Sequence[float]]
    quantiles_s: Sequence[Sequence[Sequence[float]]]
    tokens_per_second: Sequence[float]
    requests_per_second: Sequence[float]
    slo_compliance_rate: Sequence[float | None]
    gpus: Sequence[GpuSums]
    cost_usd: Sequence[float | None]
    usd_per_million_output_tokens: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.values)

    def metrics(self, place: int) -> PerformanceMetrics:
        """Return the figures of one group."""
        completed, failed, cancelled, violations = self.ended[place]
        live, gpus = self.live[place], self.gpus[place]
        latency, ttft, tpot, queue_wait = (
            DurationQuantiles(count, mean_s, *quantiles_s)
            for count, mean_s, quantiles_s in zip(
                self.sample_counts[place], self.means_s[place], self.quantiles_s[place], strict=True
            )
        )
        return PerformanceMetrics(
            total_requests=completed + failed + cancelled + live.active + live.queued,
            completed_requests=completed,
            failed_requests=failed,
            cancelled_requests=cancelled,
            active_requests=live.active,
            queued_requests=live.queued,
            avg_latency_ms=latency.mean_s * 1000,
            p50_latency_ms=latency.p50_s * 1000,
            p95_latency_ms=latency.p95_s * 1000,
            p99_latency_ms=latency.p99_s * 1000,
            latency=latency,
            ttft=ttft,
            tpot=tpot,
            queue_wait=queue_wait,
            tokens_per_second=self.tokens_per_second[place],
            requests_per_second=self.requests_per_second[place],
            average_gpu_utilization=gpus.average_utilization,
            total_gpu_memory_gb=gpus.total_memory_gib,
            used_gpu_memory_gb=gpus.used_memory_gib,
            slo_violations=violations,
            slo_compliance_rate=self.slo_compliance_rate[place],
            cost_usd=self.cost_usd[place],
            usd_per_million_output_tokens=self.usd_per_million_output_tokens[place],
        )
