"""Scheduling policies: whom each sends first, and where it prefers to send it."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core import events as ev
from sagecp.core.choice import choose
from sagecp.core.placement import CandidateRow, PlacementInputs, RequestRow
from sagecp.core.policies.adaptive import AdaptivePolicy
from sagecp.core.policies.base import PolicyContext, SchedulingPolicy
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.policies.slo_aware import SloAwarePolicy
from sagecp.core.request import RequestRecord
from sagecp.core.router.registry import make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import PARAMETERS
from sagecp.core.types import RequestPriority
from sagecp.core.waiting_line import WaitingLine
from tests.support.core_world import STEP_TIME, World, arrive, dispatched, healthy, make_record
from tests.support.placement_rows import candidate_row, request_row

P = RequestPriority
ARRIVALS = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(RequestPriority)), max_size=20)
TICKETS = itertools.count(1)


def policy_of(name: str, parameters: dict[str, float] | None = None) -> SchedulingPolicy:
    context = PolicyContext(PARAMETERS.resolve(parameters or {}), ServiceBooks())
    return SCHEDULING_POLICIES.get(name)(context)


def waiting(
    request_id: str,
    arrival_s: float = 0.0,
    *,
    sequence: int = 1,
    work_s: float = 0.1,
    ttft_s: float = 1.0,
    **fields: Any,
) -> RequestRecord:
    """A request with what admission would have estimated of it."""
    record = make_record(request_id, sequence=sequence, arrival_s=arrival_s, **fields)
    record.work_s = work_s
    record.ttft_objective_s = ttft_s
    record.queue_ticket = next(TICKETS)
    return record


def drain(line: WaitingLine) -> list[RequestRecord]:
    """Take out everything in the line's order; nothing costs anything."""
    taken = []
    while (record := line.head(0.0)) is not None:
        record.queue_ticket = 0
        line.discard(record)
        line.note_dispatch(record, 0.0)
        taken.append(record)
    return taken


def ordered(policy: SchedulingPolicy, arrivals: list[tuple[float, RequestPriority]]) -> list[int]:
    """Return the positions of the arrivals in the order in which they go."""
    line = policy.new_line()
    for number, (time_s, priority) in enumerate(arrivals):
        line.push(waiting(f"r{number}", float(time_s), sequence=number, priority=priority))
    return [record.sequence for record in drain(line)]


def score(policy: SchedulingPolicy, request: RequestRow, row: CandidateRow, **changed: float) -> float:
    """A candidate's score under a policy, as the default balancer rates it."""
    parameters = PARAMETERS.resolve({name.replace("__", "."): value for name, value in changed.items()})
    strategy = make_strategy("load_balanced", "predicted_latency", random.Random(0))
    return policy.rescore(request, row, strategy.score(request, row, parameters), parameters)


def best(policy: SchedulingPolicy, request: RequestRow, *rows: CandidateRow, **changed: float) -> str:
    """Where a policy sends a request, with the default balancer."""
    parameters = PARAMETERS.resolve({name.replace("__", "."): value for name, value in changed.items()})
    strategy = make_strategy("load_balanced", "predicted_latency", random.Random(0))
    return choose(strategy, policy, PlacementInputs(request, rows, parameters)).best.instance_id


# -- fifo ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        ([(0, P.NORMAL), (1, P.NORMAL), (2, P.NORMAL)], [0, 1, 2]),
        ([(0, P.BACKGROUND), (1, P.CRITICAL)], [0, 1]),
        ([(5, P.NORMAL), (5, P.CRITICAL)], [0, 1]),
        ([(9, P.NORMAL), (5, P.LOW), (7, P.HIGH)], [1, 2, 0]),
    ],
)
def test_fifo_looks_at_the_time_alone(
    arrivals: list[tuple[float, RequestPriority]], order: list[int]
) -> None:
    assert ordered(policy_of("fifo"), arrivals) == order


