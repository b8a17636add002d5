"""Scheduling policies: whom each sends first."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core import events as ev
from sagecp.core.policies.adaptive import HEAD_START_S, AdaptivePolicy
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.policies.fifo import FifoPolicy
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestPriority
from tests.support.core_world import World, arrive, dispatched, healthy, make_record

P = RequestPriority
ARRIVALS = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(RequestPriority)), max_size=20)


def ordered(policy: SchedulingPolicy, arrivals: list[tuple[float, RequestPriority]]) -> list[int]:
    """Return the positions of the arrivals in the order in which they go."""
    records = [
        make_record(f"r{n}", sequence=n, arrival_s=float(time_s), priority=priority)
        for n, (time_s, priority) in enumerate(arrivals)
    ]
    return [r.sequence for r in sorted(records, key=lambda r: (policy.key(r), r.sequence))]


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        ([(0, P.NORMAL), (1, P.NORMAL), (2, P.NORMAL)], [0, 1, 2]),
        ([(0, P.BACKGROUND), (1, P.CRITICAL)], [0, 1]),
        ([(5, P.NORMAL), (5, P.CRITICAL)], [0, 1]),
    ],
)
def test_fifo_looks_at_the_time_alone(
    arrivals: list[tuple[float, RequestPriority]], order: list[int]
) -> None:
    assert ordered(FifoPolicy(), arrivals) == order


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        # Alike: order of arrival.
        ([(0, P.NORMAL), (1, P.NORMAL), (2, P.NORMAL)], [0, 1, 2]),
        ([(0, P.LOW), (1, P.LOW)], [0, 1]),
        # A head start of 30 s, no more.
        ([(0, P.NORMAL), (29.9, P.HIGH)], [1, 0]),
        ([(0, P.NORMAL), (30.1, P.HIGH)], [0, 1]),
        # Equal keys: the earlier arrival.
        ([(0, P.NORMAL), (30, P.HIGH)], [0, 1]),
        # 300 s for CRITICAL.
        ([(0, P.NORMAL), (299, P.CRITICAL)], [1, 0]),
        ([(0, P.NORMAL), (301, P.CRITICAL)], [0, 1]),
        # Age beats class in the end: nothing starves.
        ([(0, P.LOW), (59, P.NORMAL), (61, P.NORMAL)], [1, 0, 2]),
        ([(0, P.BACKGROUND), (599, P.NORMAL), (601, P.NORMAL)], [1, 0, 2]),
        ([(0, P.BACKGROUND), (899, P.CRITICAL), (901, P.CRITICAL)], [1, 0, 2]),
        # Five at once, least important first.
        ([(0, P.BACKGROUND), (0, P.LOW), (0, P.NORMAL), (0, P.HIGH), (0, P.CRITICAL)], [4, 3, 2, 1, 0]),
    ],
)
def test_adaptive_gives_head_starts(arrivals: list[tuple[float, RequestPriority]], order: list[int]) -> None:
    assert ordered(AdaptivePolicy(), arrivals) == order


def test_head_starts_are_in_the_order_of_the_classes() -> None:
    assert set(HEAD_START_S) == set(RequestPriority)
    starts = [HEAD_START_S[priority] for priority in sorted(RequestPriority)]
    assert all(earlier > later for earlier, later in itertools.pairwise(starts))
    assert HEAD_START_S[P.NORMAL] == 0.0


@given(ARRIVALS, st.sampled_from(RequestPriority))
def test_adaptive_is_fifo_while_one_class_is_present(
    arrivals: list[tuple[int, RequestPriority]], priority: RequestPriority
) -> None:
    alike = [(float(time_s), priority) for time_s, _ in arrivals]
    assert ordered(AdaptivePolicy(), alike) == ordered(FifoPolicy(), alike)


@given(ARRIVALS)
def test_nobody_is_passed_by_later_arrivals_for_longer_than_the_head_start(
    arrivals: list[tuple[int, RequestPriority]],
) -> None:
    order = ordered(AdaptivePolicy(), [(float(time_s), priority) for time_s, priority in arrivals])
    for first, second in itertools.combinations(order, 2):
        (first_s, first_class), (second_s, second_class) = arrivals[first], arrivals[second]
        assert first_s - second_s <= HEAD_START_S[first_class] - HEAD_START_S[second_class]


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policy_has_a_finite_key_that_stays_and_a_reason(name: str) -> None:
    policy = SCHEDULING_POLICIES.get(name)()
    assert policy.name == name
    for priority in RequestPriority:
        record = make_record(arrival_s=12.5, priority=priority, slo_deadline_ms=100.0)
        key = policy.key(record)
        assert key == policy.key(record)
        assert abs(key) < 1e9
        assert policy.explain(record).startswith(f"{name}: ")


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policy_sends_requests_of_one_class_in_order_of_arrival(name: str) -> None:
    world = World(scheduling_policy=name, default_concurrency_limit=1)
    world.feed(healthy("a"))
    for number in range(6):
        world.now += 1.0
        world.feed(arrive(f"r{number}"))
    assert finish_in_turn(world) == [f"r{number}" for number in range(1, 6)]


def test_the_default_explains_the_head_start() -> None:
    record: RequestRecord = make_record(priority=P.HIGH)
    assert AdaptivePolicy().explain(record) == (
        "adaptive: first by arrival with the head start of HIGH (+30 s)"
    )


def finish_in_turn(world: World) -> list[str]:
    """Finish whatever runs until nothing waits; return the order of the dispatches."""
    order: list[str] = []
    while len(world.scheduler.queue):
        [running] = world.instance("a").in_flight.values()
        order += dispatched(world.feed(ev.AttemptSucceeded(running.request_id, running.epoch)))
    return order
