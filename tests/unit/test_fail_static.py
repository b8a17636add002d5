"""When most leases end together, instances stay where they are, as long as their engines answer."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core import events as ev
from sagecp.core.errors import StaleIncarnationError
from sagecp.core.health_limits import HealthLimits
from sagecp.core.types import EngineCondition, InstanceState
from tests.support.core_world import World, arrive, beat, dispatched_to, healthy, probe

READY, UNHEALTHY, LOST = InstanceState.READY, InstanceState.UNHEALTHY, InstanceState.LOST
LEASE_S = 6.0


def fleet_of(count: int, **limits: Any) -> World:
    """READY instances, whose beats are spread over a second."""
    world = World(health=HealthLimits(**limits))
    for number in range(count):
        world.now = number / count
        world.feed(healthy(f"i{number}", incarnation=1))
    return world


def pass_time(world: World, duration_s: float, *beating: str) -> list[str]:
    """Let time pass, in which only some agents are heard."""
    lines = []
    end_s = world.now + duration_s
    while world.now < end_s:
        world.now = min(end_s, world.now + 0.5)
        lines += world.feed(*[beat(instance_id, 1) for instance_id in beating], ev.ClockAdvanced())
    return lines


def states(world: World) -> list[InstanceState]:
    return [each.state for each in world.scheduler.fleet]


@pytest.mark.parametrize(
    ("count", "silent_count", "kept"),
    [
        (1, 1, False),  # Two say nothing: it may well be they.
        (2, 2, False),
        (3, 2, False),
        (3, 3, True),
        (5, 2, False),
        (5, 3, True),
        (20, 10, False),
        (20, 11, True),
        (100, 54, False),
        (100, 55, True),
    ],
)
def test_those_whose_leases_end_with_most_others_are_not_lost(
    count: int, silent_count: int, kept: bool
) -> None:
    world = fleet_of(count)
    beating = [f"i{number}" for number in range(silent_count, count)]
    lines = pass_time(world, LEASE_S + 2.0, *beating)
    if kept:
        assert lines == ["fail static on"]
        assert states(world) == [READY] * count
    else:
        assert sorted(lines) == sorted(f"i{number} READY>LOST" for number in range(silent_count))


@pytest.mark.parametrize(("count", "silent_count", "kept"), [(4, 4, True), (3, 3, False), (8, 5, False)])
def test_the_thresholds_can_be_set(count: int, silent_count: int, kept: bool) -> None:
    world = fleet_of(count, fail_static_share=0.7, fail_static_instance_count=4)
    pass_time(world, LEASE_S + 2.0, *[f"i{number}" for number in range(silent_count, count)])
    assert (states(world)[0] is READY) is kept


def test_it_says_what_happens() -> None:
    world = fleet_of(4)
    world.now = 10.0
    (change,) = world.effects(ev.ClockAdvanced())
    assert change.why == (  # type: ignore[union-attr]
        "heartbeats of 4 of 4 instances stopped together; they stay in the rotation as long as their engines "
        "answer the control plane"
    )


def test_instances_get_work_and_are_probed_meanwhile() -> None:
    world = fleet_of(3)
    assert not any(each.is_probed for each in world.scheduler.fleet)
    pass_time(world, 60.0)
    assert all(each.is_probed for each in world.scheduler.fleet)
    assert len(dispatched_to(world.feed(arrive("r1"), arrive("r2"), arrive("r3")))) == 3
    assert world.feed(probe("i0"), probe("i1")) == []


def test_those_whose_engines_do_not_answer_leave_first_the_rotation_then_the_fleet() -> None:
    world = fleet_of(4)
    pass_time(world, 10.0)
    assert world.feed(probe("i0", EngineCondition.UNHEALTHY)) == ["i0 READY>UNHEALTHY"]
    assert world.feed(probe("i0", EngineCondition.UNHEALTHY)) == []
    assert pass_time(world, LEASE_S - 0.5) == []
    assert pass_time(world, 0.5) == ["i0 UNHEALTHY>LOST"]
    assert world.instance("i0").state_reason == "no heartbeat, and its engine does not answer"
    assert not world.instance("i0").is_probed or world.instance("i0").unreachable
    assert states(world)[1:] == [READY] * 3
    # As any that is LOST: its agent must come back.
    assert world.feed(probe("i0")) == []
    assert world.feed(beat("i0", 1)) == ["i0 LOST>READY"]


def test_an_engine_that_answers_again_in_time_comes_back_without_its_agent() -> None:
    world = fleet_of(4)
    pass_time(world, 10.0)
    world.feed(probe("i0", EngineCondition.UNHEALTHY))
    pass_time(world, 3.0)
    assert world.feed(probe("i0")) == ["i0 UNHEALTHY>READY"]
    assert pass_time(world, 60.0) == []


def test_an_engine_that_was_ill_before_is_lost_as_ever() -> None:
    world = fleet_of(4)
    world.feed(beat("i3", 1, EngineCondition.UNHEALTHY))
    assert pass_time(world, LEASE_S + 2.0) == ["fail static on", "i3 UNHEALTHY>LOST"]


def test_it_ends_when_most_beat_again_and_the_rest_has_one_lease_more() -> None:
    world = fleet_of(5)
    pass_time(world, 30.0)
    assert pass_time(world, 5.0, "i0", "i1") == []
    assert pass_time(world, 3.0, "i0", "i1", "i2") == ["fail static off"]
    assert states(world) == [READY] * 5
    lines = pass_time(world, LEASE_S, "i0", "i1", "i2")
    assert lines == ["i3 READY>LOST", "i4 READY>LOST"]


def test_those_that_beat_again_in_time_are_never_lost() -> None:
    world = fleet_of(5)
    pass_time(world, 30.0)
    names = [f"i{number}" for number in range(5)]
    assert pass_time(world, 2.0, *names[:3]) == ["fail static off"]
    assert pass_time(world, 60.0, *names) == []
    assert not any(each.is_probed for each in world.scheduler.fleet)


def test_it_ends_with_the_last_of_those_it_kept() -> None:
    world = fleet_of(3)
    pass_time(world, 10.0)
    world.feed(*[probe(f"i{number}", EngineCondition.UNHEALTHY) for number in range(3)])
    lines = pass_time(world, LEASE_S + 1.0)
    assert sorted(lines[:-1]) == [f"i{number} UNHEALTHY>LOST" for number in range(3)]
    assert lines[-1] == "fail static off"


def test_a_slow_cascade_is_seen_within_a_lease() -> None:
    """One is lost; when the next two follow, more than half are gone within the time of a lease."""
    world = fleet_of(5)
    lines = pass_time(world, 3.0, "i1", "i2", "i3", "i4")
    lines += pass_time(world, 3.0, "i2", "i3", "i4")
    lines += pass_time(world, 20.0, "i3", "i4")
    assert lines == ["i0 READY>LOST", "fail static on"]
    assert states(world) == [LOST] + [READY] * 4
    assert pass_time(world, 2.0, "i2", "i3", "i4") == ["fail static off"]


def test_losses_that_are_far_apart_are_losses() -> None:
    world = fleet_of(5)
    names = [f"i{number}" for number in range(5)]
    lost = []
    for number in range(5):
        lost += pass_time(world, 20.0, *names[number + 1 :])
    assert lost == [f"{name} READY>LOST" for name in names]


def test_instances_without_an_agent_do_not_count() -> None:
    world = fleet_of(2)
    world.feed(*[healthy(f"own{number}") for number in range(5)])
    assert pass_time(world, LEASE_S + 2.0) == ["i0 READY>LOST", "i1 READY>LOST"]


def test_a_drain_goes_on_meanwhile() -> None:
    world = fleet_of(4)
    pass_time(world, 10.0)
    assert world.feed(ev.DrainRequested("i0", force=True)) == ["i0 READY>DRAINING", "i0 DRAINING>DRAINED"]
    assert pass_time(world, 10.0) == []


def test_a_restored_fleet_without_agents_works_as_far_as_its_engines_answer() -> None:
    world = World()
    for number in range(3):
        world.feed(ev.InstanceRestored(healthy(f"i{number}").instance, 1))
    assert pass_time(world, LEASE_S) == ["fail static on"]
    assert world.feed(probe("i0"), probe("i1", EngineCondition.UNHEALTHY)) == [
        "i0 STARTING>READY",
        "i1 STARTING>UNHEALTHY",
    ]


# -- the control plane's own absence ---------------------------------------------------


def test_no_lease_ends_while_the_control_plane_stands_still() -> None:
    """Of two instances, so that nothing else keeps them."""
    world = fleet_of(2)
    pass_time(world, 3.0, "i0", "i1")
    world.now += 30.0
    assert world.feed(ev.ClockSkipped(30.0), ev.ClockAdvanced()) == []
    assert pass_time(world, LEASE_S - 0.5) == []
    assert pass_time(world, 0.5) == ["i0 READY>LOST", "i1 READY>LOST"]


def test_without_a_word_of_it_leases_would_have_ended() -> None:
    world = fleet_of(2)
    assert world.wait(33.0) == ["i0 READY>LOST", "i1 READY>LOST"]


def test_deadlines_of_requests_are_promises_in_real_time() -> None:
    world = World()
    world.feed(healthy("a", limit=1))
    world.feed(arrive("running"), arrive("waiting", slo_deadline_ms=5_000.0))
    world.now += 30.0
    assert world.feed(ev.ClockSkipped(30.0)) == ["end waiting EXPIRED"], "and it is not dispatched before"


# -- duplicate agents ------------------------------------------------------------------


def test_the_agent_with_the_higher_incarnation_has_the_instance() -> None:
    world = World()
    world.feed(healthy("a", incarnation=5))
    world.feed(healthy("a", incarnation=7))
    with pytest.raises(StaleIncarnationError, match="incarnation 7; 5 is older"):
        world.feed(beat("a", 5))
    with pytest.raises(StaleIncarnationError):
        world.feed(healthy("a", incarnation=5))
    world.feed(beat("a", 7))
    assert world.instance("a").incarnation == 7
