"""Instances that fail or hang leave the rotation, and probes bring them back: events in, effects out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.health_limits import HealthLimits
from sagecp.core.types import EngineCondition, InstanceState
from tests.support.core_world import (
    REJECTED,
    STEP_TIME,
    World,
    arrive,
    beat,
    dispatched_to,
    fail,
    healthy,
    probe,
)

NUMBERS = itertools.count(1)
READY, UNHEALTHY, LOST = InstanceState.READY, InstanceState.UNHEALTHY, InstanceState.LOST


def world_of(*instance_ids: str, **config: Any) -> World:
    """READY instances with agents, of a kind that is known, that take all the work they are given."""
    world = World(
        load_balancer="least_connections",
        default_concurrency_limit=50,
        parameters={"dispatch.prefill_window_s": 3600.0},
        **config,
    )
    for instance_id in instance_ids:
        world.feed(healthy(instance_id, incarnation=1, step_time=STEP_TIME))
    return world


def run_on(world: World, instance_id: str, count: int = 1, **fields: Any) -> list[str]:
    """Have requests dispatched to an instance; those that go elsewhere succeed at once."""
    running: list[str] = []
    while len(running) < count:
        request_id = f"r{next(NUMBERS)}"
        world.feed(arrive(request_id, **fields))
        record = world.record(request_id)
        assert record.instance_id, f"{request_id} waits"
        if record.instance_id == instance_id:
            running.append(request_id)
    for request_id in [
        record.request_id
        for record in list(world.scheduler.requests())
        if record.instance_id != instance_id and not record.queued
    ]:
        world.feed(ev.AttemptSucceeded(request_id, world.record(request_id).epoch, 1))
    return running


def break_down(world: World, instance_id: str, count: int = 5, **fields: Any) -> list[str]:
    """Let attempts on an instance fail, one after another, for good, as long as it gets any."""
    fields.setdefault("retryable", False)
    lines: list[str] = []
    for _ in range(count):
        if world.instance(instance_id).state is not READY:
            break
        (request_id,) = run_on(world, instance_id)
        lines += world.feed(fail(request_id, world.record(request_id).epoch, **fields))
    return [line for line in lines if not line.startswith("end")]


def answer(world: World, instance_id: str, *, answered: bool = True) -> list[str]:
    return world.feed(ev.EngineProbed(instance_id, answered, "" if answered else "500"))


def keep_alive(world: World, duration_s: float) -> list[str]:
    """Let time pass with every agent beating once a second."""
    lines = []
    end_s = world.now + duration_s
    while world.now < end_s:
        for instance in list(world.scheduler.fleet):
            if instance.incarnation:
                lines += world.feed(beat(instance.instance_id, instance.incarnation, instance.condition))
        lines += world.wait(min(1.0, end_s - world.now))
    return lines


# -- ejection ------------------------------------------------------------------------


def test_five_failures_in_a_row_eject_an_instance() -> None:
    world = world_of("a", "b")
    assert break_down(world, "a", 4) == []
    assert break_down(world, "a", 1) == ["a READY>UNHEALTHY"]
    assert world.instance("a").state_reason == (
        "ejected: 5 attempts in a row failed, the last with ENGINE_FAILED; out for 30 s, then a probe"
    )
    assert set(dispatched_to(world.feed(*[arrive(f"x{n}") for n in range(4)]))) == {"b"}


@pytest.mark.parametrize(
    "kind",
    [
        {"failure": REJECTED, "counts_against_engine": False},
        {"failure": Failure(ErrorReason.ENGINE_FAILED, "it is full"), "counts_against_engine": False},
    ],
)
def test_what_is_not_the_engines_fault_never_ejects_it(kind: dict[str, Any]) -> None:
    world = world_of("a", "b")
    assert break_down(world, "a", 50, **kind) == []
    assert world.instance("a").state is READY


def test_a_success_in_between_resets_the_count() -> None:
    world = world_of("a", "b")
    break_down(world, "a", 4)
    (request_id,) = run_on(world, "a")
    world.feed(ev.AttemptSucceeded(request_id, 1, 1))
    assert break_down(world, "a", 4) == []
    assert break_down(world, "a", 1) == ["a READY>UNHEALTHY"]


def test_neither_heartbeats_nor_health_checks_end_an_ejection() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    assert world.feed(beat("a", 1), probe("a")) == []
    assert world.instance("a").state is UNHEALTHY
    assert world.instance("a").state_reason.startswith("ejected: 5 attempts")


def test_two_probes_that_are_answered_bring_it_back() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    assert "probe a" not in keep_alive(world, 29.0)
    assert "probe a" in keep_alive(world, 2.0)
    assert answer(world, "a") == []
    assert "probe a" in keep_alive(world, 2.0)
    assert answer(world, "a") == ["a UNHEALTHY>READY"]
    assert world.instance("a").state_reason == "the engine answers"


def test_a_probe_that_fails_prolongs_an_ejection() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    keep_alive(world, 31.0)
    assert answer(world, "a", answered=False) == []
    assert world.instance("a").state_reason == "ejected: a probe failed (500); out for 60 s, then a probe"
    assert "probe a" not in keep_alive(world, 59.0)
    assert "probe a" in keep_alive(world, 2.0)


def test_the_last_instance_of_a_model_is_never_ejected() -> None:
    world = world_of("a")
    assert break_down(world, "a", 7) == []
    assert world.instance("a").state is READY
    assert world.instance("a").state_reason == (
        "7 attempts in a row failed, the last with ENGINE_FAILED; "
        "not ejected: no other READY instance serves 'm'"
    )
    (request_id,) = run_on(world, "a")
    world.feed(ev.AttemptSucceeded(request_id, 1, 1))
    assert world.instance("a").state_reason == "attempts run to their ends again"


def test_the_last_instance_of_an_alias_is_not_ejected_either() -> None:
    world = world_of("b")
    world.feed(healthy("a", model_aliases=("other",), step_time=STEP_TIME))
    assert break_down(world, "a", 7) == []


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(2, 0.5, 1), (3, 0.5, 1), (4, 0.5, 2), (5, 0.5, 2), (4, 0.1, 1), (4, 1.0, 3), (9, 0.34, 3)],
)
def test_only_so_many_instances_are_out_at_once(count: int, share: float, expected: int) -> None:
    world = world_of(*[f"i{number}" for number in range(count)], health=HealthLimits(max_ejected_share=share))
    for number in range(count):
        break_down(world, f"i{number}", 6)
    states = [each.state for each in world.scheduler.fleet]
    assert states == [UNHEALTHY] * expected + [READY] * (count - expected)
    assert "not ejected: " in world.instance(f"i{count - 1}").state_reason


def test_an_instance_that_keeps_failing_goes_when_there_is_room() -> None:
    world = world_of("a", "b", "c")
    break_down(world, "a")
    break_down(world, "b", 6)
    assert world.instance("b").state_reason.endswith(
        "not ejected: 1 of 3 instances for 'm' are out, of at most 50%"
    )
    keep_alive(world, 31.0)
    answer(world, "a")
    keep_alive(world, 2.0)
    answer(world, "a")
    assert break_down(world, "b", 1) == ["b READY>UNHEALTHY"]


def test_those_that_are_out_are_probed_at_once_when_nobody_else_is_left() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    world.feed(probe("b", EngineCondition.UNHEALTHY))
    assert world.feed(ev.ClockAdvanced()) == ["probe a"]


def test_a_dead_engine_is_out_at_once_and_back_at_once() -> None:
    """What a probe of its port can tell needs no five failures, and no half minute."""
    world = world_of("a", "b")
    requests = run_on(world, "a", 3)
    lines = [line for r in requests for line in world.feed(fail(r, retryable=False, engine_down=True))]
    assert [line for line in lines if line.startswith("a ")] == ["a READY>UNHEALTHY"]
    assert world.instance("a").health.failure_count == 1
    assert world.feed(probe("a")) == ["a UNHEALTHY>READY"]


def test_a_call_that_found_nobody_although_the_engine_lives_is_a_failure_and_no_fall() -> None:
    world = world_of("a", "b")
    for _ in range(4):
        assert break_down(world, "a", 1, engine_down=True) == ["a READY>UNHEALTHY"]
        world.now += 0.1
        assert world.feed(probe("a")) == ["a UNHEALTHY>READY"]
    assert break_down(world, "a", 1, engine_down=True) == ["a READY>UNHEALTHY"]
    assert world.instance("a").state_reason.startswith("ejected: 5 attempts in a row failed")


def test_an_engine_that_is_dead_for_longer_each_time_has_fallen_each_time() -> None:
    world = world_of("a", "b")
    for hold_s in (0.0, 5.0, 10.0):
        assert break_down(world, "a", 1, engine_down=True) == ["a READY>UNHEALTHY"]
        keep_alive(world, 1.1)
        lines = world.feed(probe("a"))
        assert lines == ([] if hold_s else ["a UNHEALTHY>READY"])
        keep_alive(world, hold_s)
        assert world.instance("a").state is READY


def test_failures_of_an_instance_that_drains_eject_nothing() -> None:
    world = world_of("a", "b")
    requests = run_on(world, "a", 4)
    world.feed(ev.DrainRequested("a"))
    for request_id in requests:
        world.feed(fail(request_id, retryable=False))
    assert world.instance("a").state is InstanceState.DRAINED
    assert world.instance("a").health.outage is None


def test_an_ejection_outlasts_a_drain() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    assert world.feed(ev.DrainRequested("a", force=True)) == ["a UNHEALTHY>DRAINING", "a DRAINING>DRAINED"]
    assert world.feed(ev.DrainRequested("a", undo=True)) == ["a DRAINED>UNHEALTHY"]
    assert world.instance("a").state_reason.startswith("ejected: ")


def test_a_new_engine_is_probed_at_once() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    assert world.feed(healthy("a", incarnation=2)) == ["a ->STARTING", "a STARTING>UNHEALTHY"]
    assert world.feed(ev.ClockAdvanced()) == ["probe a"]


def test_a_new_registration_after_a_removal_begins_with_a_clean_slate() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    world.feed(ev.InstanceDeregistered("a"))
    assert world.feed(healthy("a", incarnation=2)) == ["a ->STARTING", "a STARTING>READY"]
    assert keep_alive(world, 40.0) == []


def test_an_instance_that_comes_back_lost_is_still_out() -> None:
    world = world_of("a", "b")
    break_down(world, "a")
    lines = []
    for _ in range(7):
        world.feed(beat("b", 1))
        lines += world.wait(1.0)
    assert lines == ["a UNHEALTHY>LOST"]
    assert world.feed(beat("a", 1)) == ["a LOST>UNHEALTHY"]
    assert world.instance("a").state_reason.startswith("ejected: ")


# -- stalls --------------------------------------------------------------------------


def silent(world: World, instance_id: str, silent_s: float) -> list[str]:
    """Let an instance have been silent since the clock was at 0, the agents being well."""
    keep_alive(world, silent_s - world.now)
    return world.feed(ev.EngineSilent(instance_id, silent_s))


def test_an_engine_that_is_silent_with_work_is_quarantined_and_its_work_moves() -> None:
    world = world_of("a", "b")
    first, second = run_on(world, "a", 2)
    world.feed(ev.AttemptProgressed(first, 1))
    assert silent(world, "a", 9.9) == []
    assert silent(world, "a", 10.0) == [
        "a READY>UNHEALTHY",
        f"interrupt {first}#1 a",
        f"interrupt {second}#1 a",
    ]
    assert world.instance("a").state_reason == "stalled: 2 requests run on it, and nothing came for 10 s"
    assert silent(world, "a", 11.0) == [], "asked once"
    world.feed(beat("a", 1), probe("a"))
    assert world.instance("a").state is UNHEALTHY
    lines = world.feed(fail(second), fail(first, output_token_count=3))
    assert dispatched_to(lines) == ["b", "b"]


def test_an_interrupted_attempt_must_stop_and_counts() -> None:
    world = world_of("a", "b")
    run_on(world, "a")
    keep_alive(world, 10.0)
    _, interrupt = world.effects(ev.EngineSilent("a", 10.0))
    assert isinstance(interrupt, fx.InterruptAttempt)
    assert interrupt.must_stop
    assert interrupt.counts
    assert interrupt.failure.reason is ErrorReason.ENGINE_TIMEOUT
    assert interrupt.failure.message == "instance a: the engine hangs, nothing came from it for 10 s"


def test_probes_bring_a_stalled_engine_back_within_seconds() -> None:
    world = world_of("a", "b")
    run_on(world, "a")
    silent(world, "a", 10.0)
    assert "probe a" in keep_alive(world, 2.0)
    assert answer(world, "a") == []
    assert "probe a" in keep_alive(world, 2.0)
    assert answer(world, "a") == ["a UNHEALTHY>READY"]


def test_a_long_prefill_is_no_stall() -> None:
    """A prompt of 200k tokens: some ten seconds by what is known of the engine."""
    world = world_of("a", "b")
    (request_id,) = run_on(world, "a", prompt="x" * 800_000)
    predicted_s = world.record(request_id).predicted_ttft_s
    assert predicted_s > 10.0
    assert silent(world, "a", 2.9 * predicted_s) == []
    assert silent(world, "a", 3.1 * predicted_s)[0] == "a READY>UNHEALTHY"


def test_an_engine_of_which_nothing_is_known_has_longer_for_its_first_token() -> None:
    """It may compile. Once it has delivered anything it is like any other."""
    for delivers, patience_s in ((False, 30.0), (True, 10.0)):
        world = World()
        world.feed(healthy("a", incarnation=1))
        world.feed(arrive("r"))
        if delivers:
            world.feed(ev.AttemptProgressed("r", 1))
        assert silent(world, "a", patience_s - 0.1) == []
        assert silent(world, "a", patience_s) == ["a READY>UNHEALTHY"]


def test_work_that_has_just_come_is_not_overdue() -> None:
    """The silence may be older: nothing was there to speak."""
    world = world_of("a", "b")
    run_on(world, "a")
    assert world.feed(ev.EngineSilent("a", 10.0)) == []


def test_new_work_does_not_hide_a_stall() -> None:
    """What is predicted for it grows with the silence; what ran before is overdue all the same."""
    world = world_of("a", "b")
    run_on(world, "a")
    for second in range(1, 10):
        silent(world, "a", float(second))
        run_on(world, "a")
    assert silent(world, "a", 10.5)[0] == "a READY>UNHEALTHY"


def test_an_engine_whose_figures_move_does_not_hang() -> None:
    """Others get their tokens from it: what is broken is our way to it."""
    world = world_of("a", "b")
    run_on(world, "a")
    for second in range(10):
        world.feed(beat("a", 1, running_request_count=1, generation_token_count=second))
        world.feed(beat("b", 1))
        world.wait(1.0)
    assert world.feed(ev.EngineSilent("a", 10.0)) == []
    assert world.instance("a").state is READY


def test_an_engine_without_work_of_ours_hangs_by_its_own_figures() -> None:
    world = world_of("a", "b")
    lines = []
    for _ in range(12):
        lines += world.feed(beat("a", 1, running_request_count=3, generation_token_count=77))
        lines += world.feed(beat("b", 1))
        world.wait(1.0)
    assert lines == ["a READY>UNHEALTHY"]
    assert world.instance("a").state_reason == (
        "stalled: its engine reports running requests, and no progress for 10 s"
    )


def test_figures_that_stand_still_while_our_streams_flow_are_stale() -> None:
    world = world_of("a", "b")
    run_on(world, "a")
    for _ in range(30):
        assert world.feed(beat("a", 1, running_request_count=3, generation_token_count=77)) == []
        world.feed(beat("b", 1))
        world.wait(1.0)
    assert world.instance("a").state is READY


def test_when_all_hang_all_are_quarantined_and_work_is_given_up_late() -> None:
    world = world_of("a", "b")
    (on_a,) = run_on(world, "a")
    world.feed(arrive("on-b"))
    assert world.record("on-b").instance_id == "b"
    keep_alive(world, 10.0)
    assert world.feed(ev.EngineSilent("a", 10.0)) == ["a READY>UNHEALTHY", f"interrupt {on_a}#1 a"]
    assert world.feed(ev.EngineSilent("b", 10.0)) == ["b READY>UNHEALTHY"]
    keep_alive(world, 19.0)
    assert world.feed(ev.EngineSilent("b", 29.0)) == []
    assert world.feed(ev.EngineSilent("b", 30.0)) == ["interrupt on-b#1 b"]


def test_work_moves_as_soon_as_there_is_an_elsewhere() -> None:
    world = world_of("a")
    (request_id,) = run_on(world, "a")
    assert silent(world, "a", 10.0) == ["a READY>UNHEALTHY"]
    world.feed(healthy("b", incarnation=1))
    assert silent(world, "a", 11.0) == [f"interrupt {request_id}#1 a"]


@pytest.mark.parametrize("condition", [EngineCondition.UNHEALTHY, EngineCondition.HEALTHY])
def test_work_moves_from_an_engine_that_is_out_already(condition: EngineCondition) -> None:
    """A frozen engine's agent may be the first to notice; its streams hang all the same."""
    world = world_of("a", "b")
    (request_id,) = run_on(world, "a")
    world.feed(ev.DrainRequested("a") if condition is EngineCondition.HEALTHY else beat("a", 1, condition))
    assert silent(world, "a", 10.0) == [f"interrupt {request_id}#1 a"]


