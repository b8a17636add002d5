"""The five ways to spread a model: what each chooses, what it predicts, and what it refuses."""

from __future__ import annotations

import math

import pytest

from sagecp.core.errors import InvalidRequestError
from sagecp.core.parallelism.data import DataParallelism
from sagecp.core.parallelism.expert import ExpertParallelism
from sagecp.core.parallelism.hybrid import HybridParallelism
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.pipeline import PipelineParallelism
from sagecp.core.parallelism.strategy import ParallelismStrategy
from sagecp.core.parallelism.tensor import TensorParallelism
from sagecp.core.types import ExecutionInstance, ParallelismType
from tests.support.core_world import make_instance, make_metadata

STRATEGIES = (
    TensorParallelism,
    PipelineParallelism,
    DataParallelism,
    ExpertParallelism,
    HybridParallelism,
)
REQUEST = make_metadata(model="llama-3.1-8b", prompt="word " * 800, max_tokens=200)


def h100(model: str = "llama-3.1-8b") -> ExecutionInstance:
    return make_instance(model=model, gpu_name="NVIDIA H100 80GB HBM3")


def test_there_is_one_strategy_per_type() -> None:
    assert {strategy.type for strategy in STRATEGIES} == set(ParallelismType)


@pytest.mark.parametrize(
    ("strategy", "model", "sizes"),
    [
        (TensorParallelism, "llama-3.1-8b", (4, 1, 1, 1, 1)),
        (PipelineParallelism, "llama-3.1-8b", (1, 4, 1, 1, 1)),
        (DataParallelism, "llama-3.1-8b", (1, 1, 4, 1, 1)),
        (HybridParallelism, "llama-3.1-8b", (2, 1, 2, 1, 1)),
        (ExpertParallelism, "qwen3-30b-a3b", (1, 1, 4, 4, 1)),
    ],
)
def test_each_gives_the_best_plan_of_its_own_for_a_known_model(
    strategy: type[ParallelismStrategy], model: str, sizes: tuple[int, ...]
) -> None:
    request = make_metadata(model=model, prompt="word " * 800, max_tokens=200)
    config = strategy().optimize(request, h100(model), 4)
    assert config.gpu_count + config.idle_gpu_count == 4
    if strategy is PipelineParallelism:
        # Fewer stages may be worth more for the money.
        assert config.tensor_parallel_size == config.data_parallel_size == 1
        assert config.pipeline_parallel_size > 1
    elif strategy is HybridParallelism:
        assert sum(size > 1 for size in config.sizes[:3]) >= 2
    else:
        assert config.sizes == sizes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_gpus_are_refused(strategy: type[ParallelismStrategy]) -> None:
    with pytest.raises(InvalidRequestError, match="gpu_count: is 0; at least one GPU is needed"):
        strategy().optimize(REQUEST, h100(), 0)


def test_experts_of_a_dense_model_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="allow no expert parallelism"):
        ExpertParallelism().optimize(REQUEST, h100(), 4)


def test_a_way_that_does_not_fit_is_refused_with_the_reason() -> None:
    request = make_metadata(model="llama-3.1-70b", prompt="x")
    with pytest.raises(InvalidRequestError, match=r"no data plan of .*70B can be on 8 x H100"):
        DataParallelism().optimize(request, h100("llama-3.1-70b"), 8)


def test_an_estimate_tells_times_rate_memory_and_price() -> None:
    config = ParallelismConfig(tensor_parallel_size=2)
    estimate = TensorParallelism().estimate(REQUEST, h100(), config)
    assert 0.005 < estimate.single_ttft_s < 0.1
    assert 0.002 < estimate.single_tpot_s < 0.01
    assert estimate.goodput > 1.0
    assert estimate.memory.key_value_token_capacity > 500_000
    assert estimate.usd_per_hour == pytest.approx(2 * 3.0)
    assert math.isfinite(estimate.usd_per_million_output_tokens)


def test_more_gpus_per_layer_are_faster_for_one_and_dearer_for_all() -> None:
    one = TensorParallelism().estimate(REQUEST, h100(), ParallelismConfig())
    four = TensorParallelism().estimate(REQUEST, h100(), ParallelismConfig(tensor_parallel_size=4))
    assert four.single_tpot_s < one.single_tpot_s
    assert four.single_ttft_s < one.single_ttft_s
    assert four.usd_per_million_output_tokens > one.usd_per_million_output_tokens


@pytest.mark.parametrize(
    ("model", "gpu_name", "config", "message"),
    [
        ("nobody-knows", "NVIDIA L4", ParallelismConfig(), "nothing is known of the model 'nobody-knows'"),
        ("llama-3.1-8b", "NVIDIA Z9", ParallelismConfig(), "'NVIDIA Z9' is not a GPU that is known"),
        (
            "llama-3.1-8b",
            "NVIDIA L4",
            ParallelismConfig(tensor_parallel_size=3),
            "32 attention heads cannot be split over 3 GPUs; .*tensor parallel sizes that fit are 1, 2, 4",
        ),
    ],
)
def test_what_cannot_be_estimated_says_why(
    model: str, gpu_name: str, config: ParallelismConfig, message: str
) -> None:
    instance = make_instance(model=model, gpu_name=gpu_name)
    with pytest.raises(InvalidRequestError, match=message):
        TensorParallelism().estimate(make_metadata(model=model, prompt="x"), instance, config)
