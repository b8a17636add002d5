"""The least of values that come and go is what a list of them would say."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.least_value import LeastValue


def test_of_nothing_it_is_the_default() -> None:
    values = LeastValue()
    assert values.least(math.inf) == math.inf
    values.discard(1.0)
    assert values.least(2.0) == 2.0


def test_a_value_stays_until_it_was_taken_out_as_often_as_it_was_added() -> None:
    values = LeastValue()
    for value in (0.2, 0.1, 0.1, math.inf):
        values.add(value)
    assert values.least(0.0) == 0.1
    values.discard(0.1)
    assert values.least(0.0) == 0.1
    values.discard(0.1)
    assert values.least(0.0) == 0.2
    values.discard(0.2)
    assert values.least(0.0) == math.inf


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=300))
def test_it_agrees_with_a_list(steps: list[tuple[bool, int]]) -> None:
    values, plain = LeastValue(), list[float]()
    for is_added, number in steps:
        value = float(number)
        if is_added:
            values.add(value)
            plain.append(value)
        else:
            values.discard(value)
            if value in plain:
                plain.remove(value)
        assert values.least(-1.0) == min(plain, default=-1.0)


def test_values_that_come_and_go_behind_a_smaller_one_take_no_room() -> None:
    values = LeastValue()
    values.add(0.0)
    for number in range(10_000):
        value = 1.0 + number % 7
        values.add(value)
        values.discard(value)
    assert len(values._heap) < 100
    assert values.least(1.0) == 0.0