def test_silence_of_what_is_unknown_or_idle_is_no_news() -> None:
    world = world_of("a")
    assert world.feed(ev.EngineSilent("a", 99.0), ev.EngineSilent("z", 99.0)) == []
    assert world.feed(ev.EngineProbed("a", answered=True), ev.EngineProbed("z", answered=True)) == []


# -- hold-downs ----------------------------------------------------------------------


def flap(world: World) -> list[str]:
    """The engine of an instance falls ill for a moment."""
    return world.feed(beat("a", 1, EngineCondition.UNHEALTHY), beat("a", 1))


def test_who_falls_out_again_and_again_is_held_back_for_longer_each_time() -> None:
    world = world_of("a", "b")
    assert flap(world) == ["a READY>UNHEALTHY", "a UNHEALTHY>READY"]
    for hold_s in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):
        assert flap(world) == ["a READY>UNHEALTHY"]
        fall_s = world.now
        assert "a UNHEALTHY>READY" not in keep_alive(world, hold_s - 0.5)
        assert world.instance("a").state_reason.endswith(f"now for {hold_s:g} s at least")
        assert "a UNHEALTHY>READY" in keep_alive(world, 1.0)
        assert world.now <= fall_s + hold_s + 1.0
    keep_alive(world, 60.0)
    assert flap(world) == ["a READY>UNHEALTHY", "a UNHEALTHY>READY"]


