"""Counts in buckets of equal ratio that forget old observations."""

from __future__ import annotations

import math
from array import array

# Weights grow instead of old counts shrinking; above this all are divided by it.
_LARGEST_WEIGHT = 1e9


class LogHistogram:
    """An exponentially forgetting histogram over a logarithmic scale.

    Bucket ``i`` holds values from ``least * ratio**i`` to ``least * ratio**(i+1)``;
    the first and the last also hold what lies beyond them. Each observation
    makes all before it weigh ``forgetting`` times as much.

    Args:
        bucket_count: Buckets.
        least: Lower edge of the first, above 0.
        ratio: Upper by lower edge of each, above 1.
        forgetting: Weight left to old observations by each new one, in (0, 1].
    """

    __slots__ = (
        "_growth",
        "_least",
        "_least_log",
        "_per_log",
        "_ratio",
        "_total",
        "_weight",
        "counts",
        "observation_count",
    )

    def __init__(self, bucket_count: int, *, least: float, ratio: float, forgetting: float) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting is {forgetting}; it must be above 0 and at most 1")
        self.counts = array("d", bytes(8 * bucket_count))
        """Weighted counts; divide by ``unit`` for observations."""
        self.observation_count = 0
        """Observations ever taken in."""
        self._least = least
        self._least_log = math.log(least)
        self._ratio = ratio
        self._per_log = 1.0 / math.log(ratio)
        self._growth = 1.0 / forgetting
        self._weight = 1.0
        self._total = 0.0

    @property
    def unit(self) -> float:
        """What the latest observation counts for in ``counts``."""
        return self._weight

    @property
    def effective_count(self) -> float:
        """Observations that still count: at most ``1 / (1 - forgetting)``."""
        return self._total / self._weight

    def add(self, value: float) -> None:
        """Count a finite value; what is below the least edge falls into the first bucket."""
        bucket = int((math.log(value) - self._least_log) * self._per_log) if value > self._least else 0
        self._weight *= self._growth
        self.counts[min(bucket, len(self.counts) - 1)] += self._weight
        self._total += self._weight
        self.observation_count += 1
        if self._weight > _LARGEST_WEIGHT:
            scale = 1.0 / self._weight
            self.counts = array("d", [count * scale for count in self.counts])
            self._total *= scale
            self._weight = 1.0

    def quantile(self, q: float) -> float:
        """Return the value below which a share ``q`` lies, by its bucket's geometric middle; 0 when empty."""
        rank = q * self._total
        last = 0
        for bucket, count in enumerate(self.counts):
            if count > 0.0:
                rank -= count
                last = bucket
                if rank <= 0.0:
                    break
        return float(self._least * self._ratio ** (last + 0.5)) if self._total else 0.0
