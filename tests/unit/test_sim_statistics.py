"""Figures of a simulated run, against values worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.types import RequestPriority
from sagecp.sim.fleet.fairness import jain_index, max_min_fair, max_service_lag, tenant_service
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.outcomes import Outcomes, OutcomeState
from sagecp.sim.fleet.statistics import (
    GoodputAt,
    goodput_at,
    mean_confidence,
    paired_difference,
    summarise,
    time_series,
)

FLEET = read_fleet("2x8b-l4")


def served(outcomes: Outcomes, arrival_s: float, **more: Any) -> None:
    """Add a request that succeeded: dispatched after 1 s, first token after 2 s, then 0.1 s per token."""
    output = more.get("output_token_count", 11)
    fields: dict[str, Any] = {
        "request_id": f"r{len(outcomes)}",
        "arrival_s": arrival_s,
        "state": OutcomeState.SUCCEEDED,
        "prompt_token_count": 100,
        "output_token_count": output,
        "dispatch_s": arrival_s + 1,
        "first_token_s": arrival_s + 2,
        "finish_s": arrival_s + 2 + 0.1 * (output - 1),
        "instance_index": 0,
    }
    outcomes.add(**(fields | more))


def missed(outcomes: Outcomes, arrival_s: float, state: OutcomeState, **more: Any) -> None:
    fields: dict[str, Any] = {
        "request_id": f"r{len(outcomes)}",
        "arrival_s": arrival_s,
        "state": state,
        "prompt_token_count": 100,
        "output_token_count": 10,
    }
    outcomes.add(**(fields | more))


def test_columns_hold_what_was_added() -> None:
    outcomes = Outcomes()
    served(outcomes, 3.0, tenant_id="b", priority=RequestPriority.HIGH, cached_token_count=-1, deadline_s=5.0)
    missed(outcomes, 4.0, OutcomeState.REJECTED, tenant_id="a", finish_s=4.0)
    rows = outcomes.as_arrays()
    assert len(outcomes) == 2
    assert (rows.request_ids, rows.tenant_ids) == (("r0", "r1"), ("b", "a"))
    assert rows.dispatch_s[0] == rows.scheduled_s[0] == 4.0
    assert math.isnan(rows.dispatch_s[1])
    assert rows.finish_s.tolist() == [6.0, 4.0]
    assert rows.cached_token_count.tolist() == [0, 0]
    assert rows.produced_token_count.tolist() == [11, 0]
    assert rows.instance_index.tolist() == [0, -1]
    assert rows.state.tolist() == [OutcomeState.SUCCEEDED, OutcomeState.REJECTED]
    assert rows.priority.tolist() == [2, 3]
    assert rows.deadline_s[0] == 5.0
    assert rows.tpot_s[0] == pytest.approx(0.1)


def test_success_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="'r0' succeeded, but has no first_token_s or finish_s"):
        served(Outcomes(), 0.0, finish_s=None)


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({}, True),
        ({"ttft_slo_s": 2.0}, True),
        ({"ttft_slo_s": 1.9}, False),
        ({"tpot_slo_s": 0.11}, True),
        ({"tpot_slo_s": 0.09}, False),
        # A single token has no time per further token.
        ({"tpot_slo_s": 0.09, "output_token_count": 1}, True),
        ({"deadline_s": 3.0}, True),
        ({"deadline_s": 2.9}, False),
        ({"ttft_slo_s": 2.0, "tpot_slo_s": 0.11, "deadline_s": 2.9}, False),
        ({"state": OutcomeState.CANCELLED}, False),
        ({"state": OutcomeState.UNFINISHED, "finish_s": None}, False),
    ],
)
def test_good_is_every_objective_met(fields: dict[str, Any], good: bool) -> None:
    outcomes = Outcomes()
    served(outcomes, 0.0, **fields)
    assert outcomes.as_arrays().good.tolist() == [good]


def test_the_figures_of_a_small_run() -> None:
    outcomes = Outcomes()
    served(outcomes, 0.0, prompt_token_count=100, cached_token_count=50, preemption_count=2)
    served(outcomes, 1.0, prompt_token_count=200, first_token_s=7.0, finish_s=9.0, ttft_slo_s=3.0)
    served(outcomes, 2.0, prompt_token_count=300, priority=RequestPriority.HIGH)
    missed(outcomes, 3.0, OutcomeState.REJECTED, prompt_token_count=400)
    missed(outcomes, 4.0, OutcomeState.EXPIRED, prompt_token_count=500, priority=RequestPriority.HIGH)
    served(outcomes, 5.0, prompt_token_count=600, output_token_count=1)
    figures = summarise(outcomes, FLEET, duration_s=10.0)
    assert (figures.request_count, figures.succeeded_count, figures.good_count) == (6, 4, 3)
    assert figures.offered_per_s == 0.6
    assert figures.goodput_per_s == 0.3
    assert figures.attainment == 0.5
    assert figures.token_weighted_attainment == pytest.approx(1000 / 2100)
    by_length = {
        name: (third.request_count, third.attainment) for name, third in figures.attainment_by_length.items()
    }
    assert by_length == {"short": (2, 0.5), "middle": (2, 0.5), "long": (2, 0.5)}
    assert [third.longest_prompt_token_count for third in figures.attainment_by_length.values()] == [
        200,
        400,
        600,
    ]
    assert (figures.rejected_share, figures.expired_share) == (1 / 6, 1 / 6)
    assert (figures.failed_share, figures.cancelled_share, figures.unfinished_share) == (0, 0, 0)
    # TTFT 2, 2, 2 and 6 s; the 95 % quantile lies 0.85 of the way from the third to the fourth.
    assert (figures.ttft.sample_count, figures.ttft.mean_s, figures.ttft.p50_s) == (4, 3.0, 2.0)
    assert figures.ttft.p95_s == pytest.approx(5.4)
    # 0.1, 0.2 and 0.1 s; the request of one token has none.
    assert figures.tpot.sample_count == 3
    assert figures.tpot.p50_s == pytest.approx(0.1)
    assert figures.tpot.p95_s == pytest.approx(0.19)
    # 3, 8, 3 and 2 s.
    assert figures.latency.p50_s == pytest.approx(3.0)
    assert figures.queue_wait.sample_count == 4
    assert figures.queue_wait.p99_s == pytest.approx(1.0)
    assert figures.prefix_hit_share == pytest.approx(50 / 1200)
    assert figures.preemption_count == 2
    # Two L4 at 0.80 an hour.
    assert figures.usd_total == pytest.approx(1.6 * 10 / 3600)
    assert figures.usd_per_1000_good == pytest.approx(1.6 * 10 / 3600 / 3 * 1000)
    assert figures.prompt_tokens_per_s == 120.0
    assert figures.output_tokens_per_s == 3.4
    assert {name: one.attainment for name, one in figures.by_priority.items()} == {"HIGH": 0.5, "NORMAL": 0.5}
    assert (figures.worst_tenant_id, figures.worst_tenant_attainment) == ("", None)
    assert json.loads(json.dumps(dataclasses.asdict(figures)))["ttft"]["p50_s"] == 2.0


def test_a_run_without_requests_has_figures() -> None:
    figures = summarise(Outcomes(), FLEET, duration_s=1.0)
    assert (figures.request_count, figures.attainment, figures.usd_per_1000_good) == (0, None, None)
    assert (figures.jain_index, figures.max_service_lag, figures.tenants) == (None, None, ())
    assert figures.rejected_share == 0.0
    json.dumps(dataclasses.asdict(figures), allow_nan=False)
    with pytest.raises(ValueError, match="duration_s must be above 0"):
        summarise(Outcomes(), FLEET, duration_s=0.0)


def test_the_worst_tenant_has_enough_requests_to_say_so() -> None:
    outcomes = Outcomes()
    for number in range(50):
        served(outcomes, number, tenant_id="many")
        served(outcomes, number, tenant_id="worse", ttft_slo_s=1.0 if number < 20 else 9.0)
    for number in range(49):
        missed(outcomes, number, OutcomeState.REJECTED, tenant_id="few")
    figures = summarise(outcomes, FLEET, duration_s=100.0)
    assert (figures.worst_tenant_id, figures.worst_tenant_attainment) == ("worse", 0.6)
    by_name = {tenant.tenant_id: tenant for tenant in figures.tenants}
    # 50 requests of 100 prompt tokens and twice 11 output tokens.
    assert by_name["many"].demand == by_name["many"].served == 50 * 122
    assert (by_name["few"].served, by_name["few"].rejected_count) == (0.0, 49)


@pytest.mark.parametrize(
    ("demand", "capacity", "share"),
    [
        ([10, 20, 30], 60, [10, 20, 30]),
        ([10, 20, 30], 100, [10, 20, 30]),
        ([30, 10, 20], 45, [17.5, 10, 17.5]),
        ([30, 30, 30], 45, [15, 15, 15]),
        ([30, 0, 30], 0, [0, 0, 0]),
        ([], 5, []),
    ],
)
def test_fair_shares_fill_up_evenly(demand: list[float], capacity: float, share: list[float]) -> None:
    assert max_min_fair(np.array(demand, dtype=float), capacity).tolist() == share


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(0, 1))
def test_fair_shares_give_out_what_there_is(demand: list[float], part: float) -> None:
    capacity = sum(demand) * part
    share = max_min_fair(np.array(demand), capacity)
    assert share.sum() == pytest.approx(capacity, rel=1e-9, abs=1e-6)
    assert all(0 <= given <= asked for given, asked in zip(share, demand, strict=True))
    level = share.max()
    # Whoever has less than another wanted no more.
    assert all(
        given == pytest.approx(level) or given == pytest.approx(asked)
        for given, asked in zip(share, demand, strict=True)
    )


@pytest.mark.parametrize(
    ("values", "index"),
    [([1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([1, 2, math.nan], 0.9), ([0, 0], None), ([], None)],
)
def test_jains_index(values: list[float], index: float | None) -> None:
    found = jain_index(np.array(values, dtype=float))
    assert found == (None if index is None else pytest.approx(index))


def test_fairness_counts_what_was_computed_against_what_was_fair() -> None:
    outcomes = Outcomes()
    for _ in range(3):
        # 80 uncached + 2 * 10 = 100 each.
        served(outcomes, 0.0, tenant_id="a", cached_token_count=20, output_token_count=10)
    served(outcomes, 0.0, tenant_id="b", prompt_token_count=80, output_token_count=10)
    # Began, got 5 of 10 tokens: 80 + 10.
    missed(
        outcomes, 0.0, OutcomeState.FAILED, tenant_id="b", prompt_token_count=80,
        first_token_s=1.0, finish_s=2.0, produced_token_count=5,
    )  # fmt: skip
    missed(outcomes, 0.0, OutcomeState.REJECTED, tenant_id="b", prompt_token_count=80)
    service = tenant_service(outcomes.as_arrays())
    assert service.demand.tolist() == [300.0, 300.0]
    assert service.served.tolist() == [300.0, 190.0]
    assert service.share.tolist() == [245.0, 245.0]
    # x = 300/245 and 190/245.
    expected = 490**2 / (2 * (300**2 + 190**2))
    assert summarise(outcomes, FLEET, duration_s=1000.0).jain_index == pytest.approx(expected)


def test_fairness_is_about_the_time_in_which_there_was_load() -> None:
    outcomes = Outcomes()
    # Both ask for the same; "b" is served when the load is over.
    objectives = {"ttft_slo_s": 5.0, "tpot_slo_s": 0.1, "output_token_count": 51, "prompt_token_count": 98}
    served(outcomes, 0.0, tenant_id="a", dispatch_s=0.0, first_token_s=1.0, finish_s=9.0, **objectives)
    served(outcomes, 0.0, tenant_id="b", dispatch_s=20.0, first_token_s=21.0, finish_s=30.0, **objectives)
    rows = outcomes.as_arrays()
    early = tenant_service(rows, 10.0)
    assert early.demand.tolist() == [200.0, 200.0]
    assert early.served.tolist() == [200.0, 0.0]
    assert jain_index(early.normalized) == pytest.approx(0.5)
    assert jain_index(tenant_service(rows).normalized) == pytest.approx(1.0)
    # After half of the ten seconds that the objectives allow, half is due: nobody is ahead of that.
    half = tenant_service(rows, 5.0)
    assert half.demand.tolist() == [100.0, 100.0]
    assert half.served.tolist() == [100.0, 0.0]


def test_lag_is_measured_while_both_wait() -> None:
    outcomes = Outcomes()
    # Both have a request that waits from 0 to 10 s. Meanwhile "a" is served 1,000 tokens, and "b" is at 20 s.
    for tenant in ("a", "b"):
        served(outcomes, 0.0, tenant_id=tenant, dispatch_s=10.0, first_token_s=20.0, finish_s=21.0)
    served(
        outcomes, 0.0, tenant_id="a", prompt_token_count=1000, output_token_count=1,
        dispatch_s=0.0, first_token_s=5.0, finish_s=5.0,
    )  # fmt: skip
    rows = outcomes.as_arrays()
    assert max_service_lag(rows, tenant_service(rows)) == pytest.approx(1002.0)


def test_lag_is_undefined_when_no_two_tenants_wait_together() -> None:
    outcomes = Outcomes()
    served(outcomes, 0.0, tenant_id="a")
    served(outcomes, 5.0, tenant_id="b")
    rows = outcomes.as_arrays()
    assert max_service_lag(rows, tenant_service(rows)) is None


def test_time_in_engines_counts_as_waiting_until_they_begin() -> None:
    outcomes = Outcomes()
    for tenant in ("a", "b"):
        served(
            outcomes, 0.0, tenant_id=tenant, dispatch_s=0.0, scheduled_s=8.0, first_token_s=9.0, finish_s=10.0
        )
    rows = outcomes.as_arrays()
    assert max_service_lag(rows, tenant_service(rows)) == 0.0


@pytest.mark.parametrize(
    ("points", "target", "expected"),
    [
        ([(1, 1.0), (2, 0.95), (3, 0.85)], 0.9, GoodputAt(2.5, "exact")),
        ([(3, 0.85), (1, 1.0), (2, 0.95)], 0.9, GoodputAt(2.5, "exact")),
        ([(1, 0.95), (2, 0.9)], 0.9, GoodputAt(2, "at_least")),
        ([(1, 0.5), (2, 0.4)], 0.9, GoodputAt(1, "at_most")),
        # It dips and comes back: the last crossing counts.
        ([(1, 1.0), (2, 0.8), (3, 1.0), (4, 0.5)], 0.75, GoodputAt(3.5, "exact")),
        # Two seeds of one rate are averaged to 0.85.
        ([(1, 0.95), (2, 0.8), (2, 0.9)], 0.9, GoodputAt(1.5, "exact")),
        ([(1, 0.9), (2, 0.5)], 0.9, GoodputAt(1.0, "exact")),
    ],
)
def test_goodput_at_a_target(points: list[tuple[float, float]], target: float, expected: GoodputAt) -> None:
    found = goodput_at(points, target)
    assert found.bound == expected.bound
    assert found.rate_per_s == pytest.approx(expected.rate_per_s)


def test_goodput_needs_points() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        goodput_at([])


def test_intervals_are_students() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(4, 95 %) = 2.776.
    found = mean_confidence([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.count, found.level) == (3.0, 5, 0.95)
    assert found.low == pytest.approx(3 - 2.776 * math.sqrt(2.5 / 5))
    assert found.high == pytest.approx(3 + 2.776 * math.sqrt(2.5 / 5))
    single = mean_confidence([7.0])
    assert (single.mean, single.low, single.high) == (7.0, None, None)
    for values, level, expected in (([], 0.95, "at least one value"), ([1.0], 0.5, "level must be one of")):
        with pytest.raises(ValueError, match=expected):
            mean_confidence(values, level)


@pytest.mark.parametrize(
    ("count", "level", "quantile"),
    [
        (2, 0.95, 12.706), (31, 0.9, 1.697), (32, 0.9, 1.696), (32, 0.95, 2.040), (32, 0.99, 2.744),
        (61, 0.95, 2.000), (61, 0.99, 2.660), (10_001, 0.95, 1.960),
    ],
)  # fmt: skip
def test_quantiles_agree_with_printed_tables(count: int, level: float, quantile: float) -> None:
    values = [float(number % 2) for number in range(count)]
    found = mean_confidence(values, level)
    assert found.high is not None
    half_width = found.high - found.mean
    assert half_width / float(np.std(values, ddof=1)) * math.sqrt(count) == pytest.approx(quantile, abs=6e-4)


def test_pairs_cancel_what_both_share() -> None:
    found = paired_difference([1.1, 5.2, 9.1], [1.0, 5.0, 9.0])
    assert found.mean == pytest.approx(0.4 / 3)
    # Differences 0.1, 0.2, 0.1: standard deviation 0.1 / sqrt(3).
    assert found.low == pytest.approx(0.4 / 3 - 4.303 * 0.1 / 3)
    with pytest.raises(ValueError, match="equal lengths, not 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_load_over_time() -> None:
    outcomes = Outcomes()
    # Waits 0-1 s, on instance 0 from 1 to 5 s, 8 tokens from 3 to 5 s.
    served(
        outcomes,
        0.0,
        dispatch_s=1.0,
        first_token_s=3.0,
        finish_s=5.0,
        output_token_count=8,
        cached_token_count=40,
    )
    # Waits 0-3 s, on instance 1 from 3 to 4 s, one token.
    served(
        outcomes, 0.0, dispatch_s=3.0, first_token_s=4.0, finish_s=4.0, output_token_count=1,
        instance_index=1, ttft_slo_s=1.0,
    )  # fmt: skip
    missed(outcomes, 2.5, OutcomeState.REJECTED, finish_s=2.5)
    series = time_series(outcomes, FLEET, 2.0)
    assert series.start_s.tolist() == [0.0, 2.0, 4.0]
    assert series.instance_ids == ("8b-l4-0", "8b-l4-1")
    assert series.arrivals_per_s.tolist() == [1.0, 0.5, 0.0]
    assert series.good_per_s.tolist() == [0.0, 0.0, 0.5]
    assert series.attainment[:2].tolist() == [0.5, 0.0]
    assert math.isnan(series.attainment[2])
    # 1 + 2 request-seconds in the first two seconds, 1 in the next.
    assert series.queued_count.tolist() == pytest.approx([1.5, 0.5, 0.0])
    assert series.in_flight_count[0].tolist() == pytest.approx([0.5, 1.0, 0.5])
    assert series.in_flight_count[1].tolist() == pytest.approx([0.0, 0.5, 0.0])
    assert series.prompt_tokens_per_s.tolist() == [[0.0, 30.0, 0.0], [0.0, 0.0, 50.0]]
    assert series.output_tokens_per_s[0].tolist() == pytest.approx([0.0, 2.0, 2.0])
    assert series.output_tokens_per_s[1].tolist() == pytest.approx([0.0, 0.0, 0.5])


def test_what_happens_at_the_very_end_is_in_a_bin() -> None:
    outcomes = Outcomes()
    served(outcomes, 0.0, dispatch_s=1.0, first_token_s=4.0, finish_s=4.0, output_token_count=1)
    series = time_series(outcomes, FLEET, 2.0)
    assert series.output_tokens_per_s[0].tolist() == [0.0, 0.0, 0.5]
    empty = time_series(Outcomes(), FLEET, 2.0)
    assert empty.in_flight_count.shape == (2, 1)
    for bin_s in (0.0, math.nan, 1e-9):
        with pytest.raises(ValueError, match="bin_s must be above 0"):
            time_series(outcomes, FLEET, bin_s)


def test_series_lose_nothing() -> None:
    generator = random.Random(7)
    outcomes = Outcomes()
    for _ in range(300):
        arrival_s = generator.uniform(0, 100)
        dispatch_s = arrival_s + generator.expovariate(1)
        first_s = dispatch_s + generator.expovariate(1)
        served(
            outcomes, arrival_s, dispatch_s=dispatch_s, first_token_s=first_s,
            finish_s=first_s + generator.expovariate(0.2), output_token_count=generator.randrange(1, 500),
            instance_index=generator.randrange(2),
        )  # fmt: skip
    rows = outcomes.as_arrays()
    series = time_series(rows, FLEET, 1.7)
    assert series.output_tokens_per_s.sum() * 1.7 == pytest.approx(rows.produced_token_count.sum())
    assert series.prompt_tokens_per_s.sum() * 1.7 == pytest.approx(rows.prompt_token_count.sum())
    assert series.in_flight_count.sum() * 1.7 == pytest.approx((rows.finish_s - rows.dispatch_s).sum())
    assert series.queued_count.sum() * 1.7 == pytest.approx((rows.dispatch_s - rows.arrival_s).sum())
    assert series.arrivals_per_s.sum() * 1.7 == pytest.approx(300)
