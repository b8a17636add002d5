"""Quantiles with a bounded relative error, from counts that can be added up.

DDSketch (Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile
sketch with relative-error guarantees", VLDB 2019). With a relative error ``a``,
each bucket is wider than the one before by ``(1 + a) / (1 - a)``; what falls
into one is reported as a value that is off by ``a`` at most. Counts of two
sketches add up to the sketch of all their values, so that times and groups of
any size are sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class BucketScale:
    """Buckets of equal ratio over a bounded range.

    Bucket 0 holds what is at most ``least``, and stands for 0; bucket ``i``
    holds what is above ``least * ratio**(i - 1)`` and at most ``least * ratio**i``.
    The last one also holds what lies beyond ``greatest``.

    Args:
        relative_error: Largest error between ``least`` and ``greatest``, in (0, 1).
        least: Smallest value told apart, above 0. Below it the error is at most this.
        greatest: Largest value told apart, above ``least``.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, relative_error: float, least: float, greatest: float) -> None:
        if not 0.0 < relative_error < 1.0:
            raise ValueError(f"relative_error is {relative_error}; it must be above 0 and below 1")
        if not 0.0 < least < greatest < math.inf:
            raise ValueError(
                f"least is {least} and greatest is {greatest}; both must be above 0, the second the larger"
            )
        self.relative_error = relative_error
        self.least = least
        self.greatest = greatest
        self._ratio = (1.0 + relative_error) / (1.0 - relative_error)
        self._per_log = 1.0 / math.log(self._ratio)
        self.bucket_count = 1 + math.ceil(math.log(greatest / least) * self._per_log)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketScale) and (self.relative_error, self.least, self.greatest) == (
            other.relative_error,
            other.least,
            other.greatest,
        )

    def __hash__(self) -> int:
        return hash((self.relative_error, self.least, self.greatest))

    def index(self, value: float) -> int:
        """Return the bucket of a value of at least 0."""
        if value <= self.least:
            return 0
        return min(math.ceil(math.log(value / self.least) * self._per_log), self.bucket_count - 1)

    def indices(self, values: Values) -> npt.NDArray[np.intp]:
        """Return the buckets of values of at least 0, none of them NaN; any shape."""
        logs = np.log(np.maximum(values, self.least) / self.least)
        found: npt.NDArray[np.intp] = np.ceil(logs * self._per_log).astype(np.intp)
        return np.minimum(found, self.bucket_count - 1, out=found)

    @cached_property
    def values(self) -> Values:
        """What each bucket stands for: equally wrong, relatively, for both of its edges."""
        lowest = self.least * 2.0 / (1.0 + self._ratio)
        values: Values = lowest * np.power(self._ratio, np.arange(self.bucket_count, dtype=np.float64))
        values[0] = 0.0
        return values


DURATIONS = BucketScale(0.01, 1e-4, 86_400.0)
"""For durations in seconds, 100 us to a day: 1,030 buckets.

1 % is less than any two windows differ by chance: the 99th percentile of a thousand
requests is uncertain by ten times as much. Half of it would double what is kept.
"""


class QuantileSketch:
    """Counts of values by bucket, with their exact number and sum.

    Args:
        scale: The buckets.
        counts: To start with, one per bucket; taken over, not copied. ``None``: all zero.
        total: The sum of what they count.
    """

    __slots__ = ("counts", "scale", "total")

    def __init__(self, scale: BucketScale, counts: Counts | None = None, total: float = 0.0) -> None:
        self.scale = scale
        self.counts: Counts = np.zeros(scale.bucket_count, np.int64) if counts is None else counts
        self.total = total

    @property
    def count(self) -> int:
        """Values taken in."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values, exact but for rounding; 0 without any."""
        count = self.count
        return self.total / count if count else 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Take in a value, as if it came ``count`` times.

        Raises:
            ValueError: It is negative, infinite or not a number.
        """
        if not 0.0 <= value < math.inf:
            raise ValueError(f"the value is {value}; it must be finite and at least 0")
        self.counts[self.scale.index(value)] += count
        self.total += value * count

    def merge(self, other: QuantileSketch) -> None:
        """Take in everything that another sketch took in.

        Raises:
            ValueError: Its buckets are others.
        """
        if self.scale != other.scale:
            raise ValueError("the sketches have different buckets; only sketches of one scale add up")
        self.counts += other.counts
        self.total += other.total

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return, for each share in [0, 1], the value that so many do not exceed; 0 without any."""
        running = np.cumsum(self.counts)
        if not running[-1]:
            return [0.0] * len(shares)
        buckets = np.searchsorted(running, nearest_ranks(running[-1:], shares)[0])
        found: list[float] = self.scale.values[buckets].tolist()
        return found


def nearest_ranks(sizes: Counts, shares: Sequence[float]) -> Counts:
    """Return which of some values in ascending order are their quantiles, counted from 1.

    The quantile of a share ``q`` of ``n`` values is the smallest that at least
    ``q * n`` of them do not exceed (nearest rank).

    Args:
        sizes: Numbers of values.
        shares: In [0, 1].

    Returns:
        Sizes x shares.
    """
    ranks: Counts = np.ceil(np.outer(sizes, shares)).astype(np.int64)
    return np.maximum(ranks, 1, out=ranks)
