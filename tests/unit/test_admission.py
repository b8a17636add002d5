"""Admission: what a request is taken to need, and which ones are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import ErrorReason, InfeasibleError
from sagecp.core.types import PromptDigest, SamplingParameters
from tests.support.core_world import STEP_TIME, World, arrive, configure, healthy

TTFT_BASE_S, TTFT_PER_1000_TOKENS_S, TPOT_S = 1.0, 0.25, 0.15


def known_world(instance_count: int = 1, policy: str = "fifo", **instance_fields: Any) -> World:
    """Idle instances whose speed is known."""
    world = World(scheduling_policy=policy, default_concurrency_limit=64)
    instance_fields.setdefault("step_time", STEP_TIME)
    for number in range(instance_count):
        world.feed(healthy(f"i{number}", **instance_fields))
    return world


def prompt(token_count: int, *block_hashes: int) -> PromptDigest:
    return PromptDigest(token_count, block_hashes, 256)


def refusal(world: World, request_id: str = "r", **fields: Any) -> InfeasibleError | None:
    """Submit a request; return why it was refused, or ``None``."""
    fields.setdefault("prompt_digest", prompt(1000))
    fields.setdefault("max_tokens", 16)
    effects = world.effects(arrive(request_id, **fields))
    for effect in effects:
        if isinstance(effect, fx.RequestRejected):
            assert isinstance(effect.error, InfeasibleError)
            assert effect.error.reason is ErrorReason.INFEASIBLE
            assert world.scheduler.find_request(request_id) is None
            return effect.error
    return None


# -- estimates -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "ttft_s", "tpot_s"),
    [
        ({}, TTFT_BASE_S + 4 * TTFT_PER_1000_TOKENS_S, TPOT_S),
        ({"ttft_slo_ms": 250.0}, 0.25, TPOT_S),
        ({"tpot_slo_ms": 20.0}, TTFT_BASE_S + 4 * TTFT_PER_1000_TOKENS_S, 0.02),
        ({"ttft_slo_ms": 250.0, "tpot_slo_ms": 20.0, "slo_deadline_ms": 60_000.0}, 0.25, 0.02),
    ],
)
def test_objectives_are_those_stated_or_the_defaults(
    fields: dict[str, Any], ttft_s: float, tpot_s: float
) -> None:
    world = known_world()
    assert refusal(world, prompt_digest=prompt(4000), **fields) is None
    record = world.record("r")
    assert record.ttft_objective_s == pytest.approx(ttft_s)
    assert record.tpot_objective_s == pytest.approx(tpot_s)


def test_default_objectives_are_parameters() -> None:
    world = known_world()
    world.feed(
        configure(
            parameters={
                "objectives.ttft_base_s": 3.0,
                "objectives.ttft_per_1000_tokens_s": 1.0,
                "objectives.tpot_s": 0.5,
            }
        )
    )
    assert refusal(world, prompt_digest=prompt(2000)) is None
    record = world.record("r")
    assert (record.ttft_objective_s, record.tpot_objective_s) == (5.0, 0.5)


def test_a_deadline_leaves_time_for_the_answer() -> None:
    """Of ten seconds the decodes need some; the first token has the rest."""
    world = known_world()
    assert refusal(world, max_tokens=400, slo_deadline_ms=10_000.0) is None
    record = world.record("r")
    output_tokens = record.expected_output_token_count
    decode_s = output_tokens * STEP_TIME.decode_step_s(1, 1000)
    assert record.ttft_objective_s == pytest.approx(10.0 - decode_s, abs=0.05)
    assert record.tpot_objective_s == pytest.approx(10.0 / output_tokens, rel=0.01)


def test_a_deadline_never_leaves_nothing_for_the_first_token() -> None:
    world = known_world()
    world.feed(configure(parameters={"admission.refuse_infeasible": 0.0}))
    assert refusal(world, max_tokens=None, slo_deadline_ms=1000.0) is None
    assert world.record("r").ttft_objective_s == pytest.approx(0.1)


def test_work_is_that_of_the_uncached_part() -> None:
    world = known_world(key_value_token_capacity=100_000)
    blocks = tuple(range(16))
    assert refusal(world, "cold", prompt_digest=prompt(4096, *blocks)) is None
    assert world.record("cold").work_s == pytest.approx(STEP_TIME.work_s(4096, 4096, 2048))
    half = (*blocks[:8], *range(100, 108))
    assert refusal(world, "warm", prompt_digest=prompt(4096, *half)) is None
    assert world.record("warm").work_s == pytest.approx(STEP_TIME.work_s(2048, 4096, 2048))


def test_the_answer_is_expected_as_long_as_answers_were_for_all_choices() -> None:
    world = known_world()
    for number in range(60):
        assert refusal(world, f"r{number}", max_tokens=1000) is None
        world.feed(ev.AttemptProgressed(f"r{number}", 1), ev.AttemptSucceeded(f"r{number}", 1, 50))
    assert refusal(world, "one", max_tokens=1000) is None
    assert world.record("one").expected_output_token_count == pytest.approx(50, rel=0.3)
    assert refusal(world, "three", max_tokens=1000, sampling=SamplingParameters(n=3)) is None
    one, three = (world.record(name).expected_output_token_count for name in ("one", "three"))
    assert three == 3 * one


# -- deadlines ---------------------------------------------------------------------------


def test_what_can_be_met_is_taken() -> None:
    assert refusal(known_world(), slo_deadline_ms=2000.0) is None


def test_a_deadline_that_even_an_idle_instance_misses_is_refused_for_good() -> None:
    error = refusal(known_world(), prompt_digest=prompt(100_000), slo_deadline_ms=1000.0)
    assert error is not None
    assert error.retry_after_s is None
    assert "even an idle instance would need that long" in str(error)
    alone_s = STEP_TIME.prefill_s(100_000, 100_000)
    assert float(error.metadata["predicted_finish_s"]) == pytest.approx(alone_s, rel=0.1)
    assert error.metadata["deadline_s"] == "1.000"


def test_a_deadline_that_is_only_too_soon_now_is_refused_with_a_time() -> None:
    world = known_world()
    assert refusal(world, "long", prompt_digest=prompt(60_000)) is None
    error = refusal(world, slo_deadline_ms=1500.0)
    assert error is not None
    assert error.retry_after_s is not None
    assert 0.1 <= error.retry_after_s <= 60.0
    assert f"try again in about {error.retry_after_s:.1f} s" in str(error)
    # What it says is true: then, and not much before, it is taken.
    world.now += 0.5 * error.retry_after_s
    assert refusal(world, slo_deadline_ms=1500.0) is not None
    world.now += 0.5 * error.retry_after_s
    assert refusal(world, slo_deadline_ms=1500.0) is None


def test_busy_decodes_alone_do_not_make_a_deadline_hopeless() -> None:
    """An idle instance would be fast enough: waiting for one may help."""
    world = known_world()
    for number in range(40):
        assert refusal(world, f"d{number}", prompt_digest=prompt(3000), max_tokens=None) is None
    for number in range(40):
        world.now += STEP_TIME.prefill_s(3000, 3000)
        world.feed(ev.AttemptProgressed(f"d{number}", 1))
    token_s = STEP_TIME.decode_step_s(1, 1000)
    loaded_token_s = STEP_TIME.decode_step_s(40, 40 * 3000)
    assert loaded_token_s > 1.5 * token_s
    # Long enough for an answer of its length on an idle instance, with a good margin.
    probe = known_world()
    assert refusal(probe, max_tokens=None) is None
    output_tokens = probe.record("r").expected_output_token_count
    deadline_ms = 1000.0 * (0.2 + 1.1 * token_s * output_tokens)
    assert refusal(probe, "idle", max_tokens=None, slo_deadline_ms=deadline_ms) is None
    error = refusal(world, max_tokens=None, slo_deadline_ms=deadline_ms)
    assert error is not None
    assert error.retry_after_s is not None


@pytest.mark.parametrize("policy", ["fifo", "slo_aware"])
def test_the_queue_counts_where_it_goes_first(policy: str) -> None:
    """Under fifo all that waits goes first; under other orders a short request may pass."""
    world = World(scheduling_policy=policy, default_concurrency_limit=1)
    world.feed(healthy("i0", step_time=STEP_TIME))
    for number in range(20):
        assert refusal(world, f"w{number}", prompt_digest=prompt(10_000), ttft_slo_ms=60_000.0) is None
    world.now += 0.6
    world.feed(ev.AttemptProgressed("w0", 1))
    assert len(world.scheduler.queue) == 19
    error = refusal(world, prompt_digest=prompt(100), slo_deadline_ms=3000.0)
    assert (error is not None) == (policy == "fifo")


def test_one_good_instance_is_enough() -> None:
    world = known_world(2)
    assert refusal(world, "long", prompt_digest=prompt(60_000)) is None
    assert refusal(world, slo_deadline_ms=1500.0) is None
    assert world.record("r").instance_id != world.record("long").instance_id


def test_the_tolerance_is_a_parameter() -> None:
    world = known_world()
    finish_s = STEP_TIME.prefill_s(20_000, 20_000) + 15 * STEP_TIME.decode_step_s(1, 20_000)
    fields: dict[str, Any] = {
        "prompt_digest": prompt(20_000),
        "max_tokens": 1,
        "slo_deadline_ms": 1000.0 * finish_s / 1.5,
    }
    assert refusal(world, **fields) is not None
    world.feed(configure(parameters={"admission.tolerance": 2.0}))
    assert refusal(world, **fields) is None


def test_operators_may_have_the_infeasible_taken_as_best_effort() -> None:
    world = known_world(policy="slo_aware")
    world.feed(configure(parameters={"admission.refuse_infeasible": 0.0}))
    assert refusal(world, prompt_digest=prompt(100_000), slo_deadline_ms=1000.0) is None
    assert world.record("r").demoted


@pytest.mark.parametrize(
    "fields",
    [
        {},  # No GPU is named: the prior is a guess.
        {"gpu_name": "NVIDIA H100 80GB HBM3", "model": "mystery"},
    ],
)
def test_an_instance_of_unknown_speed_refuses_nobody(fields: dict[str, Any]) -> None:
    world = World()
    world.feed(healthy("a", fields.pop("model", "m"), usd_per_gpu_hour=10.0, **fields))
    model = world.instance("a").spec.model_name
    assert (
        refusal(world, model=model, prompt_digest=prompt(10**6), slo_deadline_ms=1.0, cost_budget=1e-9)
        is None
    )


@pytest.mark.parametrize("event", [None, ev.DrainRequested("i0", force=True)])
def test_nobody_is_refused_for_want_of_a_ready_instance(event: ev.Event | None) -> None:
    world = World()
    if event is None:
        world.feed(ev.InstanceRegistered(healthy("i0", step_time=STEP_TIME).instance))
    else:
        world.feed(healthy("i0", step_time=STEP_TIME), event)
    assert refusal(world, prompt_digest=prompt(10**6), slo_deadline_ms=1.0) is None
    assert world.record("r").queued


def test_a_kind_that_was_observed_is_believed() -> None:
    """A guess that proved itself, or was corrected, may refuse."""
    world = World()
    world.feed(healthy("a"))
    for number in range(20):
        assert refusal(world, f"r{number}", slo_deadline_ms=None) is None
        world.now += 2.0
        world.feed(ev.AttemptProgressed(f"r{number}", 1))
        world.now += 20.0
        world.feed(ev.AttemptSucceeded(f"r{number}", 1, 16))
    assert world.instance("a").load.kind.trusted
    error = refusal(world, prompt_digest=prompt(50_000), slo_deadline_ms=1000.0)
    assert error is not None


# -- budgets -----------------------------------------------------------------------------


def test_a_budget_below_the_cheapest_price_is_refused_with_the_figure() -> None:
    world = World()
    world.feed(
        healthy("dear", step_time=STEP_TIME, usd_per_gpu_hour=8.0),
        healthy("cheap", step_time=STEP_TIME, usd_per_gpu_hour=2.0),
    )
    error = refusal(world, prompt_digest=prompt(10_000), cost_budget=1e-6)
    assert error is not None
    assert error.metadata["instance_id"] == "cheap"
    assert error.retry_after_s is None
    cost_usd = float(error.metadata["predicted_cost_usd"])
    prefill_usd = 2.0 / 3600.0 * STEP_TIME.work_s(10_000, 10_000, 2048)
    assert prefill_usd < cost_usd < 2.0 * prefill_usd
    assert f"would cost about {cost_usd:.6f} US dollars" in str(error)
    assert refusal(world, "enough", prompt_digest=prompt(10_000), cost_budget=1.01 * cost_usd) is None
    assert refusal(world, "less", prompt_digest=prompt(10_000), cost_budget=0.98 * cost_usd) is not None


def test_a_budget_is_for_all_choices_together() -> None:
    world = known_world(usd_per_gpu_hour=2.0)
    prices, token_counts = [], []
    for choice_count in (1, 2, 4):
        sampling = SamplingParameters(n=choice_count)
        error = refusal(world, sampling=sampling, cost_budget=1e-9)
        assert error is not None
        prices.append(float(error.metadata["predicted_cost_usd"]))
        enough = 1.01 * prices[-1]
        assert refusal(world, f"enough{choice_count}", sampling=sampling, cost_budget=enough) is None
        token_counts.append(world.record(f"enough{choice_count}").expected_output_token_count)
        world.feed(ev.RequestCancelled(f"enough{choice_count}"))
    # The prompt is computed once; each answer is as long as the first, and no answer is free.
    answer_usd = prices[1] - prices[0]
    step_s = STEP_TIME.overhead_s + STEP_TIME.memory_base_s
    assert token_counts == [token_counts[0], 2 * token_counts[0], 4 * token_counts[0]]
    # Eight decodes share a step.
    assert answer_usd > 2.0 / 3600.0 * token_counts[0] * step_s / 8
    assert prices[2] - prices[1] == pytest.approx(2.0 * answer_usd, rel=1e-3)
    assert prices[1] < 2.0 * prices[0]


def test_a_budget_without_prices_is_no_reason() -> None:
    assert refusal(known_world(), cost_budget=1e-9) is None


def test_a_cached_start_makes_it_cheaper() -> None:
    world = known_world(usd_per_gpu_hour=2.0, key_value_token_capacity=100_000)
    blocks = tuple(range(39))
    budget = 1.5 * 2.0 / 3600.0 * STEP_TIME.work_s(2000, 10_000, 2048)
    assert refusal(world, "cold", prompt_digest=prompt(10_000, *blocks), cost_budget=budget) is not None
    assert refusal(world, "fill", prompt_digest=prompt(10_000, *blocks)) is None
    assert refusal(world, "warm", prompt_digest=prompt(10_000, *blocks), cost_budget=budget) is None


def test_budgets_bind_even_where_deadlines_do_not() -> None:
    world = known_world(usd_per_gpu_hour=2.0)
    world.feed(configure(parameters={"admission.refuse_infeasible": 0.0}))
    assert refusal(world, cost_budget=1e-9) is not None
    assert refusal(world, cost_budget=math.inf) is None
