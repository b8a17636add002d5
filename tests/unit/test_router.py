"""Routing strategies and load balancers: who is chosen, and what the receipt says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core import events as ev
from sagecp.core.fleet import InstanceRecord
from sagecp.core.router.balancers.least_connections import LeastConnectionsBalancer
from sagecp.core.router.balancers.predicted_latency import (
    NEGLECTED_DISPATCH_COUNT,
    PRIOR_LATENCY_S,
    PredictedLatencyBalancer,
)
from sagecp.core.router.base import RECEIPT_CANDIDATE_LIMIT, InstanceView, Placement, RoutingStrategy
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES, make_strategy
from tests.support.core_world import (
    World,
    arrive,
    dispatched_to,
    healthy,
    make_instance_record,
    make_record,
)

REQUEST = make_record("asked")


def candidate(
    instance_id: str,
    in_flight_count: int = 0,
    limit: int = 4,
    latency_s: float | None = None,
    last: int = 0,
) -> InstanceRecord:
    """An instance in a certain situation."""
    record = make_instance_record(instance_id, limit=limit)
    for number in range(in_flight_count):
        record.take(make_record(f"{instance_id}-{number}"), 0)
    record.latency_estimate_s = latency_s
    record.last_dispatch_sequence = last
    return record


def strategy(name: str, balancer: str = "least_connections", seed: int = 0) -> RoutingStrategy:
    return make_strategy(name, balancer, random.Random(seed))


def chosen(placement: Placement) -> str:
    assert placement.scores[0].instance_id == placement.instance_id
    return placement.instance_id


# -- strategies ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate("a", 2), candidate("b", 1), candidate("c", 3)], "b"),
        # Ties: chosen longest ago, then by id.
        ([candidate("a", 1, last=7), candidate("b", 1, last=3), candidate("c", 1, last=5)], "b"),
        ([candidate("c"), candidate("b"), candidate("a")], "a"),
        ([candidate("only", 3)], "only"),
    ],
)
def test_load_balanced_takes_the_lowest_score(candidates: list[InstanceRecord], expected: str) -> None:
    for order in (candidates, candidates[::-1]):
        assert chosen(strategy("load_balanced").place(REQUEST, order)) == expected


def test_load_balanced_shows_the_best_candidates_in_order() -> None:
    candidates = [candidate(name, count, limit=10) for count, name in enumerate("hgfedcba")]
    placement = strategy("load_balanced").place(REQUEST, candidates)
    assert [score.instance_id for score in placement.scores] == list("hgfed")
    assert [score.score for score in placement.scores] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert placement.reason == "least_connections: 0 of 10 in flight"


@pytest.mark.parametrize(
    ("last", "expected"),
    [({"a": 3, "b": 1, "c": 2}, "b"), ({"a": 3, "b": 0, "c": 0}, "b"), ({"a": 9}, "a")],
)
def test_round_robin_takes_who_was_chosen_longest_ago(last: dict[str, int], expected: str) -> None:
    candidates = [candidate(name, last=sequence) for name, sequence in last.items()]
    for order in (candidates, candidates[::-1]):
        placement = strategy("round_robin").place(REQUEST, order)
        assert chosen(placement) == expected
        assert [s.score for s in placement.scores] == sorted(map(float, last.values()))
        assert placement.reason == "round_robin: chosen longest ago"


def test_random_is_even_and_follows_its_seed() -> None:
    candidates = [candidate(name) for name in "abcd"]

    def draws(seed: int) -> list[str]:
        chance = strategy("random", seed=seed)
        return [chosen(chance.place(REQUEST, candidates)) for _ in range(4000)]

    first = draws(1)
    assert draws(1) == first
    assert draws(2) != first
    counts = Counter(first)
    assert set(counts) == set("abcd")
    assert all(900 < count < 1100 for count in counts.values())


@pytest.mark.parametrize("name", ROUTING_STRATEGIES.names)
@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
@settings(max_examples=30)
@given(
    situations=st.lists(
        st.tuples(
            st.integers(0, 8), st.integers(9, 64), st.none() | st.floats(0.001, 100), st.integers(0, 50)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_strategy_chooses_among_the_candidates(
    name: str, balancer: str, situations: list[tuple[int, int, float | None, int]]
) -> None:
    candidates = [candidate(f"i{n}", *situation) for n, situation in enumerate(situations)]
    placement = strategy(name, balancer).place(REQUEST, candidates)
    ids = {c.instance_id for c in candidates}
    assert chosen(placement) in ids
    assert {score.instance_id for score in placement.scores} <= ids
    assert len({score.instance_id for score in placement.scores}) == len(placement.scores)
    assert 1 <= len(placement.scores) <= RECEIPT_CANDIDATE_LIMIT
    values = [score.score for score in placement.scores]
    assert values == sorted(values)
    assert placement.reason.startswith((f"{name}: ", f"{balancer}: "))


# -- balancers -------------------------------------------------------------------------


def test_least_connections_is_relative_to_what_an_instance_may_hold() -> None:
    candidates = [candidate("small", 2, limit=4), candidate("large", 8, limit=64)]
    assert LeastConnectionsBalancer().scores(REQUEST, candidates) == [0.5, 0.125]


@pytest.mark.parametrize(
    ("candidates", "scores"),
    [
        # Nobody was measured: the prior, by load.
        ([candidate("a"), candidate("b", 2)], [PRIOR_LATENCY_S, 3 * PRIOR_LATENCY_S]),
        # Measured: latency times the number of requests there would be.
        ([candidate("a", 1, latency_s=2.0), candidate("b", 3, latency_s=1.0)], [4.0, 4.0]),
        # A newcomer counts as the mean.
        ([candidate("a", latency_s=1.0), candidate("b", latency_s=3.0), candidate("new")], [1.0, 3.0, 2.0]),
    ],
)
def test_predicted_latency(candidates: Sequence[InstanceView], scores: list[float]) -> None:
    assert PredictedLatencyBalancer().scores(REQUEST, candidates) == pytest.approx(scores)


def test_an_instance_that_was_neglected_for_long_is_tried_again() -> None:
    fast = candidate("fast", 1, latency_s=1.0, last=1000)
    slow = candidate("slow", latency_s=50.0, last=1000 - 2 * NEGLECTED_DISPATCH_COUNT)
    assert PredictedLatencyBalancer().scores(REQUEST, [fast, slow]) == [2.0, 50.0]
    slow.last_dispatch_sequence -= 1
    assert PredictedLatencyBalancer().scores(REQUEST, [fast, slow]) == [2.0, 1.0]


@pytest.mark.parametrize("name", LOAD_BALANCERS.names)
def test_every_balancer_prefers_less_load_among_equals(name: str) -> None:
    balancer = LOAD_BALANCERS.get(name)()
    candidates = [candidate(f"i{count}", count, limit=16, latency_s=1.0) for count in range(8)]
    scores = balancer.scores(REQUEST, candidates)
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)
    assert balancer.reason(REQUEST, candidates[0], scores[0]).startswith(f"{name}: ")


# -- in the scheduler ------------------------------------------------------------------


def world_with(strategy_name: str, count: int = 3, seed: int = 0, limit: int = 100) -> World:
    world = World(routing_strategy=strategy_name, seed=seed, default_concurrency_limit=limit)
    for number in range(count):
        world.feed(healthy("abcdefgh"[number]))
    return world


def spread(world: World, count: int) -> list[str]:
    return dispatched_to(world.feed(*(arrive(f"r{n}") for n in range(count))))


def test_round_robin_goes_round() -> None:
    assert spread(world_with("round_robin"), 7) == list("abcabca")


def test_round_robin_stays_even_when_instances_come_and_go() -> None:
    world = world_with("round_robin")
    assert spread(world, 4) == list("abca")
    world.feed(healthy("d"))
    more = world.feed(*(arrive(f"s{n}") for n in range(4)))
    assert dispatched_to(more) == list("dbca")
    world.feed(ev.DrainRequested("b"))
    more = world.feed(*(arrive(f"t{n}") for n in range(4)))
    assert dispatched_to(more) == list("dcad")


@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_an_idle_fleet_is_used_evenly(balancer: str) -> None:
    world = World(load_balancer=balancer, default_concurrency_limit=100)
    for name in "cab":
        world.feed(healthy(name))
    assert spread(world, 9) == list("abcabcabc")


@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_one_after_another_also_uses_an_idle_fleet_evenly(balancer: str) -> None:
    world = World(load_balancer=balancer)
    for name in "abc":
        world.feed(healthy(name))
    places = []
    for number in range(9):
        places += dispatched_to(world.feed(arrive(f"r{number}")))
        world.feed(ev.AttemptSucceeded(f"r{number}", 1))
    assert places == list("abcabcabc")


def test_the_random_strategy_follows_the_configured_seed() -> None:
    first = spread(world_with("random", count=8, seed=5), 50)
    assert spread(world_with("random", count=8, seed=5), 50) == first
    assert spread(world_with("random", count=8, seed=6), 50) != first
    assert set(first) == set("abcdefgh")


def test_a_faster_instance_gets_more() -> None:
    world = world_with("load_balanced", count=2)
    for number, (name, latency_s) in enumerate([("a", 1.0), ("b", 3.0)]):
        assert dispatched_to(world.feed(arrive(f"warm{number}"))) == [name]
        world.now += 0.1
        world.feed(ev.AttemptProgressed(f"warm{number}", 1))
        world.now += latency_s
        world.feed(ev.AttemptSucceeded(f"warm{number}", 1, output_token_count=101))
    counts = Counter(spread(world, 40))
    assert counts["a"] > 2 * counts["b"] > 0