def test_the_only_instance_is_held_back_for_the_shortest_time() -> None:
    world = world_of("a")
    for _ in range(6):
        flap(world)
        keep_alive(world, 5.1)
        assert world.instance("a").state is READY


@pytest.mark.parametrize("leaves", [False, True])
def test_an_agent_that_restarts_again_and_again_is_held_back(leaves: bool) -> None:
    """With as few steps as a restart can have; whether it says goodbye or not."""
    world = world_of("a", "b")
    steps: list[list[str]] = []
    for incarnation in range(2, 7):
        if leaves and world.instance("a").state is READY:
            world.feed(ev.InstanceDeregistered("a"))
        steps.append(world.feed(healthy("a", incarnation=incarnation)))
        world.now += 1.0
    assert steps == [["a ->STARTING", "a STARTING>READY"], ["a ->STARTING"], [], [], []]
    assert world.instance("a").incarnation == 6
    # What is news is told.
    assert world.feed(healthy("a", incarnation=7, limit=3)) == ["a ->STARTING"]
    keep_alive(world, 61.0)
    assert world.instance("a").state is READY


def test_an_agent_that_never_gets_to_its_first_beat_is_held_back_as_well() -> None:
    world = world_of("b")
    spec = healthy("a").instance
    steps = []
    for incarnation in range(1, 6):
        steps.append(world.feed(ev.InstanceRegistered(spec, incarnation)))
        world.now += 0.5
    assert steps == [["a ->STARTING"], [], [], [], []]
    assert world.feed(beat("a", 5)) == []
    keep_alive(world, 61.0)
    assert world.instance("a").state is READY