def test_fifo_knows_no_tenants_and_no_objectives() -> None:
    line = policy_of("fifo").new_line()
    records = [
        waiting("r0", 0.0, work_s=50.0, ttft_s=100.0, tenant_id="large"),
        waiting("r1", 1.0, work_s=0.1, ttft_s=0.1, tenant_id="large"),
        waiting("r2", 2.0, tenant_id="small"),
    ]
    for record in records:
        line.push(record)
    assert drain(line) == records


# -- priority ------------------------------------------------------------------------


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
def test_priority_gives_head_starts(arrivals: list[tuple[float, RequestPriority]], order: list[int]) -> None:
    assert ordered(policy_of("priority"), arrivals) == order


def test_head_starts_are_parameters() -> None:
    policy = policy_of("priority", {"priority.boost_high_s": 5.0})
    assert ordered(policy, [(0, P.NORMAL), (4, P.HIGH)]) == [1, 0]
    assert ordered(policy, [(0, P.NORMAL), (6, P.HIGH)]) == [0, 1]


def test_the_default_head_starts_are_in_the_order_of_the_classes() -> None:
    values = PARAMETERS.resolve({})
    starts_s = [values[f"priority.boost_{priority.name.lower()}_s"] for priority in sorted(RequestPriority)]
    assert all(earlier > later for earlier, later in itertools.pairwise(starts_s))
    assert starts_s[2] == 0.0


@given(ARRIVALS)
def test_nobody_is_passed_by_later_arrivals_for_longer_than_the_head_start(
    arrivals: list[tuple[int, RequestPriority]],
) -> None:
    values = PARAMETERS.resolve({})
    boost_s = {p: values[f"priority.boost_{p.name.lower()}_s"] for p in RequestPriority}
    order = ordered(policy_of("priority"), [(float(time_s), priority) for time_s, priority in arrivals])
    for first, second in itertools.combinations(order, 2):
        (first_s, first_class), (second_s, second_class) = arrivals[first], arrivals[second]
        assert first_s - second_s <= boost_s[first_class] - boost_s[second_class]


def test_inside_a_class_the_tenant_that_had_least_goes_first() -> None:
    line = policy_of("priority").new_line()
    for number in range(4):
        line.push(waiting(f"large-{number}", float(number), sequence=number, tenant_id="large"))
    line.push(waiting("small", 100.0, sequence=9, tenant_id="small"))
    order = []
    while (record := line.head(200.0)) is not None:
        record.queue_ticket = 0
        line.discard(record)
        line.note_dispatch(record, 1.0)
        order.append(record.request_id)
    assert order == ["large-0", "small", "large-1", "large-2", "large-3"]


def test_service_is_remembered_through_a_change_of_policy() -> None:
    """Books outlive policies: who had much before has still had much."""
    books = ServiceBooks()
    parameters = PARAMETERS.resolve({})
    policy = SCHEDULING_POLICIES.get("priority")
    line = policy(PolicyContext(parameters, books)).new_line()
    line.push(first := waiting("large-0", 0.0, tenant_id="large"))
    line.push(waiting("large-1", 1.0, sequence=2, tenant_id="large"))
    line.push(small := waiting("small-0", 2.0, sequence=3, tenant_id="small"))
    assert line.head(0.0) is first
    first.queue_ticket = 0
    line.discard(first)
    line.note_dispatch(first, 10.0)
    again = policy(PolicyContext(parameters, books)).new_line()
    for record in list(line):
        again.push(record)
    assert again.head(0.0) is small


FAST = candidate_row("fast", usd_per_hour=10.0)
SLOW = candidate_row("slow", ttft_factor=2.0, tpot_factor=2.0, usd_per_hour=1.0)


@pytest.mark.parametrize(
    ("priority", "expected"),
    [(P.CRITICAL, "fast"), (P.HIGH, "fast"), (P.NORMAL, "slow"), (P.LOW, "slow"), (P.BACKGROUND, "slow")],
)
def test_important_requests_weigh_a_fast_instance_more(priority: RequestPriority, expected: str) -> None:
    """The slow one is a little better for the balancer, because it has the prompt's start cached."""
    slow = SLOW._replace(cached_token_count=800)
    request = request_row(priority=int(priority), output_token_count=400.0)
    plain = {row.instance_id: score(policy_of("fifo"), request, row) for row in (FAST, slow)}
    assert plain["slow"] < plain["fast"] < plain["slow"] + 0.3
    assert best(policy_of("priority"), request, slow, FAST) == expected


