"""Bounds of a dispatch: what it demotes, who waits for what, and who may pass whom."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sagecp.core import events as ev
from sagecp.core.candidates import CLOSED_CANDIDATE_LIMIT, WAITER_LIMIT, WHOLE_FLEET_LIMIT
from sagecp.core.dispatcher import DEMOTION_LIMIT, STEP_OVER_LIMIT
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.types import PromptDigest, RequestPriority
from tests.support.core_world import STEP_TIME, World, arrive, dispatched, dispatched_to, fail, healthy


def standstill(count: int, **fields: Any) -> World:
    """One place, taken by `first`; so many wait behind it, and have long missed their objectives."""
    world = World(scheduling_policy="slo_aware", queue_timeout_s=1e6)
    world.feed(healthy("a", step_time=STEP_TIME, limit=1))
    world.feed(arrive("first", prompt_digest=PromptDigest(1000), max_tokens=4))
    for number in range(count):
        digest = PromptDigest(1000)
        world.feed(arrive(f"r{number}", prompt_digest=digest, max_tokens=4, ttft_slo_ms=500.0, **fields))
    world.now += 100.0
    return world


def end(world: World, request_id: str) -> str:
    """Let a request end; return which is sent next."""
    lines = world.feed(ev.AttemptProgressed(request_id, 1), ev.AttemptSucceeded(request_id, 1, 4))
    sent = [each.split()[1].removesuffix("#1") for each in lines if each.startswith("dispatch")]
    assert len(sent) == 1
    return sent[0]


def demoted_count(world: World) -> int:
    return sum(record.demoted for record in world.scheduler.requests())


def test_a_standstill_is_worked_off_in_parts() -> None:
    world = standstill(3 * DEMOTION_LIMIT)
    first = end(world, "first")
    # Nobody looked at the next head: it goes out as it is.
    assert first == f"r{DEMOTION_LIMIT}"
    assert not world.record(first).demoted
    assert demoted_count(world) == DEMOTION_LIMIT
    sent, before = ["first", first], demoted_count(world)
    while world.scheduler.queue:
        sent.append(end(world, sent[-1]))
        # One of the demoted may be gone.
        assert demoted_count(world) <= before + DEMOTION_LIMIT
        before = demoted_count(world)
    assert sorted(sent) == sorted(["first", *(f"r{number}" for number in range(3 * DEMOTION_LIMIT))])


def test_up_to_the_bound_all_the_hopeless_make_way() -> None:
    world = standstill(DEMOTION_LIMIT)
    assert end(world, "first") == "r0"
    assert world.record("r0").demoted
    assert demoted_count(world) == DEMOTION_LIMIT


def test_the_overdue_make_way_for_those_with_time_left() -> None:
    world = standstill(10)
    world.feed(arrive("fresh", prompt_digest=PromptDigest(1000), max_tokens=4, ttft_slo_ms=20_000.0))
    assert end(world, "first") == "fresh"
    assert demoted_count(world) == 10


def test_critical_requests_are_not_given_up_however_late() -> None:
    world = standstill(10, priority=RequestPriority.CRITICAL)
    assert end(world, "first") == "r0"
    assert demoted_count(world) == 0


# -- waiting for better instances --------------------------------------------------------

SLOW = StepTimeParameters(**{name: 20.0 * value for name, value in dataclasses.asdict(STEP_TIME).items()})


def start_of(number: int, token_count: int = 1000) -> PromptDigest:
    """A prompt that begins with three blocks of its own."""
    return PromptDigest(token_count, tuple(range(100 * number, 100 * number + 3)), 256)


def busy_fleet(fast_count: int, slow_count: int) -> World:
    """Fast instances with half a second of prefill before each, of another prompt, and idle slow ones."""
    world = World(scheduling_policy="slo_aware", queue_timeout_s=1e6)
    for number in range(fast_count):
        world.feed(healthy(f"fast{number}", step_time=STEP_TIME, limit=64))
        world.feed(arrive(f"first{number}", prompt_digest=start_of(number, 9000), max_tokens=4))
    for number in range(slow_count):
        world.feed(healthy(f"slow{number}", step_time=SLOW, limit=64, gpu_name="slow"))
    return world


def awaited_by(world: World) -> dict[str, str]:
    """Which instance each request waits for that does wait."""
    return {each.request_id: each.waits_for for each in world.scheduler.requests() if each.queued}


def arrive_many(world: World, count: int, *, shared: bool = False) -> list[str]:
    """Let requests arrive; ``shared``: each begins as what one of the fast instances holds."""
    lines: list[str] = []
    for number in range(count):
        digest = start_of(number) if shared else PromptDigest(1000)
        lines += world.feed(arrive(f"r{number}", prompt_digest=digest, max_tokens=4))
    return lines


@pytest.mark.parametrize(("shared", "count"), [(False, CLOSED_CANDIDATE_LIMIT), (True, WAITER_LIMIT)])
def test_in_a_large_fleet_one_request_waits_for_each_better_instance_and_so_many_in_all(
    shared: bool, count: int
) -> None:
    assert count <= STEP_OVER_LIMIT
    world = busy_fleet(WAITER_LIMIT + 10, 60)
    lines = arrive_many(world, WAITER_LIMIT + 10, shared=shared)
    awaited = awaited_by(world)
    assert len(awaited) == len(set(awaited.values())) == count
    assert all(instance_id.startswith("fast") for instance_id in awaited.values())
    assert len(dispatched(lines)) == WAITER_LIMIT + 10 - count
    assert all(instance_id.startswith("slow") for instance_id in dispatched_to(lines))


def test_who_waited_makes_room_for_others_that_wait() -> None:
    world = busy_fleet(CLOSED_CANDIDATE_LIMIT, 60)
    arrive_many(world, CLOSED_CANDIDATE_LIMIT)
    waiting = list(awaited_by(world))
    assert len(waiting) == CLOSED_CANDIDATE_LIMIT
    world.feed(ev.RequestCancelled(waiting[0]))
    # Its place, and no second one.
    lines = world.feed(*(arrive(f"x{n}", prompt_digest=PromptDigest(1000), max_tokens=4) for n in range(2)))
    assert dispatched(lines) == ["x1"]
    assert awaited_by(world).keys() == {*waiting[1:], "x0"}


def test_all_that_wait_are_sent_when_the_gates_open() -> None:
    world = busy_fleet(WAITER_LIMIT + 10, 60)
    arrive_many(world, 60)
    awaited = awaited_by(world)
    lines: list[str] = []
    while world.scheduler.queue:
        timer_s = world.scheduler.next_timer_s()
        assert timer_s is not None
        assert timer_s < 10.0, "nothing will send what waits"
        world.now = max(world.now, timer_s)
        lines += world.feed(ev.ClockAdvanced())
    assert sorted(dispatched(lines)) == sorted(awaited)
    assert all(instance_id.startswith("fast") for instance_id in dispatched_to(lines))


def test_in_a_small_fleet_several_may_wait_for_the_same() -> None:
    world = busy_fleet(2, WHOLE_FLEET_LIMIT - 2)
    assert dispatched(arrive_many(world, 5)) == []
    assert len(set(awaited_by(world).values())) < 5


# -- long prompts beside small instances -------------------------------------------------


def long_and_short(policy: str) -> World:
    """A busy large instance, an idle small one, and a prompt that only the large one can hold."""
    world = World(scheduling_policy=policy, queue_timeout_s=1e6)
    world.feed(healthy("large", limit=1, capacity=50_000, usd_per_gpu_hour=1.0))
    world.feed(arrive("first", prompt_digest=PromptDigest(100), max_tokens=4))
    world.feed(healthy("small", limit=2, capacity=5000, usd_per_gpu_hour=1.0))
    assert world.feed(arrive("long", prompt_digest=PromptDigest(20_000), max_tokens=4)) == ["accept long"]
    return world


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES.names)
def test_a_long_prompt_waits_for_the_instance_that_can_hold_it_and_others_pass(policy: str) -> None:
    world = long_and_short(policy)
    for number in range(2):
        short = arrive(f"short{number}", prompt_digest=PromptDigest(100), max_tokens=4)
        assert world.feed(short) == [f"accept short{number}", f"dispatch short{number}#1 small"]
    lines = world.feed(ev.AttemptSucceeded("first", 1, 4))
    assert lines == ["end first SUCCEEDED", "dispatch long#1 large"]


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES.names)
def test_nobody_who_passes_a_long_prompt_takes_the_instance_it_waits_for(policy: str) -> None:
    world = World(scheduling_policy=policy, queue_timeout_s=1e6)
    world.feed(healthy("large", limit=8, capacity=25_000, usd_per_gpu_hour=1.0))
    world.feed(arrive("first", prompt_digest=PromptDigest(10_000), max_tokens=4))
    world.feed(healthy("small", limit=2, capacity=5000, usd_per_gpu_hour=1.0))
    assert world.feed(arrive("long", prompt_digest=PromptDigest(20_000), max_tokens=4)) == ["accept long"]
    # Less urgent by every policy's order.
    arrivals = [
        arrive(f"short{n}", prompt_digest=PromptDigest(100), max_tokens=4, ttft_slo_ms=1e6) for n in range(4)
    ]
    assert set(dispatched_to(world.feed(*arrivals))) <= {"small"}
    lines = world.feed(ev.AttemptSucceeded("first", 1, 4))
    assert "dispatch long#1 large" in lines


def test_without_a_ready_instance_that_can_hold_it_an_engine_is_the_judge() -> None:
    world = long_and_short("fifo")
    lines = world.feed(ev.InstanceDeregistered("large"))
    assert dispatched(lines) == ["long"]
    assert dispatched_to(lines) == ["small"]


def test_a_long_prompt_goes_back_to_the_only_instance_that_can_hold_it() -> None:
    world = long_and_short("fifo")
    world.feed(ev.AttemptSucceeded("first", 1, 4))
    lines = world.feed(fail("long"))
    assert lines == ["requeue long", "dispatch long#2 large"]


def test_an_instance_with_room_for_the_answer_too_is_preferred_but_not_waited_for() -> None:
    world = World(scheduling_policy="fifo")
    world.feed(healthy("tight", limit=1, capacity=1100), healthy("roomy", limit=1, capacity=5000))
    digest = PromptDigest(1000)
    lines = world.feed(*(arrive(f"r{n}", prompt_digest=digest, max_tokens=200) for n in range(2)))
    assert dispatched_to(lines) == ["roomy", "tight"]


def test_a_lost_attempt_matters_more_than_room_for_the_answer() -> None:
    world = World(scheduling_policy="fifo")
    world.feed(healthy("tight", limit=1, capacity=1100), healthy("roomy", limit=1, capacity=5000))
    lines = world.feed(arrive("r", prompt_digest=PromptDigest(1000), max_tokens=200), fail("r"))
    assert dispatched_to(lines) == ["roomy", "tight"]
