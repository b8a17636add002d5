"""The parallelism optimizer: the documented table, hints, known models, and that its sizes always add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.errors import InvalidRequestError
from sagecp.core.parallelism.optimizer import ParallelismOptimizer
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.types import ParallelismType
from tests.support.core_world import make_instance, make_metadata
from tests.support.plan_values import known_model

T = ParallelismType
H100 = "NVIDIA H100 80GB HBM3"


def plan(
    gpu_count: int, hint: ParallelismType | None = None, model: str = "m", **instance: Any
) -> tuple[ParallelismType, ParallelismConfig]:
    return ParallelismOptimizer().select_strategy(
        make_metadata(model=model, parallelism_hint=hint), make_instance(model=model, **instance), gpu_count
    )


@pytest.mark.parametrize(
    ("gpu_count", "strategy", "sizes", "idle"),
    [
        (1, T.TENSOR, (1, 1, 1, 1, 1), 0),
        (2, T.TENSOR, (2, 1, 1, 1, 1), 0),
        (3, T.TENSOR, (2, 1, 1, 1, 1), 1),
        (4, T.TENSOR, (4, 1, 1, 1, 1), 0),
        (6, T.TENSOR, (4, 1, 1, 1, 1), 2),
        (7, T.TENSOR, (4, 1, 1, 1, 1), 3),
        (8, T.HYBRID, (4, 1, 2, 1, 1), 0),
        (11, T.HYBRID, (4, 1, 2, 1, 1), 3),
        (12, T.HYBRID, (4, 1, 3, 1, 1), 0),
        (15, T.HYBRID, (4, 1, 3, 1, 1), 3),
        (16, T.HYBRID, (4, 2, 2, 1, 1), 0),
        (31, T.HYBRID, (4, 2, 3, 1, 1), 7),
        (64, T.HYBRID, (4, 2, 8, 1, 1), 0),
    ],
)
def test_without_knowledge_of_the_model_the_number_of_gpus_decides(
    gpu_count: int, strategy: ParallelismType, sizes: tuple[int, ...], idle: int
) -> None:
    chosen, config = plan(gpu_count)
    assert (chosen, config.sizes, config.idle_gpu_count) == (strategy, sizes, idle)


@pytest.mark.parametrize(
    ("model", "gpu_count", "sizes", "idle"),
    [
        ("my-finetune-8x7b", 8, (4, 1, 2, 8, 1), 0),
        ("my-finetune-8x7b", 4, (4, 1, 1, 4, 1), 0),
        ("my-finetune-8x7b", 2, (2, 1, 1, 2, 1), 0),
        ("my-finetune-8x7b", 6, (4, 1, 1, 4, 1), 2),
        ("my-finetune-8x7b", 16, (4, 1, 2, 8, 2), 0),
        ("my-deepseek-v3-finetune", 16, (4, 1, 4, 16, 1), 0),
    ],
)
def test_a_mixture_of_experts_has_its_experts_spread_over_the_gpus(
    model: str, gpu_count: int, sizes: tuple[int, ...], idle: int
) -> None:
    chosen, config = plan(gpu_count, model=model)
    assert (chosen, config.sizes, config.idle_gpu_count) == (T.EXPERT, sizes, idle)


def test_an_instance_with_expert_parallelism_has_a_mixture_of_experts() -> None:
    chosen, config = plan(8, expert_parallel_size=8)
    assert (chosen, config.sizes) == (T.EXPERT, (4, 1, 2, 8, 1))


@pytest.mark.parametrize(
    ("hint", "gpu_count", "sizes", "idle"),
    [
        (T.PIPELINE, 6, (1, 6, 1, 1, 1), 0),
        (T.DATA, 6, (1, 1, 6, 1, 1), 0),
        (T.TENSOR, 8, (8, 1, 1, 1, 1), 0),
        (T.TENSOR, 6, (4, 1, 1, 1, 1), 2),
        (T.TENSOR, 16, (8, 1, 1, 1, 1), 8),
        (T.EXPERT, 8, (4, 1, 2, 8, 1), 0),
        (T.HYBRID, 8, (4, 1, 2, 1, 1), 0),
        (T.HYBRID, 6, (2, 1, 3, 1, 1), 0),
        (T.HYBRID, 1, (1, 1, 1, 1, 1), 0),
    ],
)
def test_a_hint_decides(hint: ParallelismType, gpu_count: int, sizes: tuple[int, ...], idle: int) -> None:
    chosen, config = plan(gpu_count, hint)
    assert (chosen, config.sizes, config.idle_gpu_count) == (hint, sizes, idle)
    assert f"the request asks for {hint.value} parallelism" in config.rationale


@pytest.mark.parametrize("gpu_count", [0, -1])
def test_no_gpus_is_an_error_that_says_so(gpu_count: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"gpu_count: is {gpu_count}; at least one GPU is needed"):
        plan(gpu_count)


@given(
    st.integers(1, 4096),
    st.sampled_from([None, *ParallelismType]),
    st.sampled_from(["m", "x-8x7b", "deepseek-r1-tuned", "a-70b"]),
)
def test_no_more_gpus_are_used_than_there_are_and_the_others_are_told(
    gpu_count: int, hint: ParallelismType | None, model: str
) -> None:
    _, config = plan(gpu_count, hint, model)
    assert config.gpu_count + config.idle_gpu_count == gpu_count
    assert config.idle_gpu_count >= 0
    assert config.rationale
    assert all(size >= 1 for size in config.sizes)
    # Tensor parallelism stays within a host, and experts are spread as vLLM spreads them.
    assert config.tensor_parallel_size <= 8
    assert config.expert_parallel_size in {1, config.tensor_parallel_size * config.data_parallel_size}


def test_a_known_model_on_a_known_gpu_gets_a_plan_that_fits() -> None:
    way, config = plan(8, model="llama-3.1-70b", gpu_name=H100)
    assert config.gpu_count == 8
    # 141 GB of weights do not fit two GPUs with a context of 131,072 tokens beside them.
    assert config.tensor_parallel_size * config.pipeline_parallel_size >= 4
    assert config.replica_count == 1
    assert way is config.type
    assert "requests/s" in config.rationale


def test_a_small_model_is_copied_rather_than_split() -> None:
    way, config = plan(4, model="llama-3.1-8b", gpu_name=H100)
    assert (way, config.sizes) == (T.DATA, (1, 1, 4, 1, 1))


def test_an_objective_changes_the_plan() -> None:
    optimizer = ParallelismOptimizer()
    instance = make_instance(model="llama-3.1-8b", gpu_name=H100)
    strict = make_metadata(model="llama-3.1-8b", prompt="word " * 500, max_tokens=200, tpot_slo_ms=5.0)
    _, config = optimizer.select_strategy(strict, instance, 4)
    assert config.tensor_parallel_size == 4


def test_a_model_too_large_for_the_gpus_is_refused_with_what_would_do() -> None:
    with pytest.raises(InvalidRequestError, match=r"It would be possible with 2 nodes of 8 x H100"):
        plan(8, model="llama-3.1-405b", gpu_name=H100)


def test_a_hint_that_cannot_be_followed_is_told_and_the_best_taken() -> None:
    way, config = plan(8, T.DATA, model="llama-3.1-70b", gpu_name=H100)
    assert way is not T.DATA
    assert "not data parallelism, as the request asks" in config.rationale


def test_given_models_win_over_names() -> None:
    optimizer = ParallelismOptimizer({"llama-3.1-70b": known_model("llama-3.2-1b")})
    instance = make_instance(model="llama-3.1-70b", gpu_name=H100)
    _, config = optimizer.select_strategy(make_metadata(model="llama-3.1-70b"), instance, 2)
    assert config.sizes == (1, 1, 2, 1, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama-3.1-8b", "qwen2.5-7b", "mixtral-8x7b", "qwen3-30b-a3b"]),
    st.sampled_from([H100, "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"]),
    st.integers(1, 16),
    st.sampled_from([None, *ParallelismType]),
)
def test_known_models_are_never_given_more_gpus_than_there_are(
    model: str, gpu_name: str, gpu_count: int, hint: ParallelismType | None
) -> None:
    try:
        way, config = plan(gpu_count, hint, model, gpu_name=gpu_name)
    except InvalidRequestError as error:
        assert "possible" in str(error)  # noqa: PT017
        return
    assert config.gpu_count + config.idle_gpu_count == gpu_count
    assert way is hint or hint is None or "as the request asks" in config.rationale


def test_repeated_choices_are_the_same_object() -> None:
    optimizer = ParallelismOptimizer()
    instance = make_instance(model="llama-3.1-8b", gpu_name=H100)
    first = optimizer.select_strategy(make_metadata("r1", "llama-3.1-8b"), instance, 4)
    assert optimizer.select_strategy(make_metadata("r2", "llama-3.1-8b"), instance, 4) is first
