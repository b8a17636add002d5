"""The model-based balancer: its loss is the formula, and moves the right way."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.placement import miss_probability, predict
from sagecp.core.router.balancers.predicted_latency import PredictedLatencyBalancer
from sagecp.core.router.base import ScorerContext
from tests.support.placement_rows import DEFAULTS, STEP_TIME, candidate_row, request_row

BALANCER = PredictedLatencyBalancer(ScorerContext(random.Random(0)))


def loss(
    request: dict[str, Any] | None = None, parameters: dict[str, float] | None = None, **row: Any
) -> float:
    values = {**DEFAULTS, **(parameters or {})}
    return BALANCER.score(request_row(**(request or {})), candidate_row(**row), values)


def test_its_scores_are_losses() -> None:
    assert BALANCER.is_loss


def test_the_loss_is_the_formula() -> None:
    request = request_row(waited_s=0.3, ttft_objective_s=0.5, tpot_objective_s=0.02)
    row = candidate_row(
        backlog_s=0.1, decode_count=8, context_token_count=8000.0, prefill_share=0.3, sigma=0.5
    )
    predicted = predict(request, row)
    # By hand, from the constants of a step.
    decode_s = 0.002 + 0.006 + 15e-6 * 9 + 5e-8 * 9000
    own_s = 0.002 + (0.003 + 20e-6 * 1008) + 5e-8 * 8000 + 1e-9 * 1000 * 500
    prefill_step_s = 0.002 + 0.003 + 20e-6 * 2048 + 5e-8 * 8000
    assert predicted.ttft_s == pytest.approx(0.1 + decode_s / 2 + own_s)
    assert predicted.tpot_s == pytest.approx(1 / (0.3 / prefill_step_s + 0.7 / decode_s))
    assert predicted.work_s == pytest.approx(1000 * (0.005 / 2048 + 20e-6) + 1e-9 * 1000 * 500)
    ttft_s = predicted.ttft_s + 0.3
    missed = 0.5 * math.erfc(math.log(0.5 / ttft_s) / (0.5 * math.sqrt(2)))
    slow = 0.5 * math.erfc(math.log(0.02 / predicted.tpot_s) / (0.6 * math.sqrt(2)))
    assert BALANCER.score(request, row, DEFAULTS) == pytest.approx(
        1 - (1 - missed) * (1 - slow) + 0.25 * predicted.work_s + 0.2 * ttft_s / 0.5
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"backlog_s": 0.5}),
        ({"cached_token_count": 900}, {}),
        ({"decode_count": 2}, {"decode_count": 200}),
        ({"decode_count": 8}, {"decode_count": 8, "context_token_count": 400_000.0}),
        ({"decode_count": 8}, {"decode_count": 8, "prefill_share": 0.6}),
        ({}, {"ttft_factor": 2.0}),
        ({"tpot_factor": 1.0}, {"tpot_factor": 20.0}),
        ({}, {"step_time": dataclasses.replace(STEP_TIME, compute_per_token_s=80e-6)}),
        # A cache is worth some queue, and no more than it saves.
        ({"cached_token_count": 900, "backlog_s": 0.005}, {}),
        ({}, {"cached_token_count": 900, "backlog_s": 0.5}),
    ],
)
def test_less_work_less_load_and_more_speed_are_better(better: dict[str, Any], worse: dict[str, Any]) -> None:
    for waited_s in (0.0, 1.0):
        assert loss({"waited_s": waited_s}, **better) < loss({"waited_s": waited_s}, **worse)


def test_who_is_uncertain_is_avoided_while_the_objective_can_be_met() -> None:
    assert loss(backlog_s=0.5) == loss(backlog_s=0.5, sigma=0.2), "there is a least spread"
    assert loss(backlog_s=0.5) < loss(backlog_s=0.5, sigma=1.0)
    assert loss(backlog_s=3.0) > loss(backlog_s=3.0, sigma=1.0), "and sought when it cannot"


def test_parameters_weigh_the_terms() -> None:
    nothing = {"predicted_latency.work_price": 0.0, "predicted_latency.ttft_tilt": 0.0}
    assert loss(parameters=nothing) == pytest.approx(0.0, abs=1e-3)
    assert loss(parameters=nothing, backlog_s=100.0) == pytest.approx(1.0, abs=1e-3)
    priced = nothing | {"predicted_latency.work_price": 2.0}
    work_s = predict(request_row(), candidate_row()).work_s
    assert loss(parameters=priced) - loss(parameters=nothing) == pytest.approx(2.0 * work_s)


def test_without_objectives_the_loss_is_the_work() -> None:
    endless = {"ttft_objective_s": math.inf, "tpot_objective_s": math.inf}
    work_s = predict(request_row(), candidate_row()).work_s
    assert loss(endless, backlog_s=50.0) == pytest.approx(0.25 * work_s)


def test_a_prompt_that_is_cached_as_a_whole_still_computes_a_token() -> None:
    cached = predict(request_row(), candidate_row(cached_token_count=1000))
    assert cached == predict(request_row(), candidate_row(cached_token_count=999))
    assert cached.ttft_s > 0.0


@pytest.mark.parametrize(
    ("predicted_s", "objective_s", "chance"),
    [
        (1.0, 1.0, 0.5),
        (0.0, 1.0, 0.0),
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 1.0),
        (1.0, math.inf, 0.0),
        (1.0, math.e, 0.158655),
        (math.e, 1.0, 0.841345),
    ],
)
def test_the_chance_to_miss(predicted_s: float, objective_s: float, chance: float) -> None:
    assert miss_probability(predicted_s, objective_s, 1.0) == pytest.approx(chance, abs=1e-6)


@given(
    waited_s=st.floats(1e-3, 1e6),
    objective_share=st.floats(1e-6, 1.0),
    further_s=st.floats(0.0, 1e6),
    sigmas=st.tuples(st.floats(0.05, 8.0), st.floats(0.05, 8.0)),
)
def test_who_is_late_already_is_no_likelier_in_time_for_more_delay_or_less_doubt(
    waited_s: float, objective_share: float, further_s: float, sigmas: tuple[float, float]
) -> None:
    """What lets the dispatcher call a request hopeless before it knows where it could go."""
    objective_s = waited_s * objective_share
    least, largest = sorted(sigmas)
    overdue = miss_probability(waited_s, objective_s, largest)
    assert miss_probability(waited_s + further_s, objective_s, least) >= overdue >= 0.5


def test_terms_and_reason_say_what_was_predicted() -> None:
    request, row = request_row(), candidate_row(cached_token_count=512, backlog_s=0.25)
    predicted = predict(request, row)
    terms = BALANCER.terms(request, row, DEFAULTS)
    assert terms["ttft_s"] == predicted.ttft_s
    assert terms["tpot_s"] == predicted.tpot_s
    assert terms["work_s"] == predicted.work_s
    assert (terms["cached_tokens"], terms["backlog_s"]) == (512.0, 0.25)
    reason = BALANCER.reason(request, row, 0.125)
    assert reason.startswith(
        f"predicted_latency: least expected loss 0.125; first token in {predicted.ttft_s:.3f} s"
    )
    assert reason.endswith(" ms per token, 512 tokens cached")
    assert "cached" not in BALANCER.reason(request, candidate_row(), 0.1)
