"""Engines that sleep, by order or by themselves, and the LoRA adapters that they are told to have."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core import events as ev
from sagecp.core.engine_state import EngineCapability, LoraAdapter
from sagecp.core.errors import DrainRefusedError, IllegalOrderError, StaleIncarnationError
from sagecp.core.types import EngineCondition, InstanceState
from tests.support.core_world import STEP_TIME, World, arrive, beat, healthy, make_instance

READY, STARTING, UNHEALTHY = InstanceState.READY, InstanceState.STARTING, InstanceState.UNHEALTHY
DRAINING, DRAINED = InstanceState.DRAINING, InstanceState.DRAINED
CAPABLE = frozenset({EngineCapability.SLEEP, EngineCapability.LORA})


def world_of(*names: str, capabilities: frozenset[EngineCapability] = CAPABLE) -> World:
    world = World(lease_duration_s=1e6)
    for name in names:
        world.feed(
            healthy(name, incarnation=1, step_time=STEP_TIME, engine_capabilities=capabilities),
        )
    return world


def sleep(instance_id: str = "a", level: int = 1, **more: Any) -> ev.DrainRequested:
    return ev.DrainRequested(instance_id, sleep_level=level, **more)


def wake(instance_id: str = "a") -> ev.DrainRequested:
    return ev.DrainRequested(instance_id, undo=True, sleep_level=1)


def state(world: World, instance_id: str = "a") -> InstanceState:
    return world.instance(instance_id).state


# -- by themselves ---------------------------------------------------------------------------


def test_an_engine_that_sleeps_gets_no_work() -> None:
    world = world_of("a", "b")
    assert world.feed(beat("a", 1, sleeping=True)) == ["a READY>UNHEALTHY"]
    assert "its engine sleeps" in world.instance("a").state_reason
    for number in range(3):
        assert world.feed(arrive(f"r{number}"))[-1].endswith(" b")
    # Figures that could not be read once say nothing of it.
    assert world.feed(beat("a", 1)) == []
    assert world.feed(beat("a", 1, sleeping=False)) == ["a UNHEALTHY>READY"]


def test_an_engine_that_joins_asleep_is_not_ready() -> None:
    world = world_of("b")
    world.feed(ev.InstanceRegistered(make_instance("a"), 1))
    assert world.feed(beat("a", 1, sleeping=True)) == []
    assert state(world) is STARTING
    assert world.feed(beat("a", 1, sleeping=False)) == ["a STARTING>READY"]


# -- by order --------------------------------------------------------------------------------


def test_it_is_drained_sleeps_and_wakes_up() -> None:
    world = world_of("a", "b")
    world.feed(arrive("r1"), arrive("r2"))
    (running,) = world.instance("a").in_flight
    assert world.feed(sleep(level=2, cause="night")) == ["a READY>DRAINING"]
    assert world.instance("a").state_reason == "sleep requested: night"
    assert world.feed(ev.AttemptSucceeded(running, 1, 1))[-1] == "a DRAINING>DRAINED"
    assert "told to sleep at level 2" in world.instance("a").state_reason
    world.feed(beat("a", 1, sleeping=True))
    assert "sleeps at level 2" in world.instance("a").state_reason
    assert world.feed(wake()) == ["a DRAINED>STARTING"]
    assert world.feed(beat("a", 1, sleeping=True)) == []
    assert world.feed(beat("a", 1, EngineCondition.UNHEALTHY)) == ["a STARTING>UNHEALTHY"]
    # Healthy, and still asleep.
    assert world.feed(beat("a", 1)) == []
    assert world.feed(beat("a", 1, sleeping=False)) == ["a UNHEALTHY>READY"]


def test_the_same_checks_as_for_a_drain() -> None:
    world = world_of("a")
    with pytest.raises(DrainRefusedError):
        world.feed(sleep())
    with pytest.raises(StaleIncarnationError):
        world_of("a").feed(healthy("a", incarnation=2), sleep(incarnation=1, force=True))
    assert world.feed(sleep(force=True)) == ["a READY>DRAINING", "a DRAINING>DRAINED"]


def test_every_order_states_the_whole() -> None:
    world = world_of("a", "b")
    world.feed(ev.DrainRequested("a"))
    order = world.instance("a").drain
    assert order is not None
    # Waking up what was not sent to sleep changes nothing.
    assert world.feed(wake()) == []
    assert state(world) is DRAINED
    assert world.feed(sleep(level=2)) == []
    assert order.sleep_level == 2
    world.feed(ev.DrainRequested("a"))
    assert order.sleep_level == 0
    world.feed(sleep())
    assert world.feed(ev.DrainRequested("a", undo=True)) == ["a DRAINED>READY"]


def test_an_order_outlasts_its_agent() -> None:
    world = world_of("a", "b")
    world.feed(sleep(level=2), ev.LoraAdaptersRequested("a", (LoraAdapter("l", "/l"),)))
    world.feed(healthy("a", incarnation=2, engine_capabilities=CAPABLE))
    instance = world.instance("a")
    assert instance.state is DRAINED
    assert instance.drain is not None
    assert instance.drain.sleep_level == 2
    assert instance.desired_lora_adapters == (LoraAdapter("l", "/l"),)


def test_an_order_outlasts_the_control_plane() -> None:
    world = World()
    adapters = (LoraAdapter("l", "/l"),)
    world.feed(ev.InstanceRestored(make_instance("a"), 1, True, 2, adapters))
    instance = world.instance("a")
    assert instance.drain is not None
    assert instance.drain.sleep_level == 2
    assert instance.desired_lora_adapters == adapters
    assert instance.state is DRAINED


@pytest.mark.parametrize(
    "order", [sleep(force=True), ev.LoraAdaptersRequested("a", (LoraAdapter("l", "/l"),))]
)
@pytest.mark.parametrize(
    ("incarnation", "capabilities", "part"),
    [
        (0, CAPABLE, "has no agent"),
        (1, frozenset({EngineCapability.ABORT}), "cannot"),
        (1, frozenset(), ""),
    ],
)
def test_what_an_engine_cannot_do_is_not_ordered(
    order: ev.Event, incarnation: int, capabilities: frozenset[EngineCapability], part: str
) -> None:
    world = World()
    world.feed(healthy("a", incarnation=incarnation, engine_capabilities=capabilities))
    if part:
        with pytest.raises(IllegalOrderError, match=part):
            world.feed(order)
        assert world.instance("a").drain is None
        assert world.instance("a").desired_lora_adapters is None
    else:
        # An agent that says nothing of it may be able to.
        world.feed(order)
    world.feed(wake(), ev.LoraAdaptersRequested("a", None))


def test_trouble_with_an_order_is_told_once() -> None:
    world = world_of("a")
    report = ev.HeartbeatReceived("a", 1, EngineCondition.HEALTHY, order_trouble="no such file")
    assert world.feed(report, report) == ["a trouble no such file"]
    assert world.instance("a").order_trouble == "no such file"
    world.feed(beat("a", 1))
    assert world.instance("a").order_trouble == ""
