"""What requests cost: predicted before they run, charged after, and how right the prediction was."""

from __future__ import annotations

import math

import pytest

from sagecp.core import events as ev
from sagecp.core.cost_book import final_cost
from sagecp.core.prediction.cost import CostBasis, EngineTimeCurve, cost_quantiles_usd, engine_time
from sagecp.core.prediction.output_length import OutputLengthModel
from sagecp.core.request import RequestRecord
from sagecp.core.request_cost import RequestCost
from sagecp.core.types import PromptDigest, SamplingParameters
from tests.support.core_world import STEP_TIME, Traffic, World, arrive, fail, healthy
from tests.support.placement_rows import candidate_row, request_row

USD_PER_S = 1.0
"""With the price below."""


def priced_world(*names: str, usd_per_hour: float = 3600.0) -> World:
    world = World(scheduling_policy="fifo", load_balancer="least_connections")
    for name in names or ("a",):
        world.feed(healthy(name, step_time=STEP_TIME, usd_per_gpu_hour=usd_per_hour, limit=8))
    return world


def run(world: World, request_id: str, first_s: float, end_s: float, tokens: int, epoch: int = 1) -> None:
    world.now += first_s
    world.feed(ev.AttemptProgressed(request_id, epoch))
    world.now += end_s - first_s
    world.feed(ev.AttemptSucceeded(request_id, epoch, tokens))


def cost(world: World, record: RequestRecord) -> RequestCost:
    found = world.scheduler.costs.cost_of(record, world.now)
    assert found is not None
    return found


# -- charged ---------------------------------------------------------------------------------


def test_a_request_costs_its_share_of_the_engines_time() -> None:
    world = priced_world()
    world.feed(arrive("r", max_tokens=100))
    record = world.record("r")
    assert cost(world, record).actual_usd == 0.0
    world.now = 1.0
    world.feed(ev.AttemptProgressed("r", 1))
    world.now = 2.0
    assert cost(world, record).actual_usd == pytest.approx(2.0 * USD_PER_S)
    world.feed(ev.AttemptSucceeded("r", 1, 100))
    assert record.spent_usd == pytest.approx(2.0 * USD_PER_S)
    meter = world.instance("a").meter
    world.now = 5.0
    assert [meter.busy_usd(5.0), meter.idle_usd(5.0)] == pytest.approx([2.0, 3.0])


def test_lost_attempts_count() -> None:
    world = priced_world("a", "b")
    world.feed(arrive("r", max_tokens=100))
    record = world.record("r")
    first = record.instance_id
    world.now = 1.0
    world.feed(ev.AttemptProgressed("r", 1))
    world.now = 2.0
    world.feed(fail("r", output_token_count=50))
    assert record.epoch == 2
    assert record.spent_usd == pytest.approx(2.0)
    assert record.instance_id != first
    assert cost(world, record).predicted_p10_usd > 2.0, "what is spent is spent"
    run(world, "r", 0.5, 1.5, 100, epoch=2)
    assert record.spent_usd == pytest.approx(3.5)


def test_a_request_that_never_ran_costs_nothing_that_could_be_told() -> None:
    world = World()
    world.feed(healthy("a", step_time=STEP_TIME, usd_per_gpu_hour=1.0, limit=1))
    world.feed(arrive("first"), arrive("second"))
    record = world.record("second")
    world.feed(ev.RequestCancelled("second"))
    assert (record.spent_usd, final_cost(record)) == (None, None)


def test_without_a_price_there_is_no_cost_and_the_time_is_known() -> None:
    world = World()
    world.feed(healthy("a", step_time=STEP_TIME), arrive("r"))
    record = world.record("r")
    assert world.scheduler.costs.cost_of(record, 0.0) is None
    run(world, "r", 1.0, 2.0, 10)
    assert final_cost(record) is None
    assert world.instance("a").meter.busy_s(2.0) == 2.0
    assert "cost" not in world.scheduler.book.accuracy.summary()


def test_a_registration_anew_keeps_what_was_counted() -> None:
    world = priced_world()
    world.feed(arrive("r"))
    record = world.record("r")
    world.now = 1.0
    world.feed(ev.AttemptProgressed("r", 1))
    world.feed(healthy("a", step_time=STEP_TIME, usd_per_gpu_hour=7200.0))
    world.now = 2.0
    assert world.instance("a").meter.busy_usd(2.0) == pytest.approx(1.0 + 2.0)
    world.feed(ev.AttemptSucceeded("r", 1, 10))
    # Its time at the price in force at its end.
    assert record.spent_usd == pytest.approx(4.0)