def test_a_critical_request_weighs_speed_twice_as_much_as_a_high_one() -> None:
    policy = policy_of("priority")
    extra = {}
    for priority in RequestPriority:
        request = request_row(priority=int(priority))
        extra[priority] = score(policy, request, SLOW) - score(policy_of("fifo"), request, SLOW)
    assert extra[P.CRITICAL] == pytest.approx(2.0 * extra[P.HIGH])
    assert extra[P.HIGH] > 0.0
    assert extra[P.NORMAL] == extra[P.LOW] == extra[P.BACKGROUND] == 0.0


# -- slo_aware -------------------------------------------------------------------------

LONG_AND_LATE = ("long", 0.0, 2.0, 5.0)  # arrival, work, objective: starts by 3.0, due at 5.0
SHORT_AND_DUE = ("short", 0.0, 0.2, 4.0)  # starts by 3.8, due at 4.0


@pytest.mark.parametrize(
    ("work_weight", "jobs", "order"),
    [
        # Least slack first: by the latest start.
        (0.0, [LONG_AND_LATE, SHORT_AND_DUE], ["long", "short"]),
        # Earliest deadline first.
        (1.0, [LONG_AND_LATE, SHORT_AND_DUE], ["short", "long"]),
        (1.0, [("a", 0.0, 9.0, 4.0), ("b", 1.0, 0.1, 3.5)], ["a", "b"]),
        # Least work first, whatever the deadline.
        (1000.0, [("urgent", 0.0, 3.0, 3.1), ("tiny", 60.0, 0.1, 500.0)], ["tiny", "urgent"]),
        (1000.0, [("x", 0.0, 3.0, 9.0), ("y", 0.0, 2.0, 9.0), ("z", 0.0, 1.0, 9.0)], ["z", "y", "x"]),
        # A second of work is so many seconds of age.
        (4.0, [("old", 0.0, 2.0, 1.0), ("new", 5.9, 0.0, 1.0)], ["new", "old"]),
        (4.0, [("old", 0.0, 2.0, 1.0), ("new", 6.1, 0.0, 1.0)], ["old", "new"]),
        # Alike: order of arrival.
        (4.0, [("a", 0.0, 1.0, 1.0), ("b", 0.0, 1.0, 1.0)], ["a", "b"]),
    ],
)
def test_slo_aware_weighs_urgency_against_work(
    work_weight: float, jobs: list[tuple[str, float, float, float]], order: list[str]
) -> None:
    line = policy_of("slo_aware", {"slo_aware.work_weight": work_weight}).new_line()
    for number, (name, arrival_s, work_s, ttft_s) in enumerate(jobs):
        line.push(waiting(name, arrival_s, sequence=number, work_s=work_s, ttft_s=ttft_s))
    assert [record.request_id for record in drain(line)] == order


@pytest.mark.parametrize("name", ["slo_aware", "adaptive"])
def test_slo_aware_gives_classes_a_small_head_start(name: str) -> None:
    policy = policy_of(name)
    assert ordered(policy, [(0, P.NORMAL), (1.9, P.HIGH)]) == [1, 0]
    assert ordered(policy, [(0, P.NORMAL), (2.1, P.HIGH)]) == [0, 1]
    assert ordered(policy, [(0, P.BACKGROUND), (7.9, P.CRITICAL), (8.1, P.CRITICAL)]) == [1, 0, 2]


def test_slo_aware_says_from_which_lane_a_request_came() -> None:
    policy = policy_of("slo_aware")
    record = waiting("r", work_s=0.25, ttft_s=1.5)
    assert policy.explain(record) == "slo_aware: most urgent, 0.25 s of work within 1.50 s"
    record.demoted = True
    assert policy.explain(record) == "slo_aware: from the best-effort lane, its objective is out of reach"


