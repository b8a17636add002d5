"""The Pareto front: nothing on it is beaten, everything beside it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.pareto import pareto_front
from sagecp.core.parallelism.serving import estimate_plan
from sagecp.core.parallelism.workload import LengthSample, PlanObjectives, Workload
from tests.support.plan_values import known_model


@pytest.fixture(scope="module")
def plan() -> PlanEstimate:
    model = known_model("llama-3.2-1b")
    pool = GpuPool(gpu=require_gpu("L4"), gpus_per_node_count=1)
    workload = Workload(samples=(LengthSample(100, 50),))
    return estimate_plan(model, pool, ParallelismConfig(), EngineOptions(), workload, PlanObjectives())


def made(plan: PlanEstimate, point: tuple[float, float, float, float]) -> PlanEstimate:
    ttft_s, tpot_s, rate, usd = point
    return replace(
        plan,
        single_ttft_s=ttft_s,
        single_tpot_s=tpot_s,
        output_tokens_per_second=rate,
        usd_per_million_output_tokens=usd,
    )


def test_what_is_better_nowhere_is_not_on_it(plan: PlanEstimate) -> None:
    fast, cheap, both, worse, twin = (
        made(plan, point)
        for point in [
            (0.1, 0.01, 100, 3.0),
            (0.3, 0.03, 300, 1.0),
            (0.2, 0.02, 200, 2.0),
            (0.3, 0.03, 200, 2.0),
            (0.2, 0.02, 200, 2.0),
        ]
    )
    assert pareto_front([worse, fast, both, cheap, twin], at_rate=False) == (fast, both, cheap)


def test_a_difference_of_rounding_is_none(plan: PlanEstimate) -> None:
    one, other = made(plan, (0.1, 0.01, 100, 1.0)), made(plan, (0.1000001, 0.01, 99.9999, 1.2))
    assert pareto_front([one, other], at_rate=False) == (one,)


values = st.floats(0.01, 100.0)
points = st.lists(st.tuples(values, values, values, values), min_size=1, max_size=12)


@given(points)
def test_every_plan_is_on_the_front_or_beaten_by_one_that_is(
    plan: PlanEstimate, points: list[tuple[float, float, float, float]]
) -> None:
    plans = [made(plan, point) for point in points]
    front = pareto_front(plans, at_rate=False)
    assert front

    def no_worse(one: PlanEstimate, other: PlanEstimate) -> bool:
        slack = 1.0 + 4e-3 * len(plans)
        return (
            one.single_ttft_s <= other.single_ttft_s * slack
            and one.single_tpot_s <= other.single_tpot_s * slack
            and one.output_tokens_per_second * slack >= other.output_tokens_per_second
            and one.usd_per_million_output_tokens <= other.usd_per_million_output_tokens * slack
        )

    for each in plans:
        assert each in front or any(no_worse(better, each) for better in front)
