"""The search for a plan: its goals, its reasons, and what it says where nothing can be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate, PlanningResult
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.search import search_plans
from sagecp.core.parallelism.workload import LengthSample, PlanGoal, PlanObjectives, Workload
from tests.support.plan_values import known_model, pool

CHAT = (LengthSample(800, 200), LengthSample(2500, 400), LengthSample(300, 50))
OBJECTIVES = PlanObjectives(ttft_s=1.0, tpot_s=0.05)


def gpus(name: str = "H100", count: int = 8, nodes: int = 1, usd: float | None = 2.5) -> GpuPool:
    return pool(count, nodes, name, usd)


def search(
    name: str = "llama-3.1-8b",
    *pools: GpuPool,
    rate: float | None = None,
    goal: PlanGoal = PlanGoal.GOODPUT_PER_USD,
    objectives: PlanObjectives = OBJECTIVES,
    options: EngineOptions | None = None,
    samples: tuple[LengthSample, ...] = CHAT,
    **more,
) -> PlanningResult:
    model = known_model(name)
    workload = Workload(samples=samples, request_rate=rate)
    return search_plans(
        model, pools or (gpus(),), workload, objectives, goal, options or EngineOptions(), **more
    )


def best(result: PlanningResult) -> PlanEstimate:
    assert result.recommended is not None
    return result.recommended


def test_every_plan_is_ranked_or_rejected_with_a_reason() -> None:
    result = search("llama-3.1-70b")
    assert len(result.plans) > 5
    assert result.rejected
    assert all(plan.reasons and all(plan.reasons) for plan in result.rejected)
    assert {plan.config.sizes for plan in result.plans}.isdisjoint(
        plan.config.sizes for plan in result.rejected
    )
    reasons = next(plan.reasons for plan in result.rejected if plan.config.sizes == (1, 1, 1, 1, 8))
    assert "does not fit" in reasons[0]
    assert "it would fit with tensor parallel size" in reasons[0]


def test_the_front_is_a_part_of_the_plans_in_their_order() -> None:
    result = search()
    order = [result.plans.index(plan) for plan in result.pareto_front]
    assert order == sorted(order)
    assert result.pareto_front
    assert best(result) in result.pareto_front


def test_goodput_for_the_money_is_the_usual_goal() -> None:
    result = search()
    assert best(result).goodput_per_usd >= 0.99 * max(plan.goodput_per_usd for plan in result.plans)


def test_the_lowest_ttft_takes_more_gpus_per_layer() -> None:
    quick = best(search(goal=PlanGoal.LOWEST_TTFT))
    assert quick.config.tensor_parallel_size == 8
    assert quick.single_ttft_s == min(plan.single_ttft_s for plan in search().plans)


def test_the_cheapest_carries_the_load_with_the_fewest_gpus() -> None:
    rate = 30.0
    result = search(goal=PlanGoal.CHEAPEST, rate=rate)
    chosen = best(result)
    assert chosen.carries_load
    assert chosen.goodput >= rate
    assert chosen.config.idle_gpu_count == 8 - chosen.config.gpu_count > 0
    assert chosen.usd_per_hour == min(plan.usd_per_hour for plan in result.plans if plan.carries_load)


def test_without_a_rate_the_cheapest_is_one_copy_that_meets_the_objectives() -> None:
    assert best(search(goal=PlanGoal.CHEAPEST)).config.sizes == (1, 1, 1, 1, 1)


def test_the_highest_throughput_ignores_the_objectives() -> None:
    result = search(goal=PlanGoal.HIGHEST_THROUGHPUT, objectives=PlanObjectives(tpot_s=0.001))
    assert best(result).output_tokens_per_second == max(
        plan.output_tokens_per_second for plan in result.plans
    )


def test_with_a_rate_unneeded_replicas_are_not_bought() -> None:
    chosen = best(search(rate=10.0))
    assert chosen.carries_load
    assert chosen.config.gpu_count < 8


def test_pools_are_compared_by_price() -> None:
    dear = search("llama-3.1-8b", gpus("H100", usd=20.0), gpus("A100", usd=1.0))
    cheap = search("llama-3.1-8b", gpus("H100", usd=1.0), gpus("A100", usd=20.0))
    assert (best(dear).gpu_name, best(cheap).gpu_name) == ("A100-SXM-80GB", "H100-SXM-80GB")


def test_a_context_that_does_not_fit_is_cut_and_told() -> None:
    result = search("llama-3.1-8b", gpus("L4", 1))
    assert 2900 <= best(result).memory.max_context_token_count < 131_072
    assert any("the longest context is cut to" in warning for warning in result.warnings)


def test_a_context_that_was_asked_for_is_not_cut() -> None:
    result = search("llama-3.1-8b", gpus("L4", 1), options=EngineOptions(max_context_token_count=131_072))
    assert not result.plans
    assert "a context of" in result.summary


@pytest.mark.parametrize(
    ("name", "offered", "expected"),
    [
        ("llama-3.1-70b", gpus(count=1), "2 x H100"),
        ("llama-3.1-405b", gpus(), "2 nodes of 8 x H100"),
        ("llama-3.1-405b", gpus(), "fp8 weights on 8 x H100"),
        ("deepseek-v3", gpus(), "2 nodes of 8 x H100"),
    ],
)
def test_where_nothing_fits_the_summary_says_what_would(name: str, offered: GpuPool, expected: str) -> None:
    result = search(name, offered)
    assert result.recommended is None
    assert result.pareto_front == ()
    assert "It would be possible with" in result.summary
    assert expected in result.summary


def test_without_any_gpus_it_says_so() -> None:
    model = known_model("llama-3.1-8b")
    result = search_plans(model, (), Workload(samples=CHAT), OBJECTIVES, PlanGoal.CHEAPEST, EngineOptions())
    assert "There are no GPUs to plan for" in result.summary


def test_a_prime_number_of_heads_leaves_stages_and_copies() -> None:
    model = known_model("llama-3.1-8b")
    odd = replace(model, attention_head_count=31, key_value_head_count=31, hidden_size=31 * 128)
    result = search_plans(
        odd, (gpus(count=4),), Workload(samples=CHAT), OBJECTIVES, PlanGoal.GOODPUT_PER_USD, EngineOptions()
    )
    assert result.plans
    assert {plan.config.tensor_parallel_size for plan in result.plans} == {1}
    (split,) = {plan.reasons[0] for plan in result.rejected if plan.config.sizes == (2, 1, 1, 1, 2)}
    assert "31 attention heads" in split
    assert "tensor parallel size 1" in split


def test_objectives_out_of_reach_are_told_with_what_an_idle_engine_does() -> None:
    result = search(objectives=PlanObjectives(tpot_s=0.001))
    assert best(result).goodput == 0.0
    assert "No plan meets the objectives" in result.summary
    assert "even alone a request has a token every" in result.summary


def test_a_load_beyond_the_gpus_is_told_with_how_many_would_do() -> None:
    result = search("llama-3.1-8b", gpus(count=2), rate=500.0)
    assert not best(result).carries_load
    assert "That is not the 500 requests/s wanted" in result.summary


def test_prices_that_were_not_given_are_warned_of() -> None:
    assert any("usual prices" in warning for warning in search("llama-3.1-8b", gpus(usd=None)).warnings)
    assert not any("usual prices" in warning for warning in search().warnings)


def test_a_referee_has_the_last_word() -> None:
    plain = search()
    loser = best(plain).config.sizes

    def referee(plan: PlanEstimate) -> float:
        return 0.1 if plan.config.sizes == loser else plan.goodput

    judged = search(referee=referee)
    assert best(judged).config.sizes != loser
    assert len(judged.plans) == len(plain.plans)
    fallen = next(plan for plan in judged.plans if plan.config.sizes == loser)
    assert fallen.goodput == 0.1
    assert math.isfinite(fallen.usd_per_million_output_tokens)


def test_the_same_question_has_the_same_answer() -> None:
    assert search("mixtral-8x7b") == search("mixtral-8x7b")
