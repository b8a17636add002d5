"""Sketches: the promised error for every quantile, and sums that are the sketch of everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.quantile_sketch import DURATIONS, BucketScale, QuantileSketch

SHARES = (0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
SCALES = st.sampled_from([DURATIONS, BucketScale(0.005, 1e-3, 1e3), BucketScale(0.2, 1.0, 100.0)])
VALUES = st.floats(0.0, 1e6, allow_nan=False)


def sketch_of(values: list[float], scale: BucketScale = DURATIONS) -> QuantileSketch:
    sketch = QuantileSketch(scale)
    for value in values:
        sketch.add(value)
    return sketch


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(len(values) * share)) - 1]


@given(scale=SCALES, values=st.lists(VALUES, min_size=1, max_size=60))
def test_every_quantile_is_within_the_error(scale: BucketScale, values: list[float]) -> None:
    found = sketch_of(values, scale).quantiles(SHARES)
    for share, estimate in zip(SHARES, found, strict=True):
        exact = nearest_rank(values, share)
        if exact <= scale.least:
            assert estimate == 0.0
        elif exact <= scale.greatest:
            assert estimate == pytest.approx(exact, rel=scale.relative_error * (1 + 1e-9))
        else:
            assert estimate >= scale.greatest * (1 - scale.relative_error)


@given(first=st.lists(VALUES, max_size=30), second=st.lists(VALUES, max_size=30))
def test_a_sum_is_the_sketch_of_both(first: list[float], second: list[float]) -> None:
    merged, whole = sketch_of(first), sketch_of(first + second)
    merged.merge(sketch_of(second))
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.count == len(first) + len(second)
    assert merged.total == pytest.approx(whole.total)
    assert merged.quantiles(SHARES) == whole.quantiles(SHARES)


@given(parts=st.tuples(*[st.lists(VALUES, max_size=20)] * 3))
def test_the_order_of_sums_does_not_matter(parts: tuple[list[float], list[float], list[float]]) -> None:
    left, right = sketch_of(parts[0]), sketch_of(parts[2])
    left.merge(sketch_of(parts[1]))
    left.merge(sketch_of(parts[2]))
    right.merge(sketch_of(parts[1]))
    right.merge(sketch_of(parts[0]))
    assert np.array_equal(left.counts, right.counts)


@given(scale=SCALES, values=st.lists(VALUES, min_size=1, max_size=30))
def test_many_values_find_the_buckets_that_each_finds(scale: BucketScale, values: list[float]) -> None:
    together = scale.indices(np.array(values))
    # The two logarithms may round differently where a value lies on an edge; both buckets are right then.
    for value, index in zip(values, together.tolist(), strict=True):
        assert abs(index - scale.index(value)) <= 1
        if scale.least < value <= scale.greatest:
            assert scale.values[index] == pytest.approx(value, rel=scale.relative_error * (1 + 1e-9))


def test_an_empty_sketch_has_no_values() -> None:
    sketch = QuantileSketch(DURATIONS)
    assert (sketch.count, sketch.mean, sketch.quantiles((0.5, 1.0))) == (0, 0.0, [0.0, 0.0])


def test_the_mean_is_exact_and_a_value_can_count_more_than_once() -> None:
    sketch = QuantileSketch(DURATIONS)
    sketch.add(1.0, 3)
    sketch.add(5.0)
    assert (sketch.count, sketch.mean) == (4, 2.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_is_no_value_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        QuantileSketch(DURATIONS).add(value)


@pytest.mark.parametrize(
    ("relative_error", "least", "greatest"),
    [(0.0, 1.0, 2.0), (1.0, 1.0, 2.0), (0.01, 0.0, 2.0), (0.01, 2.0, 2.0), (0.01, 1.0, math.inf)],
)
def test_a_scale_that_cannot_be(relative_error: float, least: float, greatest: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        BucketScale(relative_error, least, greatest)


def test_sketches_of_different_scales_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="different buckets"):
        QuantileSketch(DURATIONS).merge(QuantileSketch(BucketScale(0.02, 1e-4, 1e5)))
    same = BucketScale(0.01, 1e-4, 86_400.0)
    assert (same, hash(same)) == (DURATIONS, hash(DURATIONS))
    QuantileSketch(DURATIONS).merge(QuantileSketch(same))


def test_the_scale_of_durations_covers_its_range_within_a_percent() -> None:
    assert DURATIONS.bucket_count == 1030
    grid = np.geomspace(1.0001e-4, 86_400.0, 20_000)
    estimates = DURATIONS.values[DURATIONS.indices(grid)]
    assert float(np.max(np.abs(estimates / grid - 1))) <= 0.01 * (1 + 1e-9)
