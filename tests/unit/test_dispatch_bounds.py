"""One event never pays for a whole queue: what a dispatch demotes is bounded."""

from __future__ import annotations

from typing import Any

from sagecp.core import events as ev
from sagecp.core.dispatcher import DEMOTION_LIMIT
from sagecp.core.types import PromptDigest, RequestPriority
from tests.support.core_world import STEP_TIME, World, arrive, healthy


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
