"""Quantiles of the last minute, from histograms that count since an engine's start."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.agent.histograms import HistogramSnapshot, LatencyWindow
from sagecp.core.duration_quantiles import DurationQuantiles

BOUNDS = (0.1, 0.2, 0.4, 0.8, math.inf)


def histogram(*samples: float) -> HistogramSnapshot:
    """Return what a histogram says after these samples."""
    counts = tuple(float(sum(sample <= bound for sample in samples)) for bound in BOUNDS)
    return HistogramSnapshot(BOUNDS, counts, math.fsum(samples))


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    # Ten in the bucket up to 0.2, ten in that up to 0.4.
    found = HistogramSnapshot(BOUNDS, (0, 10, 20, 20, 20), 5.0).quantiles()
    assert found is not None
    assert (found.sample_count, found.mean_s, found.p50_s) == (20, 0.25, 0.2)
    assert found.p95_s == pytest.approx(0.38)
    assert found.p99_s == pytest.approx(0.396)


def test_beyond_the_largest_bound_nothing_says_how_far() -> None:
    found = HistogramSnapshot(BOUNDS, (0, 0, 0, 0, 4), 100.0).quantiles()
    assert found == DurationQuantiles(4, 25.0, 0.8, 0.8, 0.8)


@pytest.mark.parametrize("empty", [HistogramSnapshot((), (), 0.0), histogram()])
def test_without_a_sample_there_is_none(empty: HistogramSnapshot) -> None:
    assert empty.quantiles() is None


def test_buckets_that_were_read_while_they_counted_do_no_harm() -> None:
    torn = HistogramSnapshot(BOUNDS, (5, 4, 9, 9, 9), 1.0)
    found = torn.quantiles()
    assert found is not None
    assert 0 <= found.p50_s <= found.p95_s <= found.p99_s <= 0.8


@given(st.lists(st.floats(0.001, 0.79), min_size=1, max_size=200))
def test_a_quantile_is_never_further_off_than_its_bucket(samples: list[float]) -> None:
    found = histogram(*samples).quantiles()
    assert found is not None
    ordered = sorted(samples)
    for share, value in ((0.5, found.p50_s), (0.95, found.p95_s), (0.99, found.p99_s)):
        exact = ordered[math.ceil(share * len(samples)) - 1]
        below = max((bound for bound in (0.0, *BOUNDS) if bound < exact), default=0.0)
        above = min(bound for bound in BOUNDS if bound >= exact)
        assert below - 1e-9 <= value <= above + 1e-9


def test_the_window_tells_what_was_added_in_about_a_minute() -> None:
    window = LatencyWindow()
    samples: list[float] = []
    assert window.add(0.0, {"ttft": histogram(*[0.7] * 1000)}) == {}, "nothing yet to compare with"
    samples += [0.7] * 1000
    for second in range(1, 300):
        samples += [0.05] if second < 200 else [0.3]
        found = window.add(float(second), {"ttft": histogram(*samples)})
        expected = min(second, 60)
        assert expected <= found["ttft"].sample_count <= expected + 10
        if second < 200:
            assert found["ttft"].p99_s <= 0.1, "the thousand slow ones were before"
    assert found["ttft"].p50_s == pytest.approx(0.3)
    assert len(window._pages) <= 8


def test_nothing_finished_is_nothing_known() -> None:
    window = LatencyWindow()
    for second in range(5):
        assert window.add(float(second), {"ttft": histogram(0.05, 0.05)}) == {}


def test_an_engine_that_starts_again_counts_from_its_start() -> None:
    window = LatencyWindow()
    window.add(0.0, {"ttft": histogram(*[0.7] * 100)})
    window.add(5.0, {"ttft": histogram(*[0.7] * 101)})
    for second, count in ((6.0, 3), (16.0, 5), (60.0, 7)):
        found = window.add(second, {"ttft": histogram(*[0.05] * count)})
        assert found["ttft"].sample_count == count, "all that the new one has seen"
        assert found["ttft"].p99_s <= 0.1
    found = window.add(77.0, {"ttft": histogram(*[0.05] * 9)})
    assert found["ttft"].sample_count == 4, "since ten seconds after its start"


def test_other_buckets_are_another_histogram() -> None:
    window = LatencyWindow()
    window.add(0.0, {"ttft": histogram(0.05)})
    other = HistogramSnapshot((1.0, math.inf), (7.0, 7.0), 2.0)
    assert window.add(1.0, {"ttft": other})["ttft"].sample_count == 7


def test_after_a_long_silence_the_last_minute_is_unknown() -> None:
    window = LatencyWindow()
    window.add(0.0, {"ttft": histogram(0.05)})
    assert window.add(600.0, {"ttft": histogram(0.05, 0.3)}) == {}
    assert window.add(605.0, {"ttft": histogram(0.05, 0.3, 0.3)})["ttft"].sample_count == 1


def test_however_often_it_is_asked_it_remembers_little() -> None:
    window = LatencyWindow()
    source = random.Random(3)
    now_s = 0.0
    for _ in range(5000):
        now_s += source.uniform(0.05, 3.0)
        window.add(now_s, {"ttft": histogram(0.05)})
        assert len(window._pages) <= 8
