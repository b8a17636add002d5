"""Means with confidence intervals over repeated runs, and the rate that a target allows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# Two-sided quantiles of Student's t distribution for 1 to 30 degrees of freedom, to three decimals.
_T_QUANTILES = {
    0.90: (
        6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
        1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725,
        1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
    ),
    0.95: (
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
    ),
    0.99: (
        63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169,
        3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845,
        2.831, 2.819, 2.807, 2.797, 2.787, 2.779, 2.771, 2.763, 2.756, 2.750,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval that holds the true one with the given confidence.

    Attributes:
        mean: Of the values.
        low: Lower end; ``None`` with a single value, which says nothing of the spread.
        high: Upper end, likewise.
        count: Values that it is made of.
        level: Confidence, such as 0.95.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    level: float


@dataclass(frozen=True, slots=True)
class GoodputAt:
    """The largest offered rate at which the target is met.

    Attributes:
        rate_per_s: The rate, or the bound of it.
        bound: ``exact``: interpolated; ``at_least``: the target is met at every rate that was
            tried, and this is the largest; ``at_most``: at none, and this is the smallest.
    """

    rate_per_s: float
    bound: Literal["exact", "at_least", "at_most"]


def mean_confidence(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent values with its interval from Student's t distribution.

    Raises:
        ValueError: There are no values, or the level is none of 0.9, 0.95 and 0.99.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    if level not in _T_QUANTILES:
        raise ValueError(f"level must be one of {', '.join(map(str, _T_QUANTILES))}, not {level}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1, level)
    half_width = _t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half_width, mean + half_width, len(values), level)


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of ``first - second``, pair by pair, with its interval.

    Pairs are runs of the same seed: what the seed does to both cancels out, so
    that the interval is narrower than the difference of two means' would be.

    Raises:
        ValueError: As :func:`mean_confidence`, or the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths, not {len(first)} and {len(second)}")
    return mean_confidence([a - b for a, b in zip(first, second, strict=True)], level)


def goodput_at(points: Iterable[tuple[float, float]], target: float = 0.9) -> GoodputAt:
    """Return the largest offered rate whose attainment reaches the target, interpolated linearly.

    Where attainment crosses the target more than once, the last crossing counts.
    Points of equal rate (several seeds) are averaged.

    Args:
        points: Pairs of offered rate per second and attainment.
        target: Attainment, 0 to 1.

    Raises:
        ValueError: There are no points.
    """
    groups = itertools.groupby(sorted(points), key=lambda point: point[0])
    curve = [(rate, statistics.fmean(attainment for _, attainment in group)) for rate, group in groups]
    if not curve:
        raise ValueError("a goodput needs at least one point of rate and attainment")
    reached = [index for index, (_, attainment) in enumerate(curve) if attainment >= target]
    if not reached:
        return GoodputAt(curve[0][0], "at_most")
    if reached[-1] == len(curve) - 1:
        return GoodputAt(curve[-1][0], "at_least")
    (low_rate, above), (high_rate, below) = curve[reached[-1]], curve[reached[-1] + 1]
    return GoodputAt(low_rate + (high_rate - low_rate) * (above - target) / (above - below), "exact")


def _t_quantile(degrees: int, level: float) -> float:
    table = _T_QUANTILES[level]
    if degrees <= len(table):
        return table[degrees - 1]
    # Cornish and Fisher's expansion around the normal quantile (Biometrika 1938); below 30
    # degrees it would be off in the third decimal.
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
