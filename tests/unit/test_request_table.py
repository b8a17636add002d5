"""Requests that can still be asked about, and for how long."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import (
    ErrorReason,
    Failure,
    InvalidRequestError,
    RequestNotFoundError,
    TooManyStreamsError,
)
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestMetadata, RequestState, SamplingParameters, Usage
from sagecp.runtime.engines.base import EngineDelta, EngineOutcome
from sagecp.runtime.output import OutputLog
from sagecp.runtime.requests import Reading, RequestHandle, RequestTable, fingerprint

HUGE = 1 << 40


def make_handle(request_id: str, *, text: str = "", prompt: str = "hello") -> RequestHandle:
    record = RequestRecord(RequestMetadata(request_id=request_id, prompt=prompt), "m", 1, 10.0)
    handle = RequestHandle(record, OutputLog(lambda: None), b"", 1, 1000.0)
    if text:
        handle.output.on_deltas([EngineDelta(0, text, None, 1)])
    return handle


def end(table: RequestTable, handle: RequestHandle, now: float) -> None:
    handle.end_s = now
    handle.record.machine.to(RequestState.CANCELLED)
    table.note_ended(handle, now)


def fill(
    table: RequestTable, count: int, *, text: str = "", end_at: float | None = None
) -> list[RequestHandle]:
    handles = [make_handle(f"r{number}", text=text) for number in range(count)]
    for handle in handles:
        table.add(handle)
        if end_at is not None:
            end(table, handle, end_at)
    return handles


def test_a_request_is_found_until_it_is_forgotten() -> None:
    table = RequestTable(10, HUGE, 60.0)
    (handle,) = fill(table, 1)
    assert table.get("r0") is table.find("r0") is handle
    end(table, handle, 100.0)
    table.drop_old(160.0)
    assert table.get("r0") is handle
    table.drop_old(160.1)
    assert table.find("r0") is None
    with pytest.raises(RequestNotFoundError, match="'r0'"):
        table.get("r0")
    assert len(table) == 0


def test_only_so_many_ended_requests_are_kept_the_oldest_go() -> None:
    table = RequestTable(3, HUGE, 60.0)
    fill(table, 5, end_at=100.0)
    assert [handle.request_id for handle in table.newest_first()] == ["r4", "r3", "r2"]


def test_only_so_many_bytes_are_kept() -> None:
    size = make_handle("x", text="t" * 1000).output.size_bytes
    table = RequestTable(100, 3 * size, 60.0)
    fill(table, 5, text="t" * 1000, end_at=100.0)
    assert [handle.request_id for handle in table.newest_first()] == ["r4", "r3", "r2"]


def test_an_output_beyond_the_whole_bound_is_not_kept_and_takes_no_room() -> None:
    table = RequestTable(100, 1000, 60.0)
    big = make_handle("big", text="t" * 5000)
    table.add(big)
    end(table, big, 100.0)
    assert table.find("big") is None
    fill(table, 2, end_at=100.0)
    assert len(table) == 2


def test_live_requests_are_never_dropped() -> None:
    table = RequestTable(0, 0, 0.0)
    handles = fill(table, 3)
    table.drop_old(1e9)
    assert table.live() == handles
    end(table, handles[1], 100.0)
    assert table.live() == [handles[0], handles[2]]
    assert table.find("r1") is None


def test_what_was_asked_is_dropped_at_the_end_and_the_rest_stays() -> None:
    table = RequestTable(10, HUGE, 60.0)
    record = RequestRecord(
        RequestMetadata(
            request_id="r",
            user_id="u",
            messages=({"role": "user", "content": "secret"},),
            tools=({"type": "function"},),
            tool_choice="auto",
        ),
        "m",
        1,
        10.0,
    )
    handle = RequestHandle(record, OutputLog(lambda: None), b"", 1, 0.0)
    table.add(handle)
    end(table, handle, 100.0)
    kept = handle.record.metadata
    assert (kept.user_id, kept.request_id) == ("u", "r")
    assert kept.messages == ()
    assert kept.tools == ()
    assert kept.tool_choice is None


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 50)), max_size=60),
    st.integers(0, 20),
    st.integers(0, 20_000),
    st.floats(0.1, 30),
)
def test_the_bounds_hold_whatever_ends_when(
    ends: list[tuple[int, float]], max_count: int, max_bytes: int, retention_s: float
) -> None:
    table = RequestTable(max_count, max_bytes, retention_s)
    now = 0.0
    for number, (size, pause_s) in enumerate(ends):
        now += pause_s
        handle = make_handle(f"r{number}", text="t" * size)
        table.add(handle)
        end(table, handle, now)
        kept = list(table.newest_first())
        assert len(kept) == len(table) <= max_count
        assert sum(other.output.size_bytes for other in kept) <= max_bytes
        assert all(now - (other.end_s or 0.0) <= retention_s for other in kept)
        # What is kept is the newest, without a hole.
        assert [other.request_id for other in kept] == [f"r{number - i}" for i in range(len(kept))]


def test_readers_are_counted_and_bounded() -> None:
    handle = make_handle("r")
    with Reading(handle, 2), Reading(handle, 2):
        assert handle.output.reader_count == 2
        with pytest.raises(TooManyStreamsError, match="read by 2 streams"):
            Reading(handle, 2)
    assert handle.output.reader_count == 0


def test_the_engines_count_wins_over_our_own() -> None:
    handle = make_handle("r", text="abc")
    assert handle.usage() == Usage(None, 1, None)
    handle.outcome = EngineOutcome(("length", "stop"), 7, 12, 3)
    assert handle.usage() == Usage(7, 12, 3)
    assert handle.finish_reason == "length"
    handle.outcome = EngineOutcome(("stop",))
    assert handle.usage() == Usage(None, 1, None)


def test_a_status_has_unix_times_and_one_record_per_attempt() -> None:
    handle = make_handle("r")
    record = handle.record
    lost = Failure(ErrorReason.ENGINE_FAILED, "lost")
    record.epoch, record.instance_id = 1, "a"
    handle.start_attempt(11.0)
    handle.end_attempt(12.0, lost)
    handle.end_attempt(99.0, None)  # Ended already: nothing changes.
    record.epoch, record.instance_id, record.dispatch_s = 2, "b", 13.0
    handle.start_attempt(13.0)
    status = handle.status(None)
    assert status.create_time_s == 1010.0
    assert status.dispatch_time_s == 1013.0
    assert (status.end_time_s, status.first_token_time_s, status.deadline_time_s) == (None, None, None)
    first, second = status.attempts
    assert (first.epoch, first.instance_id, first.dispatch_time_s) == (1, "a", 1011.0)
    assert (first.end_time_s, first.failure) == (1012.0, lost)
    assert (second.epoch, second.instance_id, second.end_time_s) == (2, "b", None)


BASE = RequestMetadata(
    request_id="r",
    messages=({"role": "user", "content": "x"},),
    sampling=SamplingParameters(logit_bias={2: 1.0, 1: -1.0}, engine_extras={"b": 1, "a": [None, True]}),
    labels={"a": "1", "b": "2"},
)


def test_the_order_of_keys_makes_no_other_request() -> None:
    other = dataclasses.replace(
        BASE,
        messages=({"content": "x", "role": "user"},),
        sampling=SamplingParameters(logit_bias={1: -1.0, 2: 1.0}, engine_extras={"a": [None, True], "b": 1}),
        labels={"b": "2", "a": "1"},
    )
    assert fingerprint(BASE) == fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "other"},
        {"messages": ({"role": "user", "content": "y"},)},
        {"max_tokens": 1},
        {"sampling": SamplingParameters(temperature=0.5)},
        {"user_id": "u"},
        {"tenant_id": "t"},
        {"labels": {}},
        {"slo_deadline_ms": 5.0},
        {"prompt": "x"},
        {"openai_body": b"{}"},
        {"include_openai_events": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_content_is_another_request(change: dict[str, object]) -> None:
    assert fingerprint(BASE) != fingerprint(dataclasses.replace(BASE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "\ud800"},
        {"messages": ({"role": "user", "content": {1, 2}}, {"role": object()})},
    ],
    ids=["half of a pair", "no JSON type"],
)
def test_what_is_not_json_is_the_callers_fault(content: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="JSON cannot express"):
        fingerprint(RequestMetadata(request_id="r", **content))  # type: ignore[arg-type]