def test_a_host_that_was_away_for_long_is_not_held_back() -> None:
    world = world_of("a", "b")
    for _ in range(120):
        world.feed(beat("b", 1))
        world.wait(1.0)
    assert world.instance("a").state is LOST
    assert world.feed(healthy("a", incarnation=2)) == ["a ->STARTING", "a STARTING>READY"]


def test_what_is_remembered_of_falls_is_bounded() -> None:
    world = World(max_instance_count=3)
    for number in range(50):
        world.feed(healthy(f"i{number}", incarnation=1), ev.InstanceDeregistered(f"i{number}"))
    assert list(world.scheduler._instances._hold_downs) == ["i47", "i48", "i49"]


# -- restarts ------------------------------------------------------------------------


@pytest.mark.parametrize("incarnation", [0, 3])
def test_a_restored_instance_must_show_that_it_lives(incarnation: int) -> None:
    world = World()
    spec = healthy("a").instance
    assert world.feed(ev.InstanceRestored(spec, incarnation)) == ["a ->STARTING"]
    record = world.instance("a")
    assert record.lease_expire_s == (6.0 if incarnation else None)
    assert record.is_probed is (incarnation == 0)
    assert world.feed(beat("a", 3) if incarnation else probe("a")) == ["a STARTING>READY"]


def test_a_restored_instance_whose_agent_is_gone_is_lost_after_one_lease() -> None:
    world = World()
    world.feed(ev.InstanceRestored(healthy("a").instance, 3))
    assert world.wait(5.9) == []
    assert world.wait(0.1) == ["a STARTING>LOST"]


def test_a_restored_drain_goes_on() -> None:
    world = World()
    lines = world.feed(ev.InstanceRestored(healthy("a").instance, 3, draining=True))
    assert lines == ["a ->STARTING", "a STARTING>DRAINING", "a DRAINING>DRAINED"]
    assert world.feed(beat("a", 3)) == []
