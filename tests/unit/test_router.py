"""Routing strategies and load balancers: who is chosen, and that equal rows give equal scores."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core import events as ev
from sagecp.core.parameters import ParameterTable
from sagecp.core.router.base import Scorer, ScorerContext
from sagecp.core.router.packed_extra import pack, squeeze, unpack, unsqueeze
from sagecp.core.router.registry import (
    LOAD_BALANCERS,
    ROUTER_PARAMETERS,
    ROUTING_STRATEGIES,
    make_strategy,
)
from tests.support.core_world import World, arrive, dispatched_to, healthy
from tests.support.placement_rows import DEFAULTS, Instance, Placer, asked, candidate_row, request_row


def fleet(*names: str, **fields: Any) -> list[Instance]:
    return [Instance(name, **fields) for name in names]


def loaded(**in_flight: int) -> list[Instance]:
    return [Instance(name, count) for name, count in in_flight.items()]


# -- every strategy, every balancer -------------------------------------------------------

SITUATIONS = st.lists(
    st.builds(
        Instance,
        st.just(""),
        in_flight_count=st.integers(0, 40),
        concurrency_limit=st.integers(1, 64),
        last_dispatch_sequence=st.integers(0, 5000),
        ttft_estimate_s=st.none() | st.floats(0.001, 100),
        cached_token_count=st.sampled_from([0, 0, 64, 512, 999]),
        gpu_count=st.integers(0, 8),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("strategy", ROUTING_STRATEGIES.names)
@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
@settings(max_examples=15, deadline=None)
@given(situations=SITUATIONS, session_id=st.sampled_from(["", "s1", "s2"]))
def test_every_strategy_chooses_one_and_its_scores_can_be_had_again(
    strategy: str, balancer: str, situations: list[Instance], session_id: str
) -> None:
    for number, instance in enumerate(situations):
        instance.instance_id = f"i{number:02}"
    placer, again = Placer(strategy, balancer), make_strategy(strategy, balancer, random.Random(9))
    placer.strategy.note_fleet([instance.instance_id for instance in situations])
    record = asked(session_id)
    for _ in range(3):
        rows = placer.rows(situations, record)
        request = request_row()
        scores = [placer.strategy.score(request, row, DEFAULTS) for row in rows]
        # A strategy that was made anew knows nothing but the rows.
        assert [again.score(request, row, DEFAULTS) for row in rows] == scores
        assert min(scores) < float("inf")
        assert not any(math.isnan(score) for score in scores)
        best = rows[scores.index(min(scores))]
        assert again.reason(request, best, min(scores)).startswith((f"{strategy}: ", f"{balancer}: "))
        assert all(isinstance(value, float) for value in again.terms(request, best, DEFAULTS).values())
        assert placer.place(situations, record) in {instance.instance_id for instance in situations}


@pytest.mark.parametrize("name", LOAD_BALANCERS.names)
@settings(max_examples=25, deadline=None)
@given(situations=SITUATIONS)
def test_scores_and_extras_of_balancers_are_not_negative(name: str, situations: list[Instance]) -> None:
    # Strategies put what they prefer themselves below zero.
    for number, instance in enumerate(situations):
        instance.instance_id = f"i{number:02}"
    placer = Placer("load_balanced", name)
    for _ in range(3):
        rows = placer.rows(situations)
        assert all(row.extra >= 0.0 for row in rows)
        assert all(placer.strategy.score(request_row(), row, DEFAULTS) >= 0.0 for row in rows)
        placer.place(situations)


@pytest.mark.parametrize("strategy", ["load_balanced", "round_robin", "locality"])
@pytest.mark.parametrize("balancer", sorted(set(LOAD_BALANCERS.names) - {"power_of_two"}))
def test_an_idle_fleet_is_used_evenly(strategy: str, balancer: str) -> None:
    assert Placer(strategy, balancer).spread(fleet("c", "a", "b"), 3) == list("abc")
    instances = fleet("c", "a", "b")
    placer, places = Placer(strategy, balancer), []
    for _ in range(9):
        places.append(placer.place(instances))
        for instance in instances:
            instance.in_flight_count = 0
    assert places == list("abcabcabc")


@pytest.mark.parametrize("strategy", ROUTING_STRATEGIES.names)
@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_the_same_seed_gives_the_same_places(strategy: str, balancer: str) -> None:
    def places() -> list[str]:
        placer = Placer(strategy, balancer, seed=3)
        placer.strategy.note_fleet(list("abcdefgh"))
        return [
            *placer.spread(fleet(*"abcdefgh"), 20),
            *placer.spread(fleet(*"abcdefgh"), 20, asked("session")),
        ]

    assert places() == places()


def test_parameters_are_named_after_who_has_them_and_their_defaults_are_allowed() -> None:
    table = ParameterTable(ROUTER_PARAMETERS)
    assert table.violations(DEFAULTS) == []
    for registry in (ROUTING_STRATEGIES, LOAD_BALANCERS):
        for name in registry.names:
            assert all(p.name.startswith(f"{name}.") for p in registry.get(name).PARAMETERS)
            assert all(p.description.endswith(".") for p in registry.get(name).PARAMETERS)


@pytest.mark.parametrize("name", LOAD_BALANCERS.names)
def test_the_load_balanced_strategy_is_its_balancer(name: str) -> None:
    strategy = make_strategy("load_balanced", name, random.Random(0))
    assert strategy.is_loss is LOAD_BALANCERS.get(name).is_loss
    rows = Placer("load_balanced", name).rows(loaded(a=1, b=2))
    balancer: Scorer = LOAD_BALANCERS.get(name)(ScorerContext(random.Random(0)))
    for row in rows:
        assert strategy.score(request_row(), row, DEFAULTS) == balancer.score(request_row(), row, DEFAULTS)


# -- plain strategies ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (loaded(a=2, b=1, c=3), "b"),
        # Ties: chosen longest ago, then by id.
        ([Instance(n, 1, last_dispatch_sequence=s) for n, s in (("a", 7), ("b", 3), ("c", 5))], "b"),
        (loaded(c=0, b=0, a=0), "a"),
        (loaded(only=3), "only"),
        # Relative to what an instance may hold.
        ([Instance("small", 2, 4), Instance("large", 8, 64)], "large"),
    ],
)
def test_least_connections(candidates: list[Instance], expected: str) -> None:
    for order in (candidates, candidates[::-1]):
        placer = Placer("load_balanced")
        assert placer.choose(order) == expected
        assert placer.reason.startswith("least_connections: ")


@pytest.mark.parametrize(
    ("last", "expected"),
    [({"a": 3, "b": 1, "c": 2}, "b"), ({"a": 3, "b": 0, "c": 0}, "b"), ({"a": 9}, "a")],
)
def test_round_robin_takes_who_was_chosen_longest_ago(last: dict[str, int], expected: str) -> None:
    candidates = [Instance(name, last_dispatch_sequence=sequence) for name, sequence in last.items()]
    for order in (candidates, candidates[::-1]):
        placer = Placer("round_robin")
        assert placer.choose(order) == expected
        assert placer.scores == {name: float(sequence) for name, sequence in last.items()}
        assert placer.reason == "round_robin: chosen longest ago"


def test_random_is_even_and_follows_its_seed() -> None:
    def draws(seed: int) -> list[str]:
        return Placer("random", seed=seed).spread(fleet(*"abcd"), 2000)

    first = draws(1)
    assert draws(1) == first
    assert draws(2) != first
    counts = Counter(first)
    assert set(counts) == set("abcd")
    assert all(440 < count < 560 for count in counts.values())


# -- affinity ------------------------------------------------------------------------------


def affine(instances: list[Instance], bound: float = 1.25) -> Placer:
    placer = Placer("affinity", parameters={"affinity.load_bound": bound})
    placer.strategy.note_fleet(sorted(instance.instance_id for instance in instances))
    return placer


def test_a_session_stays_and_sessions_spread() -> None:
    instances = fleet(*"abcdefgh")
    placer = affine(instances)
    homes = {f"s{number}": placer.choose(instances, asked(f"s{number}")) for number in range(400)}
    assert all(placer.choose(instances[::-1], asked(session)) == at for session, at in homes.items())
    counts = Counter(homes.values())
    assert set(counts) == set("abcdefgh")
    assert max(counts.values()) < 100
    assert placer.reason == "affinity: where its session or user belongs; 0.00 of the mean load"


def test_the_session_comes_before_the_user_and_without_either_the_balancer_decides() -> None:
    instances = loaded(a=5, b=4, c=3, d=4)
    placer = affine(instances)
    for number in range(20):
        both, session = asked(f"s{number}", "u"), asked(f"s{number}")
        assert placer.choose(instances, both) == placer.choose(instances, session)
    of_users = {placer.choose(instances, asked(user_id=f"u{number}")) for number in range(50)}
    assert of_users == set("abcd")
    assert placer.choose(instances, asked()) == "c"
    assert placer.reason == "least_connections: 3 of 16 in flight"


def test_only_sessions_of_instances_that_come_or_go_move() -> None:
    instances = fleet(*"abcdefgh")
    placer = affine(instances)
    before = {f"s{number}": placer.choose(instances, asked(f"s{number}")) for number in range(300)}
    # Closed or gone makes no difference to the others.
    without = [instance for instance in instances if instance.instance_id != "c"]
    closed = {session: placer.choose(without, asked(session)) for session in before}
    placer.strategy.note_fleet(list("abdefgh"))
    gone = {session: placer.choose(without, asked(session)) for session in before}
    assert closed == gone
    assert {session for session in before if before[session] != gone[session]} == {
        session for session in before if before[session] == "c"
    }
    placer.strategy.note_fleet(list("abcdefgh"))
    assert {session: placer.choose(instances, asked(session)) for session in before} == before


def test_one_busy_session_does_not_drown_its_home() -> None:
    instances = fleet(*"abcdefgh", concurrency_limit=1000)
    placer = affine(instances)
    placer.spread(instances, 400, asked("busy"))
    # 50 on average; with this request on each, 1.25 times 51 is the bound.
    assert max(instance.in_flight_count for instance in instances) <= 64
    assert "after " in placer.reason
    wide = fleet(*"abcdefgh", concurrency_limit=1000)
    affine(wide, 1000.0).spread(wide, 400, asked("busy"))
    assert [instance.in_flight_count for instance in wide].count(0) == 7


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    bound=st.floats(1.0, 3.0),
    session=st.text(min_size=1, max_size=5),
)
def test_the_first_below_the_bound_is_taken(counts: list[int], bound: float, session: str) -> None:
    instances = [Instance(f"i{number:02}", count) for number, count in enumerate(counts)]
    placer = affine(instances, bound)
    chosen = placer.choose(instances, asked(session))
    level = sum(counts) / len(counts) + 1
    order = list(placer.strategy.wants(asked(session)))
    in_flight = {instance.instance_id: instance.in_flight_count for instance in instances}
    clear = [name for name in order if abs(in_flight[name] - bound * level) > 1e-6]
    if clear == order:
        assert chosen == next(name for name in order if in_flight[name] < bound * level)


def test_a_key_wants_the_first_of_its_order() -> None:
    instances = [Instance(f"i{number:03}") for number in range(200)]
    placer = affine(instances)
    for session in ("s1", "s2", "s3"):
        wanted = list(placer.strategy.wants(asked(session)))
        assert len(wanted) == len(set(wanted)) == 32
        assert placer.choose(instances, asked(session)) == wanted[0]
        sample = [instance for instance in instances if instance.instance_id in wanted[5:]]
        assert placer.choose(sample, asked(session)) == wanted[5]
    assert placer.strategy.wants(asked()) == ()


@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_requests_without_a_key_are_placed_as_by_the_balancer_alone(balancer: str) -> None:
    alone, within = Placer("load_balanced", balancer, seed=2), Placer("affinity", balancer, seed=2)
    within.strategy.note_fleet(list("abc"))
    first, second = fleet(*"abc", gpu_count=2), fleet(*"abc", gpu_count=2)
    for number in range(30):
        assert within.place(second) == alone.place(first)
        assert within.reason == alone.reason
        if number % 3 == 0:
            # Requests with a key go by other rules, and change no turns.
            within.choose(second, asked("session"))
            within.strategy.note_dispatch(asked("session"), "a")


# -- locality --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "in_flight", "expected", "reason"),
    [
        ({"a": 0, "b": 0}, {"a": 1, "b": 0}, "b", "least_connections: "),
        ({"a": 512, "b": 0}, {"a": 5, "b": 0}, "a", "locality: 512 of 1000 prompt tokens cached, 5 in "),
        ({"a": 512, "b": 768}, {"a": 0, "b": 5}, "b", "locality: 768 of "),
        # Equally much: the balancer decides.
        ({"a": 512, "b": 512, "c": 0}, {"a": 5, "b": 4, "c": 0}, "b", "locality: 512 of "),
        # Too little to be worth it.
        ({"a": 99, "b": 0}, {"a": 1, "b": 0}, "b", "least_connections: "),
        ({"a": 100, "b": 0}, {"a": 1, "b": 0}, "a", "locality: "),
        # Load out of proportion: 8 more, or 1.5 times as much, than the least.
        ({"a": 999, "b": 0}, {"a": 8, "b": 0}, "a", "locality: "),
        ({"a": 999, "b": 0}, {"a": 9, "b": 0}, "b", "least_connections: "),
        ({"a": 999, "b": 0}, {"a": 60, "b": 40}, "a", "locality: "),
        ({"a": 999, "b": 0}, {"a": 61, "b": 40}, "b", "least_connections: "),
        # The longest is overloaded, the second is not.
        ({"a": 999, "b": 0, "c": 256}, {"a": 30, "b": 0, "c": 3}, "c", "locality: 256 of "),
    ],
)  # fmt: skip
def test_locality(cached: dict[str, int], in_flight: dict[str, int], expected: str, reason: str) -> None:
    instances = [
        Instance(name, in_flight[name], 100, cached_token_count=tokens) for name, tokens in cached.items()
    ]
    for order in (instances, instances[::-1]):
        placer = Placer("locality")
        assert placer.choose(order) == expected
        assert placer.reason.startswith(reason)


def test_locality_follows_its_parameters() -> None:
    instances = [Instance("a", 12, cached_token_count=300), Instance("b", 4)]
    cases: list[tuple[dict[str, float], str]] = [
        ({}, "a"),
        ({"locality.min_match_share": 0.31}, "b"),
        ({"locality.load_slack": 7.0}, "b"),
        ({"locality.load_slack": 0.0, "locality.load_ratio": 3.0}, "a"),
    ]
    for parameters, expected in cases:
        assert Placer("locality", parameters=parameters).choose(instances) == expected


@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_what_nobody_has_cached_is_placed_as_by_the_balancer_alone(balancer: str) -> None:
    alone, within = Placer("load_balanced", balancer, seed=2), Placer("locality", balancer, seed=2)
    first, second = ([Instance(n, gpu_count=g) for n, g in (("a", 4), ("b", 2), ("c", 1))] for _ in "12")
    for _ in range(42):
        assert within.place(second) == alone.place(first)
        assert within.reason == alone.reason


@pytest.mark.parametrize("balancer", LOAD_BALANCERS.names)
def test_what_is_preferred_comes_before_what_any_balancer_would_choose(balancer: str) -> None:
    for seed in range(10):
        instances = [Instance(name, gpu_count=8, cached_token_count=500 * (name == "d")) for name in "abcd"]
        assert Placer("locality", balancer, seed=seed).choose(instances) == "d"
        assert Placer("locality", balancer, seed=seed).rows(instances)[0].extra >= 0.0


def test_terms_say_what_was_compared() -> None:
    placer = Placer("locality", "predicted_latency")
    row = placer.rows([Instance("a", 3, cached_token_count=640), Instance("b", 2)])[0]
    terms = placer.strategy.terms(request_row(), row, DEFAULTS)
    assert (terms["cached_tokens"], terms["fewest_in_flight"], terms["preferred"]) == (640.0, 2.0, 1.0)
    assert terms["ttft_s"] > 0.0
    keyed = affine(fleet("a", "b"))
    rows = keyed.rows(loaded(a=3, b=0), asked("s"))
    assert {keyed.strategy.terms(request_row(), row, DEFAULTS)["place"] for row in rows} == {0.0, 1.0}
    loads = [keyed.strategy.terms(request_row(), row, DEFAULTS)["relative_load"] for row in rows]
    assert loads == pytest.approx([3 / 2.5, 0.0])


# -- packed extras -----------------------------------------------------------------------------


@given(count=st.integers(0, 1000), value=st.floats(0.0, 1000.0))
def test_packed_numbers_come_back(count: int, value: float) -> None:
    found, kept = unpack(pack(count, value))
    assert found == count
    assert kept == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, float("inf")])
def test_some_values_are_squeezed_exactly(value: float) -> None:
    assert unsqueeze(squeeze(value)) == value
    assert 0.0 <= squeeze(value) <= 1.0


def test_a_row_is_rated_without_extras_too() -> None:
    # Receipts of instances that were only explained have none.
    for strategy in ROUTING_STRATEGIES.names:
        for balancer in LOAD_BALANCERS.names:
            made = make_strategy(strategy, balancer, random.Random(0))
            assert made.score(request_row(), candidate_row(), DEFAULTS) >= 0.0


# -- in the scheduler --------------------------------------------------------------------------


def world_with(strategy: str, balancer: str = "least_connections", count: int = 3, seed: int = 0) -> World:
    world = World(
        scheduling_policy="fifo",
        routing_strategy=strategy,
        load_balancer=balancer,
        seed=seed,
        default_concurrency_limit=100,
    )
    for name in "abcdefgh"[:count]:
        world.feed(healthy(name))
    return world


def spread(world: World, prefix: str, count: int, **fields: Any) -> str:
    arrivals = (arrive(f"{prefix}{number}", **fields) for number in range(count))
    return "".join(dispatched_to(world.feed(*arrivals)))


def test_round_robin_stays_even_when_instances_come_and_go() -> None:
    world = world_with("round_robin")
    assert spread(world, "r", 4) == "abca"
    world.feed(healthy("d"))
    assert spread(world, "s", 4) == "dbca"
    world.feed(ev.DrainRequested("b"))
    assert spread(world, "t", 4) == "dcad"


@pytest.mark.parametrize("strategy", ["random", "load_balanced"])
def test_chance_follows_the_configured_seed(strategy: str) -> None:
    def places(seed: int) -> str:
        return spread(world_with(strategy, "power_of_two", 8, seed), "r", 50)

    assert places(5) == places(5) != places(6)
    assert set(places(5)) == set("abcdefgh")


def test_a_session_moves_on_while_its_instance_drains() -> None:
    world = world_with("affinity", count=8)
    places = spread(world, "r", 2, session_id="s")
    home = places[0]
    assert places == home * 2
    world.feed(ev.DrainRequested(home))
    next_home = spread(world, "t", 1, session_id="s")
    assert next_home != home
    assert spread(world, "u", 1, session_id="s") == next_home


def test_a_prompt_goes_where_its_start_is() -> None:
    world = world_with("locality")
    start = "x" * 5000
    assert spread(world, "r", 1) == "a"
    assert spread(world, "s", 3, prompt=start + "and?") == "bbb"
    assert spread(world, "t", 1, prompt=start + "y" * 40_000) == "c", "10 % of it are not there"
