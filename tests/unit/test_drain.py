"""Drains: when they are refused, what they move and when, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.drain import RETRY_S
from sagecp.core.errors import (
    DrainRefusedError,
    ErrorReason,
    Failure,
    InstanceNotFoundError,
    SageError,
    StaleIncarnationError,
)
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.types import EngineCondition, FailoverMode, InstanceState, PromptDigest
from tests.support.core_world import STEP_TIME, World, arrive, beat, fail, healthy, make_metadata, probe

SLOW = StepTimeParameters(**{name: 20.0 * value for name, value in asdict(STEP_TIME).items()})
MOVED = Failure(ErrorReason.SHUTTING_DOWN, "moved")
FOREVER_S = 3600.0


def drain(instance_id: str = "a", **order: Any) -> ev.DrainRequested:
    return ev.DrainRequested(instance_id, **order)


def undo(instance_id: str = "a") -> ev.DrainRequested:
    return ev.DrainRequested(instance_id, undo=True)


def moved(request_id: str, epoch: int = 1, **more: Any) -> ev.AttemptFailed:
    """What comes of an attempt that was interrupted."""
    return fail(request_id, epoch, MOVED, counts_against_engine=False, counts=False, **more)


def done(request_id: str, epoch: int = 1) -> ev.AttemptSucceeded:
    return ev.AttemptSucceeded(request_id, epoch, 16)


def state(world: World, instance_id: str = "a") -> str:
    return world.instance(instance_id).state.name


def world_of(*registrations: ev.InstanceRegistered, **config: Any) -> World:
    world = World(**config)
    world.feed(*registrations)
    return world


def busy_world(**request: Any) -> World:
    """``a`` runs ``r1``; ``b`` has nothing to do."""
    world = world_of(healthy("a"))
    assert world.feed(arrive("r1", **request)) == ["accept r1", "dispatch r1#1 a"]
    world.feed(healthy("b"))
    return world


# -- whether the rest could carry the load ----------------------------------------------------------


@dataclass
class Case:
    """A fleet with work, an order, and what it is refused for (``""``: it is not)."""

    name: str
    prepare: Callable[[World], Any]
    refused_for: str = ""


def fleet(*registrations: ev.InstanceRegistered, then: tuple[ev.Event, ...] = ()) -> Callable[[World], Any]:
    return lambda world: world.feed(*registrations, *then)


def loaded(count: int, *registrations: ev.InstanceRegistered, **request: Any) -> Callable[[World], Any]:
    """All on ``a``: the others register later."""

    def prepare(world: World) -> None:
        world.feed(healthy("a", limit=8))
        world.feed(*(arrive(f"r{number}", **request) for number in range(count)))
        world.feed(*registrations)

    return prepare


def prefilling(seconds: float, count: int, instance_count: int = 2) -> Callable[[World], Any]:
    """Some of the instances, ``a`` first, do nothing but prefill for a while."""

    def prepare(world: World) -> None:
        for instance_id in "abcd"[:instance_count]:
            world.feed(healthy(instance_id, step_time=STEP_TIME))
        world.feed(*(arrive(f"r{number}") for number in range(count)))
        world.wait(seconds)

    return prepare


def full_cache(world: World) -> None:
    world.feed(healthy("a"), healthy("b", incarnation=1), arrive("r1"), arrive("r2"))
    assert world.instance("b").in_flight_count == 1
    world.feed(beat("b", 1, key_value_cache_usage=0.99))


CASES = [
    Case("the last instance, though idle", fleet(healthy("a")), "no other READY instance serves 'm'"),
    Case("one of two", fleet(healthy("a"), healthy("b"))),
    Case("the other serves another model", fleet(healthy("a"), healthy("b", "n")), "serves 'm'"),
    Case(
        "an alias that the other lacks",
        fleet(healthy("a", model_aliases=("lora",)), healthy("b")),
        "no other READY instance serves 'lora'",
    ),
    Case(
        "a name that the other has as an alias",
        fleet(healthy("a"), healthy("b", "n", model_aliases=("m",))),
    ),
    Case(
        "the other is loading",
        fleet(healthy("a"), ev.InstanceRegistered(healthy("b").instance)),
        "no other READY",
    ),
    Case(
        "the other is unhealthy",
        fleet(healthy("a"), healthy("b"), then=(probe("b", EngineCondition.UNHEALTHY),)),
        "no other READY",
    ),
    Case(
        "the other drains already",
        fleet(healthy("a"), healthy("b"), then=(drain("b", force=True),)),
        "no other READY",
    ),
    Case(
        "a broken one whose model nobody else serves",
        fleet(healthy("a"), then=(probe("a", EngineCondition.UNHEALTHY),)),
        "no other READY",
    ),
    Case("as many places as there are requests", loaded(3, healthy("b", limit=3))),
    Case(
        "a place too few",
        loaded(3, healthy("b", limit=2)),
        "of 'm' 3 requests run there and 0 wait, and the rest (1 READY) has 2 free places",
    ),
    Case("places on several", loaded(3, healthy("b", limit=2), healthy("c", limit=1))),
    Case(
        "what waits counts as well",
        fleet(
            healthy("a", limit=1),
            healthy("b", limit=1),
            then=(*(arrive(f"r{number}") for number in range(3)), healthy("b", limit=2)),
        ),
        "1 requests run there and",
    ),
    Case("a full cache has no places", full_cache, "the rest (1 READY) has 0 free places"),
    Case("tokens enough", loaded(2, healthy("b", capacity=2000), max_tokens=100)),
    Case(
        "tokens too few",
        loaded(4, healthy("b", capacity=300), max_tokens=100),
        "tokens of KV cache, and the rest (1 READY) has 300 free",
    ),
    Case(
        "a prompt that is too long for the rest",
        loaded(1, healthy("b", max_context_token_count=100), prompt="x" * 4000),
        "and none of the rest (1 READY) can hold more than 100",
    ),
    Case("some prefill everywhere", prefilling(2.0, count=2)),
    Case("nothing but prefill on one, and the other idle", prefilling(60.0, count=1)),
    Case(
        "nothing but prefill everywhere",
        prefilling(60.0, count=2),
        "prefill took 100% of its recent time, and the rest has time for 0% until it is 90% busy with it",
    ),
    Case("half the time of two", prefilling(3.5, count=2), "prefill took 50% of its recent time"),
    Case("half the time of four", prefilling(3.5, count=4, instance_count=4)),
]


@pytest.mark.parametrize("case", [each for each in CASES if each.refused_for], ids=lambda case: case.name)
def test_a_drain_is_refused_when_the_rest_could_not_carry_the_load(case: Case) -> None:
    world = World()
    case.prepare(world)
    before = state(world)
    with pytest.raises(DrainRefusedError) as caught:
        world.feed(drain())
    error = caught.value
    assert case.refused_for in error.message
    assert "force" in error.message
    assert error.reason is ErrorReason.DRAIN_REFUSED
    assert error.metadata["instance_id"] == "a"
    assert (state(world), world.instance("a").drain) == (before, None), "refused, and yet it drains"
    world.feed(drain(force=True))
    assert state(world) in {"DRAINING", "DRAINED"}


@pytest.mark.parametrize("case", [each for each in CASES if not each.refused_for], ids=lambda case: case.name)
def test_a_drain_is_granted_when_the_rest_can_carry_the_load(case: Case) -> None:
    world = World()
    case.prepare(world)
    world.feed(drain())
    assert state(world) in {"DRAINING", "DRAINED"}


def test_an_instance_that_takes_no_work_hands_on_only_what_runs_there() -> None:
    """What waits, waits for others already."""
    world = world_of(healthy("a", limit=1), healthy("b", limit=1))
    world.feed(*(arrive(f"r{number}") for number in range(9)))
    world.feed(probe("a", EngineCondition.UNHEALTHY), healthy("b", limit=2))
    assert world.instance("b").in_flight_count == 2
    with pytest.raises(DrainRefusedError, match="1 requests run there and 0 wait"):
        world.feed(drain())
    world.feed(done("r1"))
    for number in range(2, 9):
        world.feed(ev.RequestCancelled(f"r{number}"))
    assert world.feed(drain()) == ["a UNHEALTHY>DRAINING"]


# -- the order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("incarnation", "error"), [(0, None), (5, None), (4, StaleIncarnationError), (6, InstanceNotFoundError)]
)
@pytest.mark.parametrize("is_undo", [False, True])
def test_an_order_for_another_incarnation_is_refused(
    incarnation: int, error: type[SageError] | None, is_undo: bool
) -> None:
    world = world_of(healthy("a", incarnation=5), healthy("b"))
    if is_undo:
        world.feed(drain())
    before = state(world)
    event = drain(incarnation=incarnation, undo=is_undo)
    if error is None:
        assert world.feed(event)
        assert state(world) != before
    else:
        with pytest.raises(error):
            world.feed(event)
        assert state(world) == before


def test_a_repetition_changes_nothing() -> None:
    world = busy_world()
    assert world.feed(drain(grace_s=30.0, cause="upgrade")) == ["a READY>DRAINING"]
    assert world.instance("a").state_reason == "drain requested: upgrade"
    world.now += 10.0
    assert world.feed(drain(grace_s=30.0)) == []
    order = world.instance("a").drain
    assert order is not None
    assert (order.begin_s, order.grace_end_s, order.cause, order.forced) == (0.0, 30.0, "upgrade", False)
    assert world.scheduler.next_timer_s() == 30.0


@pytest.mark.parametrize(("grace_s", "moved_at_s"), [(5.0, 15.0), (60.0, 70.0), (0.0, 10.0), (None, None)])
def test_another_grace_time_counts_from_the_request(grace_s: float | None, moved_at_s: float | None) -> None:
    world = busy_world()
    world.feed(drain(grace_s=30.0))
    world.now = 10.0
    found = world.feed(drain(grace_s=grace_s, force=True))
    order = world.instance("a").drain
    assert order is not None
    assert order.forced
    assert order.grace_end_s == moved_at_s
    if grace_s == 0.0:
        assert found == ["interrupt r1#1 a"]
    elif moved_at_s is not None:
        assert world.wait(moved_at_s - 10.0 - 0.5) == []
        assert world.wait(0.5) == ["interrupt r1#1 a"]
    else:
        assert world.scheduler.next_timer_s() == world.record("r1").expire_s
        assert world.wait(FOREVER_S) == []


def test_an_order_that_is_changed_for_ever_takes_no_more_memory() -> None:
    world = busy_world()
    for number in range(500):
        world.feed(drain(grace_s=100.0 + number))
    assert len(world.scheduler._drains._timers) < 20
    assert world.scheduler.next_timer_s() == 599.0


def test_force_stays() -> None:
    world = world_of(healthy("a"))
    world.feed(drain(force=True))
    world.feed(drain())
    order = world.instance("a").drain
    assert order is not None
    assert order.forced


def test_to_undo_what_was_not_ordered_changes_nothing() -> None:
    world = world_of(healthy("a"))
    assert world.feed(undo()) == []
    assert state(world) == "READY"


# -- moving what runs ---------------------------------------------------------------------------------


def test_without_a_grace_time_nothing_is_moved() -> None:
    world = busy_world()
    world.feed(drain())
    assert world.scheduler.next_timer_s() == world.record("r1").expire_s
    assert world.wait(FOREVER_S) == []
    assert world.feed(done("r1")) == ["end r1 SUCCEEDED", "a DRAINING>DRAINED"]


def test_what_runs_is_moved_when_the_grace_time_is_over() -> None:
    world = busy_world()
    assert world.feed(drain(grace_s=30.0)) == ["a READY>DRAINING"]
    assert world.scheduler.next_timer_s() == 30.0
    assert world.wait(29.9) == []
    world.now = 30.0
    [effect] = world.effects(ev.ClockAdvanced())
    assert isinstance(effect, fx.InterruptAttempt)
    assert (effect.request_id, effect.epoch, effect.instance_id) == ("r1", 1, "a")
    assert not effect.must_stop
    assert not effect.counts
    assert "'a' is drained" in effect.failure.message
    # It is not lost until it says so, and asked again meanwhile.
    assert world.wait(RETRY_S / 2) == []
    assert world.wait(RETRY_S / 2) == ["interrupt r1#1 a"]
    assert state(world) == "DRAINING"
    assert world.feed(moved("r1", output_token_count=7)) == [
        "requeue r1",
        "a DRAINING>DRAINED",
        "dispatch r1#2 b",
    ]
    order = world.instance("a").drain
    assert order is not None
    assert order.moved_request_count == 1
    assert world.record("r1").lost_attempt_count == 0, "a move is not its loss"


def test_a_grace_time_of_zero_moves_at_once() -> None:
    world = busy_world()
    assert world.feed(drain(grace_s=0.0)) == ["a READY>DRAINING", "interrupt r1#1 a"]
    assert world.feed(moved("r1")) == ["requeue r1", "a DRAINING>DRAINED", "dispatch r1#2 b"]


def test_what_ended_by_itself_is_not_moved() -> None:
    world = busy_world()
    world.feed(drain(grace_s=30.0))
    assert world.feed(done("r1")) == ["end r1 SUCCEEDED", "a DRAINING>DRAINED"]
    assert world.scheduler.next_timer_s() is None
    assert world.wait(31.0) == []


def test_what_its_engine_loses_is_not_counted_as_moved() -> None:
    world = busy_world()
    world.feed(drain(grace_s=30.0))
    assert world.feed(fail("r1")) == ["requeue r1", "a DRAINING>DRAINED", "dispatch r1#2 b"]
    order = world.instance("a").drain
    assert order is not None
    assert order.moved_request_count == 0


def test_to_undo_in_the_grace_time_lets_everything_run_on() -> None:
    world = busy_world()
    world.feed(drain(grace_s=30.0))
    assert world.feed(undo()) == ["a DRAINING>READY"]
    assert world.scheduler.next_timer_s() == world.record("r1").expire_s
    assert world.wait(60.0) == []
    # The next order is one of its own.
    assert world.feed(drain(grace_s=30.0)) == ["a READY>DRAINING"]
    assert world.wait(29.0) == []
    assert world.wait(1.0) == ["interrupt r1#1 a"]


def test_another_drain_asks_for_a_move_again() -> None:
    world = busy_world()
    world.feed(drain(grace_s=0.0), undo())
    assert world.feed(drain(grace_s=0.0)) == ["a READY>DRAINING", "interrupt r1#1 a"]


@pytest.mark.parametrize(
    ("mode", "has_output", "is_moved"),
    [
        (FailoverMode.DEFAULT, True, True),
        (FailoverMode.CONTINUE, True, True),
        (FailoverMode.RESTART, False, True),
        (FailoverMode.RESTART, True, False),
        (FailoverMode.FAIL, False, False),
        (FailoverMode.FAIL, True, False),
    ],
)
def test_what_would_fail_by_a_move_finishes_where_it_is(
    mode: FailoverMode, has_output: bool, is_moved: bool
) -> None:
    world = busy_world(failover_mode=mode)
    if has_output:
        world.feed(ev.AttemptProgressed("r1", 1))
    found = world.feed(drain(grace_s=0.0))
    assert ("interrupt r1#1 a" in found) == is_moved
    assert world.wait(60.0) == (["interrupt r1#1 a"] if is_moved else [])
    assert world.feed(done("r1")) == ["end r1 SUCCEEDED", "a DRAINING>DRAINED"]


def test_what_has_nowhere_to_go_runs_on_until_there_is_a_place() -> None:
    world = world_of(healthy("a"))
    world.feed(arrive("r1"), arrive("r2"))
    assert world.feed(drain(grace_s=10.0, force=True)) == ["a READY>DRAINING"]
    assert world.wait(10.0) == []
    assert world.scheduler.next_timer_s() == 10.0 + RETRY_S
    assert world.feed(done("r2")) == ["end r2 SUCCEEDED"]
    assert world.wait(RETRY_S) == []
    world.feed(ev.InstanceRegistered(healthy("b").instance))
    assert world.wait(RETRY_S) == [], "it is not ready"
    world.feed(probe("b"))
    assert world.wait(RETRY_S) == ["interrupt r1#1 a"]


def test_a_prompt_too_long_for_the_rest_is_not_moved_there() -> None:
    world = world_of(healthy("a"))
    world.feed(arrive("long", prompt="x" * 4000), arrive("short"))
    world.feed(healthy("b", max_context_token_count=100))
    assert world.feed(drain(grace_s=0.0, force=True)) == ["a READY>DRAINING", "interrupt short#1 a"]
    world.feed(moved("short"), healthy("c"))
    assert world.wait(RETRY_S) == ["interrupt long#1 a"]


def test_everything_movable_is_moved_together() -> None:
    world = world_of(healthy("a", limit=8))
    world.feed(*(arrive(f"r{number}") for number in range(6)), healthy("b", limit=8))
    found = world.feed(drain(grace_s=0.0))
    assert found == ["a READY>DRAINING", *(f"interrupt r{number}#1 a" for number in range(6))]
    for number in range(6):
        world.feed(moved(f"r{number}"))
    assert state(world) == "DRAINED"
    assert set(world.instance("b").in_flight) == {f"r{number}" for number in range(6)}


# -- what an order outlasts ---------------------------------------------------------------------------


def test_an_order_outlasts_a_lease_and_moves_meanwhile() -> None:
    world = world_of(healthy("a", incarnation=1))
    world.feed(arrive("r1"), healthy("b"))
    world.feed(drain(grace_s=30.0))
    assert world.wait(6.0) == ["a DRAINING>LOST"]
    assert world.wait(24.0) == ["interrupt r1#1 a"]
    assert world.feed(moved("r1")) == ["requeue r1", "dispatch r1#2 b"]
    assert world.feed(beat("a", 1)) == ["a LOST>DRAINING", "a DRAINING>DRAINED"]


def test_an_order_outlasts_a_new_registration_with_its_grace_time() -> None:
    world = world_of(healthy("a", incarnation=1))
    world.feed(arrive("r1"), healthy("b"))
    world.feed(drain(grace_s=5.0, cause="upgrade"))
    world.wait(4.0)
    world.feed(healthy("a", incarnation=2))
    assert state(world) == "DRAINING"
    assert world.wait(1.0) == ["interrupt r1#1 a"]
    order = world.instance("a").drain
    assert order is not None
    assert order.cause == "upgrade"


def test_an_order_outlasts_a_restart_of_the_control_plane() -> None:
    """Nothing runs there any more as far as it is concerned, so that there is no grace time to keep."""
    world = World()
    world.feed(ev.InstanceRestored(healthy("a").instance, 5, draining=True))
    assert state(world) == "DRAINED"
    world.feed(beat("a", 5), ev.RequestsRestored((ev.RestoredRequest(make_metadata("r1"), "m", -1.0, 10),)))
    assert state(world) == "DRAINED"
    assert world.record("r1").queued
    assert world.feed(undo()) == ["a DRAINED>READY", "dispatch r1#1 a"]


def test_deregistration_ends_an_order() -> None:
    world = busy_world()
    world.feed(drain(grace_s=5.0), ev.InstanceDeregistered("a"))
    assert world.wait(5.0) == []
    world.feed(healthy("a"))
    assert state(world) == "READY"
    assert world.wait(5.0) == []


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (EngineCondition.HEALTHY, InstanceState.READY),
        (EngineCondition.UNHEALTHY, InstanceState.UNHEALTHY),
        (EngineCondition.STARTING, InstanceState.STARTING),
    ],
)
def test_to_undo_leads_to_where_the_engine_is(condition: EngineCondition, expected: InstanceState) -> None:
    world = world_of(healthy("a"), healthy("b"))
    world.feed(drain(), probe("a", condition))
    assert state(world) == "DRAINED"
    world.feed(undo())
    assert world.instance("a").state is expected


# -- what waits for it --------------------------------------------------------------------------------


def test_requests_that_wait_for_it_go_elsewhere_at_once() -> None:
    world = world_of(healthy("a", step_time=STEP_TIME), scheduling_policy="slo_aware")
    world.feed(arrive("r1", prompt_digest=PromptDigest(9000), max_tokens=4))
    world.feed(healthy("b", step_time=SLOW, gpu_name="slow"))
    assert world.feed(arrive("r2", prompt_digest=PromptDigest(1000), max_tokens=4)) == ["accept r2"]
    assert world.record("r2").waits_for == "a"
    assert world.feed(drain()) == ["a READY>DRAINING", "dispatch r2#1 b"]


@pytest.mark.parametrize("strategy", ["affinity", "locality"])
def test_neither_a_session_nor_a_cached_prompt_holds_on_to_it(strategy: str) -> None:
    world = world_of(*(healthy(each) for each in "abc"), routing_strategy=strategy)
    asked = {"session_id": "s", "prompt": "x" * 5000}
    [_, dispatch] = world.feed(arrive("r1", **asked))
    home = dispatch.split()[-1]
    assert world.feed(arrive("r2", **asked))[-1].endswith(home)
    world.feed(drain(home))
    [_, dispatch] = world.feed(arrive("r3", **asked))
    assert not dispatch.endswith(home)
