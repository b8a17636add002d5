"""What remains to be done, from what an engine should be and what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagecp.agent.orders import Step, Wishes, steps_towards
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.types import EngineGauges

IDLE = EngineGauges(running_request_count=0, waiting_request_count=0, sleeping=False)
ASLEEP = replace(IDLE, sleeping=True)
RED, BLUE = LoraAdapter("red", "/adapters/red"), LoraAdapter("blue", "/adapters/blue")
LOAD_RED = Step("load", "red", "/adapters/red")


@pytest.mark.parametrize(
    ("wishes", "gauges", "expected"),
    [
        (Wishes(asleep=True), IDLE, [Step("sleep", level=1)]),
        (Wishes(asleep=True, sleep_level=2), IDLE, [Step("sleep", level=2)]),
        (Wishes(asleep=True), replace(IDLE, running_request_count=1), []),
        (Wishes(asleep=True), replace(IDLE, waiting_request_count=1), []),
        (Wishes(asleep=True), replace(IDLE, running_request_count=None), []),
        (Wishes(asleep=True), ASLEEP, []),
        (Wishes(asleep=False), ASLEEP, [Step("wake", level=1)]),
        (Wishes(asleep=False), IDLE, []),
        (Wishes(asleep=False), replace(IDLE, sleeping=None), []),
        (Wishes(), ASLEEP, []),
        (Wishes(), IDLE, []),
        (Wishes(asleep=True), replace(IDLE, sleeping=None), []),
    ],
)
def test_sleep(wishes: Wishes, gauges: EngineGauges, expected: list[Step]) -> None:
    assert steps_towards(wishes, gauges, (), may_wake=True) == expected


def test_who_sleeps_by_another_order_is_left_alone() -> None:
    assert steps_towards(Wishes(asleep=False), ASLEEP, (), may_wake=False) == []


def test_it_is_woken_up_from_the_sleep_that_it_is_in() -> None:
    assert steps_towards(Wishes(asleep=False), ASLEEP, (), may_wake=True, sleep_level=2) == [
        Step("wake", level=2)
    ]


@pytest.mark.parametrize(
    ("wanted", "loaded", "expected"),
    [
        (None, (RED,), []),
        ((), (), []),
        ((), (RED,), [Step("unload", "red")]),
        ((RED,), (), [LOAD_RED]),
        ((RED,), (RED,), []),
        ((RED,), (BLUE,), [Step("unload", "blue"), LOAD_RED]),
        ((RED, BLUE), (BLUE,), [LOAD_RED]),
        # Of another path: gone first, then loaded.
        ((RED,), (LoraAdapter("red", "/old/red"),), [Step("unload", "red")]),
        # An engine that does not say where it has them from is believed.
        ((RED,), (LoraAdapter("red", ""),), []),
    ],
)
def test_adapters(
    wanted: tuple[LoraAdapter, ...] | None, loaded: tuple[LoraAdapter, ...], expected: list[Step]
) -> None:
    assert steps_towards(Wishes(adapters=wanted), IDLE, loaded, may_wake=True) == expected


def test_an_adapter_that_is_shown_under_another_path_than_it_was_given_is_not_loaded_for_ever() -> None:
    shown = (LoraAdapter("red", "/snapshots/red"),)
    wishes = Wishes(adapters=(RED,))
    assert steps_towards(wishes, IDLE, shown, may_wake=True, placed={"red": "/adapters/red"}) == []


def test_adapters_come_before_sleep_and_after_waking_up() -> None:
    wishes = Wishes(asleep=True, adapters=(RED,))
    assert steps_towards(wishes, IDLE, (), may_wake=True) == [LOAD_RED, Step("sleep", level=1)]
    assert steps_towards(replace(wishes, asleep=False), ASLEEP, (), may_wake=True) == [Step("wake", level=1)]
