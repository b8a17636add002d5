"""The health of one instance: failures, outages, probes, progress, and how often it fell out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_health import PROBE_ANSWER_TIMEOUT_S, HoldDown, InstanceHealth, Outage
from sagecp.core.types import EngineGauges


def failed(health: InstanceHealth, count: int, now: float = 0.0) -> bool:
    """Let attempts fail; return whether the last was one too many."""
    return [health.note_failure(now, delivering=False) for _ in range(count)][-1]


def ejected(health: InstanceHealth, now: float = 0.0) -> InstanceHealth:
    failed(health, 5, now)
    health.eject(now, "ENGINE_FAILED")
    return health


def answer(health: InstanceHealth, now: float, detail: str = "") -> bool:
    """Make a probe and let it end at once."""
    health.begin_probe(now)
    return health.note_probe(now, detail)


# -- failures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("ffff", False),
        ("fffff", True),
        ("ffffsf", False),
        ("ffffsfffff", True),
        ("sssss", False),
    ],
)
def test_only_failures_in_a_row_count(steps: str, expected: bool) -> None:
    health = InstanceHealth()
    too_many = False
    for step in steps:
        if step == "f":
            too_many = health.note_failure(0.0, delivering=False)
        else:
            health.note_success()
    assert too_many is expected


@pytest.mark.parametrize(
    ("delivering", "apart_s", "expected"),
    [(True, 0.0, 1), (True, 0.2, 2), (True, 1.0, 10), (False, 0.0, 10)],
)
def test_streams_that_are_cut_together_are_one_failure(
    delivering: bool, apart_s: float, expected: int
) -> None:
    """Errors before any output are not: a failing engine may fail many at once."""
    health = InstanceHealth()
    for number in range(10):
        health.note_failure(number * apart_s, delivering=delivering)
    assert health.failure_count == expected


# -- ejections -----------------------------------------------------------------------


def test_an_ejection_says_why_and_when_it_is_looked_at_again() -> None:
    health = ejected(InstanceHealth(), 100.0)
    assert health.outage is Outage.EJECTED
    assert health.why == (
        "ejected: 5 attempts in a row failed, the last with ENGINE_FAILED; out for 30 s, then a probe"
    )
    assert health.probe_s == 130.0


def test_probes_that_fail_prolong_an_ejection_up_to_a_bound() -> None:
    health = ejected(InstanceHealth())
    durations = []
    for _ in range(12):
        now = health.probe_s
        assert not answer(health, now, "500")
        durations.append(health.probe_s - now)
    assert durations == [60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300, 300]
    assert health.why == "ejected: a probe failed (500); out for 300 s, then a probe"


def test_two_probes_in_a_row_end_an_outage() -> None:
    health = ejected(InstanceHealth())
    assert not answer(health, 30.0)
    assert health.probe_s == 31.0
    assert answer(health, 31.0)
    assert health.outage is None
    assert health.why == ""
    assert health.probe_s == math.inf
    assert health.failure_count == 0


def test_a_failure_between_two_answers_counts_anew() -> None:
    health = ejected(InstanceHealth())
    assert not answer(health, 30.0)
    assert not answer(health, 31.0, "500")
    assert not answer(health, 91.0)
    assert answer(health, 92.0)


@pytest.mark.parametrize(
    ("well_s", "expected_s"), [(0.0, 90.0), (29.9, 90.0), (30.0, 60.0), (60.0, 30.0), (1e6, 30.0)]
)
def test_time_in_the_rotation_makes_up_for_ejections(well_s: float, expected_s: float) -> None:
    health = ejected(InstanceHealth())
    answer(health, 30.0, "500")
    answer(health, 90.0)
    assert answer(health, 91.0)
    now = 91.0 + well_s
    ejected(health, now)
    assert health.probe_s == now + expected_s


def test_an_answer_that_nobody_asked_for_says_nothing() -> None:
    health = ejected(InstanceHealth())
    assert not health.note_probe(1.0, "")
    assert not health.note_probe(1.0, "")
    assert health.outage is Outage.EJECTED
    assert health.probe_s == 30.0


def test_a_probe_without_an_answer_is_made_again() -> None:
    health = ejected(InstanceHealth())
    health.begin_probe(30.0)
    assert health.probe_s == 30.0 + PROBE_ANSWER_TIMEOUT_S


def test_a_probe_can_be_brought_forward_but_only_in_an_outage() -> None:
    health = InstanceHealth()
    health.probe_soon(1.0)
    assert health.probe_s == math.inf
    ejected(health, 1.0)
    health.probe_soon(2.0)
    health.probe_soon(3.0)
    assert health.probe_s == 2.0


# -- stalls --------------------------------------------------------------------------


def test_probes_of_a_stalled_engine_back_off() -> None:
    health = InstanceHealth()
    health.quarantine(10.0, "nothing came for 10 s")
    assert health.outage is Outage.STALLED
    assert health.why == "stalled: nothing came for 10 s"
    assert health.probe_s == 11.0
    waits = []
    for _ in range(7):
        now = health.probe_s
        assert not answer(health, now, "no token")
        waits.append(health.probe_s - now)
    assert waits == [2, 4, 8, 16, 30, 30, 30]
    assert health.why == "stalled: a probe failed (no token); the next follows after 30 s"
    assert not answer(health, health.probe_s)
    assert answer(health, health.probe_s)


def test_an_ejected_instance_that_stalls_as_well_is_not_probed_earlier() -> None:
    health = ejected(InstanceHealth())
    health.quarantine(1.0, "nothing came for 10 s")
    assert health.outage is Outage.STALLED
    assert health.probe_s == 30.0


# -- progress ------------------------------------------------------------------------


def gauges(running: int | None = 1, generated: int | None = 100, **more: Any) -> EngineGauges:
    return EngineGauges(running_request_count=running, generation_token_count=generated, **more)


@pytest.mark.parametrize(
    ("later", "still_s"),
    [
        (gauges(), 10.0),
        (gauges(waiting_request_count=7), 10.0),
        (gauges(generated=101), 0.0),
        (gauges(prompt_token_count=1), 0.0),
        (gauges(key_value_cache_usage=0.5), 0.0),
        (gauges(finished_request_count=1), 0.0),
        (gauges(running=2), 0.0),
        (gauges(running=0), 0.0),
        (gauges(running=None), 0.0),
        (None, 0.0),
    ],
)
def test_an_engine_that_moves_no_figure_stands_still(later: EngineGauges | None, still_s: float) -> None:
    health = InstanceHealth()
    assert health.note_gauges(gauges(), 5.0) == 0.0
    assert health.note_gauges(later, 15.0) == still_s


def test_figures_that_are_not_counted_say_nothing() -> None:
    health = InstanceHealth()
    assert health.note_gauges(gauges(generated=None), 5.0) == 0.0
    assert health.note_gauges(gauges(generated=None), 15.0) == 0.0


def test_figures_that_stood_still_through_answered_probes_say_nothing() -> None:
    """They are stale, and the engine is not."""
    health = InstanceHealth()
    health.note_gauges(gauges(), 0.0)
    assert health.note_gauges(gauges(), 10.0) == 10.0
    health.quarantine(10.0, "no progress")
    answer(health, 11.0)
    assert answer(health, 12.0)
    assert health.note_gauges(gauges(), 40.0) == 0.0
    assert not health.moved_since(-1.0)
    assert health.note_gauges(gauges(generated=102), 41.0) == 0.0
    assert health.moved_since(40.0)
    assert health.note_gauges(gauges(generated=102), 52.0) == 11.0


def test_whether_figures_have_moved() -> None:
    health = InstanceHealth()
    assert not health.moved_since(-1e9)
    health.note_gauges(gauges(), 5.0)
    assert health.moved_since(4.9)
    assert not health.moved_since(5.0)
    health.forget_progress(6.0)
    assert not health.moved_since(4.9)


def test_time_in_which_nobody_could_look_is_no_silence() -> None:
    health = InstanceHealth()
    health.note_gauges(gauges(), 0.0)
    health.skip(30.0)
    assert health.note_gauges(gauges(), 32.0) == 2.0


# -- hold-downs ----------------------------------------------------------------------


def held(*falls: tuple[float, float]) -> list[float]:
    """Return how long each fall holds an instance: (time of the return before it, of the fall)."""
    hold_down, limits, found = HoldDown(), HealthLimits(), []
    for return_s, fall_s in falls:
        hold_down.note_return(return_s)
        hold_down.note_fall(fall_s, limits)
        found.append(hold_down.until_s(limits) - fall_s)
    return found


@pytest.mark.parametrize(
    ("falls", "expected"),
    [
        ([(0, 1)], [0]),
        ([(0, 1), (2, 3)], [0, 5]),
        ([(n, n + 1) for n in range(0, 16, 2)], [0, 5, 10, 20, 40, 60, 60, 60]),
        ([(0, 1), (2, 3), (10, 70)], [0, 5, 0]),
        ([(0, 1), (2, 3), (10, 69)], [0, 5, 10]),
        ([(0, 1), (60, 61)], [0, 5]),
    ],
)
def test_each_fall_soon_after_a_return_holds_for_twice_as_long(
    falls: list[tuple[float, float]], expected: list[float]
) -> None:
    assert held(*[(1000.0 + a, 1000.0 + b) for a, b in falls]) == expected


def test_no_number_of_falls_is_too_large() -> None:
    assert held(*[(float(n), float(n)) for n in range(5000)])[-1] == 60.0


# -- limits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, ""),
        ({"max_ejected_share": 1.5}, "max_ejected_share: is 1.5; must be at most 1"),
        ({"fail_static_share": 2.0}, "fail_static_share: is 2; must be at most 1"),
        ({"fail_static_share": 0.3}, "fail_static_share: is 0.3; must be at least 0.5"),
        ({"max_ejection_s": 5.0}, "max_ejection_s: is 5, less than base_ejection_s (30); raise it"),
        ({"base_hold_down_s": 90.0}, "max_hold_down_s: is 60, less than base_hold_down_s (90); raise it"),
        ({"probe_interval_s": 31.0}, "max_probe_interval_s: is 30, less than probe_interval_s (31)"),
    ],
)
def test_limits_that_contradict_each_other_are_named(fields: dict[str, Any], message: str) -> None:
    found = [f"{each.field}: {each.description}" for each in HealthLimits(**fields).violations()]
    assert [text.startswith(message) for text in found] == [True] * bool(message)
