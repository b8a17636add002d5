"""How the fleet does: samples of ended requests, and what follows from them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sagecp.core.types import RequestMetadata, RequestState
from sagecp.runtime import monitor_slices as slices
from sagecp.runtime.metrics_table import GpuSums, LiveCount, MetricsTable
from sagecp.runtime.monitor_groups import KeptSums, overall_figures
from sagecp.runtime.monitor_keys import EVERYTHING, KeyTable, MetricsDimension, MetricsKey

DEFAULT_WINDOW_S = 300.0
MAX_GROUP_COUNT = 10_000
MAX_TABLE_BYTES = 32 << 20
# Samples are taken in together: one by one, numpy would cost ten times as much.
_PENDING_COUNT = 1024


# A tuple and not a dataclass: one is made for every request that ends.
class EndedSample(NamedTuple):
    """What is remembered of one ended request. Durations in seconds; ``None``: does not apply.

    Attributes:
        slo_met: Whether every objective was met; ``None`` without one.
        cost_usd: What it cost, US dollars; ``None``: no price is known.
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
    cost_usd: float | None = None


class Monitor:
    """Takes samples of ended requests, and answers what they add up to over windows and groups.

    Bounded: sketches of the last hour within ``MAX_TABLE_BYTES`` (where that is not enough the
    oldest are dropped), sums of them for the questions asked lately (:class:`KeptSums`), and
    counters for ``MAX_GROUP_COUNT`` combinations of model, instance, tenant and priority, and as
    many again without their tenants (further ones are counted together, without names).

    Args:
        enabled: Whether to keep sketches, or only to count.
        start_s: Since when samples are taken, on the core's clock: a window does not begin earlier.
    """

    def __init__(self, *, enabled: bool = True, start_s: float = -math.inf) -> None:
        self._enabled = enabled
        self._start_s = start_s
        self._keys = KeyTable(MAX_GROUP_COUNT, slices.KEPT_S)
        self._store = slices.SliceStore(MAX_TABLE_BYTES)
        self._kept = KeptSums()
        # Of one slice: number of the key, state, durations, tokens, objectives met, cost.
        self._pending: list[tuple[float | None, ...]] = []
        self._slice_start_s = -math.inf
        self._slice_end_s = -math.inf
        self.event_loop_lag_s = 0.0

    def record(self, sample: EndedSample) -> None:
        """Take one ended request."""
        end_s = sample.end_s
        pending = self._pending
        if end_s >= self._slice_end_s or len(pending) >= _PENDING_COUNT:
            self._take_in()
            if end_s >= self._slice_end_s:
                self._slice_start_s = end_s // slices.SLICE_S * slices.SLICE_S
                self._slice_end_s = self._slice_start_s + slices.SLICE_S
                self._kept.let_go(end_s)
            pending = self._pending
        pending.append((self._keys.number_of(sample.key, end_s), *sample[2:]))

    def _take_in(self) -> None:
        """Add pending samples to the counts and sketches."""
        if not self._pending:
            return
        # None becomes NaN on the way.
        rows = np.array(self._pending, dtype=np.float64)
        self._pending = []
        self._keys.count(rows[:, 0].astype(np.int64), rows[:, 1], missed=rows[:, 7] == 0.0)
        if self._enabled:
            self._store.add(self._slice_start_s, slices.table_of(rows))

    @property
    def table_bytes(self) -> int:
        """Memory that the sketches take."""
        self._take_in()
        return self._store.size_bytes + self._kept.size_bytes

    def values(self, dimension: MetricsDimension, match: MetricsKey) -> set[str]:
        """Return what was seen in a dimension, of what passes a filter."""
        return self._keys.values(dimension, self._keys.passing(match))

    def table(
        self,
        now: float,
        *,
        window_s: float = DEFAULT_WINDOW_S,
        match: MetricsKey = EVERYTHING,
        dimension: MetricsDimension | None = None,
        values: Sequence[str] = ("",),
        live: Sequence[LiveCount] = (LiveCount(),),
        gpus: Sequence[GpuSums] = (GpuSums(),),
    ) -> MetricsTable:
        """Return the metrics of what passes a filter, together or by group.

        Args:
            now: On the core's clock.
            window_s: Of the rates and quantiles: up to ``LONGEST_WINDOW_S``. The table says what it became.
            match: The filter.
            dimension: What to group by; ``None``: everything is one group.
            values: The groups.
            live: What has not ended of each group.
            gpus: What GPUs report of each group.
        """
        self._take_in()
        keys = self._keys
        passing = keys.passing(match)
        groups = np.where(passing, 0, -1) if dimension is None else keys.groups(dimension, passing, values)
        asked_window_s = window_s
        found, window_s = self._store.within(now, window_s)
        if dimension is None and match == EVERYTHING:
            figures = overall_figures(found)
        else:
            question = (asked_window_s, match, dimension)
            figures = self._kept.figures(question, found, groups, len(values), now)
        # Rates are of the time that it has run, and of a second at least.
        span_s = max(min(window_s, now - self._start_s), 1.0)
        sums = figures.sums
        succeeded, judged = sums[:, slices.SUCCEEDED], sums[:, slices.JUDGED]
        means = sums[:, : slices.DURATION_COUNT] / np.maximum(figures.sample_counts, 1)
        return MetricsTable(
            window_s=window_s,
            values=values,
            ended=keys.sums_of_counts(groups, len(values)).tolist(),
            live=live,
            sample_counts=figures.sample_counts.tolist(),
            means_s=means.tolist(),
            quantiles_s=figures.quantiles_s.tolist(),
            tokens_per_second=(sums[:, slices.TOKENS] / span_s).tolist(),
            requests_per_second=(succeeded / span_s).tolist(),
            slo_compliance_rate=[
                met / count if count else None
                for met, count in zip(sums[:, slices.MET].tolist(), judged.tolist(), strict=True)
            ],
            gpus=gpus,
            cost_usd=[
                cost_usd if count else None
                for cost_usd, count in zip(
                    sums[:, slices.COST_USD].tolist(), sums[:, slices.PRICED].tolist(), strict=True
                )
            ],
            usd_per_million_output_tokens=[
                1e6 * cost_usd / tokens if tokens else None
                for cost_usd, tokens in zip(
                    sums[:, slices.COST_USD].tolist(), sums[:, slices.PRICED_TOKENS].tolist(), strict=True
                )
            ],
        )

    async def watch_event_loop(self, interval_s: float, note: Callable[[], None] = lambda: None) -> None:
        """Measure how late the event loop runs its callbacks, for ever; ``note`` is called each time."""
        loop = asyncio.get_running_loop()
        while True:
            before_s = loop.time()
            await asyncio.sleep(interval_s)
            self.event_loop_lag_s = max(0.0, loop.time() - before_s - interval_s)
            note()


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
