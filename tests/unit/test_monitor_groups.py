"""Sums of groups that are kept from one question to the next are what they are when made anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.types import RequestState
from sagecp.runtime import monitor_groups
from sagecp.runtime.monitor_groups import GroupFigures, GroupSums, KeptSums
from sagecp.runtime.monitor_slices import ENDED, LATENCY, SLICE_S, SUM_COUNT, SliceStore, table_of

KEYS = 6


def add(store: SliceStore, time_s: float, *keys: int, latency_s: float = 1.0) -> None:
    rows = [
        [key, RequestState.SUCCEEDED, latency_s * (key + 1), 0.3, math.nan, 0.0, 7.0, 1.0, latency_s / 3e5]
        for key in keys
    ]
    store.add(time_s // SLICE_S * SLICE_S, table_of(np.array(rows, dtype=np.float64)))


def assert_same(first: GroupFigures, second: GroupFigures) -> None:
    assert np.array_equal(first.sums, second.sums)
    assert np.array_equal(first.sample_counts, second.sample_counts)
    assert np.array_equal(first.quantiles_s, second.quantiles_s)


@given(
    steps=st.lists(
        st.tuples(
            st.floats(0.0, 120.0),
            st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=5),
            st.floats(0.0, 100.0),
            # Now and then keys are of other groups than before, or of none.
            st.one_of(st.none(), st.lists(st.integers(-1, 2), min_size=KEYS, max_size=KEYS)),
        ),
        min_size=1,
        max_size=25,
    ),
    window_s=st.sampled_from((5.0, 60.0, 3600.0)),
)
def test_what_is_kept_is_what_would_be_found_anew(
    steps: list[tuple[float, list[int], float, list[int] | None]], window_s: float
) -> None:
    store, kept = SliceStore(1 << 30), GroupSums()
    groups = np.array([0, 1, 2, 0, -1, 2])
    now = 0.0
    for pause_s, keys, latency_s, regrouped in steps:
        now += pause_s
        add(store, now, *keys, latency_s=latency_s)
        if regrouped is not None:
            groups = np.array(regrouped)
        found, _ = store.within(now, window_s)
        assert_same(kept.figures(found, groups, 3), GroupSums().figures(found, groups, 3))


def test_nothing_is_left_of_what_has_gone() -> None:
    store, kept = SliceStore(1 << 30), GroupSums()
    groups = np.zeros(KEYS, np.int64)
    for second in range(0, 600, 5):
        add(store, float(second), second % KEYS, latency_s=0.1 * (second + 1))
        kept.figures(store.within(float(second), 60.0)[0], groups, 1)
    figures = kept.figures([], groups, 1)
    assert not figures.sums.any()
    assert not figures.sample_counts.any()
    assert not figures.quantiles_s.any()
    assert kept.size_bytes < 1_000


def test_keys_and_groups_may_come() -> None:
    store, kept = SliceStore(1 << 30), GroupSums()
    add(store, 0.0, 0, 1)
    assert kept.figures(store.within(1.0, 60.0)[0], np.array([0, -1]), 1).sums[0, ENDED] == 1
    add(store, 1.0, 2)
    assert kept.figures(store.within(1.0, 60.0)[0], np.array([0, -1, 0]), 1).sums[0, ENDED] == 2
    figures = kept.figures(store.within(1.0, 60.0)[0], np.array([1, 0, 1]), 2)
    assert figures.sums[:, ENDED].tolist() == [1, 2]
    assert figures.sample_counts[:, LATENCY].tolist() == [1, 2]
    assert kept.figures(store.within(1.0, 60.0)[0], np.array([-1, -1, -1]), 0).sums.shape == (0, SUM_COUNT)


def test_questions_are_kept_within_bounds_and_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    store, kept = SliceStore(1 << 30), KeptSums()
    add(store, 0.0, *range(KEYS))
    found, _ = store.within(0.0, 60.0)
    groups = np.arange(KEYS)
    for number in range(20):
        kept.figures(number, found, groups, KEYS, float(number))
    one = GroupSums()
    one.figures(found, groups, KEYS)
    assert kept.size_bytes == monitor_groups.MAX_KEPT_COUNT * one.size_bytes
    kept.let_go(18.0 + monitor_groups.KEPT_FOR_S)
    assert kept.size_bytes == one.size_bytes
    monkeypatch.setattr(monitor_groups, "MAX_KEPT_BYTES", 2 * one.size_bytes)
    for number in range(20):
        kept.figures(number, found, groups, KEYS, 100.0)
    assert kept.size_bytes == 2 * one.size_bytes
    kept.let_go(200.0)
    assert kept.size_bytes == 0
