"""What a plan is predicted to give: what must hold whatever the constants are."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.request_classes import MAX_CLASS_COUNT, RequestClasses
from sagecp.core.parallelism.serving import PlanServing, estimate_plan
from sagecp.core.parallelism.step_model import plan_step_time
from sagecp.core.parallelism.workload import LengthSample, PlanObjectives, Workload
from tests.support.plan_values import known_model

MODEL = known_model("llama-3.1-8b")
OPTIONS = EngineOptions()
POOL = GpuPool(gpu=require_gpu("H100"), gpus_per_node_count=8)
CHAT = Workload(samples=(LengthSample(800, 200), LengthSample(2500, 400), LengthSample(300, 50, 100)))
OBJECTIVES = PlanObjectives(ttft_s=1.0, tpot_s=0.05)


def serving(
    config: ParallelismConfig | None = None,
    workload: Workload = CHAT,
    objectives: PlanObjectives = OBJECTIVES,
    capacity: float = 400_000,
    options: EngineOptions = OPTIONS,
) -> PlanServing:
    config = config or ParallelismConfig()
    step = plan_step_time(MODEL, POOL, config, options)
    return PlanServing(step, capacity, config, options, RequestClasses.of(workload), objectives)


def estimate(config: ParallelismConfig | None = None, **more) -> PlanEstimate:
    workload = more.pop("workload", CHAT)
    objectives = more.pop("objectives", OBJECTIVES)
    return estimate_plan(MODEL, POOL, config or ParallelismConfig(), OPTIONS, workload, objectives)


def test_attainment_falls_as_the_rate_grows_and_is_none_beyond_what_can_be_done() -> None:
    plan = serving()
    attainments = [plan.attainment(rate) for rate in (0.01, 1, 5, 10, 15, 20, 30, 1000)]
    assert attainments[0] > 0.99
    assert attainments == sorted(attainments, reverse=True)
    assert attainments[-1] == 0.0


def test_goodput_is_where_the_wanted_share_is_just_met() -> None:
    plan = serving()
    goodput, _ = plan.goodput()
    assert plan.attainment(goodput) >= 0.9
    assert plan.attainment(1.01 * goodput) < 0.9


def test_times_at_a_rate_are_those_that_the_wanted_share_stays_below() -> None:
    goodput, _ = serving().goodput()
    ttft_s, tpot_s, count = serving().times_at(0.8 * goodput)
    only_first = serving(objectives=PlanObjectives(ttft_s=ttft_s))
    assert only_first.attainment(0.8 * goodput) == pytest.approx(0.9, abs=0.01)
    only_further = serving(objectives=PlanObjectives(tpot_s=tpot_s))
    assert only_further.attainment(0.8 * goodput) == pytest.approx(0.9, abs=0.01)
    # Little's law: requests at a time are the rate by the time that each decodes.
    assert count == pytest.approx(0.8 * goodput * 217 * tpot_s, rel=0.4)


@pytest.mark.parametrize(
    ("objectives", "limited_by"),
    [
        (PlanObjectives(ttft_s=0.05), "ttft"),
        (PlanObjectives(tpot_s=0.01), "tpot"),
        (PlanObjectives(ttft_s=60.0, tpot_s=5.0), "batch"),
    ],
)
def test_what_bounds_the_goodput_is_named(objectives: PlanObjectives, limited_by: str) -> None:
    assert serving(objectives=objectives, capacity=1_000_000).goodput()[1] == limited_by


def test_a_small_cache_bounds_by_memory() -> None:
    assert serving(capacity=40_000, objectives=PlanObjectives(ttft_s=30.0)).goodput()[1] == "memory"


def test_objectives_that_an_idle_engine_misses_leave_no_goodput() -> None:
    result = estimate(objectives=PlanObjectives(tpot_s=0.001))
    assert result.goodput == 0.0
    assert not result.carries_load
    assert math.isinf(result.usd_per_million_output_tokens)


def test_copies_do_at_least_their_share() -> None:
    one, four = estimate(), estimate(ParallelismConfig(replica_count=4))
    assert 4.0 * one.goodput <= four.goodput <= 4.5 * one.goodput
    assert four.usd_per_hour == pytest.approx(4 * one.usd_per_hour)
    assert four.single_ttft_s == one.single_ttft_s
    assert four.output_tokens_per_second == pytest.approx(4 * one.output_tokens_per_second)


def test_stages_gain_throughput_and_no_latency() -> None:
    one, two = estimate(), estimate(ParallelismConfig(pipeline_parallel_size=2))
    assert two.goodput > 1.2 * one.goodput
    assert two.single_tpot_s >= one.single_tpot_s


def test_a_prefix_cache_saves_work() -> None:
    samples = tuple(LengthSample(4000, 200, cached) for cached in (0, 3000))
    cold, warm = (estimate(workload=Workload(samples=(sample,))) for sample in samples)
    assert warm.goodput > 1.5 * cold.goodput
    assert warm.single_ttft_s < cold.single_ttft_s


def test_bursts_cost_goodput() -> None:
    objectives = PlanObjectives(ttft_s=0.3)
    steady, bursty = (
        estimate(workload=Workload(samples=CHAT.samples, arrival_variation=variation), objectives=objectives)
        for variation in (0.5, 4.0)
    )
    assert bursty.goodput < 0.95 * steady.goodput


def test_a_wanted_rate_is_carried_or_not() -> None:
    goodput = estimate().goodput
    for share, carried in ((0.9, True), (1.1, False)):
        workload = Workload(samples=CHAT.samples, request_rate=share * goodput)
        result = estimate(workload=workload)
        assert result.carries_load is carried
        assert result.request_rate == pytest.approx(share * goodput)
        assert (result.ttft_s <= 1.0 and result.tpot_s <= 0.05) is carried


def test_many_samples_become_few_kinds_with_the_same_means() -> None:
    samples = tuple(LengthSample(50 + 37 * n % 9000, 1 + 11 * n % 900, n % 40) for n in range(2000))
    workload = Workload(samples=samples)
    classes = RequestClasses.of(workload)
    assert len(classes.shares) <= MAX_CLASS_COUNT
    assert classes.shares.sum() == pytest.approx(1.0)
    assert classes.mean(classes.prompts) == pytest.approx(workload.mean_prompt_token_count, rel=0.01)
    assert classes.mean(classes.outputs) == pytest.approx(workload.mean_output_token_count, rel=0.01)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    classes = RequestClasses.of(Workload(samples=(LengthSample(100, 10, 100),)))
    assert classes.computed.tolist() == [1.0]


lengths = st.tuples(st.integers(1, 30_000), st.integers(1, 4_000))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(lengths, min_size=1, max_size=5),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.05, 1.0, 20.0, None]),
    st.sampled_from([0.01, 0.05, None]),
    st.floats(0.3, 5.0),
)
def test_estimates_are_finite_and_in_order(
    samples: list[tuple[int, int]],
    tensor: int,
    stages: int,
    ttft_s: float | None,
    tpot_s: float | None,
    variation: float,
) -> None:
    workload = Workload(
        samples=tuple(LengthSample(*sample) for sample in samples), arrival_variation=variation
    )
    objectives = PlanObjectives(ttft_s=ttft_s, tpot_s=tpot_s)
    config = ParallelismConfig(tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    result = estimate(config, workload=workload, objectives=objectives)
    assert 0.0 < result.single_tpot_s < 1.0
    assert 0.0 < result.single_ttft_s < 60.0
    assert 0.0 <= result.goodput < 1e6
    assert result.output_tokens_per_second > 0.0
    # What is within the objectives is what can be served at all.
    assert result.goodput * workload.mean_output_token_count <= 1.3 * result.output_tokens_per_second
    if result.goodput > 0.0:
        assert result.ttft_s <= (ttft_s or math.inf) * 1.01
        assert result.tpot_s <= (tpot_s or math.inf) * 1.01