@pytest.mark.parametrize("name", ["slo_aware", "cost_optimized", "adaptive"])
@pytest.mark.parametrize(
    ("priority", "order"),
    [
        (P.NORMAL, ["fresh", "hopeless"]),
        (P.HIGH, ["fresh", "hopeless"]),
        # The most important are never given up.
        (P.CRITICAL, ["hopeless", "fresh"]),
    ],
)
def test_a_request_whose_objective_is_out_of_reach_makes_way(
    name: str, priority: RequestPriority, order: list[str]
) -> None:
    world = World(scheduling_policy=name, default_concurrency_limit=1)
    world.feed(healthy("a", step_time=STEP_TIME), arrive("running", prompt="x" * 4000))
    # No objective shorter than its own prefill can be met.
    world.feed(arrive("hopeless", prompt="x" * 40_000, ttft_slo_ms=100.0, priority=priority))
    world.now += 0.5
    world.feed(arrive("fresh", prompt="x" * 400, ttft_slo_ms=20_000.0))
    assert finish_in_turn(world) == order


def test_a_demoted_request_stays_so_and_says_so() -> None:
    world = World(scheduling_policy="slo_aware", default_concurrency_limit=1)
    world.feed(healthy("a", step_time=STEP_TIME), arrive("r", prompt="x" * 40_000, ttft_slo_ms=100.0))
    record = world.record("r")
    assert record.demoted
    assert record.decisions[-1].reason.startswith("slo_aware: from the best-effort lane")


@pytest.mark.parametrize("name", ["fifo", "priority"])
def test_other_policies_give_nobody_up(name: str) -> None:
    world = World(scheduling_policy=name, default_concurrency_limit=1)
    world.feed(healthy("a", step_time=STEP_TIME), arrive("r", prompt="x" * 40_000, ttft_slo_ms=100.0))
    assert not world.record("r").demoted


# -- cost_optimized --------------------------------------------------------------------

CHEAP = candidate_row("cheap", usd_per_hour=1.0, ttft_factor=3.0, tpot_factor=3.0, in_flight_count=1)
DEAR = candidate_row("dear", usd_per_hour=12.0, in_flight_count=1)


