"""What becomes of a request that lost an attempt."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.failover import ending_of
from sagecp.core.types import FailoverMode, RequestState
from tests.support.core_world import World, arrive, fail, healthy, make_metadata, make_record

LOST = Failure(ErrorReason.ENGINE_FAILED, "the engine failed")
TOOLS = "it uses tools"


@pytest.mark.parametrize(
    ("mode", "has_output", "cannot_continue", "goes_on"),
    [
        (FailoverMode.DEFAULT, False, TOOLS, True),
        (FailoverMode.DEFAULT, True, "", True),
        (FailoverMode.DEFAULT, True, TOOLS, False),
        (FailoverMode.CONTINUE, False, TOOLS, True),
        (FailoverMode.CONTINUE, True, "", True),
        (FailoverMode.CONTINUE, True, TOOLS, False),
        (FailoverMode.RESTART, False, "", True),
        (FailoverMode.RESTART, True, "", False),
        (FailoverMode.FAIL, False, "", False),
        (FailoverMode.FAIL, True, "", False),
    ],
)
def test_the_caller_chooses_and_the_output_decides(
    mode: FailoverMode, has_output: bool, cannot_continue: str, goes_on: bool
) -> None:
    record = make_record(failover_mode=mode)
    record.lost_attempt_count = 1
    record.has_output = has_output
    ending = ending_of(record, LOST, retryable=True, cannot_continue=cannot_continue, max_attempt_count=3)
    assert (ending is None) == goes_on
    if ending is not None:
        assert ending.reason is ErrorReason.ENGINE_FAILED
        assert ending.message.startswith(LOST.message)


def test_what_cannot_go_on_says_why() -> None:
    record = make_record()
    record.has_output = True
    ending = ending_of(record, LOST, retryable=True, cannot_continue=TOOLS, max_attempt_count=3)
    assert ending is not None
    assert TOOLS in ending.message


def three_engines() -> World:
    world = World()
    world.feed(healthy("a"), healthy("b"), healthy("c"))
    return world


def place_of(world: World, request_id: str = "r1") -> str:
    return world.record(request_id).instance_id


def test_a_continued_request_goes_elsewhere_with_its_output_as_part_of_the_prompt() -> None:
    world = three_engines()
    world.feed(arrive("r1", max_tokens=100))
    record = world.record("r1")
    prompt_tokens, expected_tokens = record.prompt_token_count, record.expected_output_token_count
    first = place_of(world)
    world.feed(ev.AttemptProgressed("r1", 1))
    world.feed(fail("r1", output_token_count=10))
    assert record.state is RequestState.DISPATCHED
    assert place_of(world) != first
    assert record.prompt_token_count == prompt_tokens + 10
    assert record.expected_output_token_count == max(1, expected_tokens - 10)
    world.feed(ev.AttemptProgressed("r1", 2), fail("r1", 2, output_token_count=25))
    assert record.prompt_token_count == prompt_tokens + 25
    assert world.feed(ev.AttemptSucceeded("r1", 3, 40)) == ["end r1 SUCCEEDED"]


def test_three_lost_attempts_are_the_most() -> None:
    world = three_engines()
    world.feed(arrive("r1"))
    for epoch in (1, 2):
        world.feed(fail("r1", epoch))
    (ended,) = (e for e in world.effects(fail("r1", 3)) if isinstance(e, fx.RequestEnded))
    assert ended.state is RequestState.FAILED
    assert ended.failure is not None
    assert "attempt 3 of 3" in ended.failure.message


def test_attempts_that_were_moved_do_not_count() -> None:
    world = three_engines()
    world.feed(arrive("r1"))
    for epoch in range(1, 8):
        world.feed(fail("r1", epoch, counts=False))
    assert world.record("r1").lost_attempt_count == 0
    assert not world.record("r1").state.is_terminal


def test_a_request_that_kills_two_engines_is_poison() -> None:
    world = three_engines()
    world.feed(arrive("r1"))
    world.feed(fail("r1", 1, engine_down=True, engine_died=True))
    (ended,) = (
        e
        for e in world.effects(fail("r1", 2, engine_down=True, engine_died=True))
        if isinstance(e, fx.RequestEnded)
    )
    assert ended.failure is not None
    assert ended.failure.reason is ErrorReason.POISON_REQUEST


def test_a_request_alone_on_the_engine_is_suspect_even_after_output() -> None:
    world = three_engines()
    world.feed(arrive("r1"))
    for epoch, tokens in ((1, 4), (2, 9)):
        world.feed(ev.AttemptProgressed("r1", epoch))
        last = world.effects(fail("r1", epoch, engine_down=True, engine_died=True, output_token_count=tokens))
    assert any(
        isinstance(e, fx.RequestEnded) and e.failure and e.failure.reason is ErrorReason.POISON_REQUEST
        for e in last
    )


def test_bystanders_of_two_deaths_go_on() -> None:
    # Fifty requests on two engines, all with output; both engines die, and a third is there.
    world = World()
    world.feed(healthy("a"), healthy("b"))
    ids = [f"r{number}" for number in range(50)]
    for request_id in ids:
        world.feed(arrive(request_id, max_tokens=100))
        world.feed(ev.AttemptProgressed(request_id, 1))
    world.feed(healthy("c"))
    for instance_id in ("a", "b"):
        there = list(world.instance(instance_id).in_flight.values())
        assert there
        for record in there:
            world.feed(
                fail(
                    record.request_id, record.epoch, engine_down=True, engine_died=True, output_token_count=5
                )
            )
            if record.state is RequestState.DISPATCHED:
                world.feed(ev.AttemptProgressed(record.request_id, record.epoch))
    assert all(not world.record(request_id).state.is_terminal for request_id in ids)


def restored(world: World, slo_deadline_ms: float | None = None, **fields: Any) -> list[fx.Effect]:
    metadata = make_metadata("r1", slo_deadline_ms=slo_deadline_ms)
    fields = {"arrival_s": world.now, "size_bytes": 5, **fields}
    return world.effects(ev.RequestsRestored((ev.RestoredRequest(metadata, "m", **fields),)))


def test_a_restored_request_waits_before_there_is_any_instance_and_then_runs() -> None:
    world = World()
    assert [type(e) for e in restored(world, epoch=1, lost_instance_ids=("a",))] == [fx.RequestAccepted]
    assert world.record("r1").queued
    lines = world.feed(healthy("a"))
    assert "dispatch r1#2 a" in lines


def test_a_restored_request_keeps_its_deadline() -> None:
    world = World()
    world.feed(healthy("a"))
    effects = restored(world, arrival_s=world.now - 10.0, slo_deadline_ms=5_000.0)
    assert [type(e) for e in effects] == [fx.RequestAccepted, fx.RequestEnded]
    assert effects[1].state is RequestState.EXPIRED  # type: ignore[union-attr]


def test_a_restored_request_that_cannot_go_on_after_its_output_fails() -> None:
    world = World()
    world.feed(healthy("a"))
    effects = restored(world, epoch=1, has_output=True, output_token_count=7, cannot_continue=TOOLS)
    assert [type(e) for e in effects] == [fx.RequestAccepted, fx.RequestEnded]
    assert effects[1].state is RequestState.FAILED  # type: ignore[union-attr]


def test_work_that_is_out_of_time_is_not_started_however_late_that_is_noticed() -> None:
    world = World()
    world.feed(healthy("a"))
    world.instance("a").concurrency_limit = 1
    world.feed(arrive("r1"), arrive("r2", slo_deadline_ms=1_000.0))
    world.now += 30.0  # As after a pause of the whole process: no timer ran.
    lines = world.feed(ev.AttemptSucceeded("r1", 1, 5))
    assert "end r2 EXPIRED" in lines
    assert not [line for line in lines if line.startswith("dispatch")]