def test_costs_of_many_requests_are_the_price_of_busy_time() -> None:
    world = priced_world("a", "b")
    traffic = Traffic(world)
    for number in range(40):
        tokens = 10 + 13 * number % 200
        digest = PromptDigest(100 + 977 * number % 5000)
        traffic.add(0.05 * number, arrive(f"r{number}", max_tokens=tokens, prompt_digest=digest))
    traffic.run()
    records = {dispatch.record.request_id: dispatch.record for dispatch in traffic.dispatches}
    assert len(records) == 40
    busy_usd = sum(world.instance(name).meter.busy_usd(world.now) for name in "ab")
    assert sum(record.spent_usd or 0.0 for record in records.values()) == pytest.approx(busy_usd)
    assert all(record.spent_usd for record in records.values())


# -- predicted -------------------------------------------------------------------------------


def test_predicted_at_dispatch_and_the_same_after_what_was_learned_since() -> None:
    world = priced_world()
    world.feed(arrive("r", max_tokens=100), arrive("other", max_tokens=100))
    record = world.record("r")
    before = cost(world, record)
    assert 0.0 < before.predicted_p10_usd < before.predicted_p50_usd < before.predicted_p90_usd
    run(world, "other", 0.5, 1.0, 1)
    after = cost(world, record)
    assert (after.predicted_p10_usd, after.predicted_p90_usd) == (
        before.predicted_p10_usd,
        before.predicted_p90_usd,
    )
    run(world, "r", 0.1, 1.0, 90)
    assert record.cost_basis is not None
    ended = final_cost(record)
    assert ended is not None
    assert ended.predicted_p50_usd == before.predicted_p50_usd
    assert record.cost_basis is None, "a distribution is not kept for ended requests"
    assert final_cost(record) == ended


def test_while_it_waits_it_is_predicted_on_the_cheapest_ready_instance() -> None:
    world = World(scheduling_policy="fifo", load_balancer="least_connections")
    world.feed(
        healthy("cheap", step_time=STEP_TIME, usd_per_gpu_hour=1.0, limit=1),
        healthy("dear", step_time=STEP_TIME, usd_per_gpu_hour=8.0, limit=1),
        healthy("unpriced", step_time=STEP_TIME, limit=1),
    )
    world.feed(*(arrive(f"r{number}", max_tokens=100) for number in range(4)))
    waiting = world.record("r3")
    assert waiting.queued
    found = cost(world, waiting)
    assert found.actual_usd is None
    cheap = next(record for n in range(3) if (record := world.record(f"r{n}")).instance_id == "cheap")
    # Beside the one that runs there it would pay for less than that, which has the engine alone.
    assert 0.3 < found.predicted_p50_usd / cost(world, cheap).predicted_p50_usd <= 1.0
    world.now += 2.0
    world.feed(ev.DrainRequested("cheap", force=True), ev.DrainRequested("unpriced", force=True))
    assert cost(world, waiting).predicted_p50_usd == pytest.approx(8.0 * found.predicted_p50_usd, rel=0.1)
    world.now += 2.0
    world.feed(ev.DrainRequested("dear", force=True))
    assert world.scheduler.costs.cost_of(waiting, world.now) is None


def test_predictions_are_compared_with_what_came_and_bounds_with_how_often_they_held() -> None:
    world = priced_world()
    for number in range(60):
        name = f"r{number}"
        world.feed(arrive(name, max_tokens=64))
        record = world.record(name)
        run(world, name, 0.02, 0.02 + 0.011 * 31, 32)
        world.now += 1.0
        assert record.spent_usd is not None
    accuracy = world.scheduler.book.accuracy.summary()["cost"]
    assert accuracy.count == 60
    assert accuracy.median_error_ratio < 0.3
    assert accuracy.upper_coverage is not None
    assert accuracy.upper_coverage > 0.9