@pytest.mark.parametrize(
    ("name", "request_fields", "rows", "expected"),
    [
        ("the cheapest that meets the objective", {}, [CHEAP, DEAR], "cheap"),
        (
            "not a cheap one that would miss the first token's",
            {"ttft_objective_s": 0.1},
            [CHEAP, DEAR],
            "dear",
        ),
        (
            "not a cheap one that would be too slow after it",
            {"tpot_objective_s": 0.012},
            [CHEAP, DEAR],
            "dear",
        ),
        (
            "time already spent waiting counts",
            {"ttft_objective_s": 1.0, "waited_s": 0.85},
            [CHEAP, DEAR],
            "dear",
        ),
        (
            "not a cheap one that is busy for too long",
            {},
            [CHEAP._replace(backlog_s=3.0), DEAR],
            "dear",
        ),
        (
            "a cached start is money",
            {"output_token_count": 1.0},
            [DEAR._replace(instance_id="cold"), DEAR._replace(instance_id="warm", cached_token_count=900)],
            "warm",
        ),
        (
            "of equals the fuller, at low load",
            {},
            [CHEAP._replace(instance_id="empty", in_flight_count=0), CHEAP._replace(in_flight_count=8)],
            "cheap",
        ),
        (
            "of equals the faster, at high load",
            {},
            [
                CHEAP._replace(instance_id="idle", in_flight_count=0, prefill_share=0.8),
                CHEAP._replace(in_flight_count=8, backlog_s=0.1, prefill_share=0.8),
            ],
            "idle",
        ),
        (
            "filling does not go before the objective",
            {"ttft_objective_s": 0.5},
            [
                CHEAP._replace(instance_id="empty", in_flight_count=0),
                CHEAP._replace(in_flight_count=8, backlog_s=0.6),
            ],
            "empty",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_cost_optimized(
    name: str, request_fields: dict[str, Any], rows: list[CandidateRow], expected: str
) -> None:
    request = request_row(**request_fields)
    assert best(policy_of("cost_optimized"), request, *rows) == expected
    assert best(policy_of("cost_optimized"), request, *reversed(rows)) == expected


def test_cost_optimized_takes_requests_by_deadline() -> None:
    line = policy_of("cost_optimized").new_line()
    for number, (name, arrival_s, ttft_s) in enumerate([("a", 0.0, 9.0), ("b", 2.0, 3.0), ("c", 1.0, 5.0)]):
        line.push(waiting(name, arrival_s, sequence=number, work_s=float(number), ttft_s=ttft_s))
    assert [record.request_id for record in drain(line)] == ["b", "c", "a"]


def test_without_prices_cost_optimized_still_meets_objectives() -> None:
    rows = [candidate_row("busy", backlog_s=5.0), candidate_row("idle")]
    assert best(policy_of("cost_optimized"), request_row(), *rows) == "idle"


# -- every policy --------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policy_has_a_name_a_finite_rank_and_a_reason(name: str) -> None:
    policy = policy_of(name)
    assert policy.name == name
    for priority in RequestPriority:
        line = policy.new_line()
        record = waiting("r", 12.5, priority=priority, slo_deadline_ms=100.0)
        line.push(record)
        assert line.rank(20.0) == line.rank(20.0)
        assert abs(line.rank(20.0)[0]) < 1e9
        assert line.rank(20.0)[1] == record.sequence
        assert policy.explain(record).startswith(f"{name}: ")


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policys_scores_are_finite_and_come_from_the_rows_alone(name: str) -> None:
    policy, again = policy_of(name), policy_of(name)
    for priority in RequestPriority:
        for objective_s in (0.001, 1.0, math.inf):
            request = request_row(
                priority=int(priority), ttft_objective_s=objective_s, tpot_objective_s=objective_s
            )
            for row in (FAST, SLOW, CHEAP, DEAR):
                value = score(policy, request, row)
                assert math.isfinite(value)
                assert value == score(again, request, row)


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policy_sends_requests_of_one_class_in_order_of_arrival(name: str) -> None:
    world = World(scheduling_policy=name, default_concurrency_limit=1)
    world.feed(healthy("a"))
    for number in range(6):
        world.now += 1.0
        world.feed(arrive(f"r{number}", ttft_slo_ms=60_000.0))
    assert finish_in_turn(world) == [f"r{number}" for number in range(1, 6)]


@pytest.mark.parametrize("name", SCHEDULING_POLICIES.names)
def test_every_policy_in_force_is_another_or_itself(name: str) -> None:
    policy = policy_of(name)
    assert policy.in_force in SCHEDULING_POLICIES.names
    assert policy.in_force == name or isinstance(policy, AdaptivePolicy)
    assert policy.in_force != "adaptive"


def test_adaptive_says_who_decides_and_why() -> None:
    policy = policy_of("adaptive")
    assert policy.in_force == "slo_aware"
    assert policy.why() == "nothing to judge by yet"
    record = waiting("r", work_s=0.25, ttft_s=1.5)
    assert policy.explain(record) == "adaptive: slo_aware: most urgent, 0.25 s of work within 1.50 s"


def test_only_the_policies_that_plan_ahead_wait_pace_and_demote() -> None:
    flags = {
        name: (policy.is_patient, policy.is_paced, policy.demotes)
        for name in SCHEDULING_POLICIES.names
        if name != "adaptive" and (policy := policy_of(name))
    }
    assert flags == {
        "fifo": (False, False, False),
        "priority": (False, False, False),
        "slo_aware": (True, True, True),
        "cost_optimized": (True, True, True),
    }
    assert SloAwarePolicy.name == "slo_aware"


def finish_in_turn(world: World) -> list[str]:
    """Finish whatever runs until nothing waits; return the order of the dispatches."""
    order: list[str] = []
    while len(world.scheduler.queue):
        [running] = world.instance("a").in_flight.values()
        order += dispatched(world.feed(ev.AttemptSucceeded(running.request_id, running.epoch)))
    return order
