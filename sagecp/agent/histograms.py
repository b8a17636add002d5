"""Quantiles of what happened lately, from histograms that count since the engine's start."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from sagecp.core.duration_quantiles import DurationQuantiles

_INTERVAL_S = 10.0
_SPAN_S = 60.0
# After a longer gap the last minute cannot be told from what was before it.
_OLDEST_S = 1.5 * _SPAN_S


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram at one moment, as Prometheus tells it.

    Attributes:
        bounds_s: Upper bounds of its buckets, ascending; the last is infinite.
        counts: For each bound, how many observations were at most that long.
        total_s: Sum of all observations.
    """

    bounds_s: tuple[float, ...]
    counts: tuple[float, ...]
    total_s: float

    def since(self, earlier: Self) -> Self | None:
        """Return what was added after an earlier snapshot; ``None``: the counters began anew."""
        added = tuple(new - old for new, old in zip(self.counts, earlier.counts, strict=False))
        total_s = self.total_s - earlier.total_s
        if self.bounds_s != earlier.bounds_s or total_s < 0 or min(added, default=0.0) < 0:
            return None
        return type(self)(self.bounds_s, added, total_s)

    def quantiles(self) -> DurationQuantiles | None:
        """Return its quantiles; ``None`` when nothing was observed."""
        count = self.counts[-1] if self.counts else 0.0
        # Buckets of one page are written one after another: a busy engine may count in between.
        counts = list(itertools.accumulate(self.counts, max))
        if count < 1:
            return None
        return DurationQuantiles(
            sample_count=int(count),
            mean_s=self.total_s / count,
            p50_s=self._quantile(0.50, counts),
            p95_s=self._quantile(0.95, counts),
            p99_s=self._quantile(0.99, counts),
        )

    def _quantile(self, share: float, counts: list[float]) -> float:
        """Return a quantile, as if observations were spread evenly over their bucket."""
        rank = share * counts[-1]
        below_s, below = 0.0, 0.0
        for bound_s, count in zip(self.bounds_s, counts, strict=True):
            if count >= rank:
                if math.isinf(bound_s):
                    break  # Somewhere above the largest bound; nothing says where.
                return below_s + (bound_s - below_s) * (rank - below) / (count - below)
            below_s, below = bound_s, count
        return below_s


@dataclass(slots=True)
class LatencyWindow:
    """Remembers histograms of the last minute, by name, to tell what was added to them.

    Args:
        interval_s: Between two that are remembered.
        span_s: How far back the comparison goes, about.
        oldest_s: How far back it may go at most.
    """

    interval_s: float = _INTERVAL_S
    span_s: float = _SPAN_S
    oldest_s: float = _OLDEST_S
    _pages: deque[tuple[float, Mapping[str, HistogramSnapshot]]] = field(default_factory=deque)

    def add(self, now_s: float, histograms: Mapping[str, HistogramSnapshot]) -> dict[str, DurationQuantiles]:
        """Take a page, and return the quantiles of what it has more than one a minute ago.

        Args:
            now_s: On a monotonic clock.
            histograms: By name, of one page.

        Returns:
            By name; without those to which nothing was added, or for which there
            is nothing yet to compare with.
        """
        pages = self._pages
        while len(pages) > 1 and pages[1][0] <= now_s - self.span_s:
            pages.popleft()
        while pages and pages[0][0] < now_s - self.oldest_s:
            pages.popleft()
        found: dict[str, DurationQuantiles] = {}
        for name, histogram in histograms.items():
            earlier = pages[0][1].get(name) if pages else None
            if earlier is None:
                continue
            # An engine that was started again has counted since then, and no longer.
            quantiles = (histogram.since(earlier) or histogram).quantiles()
            if quantiles is not None:
                found[name] = quantiles
        if any(self._began_anew(name, histogram) for name, histogram in histograms.items()):
            pages.clear()
            pages.append((now_s, _zero(histograms)))
        elif not pages or now_s - pages[-1][0] >= self.interval_s:
            pages.append((now_s, dict(histograms)))
        return found

    def _began_anew(self, name: str, histogram: HistogramSnapshot) -> bool:
        earlier = self._pages[-1][1].get(name) if self._pages else None
        return earlier is not None and histogram.since(earlier) is None


def _zero(histograms: Mapping[str, HistogramSnapshot]) -> dict[str, HistogramSnapshot]:
    """Return the histograms as they were before the first observation."""
    return {
        name: HistogramSnapshot(each.bounds_s, (0.0,) * len(each.counts), 0.0)
        for name, each in histograms.items()
    }
