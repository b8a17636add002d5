"""Events of the fleet: what is kept, what watchers get, and what is told of things that repeat themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core.errors import ErrorReason, Failure, TooManyStreamsError
from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.types import InstanceState
from sagecp.runtime import event_log
from sagecp.runtime.event_log import MAX_MESSAGE_LENGTH, EventFilter, EventLog
from sagecp.runtime.event_reporter import EventReporter
from sagecp.runtime.repetition import Repetition

INFO, WARNING, ERROR = EventSeverity.INFO, EventSeverity.WARNING, EventSeverity.ERROR
ALL = EventFilter()


def log_of(capacity: int = 10, count: int = 0) -> EventLog:
    log = EventLog(lambda: 100.0, capacity)
    for number in range(1, count + 1):
        log.add(INFO, EventKind.OVERLOAD, f"event {number}", instance_id=f"i{number % 2}")
    return log


def numbers(events: Any) -> list[int]:
    return [event.sequence for event in events]


async def taken(watch: event_log.EventWatch, count: int) -> list[tuple[int, int]]:
    """Return numbers and skipped counts of the next events."""
    found = []
    for _ in range(count):
        event, skipped_count = await asyncio.wait_for(anext(watch), 10.0)
        found.append((event.sequence, skipped_count))
    return found


# -- the log ---------------------------------------------------------------------------------


def test_events_are_numbered_and_the_oldest_are_let_go_of() -> None:
    log = log_of()
    assert (log.first_sequence, log.last_sequence) == (1, 0)
    assert numbers(log.newest_first(ALL)) == []
    log = log_of(count=25)
    assert (log.first_sequence, log.last_sequence) == (16, 25)
    assert numbers(log.newest_first(ALL)) == list(range(25, 15, -1))
    assert numbers(log.newest_first(ALL, before_sequence=18)) == [17, 16]
    assert numbers(log.newest_first(ALL, before_sequence=3)) == []
    assert numbers(log.newest_first(ALL, before_sequence=10**18)) == list(range(25, 15, -1))
    assert log.event(20).message == "event 20"
    assert log.event(20).time_s == 100.0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (EventFilter(), [4, 3, 2, 1]),
        (EventFilter(WARNING), [4, 3]),
        (EventFilter(ERROR), [4]),
        (EventFilter(kinds=frozenset({EventKind.OVERLOAD, EventKind.CLOCK_SKEW})), [3, 1]),
        (EventFilter(instance_id="a"), [4, 1]),
        (EventFilter(WARNING, frozenset({EventKind.OVERLOAD}), "a"), []),
    ],
)
def test_filters(wanted: EventFilter, expected: list[int]) -> None:
    log = log_of()
    log.add(INFO, EventKind.OVERLOAD, "1", instance_id="a")
    log.add(INFO, EventKind.GPU_FAULT, "2", instance_id="b")
    log.add(WARNING, EventKind.CLOCK_SKEW, "3")
    log.add(ERROR, EventKind.GPU_FAULT, "4", instance_id="a")
    assert numbers(log.newest_first(wanted)) == expected


def test_warnings_are_remembered_beyond_a_flood_of_news() -> None:
    log = log_of()
    log.add(ERROR, EventKind.GPU_FAULT, "broken")
    for _ in range(20):
        log.add(INFO, EventKind.OVERLOAD, "fine")
    assert [event.message for event in log.warnings] == ["broken"]


def test_long_messages_are_cut() -> None:
    log = log_of()
    assert len(log.add(INFO, EventKind.OVERLOAD, "x" * 5000).message) == MAX_MESSAGE_LENGTH


async def _until_the_end(watch: event_log.EventWatch) -> int:
    return len([event async for event in watch])


# -- watching --------------------------------------------------------------------------------


async def test_a_watch_begins_now_or_where_it_is_told() -> None:
    log = log_of(count=5)
    with log.watch(ALL) as now, log.watch(ALL, 3) as since, log.watch(ALL, 999) as after_a_restart:
        assert await taken(since, 2) == [(4, 0), (5, 0)]
        assert await taken(after_a_restart, 5) == [(n, 0) for n in range(1, 6)]
        waiting = asyncio.create_task(taken(now, 2))
        await asyncio.sleep(0)
        assert not waiting.done()
        log.add(INFO, EventKind.OVERLOAD, "6")
        log.add(INFO, EventKind.OVERLOAD, "7")
        assert await waiting == [(6, 0), (7, 0)]


async def test_a_slow_watcher_is_told_what_it_missed() -> None:
    log = log_of(capacity=10, count=5)
    with log.watch(ALL, 2) as watch:
        assert await taken(watch, 1) == [(3, 0)]
        for _ in range(20):
            log.add(INFO, EventKind.OVERLOAD, "more")
        # 16 to 25 are kept: 4 to 15 are gone.
        assert await taken(watch, 3) == [(16, 12), (17, 0), (18, 0)]


async def test_what_was_dropped_is_told_with_the_next_event_that_is_wanted() -> None:
    log = log_of(capacity=4, count=8)
    with log.watch(EventFilter(ERROR), 0) as watch:
        log.add(ERROR, EventKind.OVERLOAD, "at last")
        assert await taken(watch, 1) == [(9, 5)]


async def test_a_watch_ends_with_the_log_after_what_was_added() -> None:
    log = log_of(count=2)
    with log.watch(ALL, 0) as watch, log.watch(ALL) as idle:
        waiting = asyncio.create_task(_until_the_end(idle))
        await asyncio.sleep(0)
        log.close()
        assert await taken(watch, 2) == [(1, 0), (2, 0)]
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        assert await waiting == 0
    assert not log._watches


async def test_watchers_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_WATCH_COUNT", 2)
    log = log_of()
    with log.watch(ALL), log.watch(ALL), pytest.raises(TooManyStreamsError):
        log.watch(ALL)
    with log.watch(ALL):
        assert len(log._watches) == 1
    assert not log._watches


# -- repetition ------------------------------------------------------------------------------


def test_repetitions_are_told_a_few_times_and_then_counted() -> None:
    repetition: Repetition[str] = Repetition(60.0, told_count=2)
    assert [repetition.note("k", 0.0, "a") for _ in range(4)] == [True, True, False, False]
    assert repetition.note("other", 10.0)
    assert not repetition.note("k", 59.0, "b")
    assert list(repetition.due(59.9)) == []
    assert [(key, dict(counts)) for key, counts in repetition.due(60.0)] == [("k", {"a": 2, "b": 1})]
    # The telling began another window.
    assert not repetition.note("k", 61.0, "a")
    assert [(key, dict(counts)) for key, counts in repetition.due(125.0)] == [("k", {"a": 1})]
    assert list(repetition.due(190.0)) == []
    assert repetition.note("k", 191.0)


def test_repetitions_are_bounded() -> None:
    repetition: Repetition[int] = Repetition(max_key_count=3)
    for key in range(10):
        assert repetition.note(key, 0.0)
    assert len(repetition._windows) == 3
    assert repetition.note(0, 1.0)
    assert not repetition.note(9, 1.0)


# -- what is told ----------------------------------------------------------------------------


def told(do: Callable[[EventReporter], None]) -> list[FleetEvent]:
    log = log_of(capacity=1000)
    do(EventReporter(log))
    return list(reversed(list(log.newest_first(ALL))))


@pytest.mark.parametrize(
    ("state", "severity"),
    [
        (InstanceState.READY, INFO),
        (InstanceState.DRAINED, INFO),
        (InstanceState.UNHEALTHY, WARNING),
        (InstanceState.LOST, ERROR),
    ],
)
def test_a_change_of_state_matters_by_where_it_leads(state: InstanceState, severity: EventSeverity) -> None:
    effect = fx.InstanceChanged("i", state, InstanceState.STARTING, "because")
    (event,) = told(lambda reporter: reporter.instance_changed(effect))
    assert (event.severity, event.kind) == (severity, EventKind.INSTANCE_STATE_CHANGED)
    assert event.attributes == {"from": "STARTING", "to": state.name, "reason": "because"}
    assert (event.instance_id, event.message) == ("i", f"instance became {state.name}: because")


def test_an_instance_that_joins_registered() -> None:
    effect = fx.InstanceChanged("i", InstanceState.STARTING, None, "registered")
    (event,) = told(lambda reporter: reporter.instance_changed(effect))
    assert event.kind is EventKind.INSTANCE_REGISTERED


def test_a_thousand_failures_are_not_a_thousand_events() -> None:
    def fail(reporter: EventReporter) -> None:
        failure = Failure(ErrorReason.ENGINE_UNREACHABLE, "nobody answers")
        for number in range(1000):
            reporter.request_failed(failure, "i", f"r{number}", 1.0)
        reporter.advance(30.0)
        reporter.advance(61.0)

    *single, last = told(fail)
    assert len(single) == 50
    assert {event.kind for event in single} == {EventKind.REQUEST_FAILED}
    assert single[0].request_id == "r0"
    assert last.message.startswith("950 more requests failed with ENGINE_UNREACHABLE")
    assert last.attributes["count"] == "950"


def test_overload_is_told_once_a_minute_with_counts() -> None:
    def refuse(reporter: EventReporter) -> None:
        for number in range(100):
            reason = ErrorReason.INFEASIBLE if number % 4 == 1 else ErrorReason.QUEUE_FULL
            reporter.overloaded(reason, float(number) / 10)
        reporter.advance(60.0)

    first, second = told(refuse)
    assert first.attributes == {"QUEUE_FULL": "1"}
    assert second.attributes == {"QUEUE_FULL": "74", "INFEASIBLE": "25"}
    assert "74 QUEUE_FULL, 25 INFEASIBLE" in second.message


def test_refused_heartbeats_are_told_once_a_minute_by_instance_and_reason() -> None:
    def refuse(reporter: EventReporter) -> None:
        for second in range(30):
            reporter.heartbeat_refused("a", "BAD_FIGURE", "engine.x is NaN", float(second))
            reporter.heartbeat_refused("b", "BAD_FIGURE", "engine.x is NaN", float(second))
        reporter.advance(60.0)

    events = told(refuse)
    assert [(event.instance_id, event.attributes["count"]) for event in events] == [
        ("a", "1"),
        ("b", "1"),
        ("a", "29"),
        ("b", "29"),
    ]


def accuracy(error: float, count: int = 1000) -> dict[str, QuantityAccuracy]:
    return {
        "ttft": QuantityAccuracy(
            count=count, bias_ratio=2.0, median_error_ratio=error, p90_error_ratio=1.0, upper_coverage=None
        )
    }


def test_drift_of_predictions_is_told_when_it_begins_and_when_it_is_over() -> None:
    def drift(reporter: EventReporter) -> None:
        reporter.look_at_predictions(accuracy(5.0, count=10))
        for error in (0.3, 0.55, 0.6, 0.45, 0.55, 0.39, 0.45):
            reporter.look_at_predictions(accuracy(error))

    begins, over = told(drift)
    assert (begins.severity, over.severity) == (WARNING, INFO)
    assert begins.attributes == {"quantity": "ttft", "median_error": "0.550"}
    assert over.attributes == {"quantity": "ttft", "median_error": "0.390"}
