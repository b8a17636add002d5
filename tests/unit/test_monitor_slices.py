"""Sketches by slice of time: windows, age, and the bound on memory, against a plain list of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.quantile_sketch import Values
from sagecp.core.types import RequestState
from sagecp.runtime.monitor_groups import GroupFigures, GroupSums, overall_figures
from sagecp.runtime.monitor_slices import (
    COST_USD,
    DURATION_COUNT,
    ENDED,
    JUDGED,
    LATENCY,
    LONGEST_WINDOW_S,
    MET,
    PRICED,
    PRICED_TOKENS,
    QUEUE_WAIT,
    SLICE_S,
    SUCCEEDED,
    SUM_COUNT,
    TOKENS,
    TPOT,
    TTFT,
    SliceStore,
    merged,
    table_of,
)

PLENTY = 1 << 30


def row(
    key: int = 0,
    state: RequestState = RequestState.SUCCEEDED,
    latency_s: float = 1.0,
    ttft_s: float = 0.5,
    tpot_s: float = 0.1,
    wait_s: float = 0.0,
    tokens: float = 10.0,
    met: float = math.nan,
    cost_usd: float = math.nan,
) -> list[float]:
    return [key, state, latency_s, ttft_s, tpot_s, wait_s, tokens, met, cost_usd]


def add(store: SliceStore, time_s: float, *rows: list[float]) -> None:
    store.add(time_s // SLICE_S * SLICE_S, table_of(np.array(rows)))


def count_within(store: SliceStore, now: float, window_s: float) -> tuple[int, float]:
    found, real_s = store.within(now, window_s)
    return int(overall_figures(found).sums[0, ENDED]), real_s


def same(first: GroupFigures, second: GroupFigures) -> bool:
    return (
        np.allclose(first.sums, second.sums)
        and np.array_equal(first.sample_counts, second.sample_counts)
        and np.array_equal(first.quantiles_s, second.quantiles_s)
    )


@settings(max_examples=60, deadline=None)
@given(
    steps_s=st.lists(st.sampled_from((0.5, 3.0, 7.0, 40.0, 200.0)), min_size=1, max_size=80),
    window_s=st.floats(1.0, LONGEST_WINDOW_S),
    after_s=st.floats(0.0, 100.0),
)
def test_a_window_is_longer_by_less_than_a_slice(
    steps_s: list[float], window_s: float, after_s: float
) -> None:
    store = SliceStore(PLENTY)
    times_s = np.cumsum(steps_s)
    for time_s in times_s:
        add(store, float(time_s), row())
    now = float(times_s[-1]) + after_s
    count, real_s = count_within(store, now, window_s)
    excess_s = 5.0 if window_s <= 60.0 else 15.0 if window_s <= 300.0 else 150.0
    assert window_s <= real_s < window_s + excess_s
    # Nothing of the window is missing, and what is counted is of the window that was told.
    assert count == np.count_nonzero(times_s >= now - real_s)


def test_two_hours_of_samples_take_few_slices_and_the_last_hour_is_whole() -> None:
    store = SliceStore(PLENTY)
    for second in range(7200):
        add(store, float(second), row(second % 3, latency_s=1.0 + second % 10))
    assert len(store) <= 70
    count, real_s = count_within(store, 7200.0, 3600.0)
    assert count == real_s
    for window_s in (60.0, 300.0, 3600.0):
        found, _ = store.within(7200.0, window_s)
        one_group = GroupSums().figures(found, np.zeros(3, np.int64), 1)
        assert same(one_group, overall_figures(found))
        assert one_group.quantiles_s[0, LATENCY] == pytest.approx((5.0, 10.0, 10.0), rel=0.01)


def test_beyond_the_bound_the_oldest_go_and_the_window_says_so() -> None:
    store = SliceStore(20_000)
    for second in range(600):
        add(store, float(second), *(row(key, latency_s=key + 1.0) for key in range(20)))
        # The newest slice is always kept.
        assert store.size_bytes <= 20_000 + 2_000
    count, real_s = count_within(store, 600.0, 600.0)
    assert 5.0 <= real_s < 300.0
    assert count == real_s * 20
    # A shorter window is as it was.
    assert count_within(store, 600.0, 5.0) == (100, 5.0)


def test_a_clock_that_goes_back_loses_nothing() -> None:
    store = SliceStore(PLENTY)
    add(store, 100.0, row())
    add(store, 50.0, row())
    assert count_within(store, 101.0, 60.0)[0] == 2


def test_what_does_not_apply_is_left_out() -> None:
    table = table_of(
        np.array(
            [
                row(3, ttft_s=math.nan, tpot_s=math.nan, met=1.0),
                row(3, RequestState.FAILED, latency_s=9.0, met=0.0, cost_usd=0.25),
                row(1, tokens=5.0),
            ]
        )
    )
    assert table.numbers.tolist() == [1, 3]
    assert table.sums[:, 1].tolist() == [
        *(1.0, 0.0, 0.0, 0.0),
        *(2.0, 1.0, 20.0, 2.0, 1.0),
        *(0.25, 1.0, 10.0),
    ]
    named = (ENDED, SUCCEEDED, TOKENS, JUDGED, MET, COST_USD, PRICED, PRICED_TOKENS)
    assert tuple(range(DURATION_COUNT, SUM_COUNT)) == named
    store = SliceStore(PLENTY)
    store.add(0.0, table)
    found, _ = store.within(1.0, 60.0)
    figures = GroupSums().figures(found, np.array([-1, 1, -1, 0]), 3)
    counts = figures.sample_counts.tolist()
    assert [counts[0][each] for each in (LATENCY, TTFT, TPOT, QUEUE_WAIT)] == [1, 0, 0, 1]
    assert counts[1:] == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert figures.quantiles_s[0, TTFT].tolist() == [0.0, 0.0, 0.0]
    assert figures.quantiles_s[1, TTFT] == pytest.approx([0.5] * 3, rel=0.01)
    assert not figures.quantiles_s[2].any()


ROWS = st.lists(
    st.builds(
        row,
        key=st.integers(0, 5),
        state=st.sampled_from((RequestState.SUCCEEDED, RequestState.EXPIRED)),
        latency_s=st.floats(0.0, 1e6),
        ttft_s=st.one_of(st.just(math.nan), st.floats(0.0, 10.0)),
        wait_s=st.floats(0.0, 1.0),
        tokens=st.integers(0, 1000).map(float),
        met=st.sampled_from((math.nan, 0.0, 1.0)),
        cost_usd=st.one_of(st.just(math.nan), st.floats(0.0, 100.0)),
    ),
    min_size=1,
    max_size=30,
)


def array(rows: list[list[float]]) -> Values:
    return np.array(rows, dtype=np.float64)


@given(first=ROWS, second=ROWS)
def test_the_sum_of_tables_is_the_table_of_all_samples(
    first: list[list[float]], second: list[list[float]]
) -> None:
    whole, parts = table_of(array(first + second)), merged([table_of(array(first)), table_of(array(second))])
    assert np.array_equal(whole.cells, parts.cells)
    assert np.array_equal(whole.numbers, parts.numbers)
    assert np.allclose(whole.sums, parts.sums)