def test_where_many_end_only_some_are_compared() -> None:
    world = priced_world()
    for number in range(50):
        world.feed(arrive(f"r{number}", max_tokens=4))
        run(world, f"r{number}", 0.01, 0.02, 4)
    assert 1 <= world.scheduler.book.accuracy.summary()["cost"].count <= 3


# -- formulas --------------------------------------------------------------------------------


def basis(**fields: float) -> CostBasis:
    values = {"spent_usd": 0.0, "factor": 1.0, "sigma": 0.0, **fields}
    return CostBasis(OutputLengthModel().distribution("t", None, 100), **values)


CURVE = EngineTimeCurve(
    prompt_s=1.0, token_s=0.01, context_per_token_s=0.0, prompt_token_count=100, choice_count=1
)


def test_without_other_uncertainty_the_quantiles_are_those_of_the_length() -> None:
    lengths = basis().lengths
    expected = [1.0 + 0.01 * (lengths.quantile(q, 0, math.inf) - 1) for q in (0.1, 0.5, 0.9)]
    assert cost_quantiles_usd(CURVE, 3600.0, basis(), max_tokens=None) == pytest.approx(expected)
    doubled = cost_quantiles_usd(CURVE, 7200.0, basis(spent_usd=5.0), max_tokens=None)
    assert doubled == pytest.approx([5.0 + 2.0 * each for each in expected])


def test_what_runs_beside_it_makes_the_bounds_wider_and_the_median_stays() -> None:
    narrow = cost_quantiles_usd(CURVE, 1.0, basis(), max_tokens=8)
    wide = cost_quantiles_usd(CURVE, 1.0, basis(sigma=0.5), max_tokens=8)
    assert wide.p50_usd == pytest.approx(narrow.p50_usd)
    assert wide.p10_usd < narrow.p10_usd <= narrow.p90_usd < wide.p90_usd


def test_limits_and_what_is_produced_already_bound_the_length() -> None:
    limited = cost_quantiles_usd(CURVE, 3600.0, basis(), max_tokens=10)
    assert limited.p90_usd <= 1.0 + 0.01 * 9 + 1e-9
    # Of ten, nine are there: one is left, and comes with the prompt.
    assert cost_quantiles_usd(CURVE, 3600.0, basis(), max_tokens=10, produced_token_count=9) == pytest.approx(
        (1.0, 1.0, 1.0)
    )


def test_engines_that_take_no_time_cost_nothing() -> None:
    free = CURVE._replace(prompt_s=0.0, token_s=0.0)
    assert cost_quantiles_usd(free, 1.0, basis(spent_usd=0.5), max_tokens=5) == (0.5, 0.5, 0.5)


def test_the_curve_is_what_the_meter_charges_for_one_that_is_alone() -> None:
    row = candidate_row("a", step_time=STEP_TIME)
    request = request_row(prompt_token_count=1000)
    curve = engine_time(request, row)
    assert curve.seconds(1) == pytest.approx(STEP_TIME.prefill_s(1000, 1000))
    gap_s = STEP_TIME.decode_step_s(1, 1000 + 50)
    assert curve.seconds(100) - curve.seconds(1) == pytest.approx(99 * gap_s, rel=1e-3)


def test_beside_others_a_request_pays_less_and_more_tokens_cost_more() -> None:
    request = request_row(prompt_token_count=1000)
    alone = engine_time(request, candidate_row("a", step_time=STEP_TIME))
    beside = engine_time(
        request,
        candidate_row("a", step_time=STEP_TIME, decode_count=15, context_token_count=15_000.0),
    )
    assert beside.seconds(200) < 0.3 * alone.seconds(200)
    for curve in (alone, beside):
        assert sorted(map(curve.seconds, range(1, 100))) == [curve.seconds(n) for n in range(1, 100)]
    cached = engine_time(request, candidate_row("a", step_time=STEP_TIME, cached_token_count=900))
    assert cached.seconds(1) < alone.seconds(1)


def test_several_answers_cost_several_times_the_tokens() -> None:
    world = priced_world()
    world.feed(arrive("one", max_tokens=64))
    one = cost(world, world.record("one")).predicted_p50_usd
    world = priced_world()
    world.feed(arrive("four", max_tokens=64, sampling=SamplingParameters(n=4)))
    # They share each step's fixed part.
    assert one < cost(world, world.record("four")).predicted_p50_usd < 2.0 * one
