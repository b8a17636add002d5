"""The parallelism planner: what it chooses, and that its sizes always add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import InvalidRequestError
from sagecp.core.parallelism.optimizer import ParallelismOptimizer
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.types import ParallelismType
from tests.support.core_world import make_instance, make_metadata

T = ParallelismType


def plan(
    gpu_count: int, hint: ParallelismType | None = None, tensor_parallel_size: int = 1
) -> tuple[ParallelismType, ParallelismConfig]:
    return ParallelismOptimizer().select_strategy(
        make_metadata(parallelism_hint=hint),
        make_instance(tensor_parallel_size=tensor_parallel_size),
        gpu_count,
    )


def sizes(config: ParallelismConfig) -> tuple[int, int, int, int]:
    return (
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.data_parallel_size,
        config.expert_parallel_size,
    )


@pytest.mark.parametrize(
    ("gpu_count", "tensor_parallel_size", "strategy", "expected"),
    [
        (1, 1, T.DATA, (1, 1, 1, 1)),
        (2, 1, T.TENSOR, (2, 1, 1, 1)),
        (4, 1, T.TENSOR, (4, 1, 1, 1)),
        (8, 1, T.TENSOR, (8, 1, 1, 1)),
        (3, 1, T.HYBRID, (1, 1, 3, 1)),
        (6, 1, T.HYBRID, (2, 1, 3, 1)),
        (12, 1, T.HYBRID, (4, 1, 3, 1)),
        (16, 1, T.HYBRID, (8, 1, 2, 1)),
        (16, 8, T.HYBRID, (8, 2, 1, 1)),
        (64, 8, T.HYBRID, (8, 8, 1, 1)),
        (8, 8, T.TENSOR, (8, 1, 1, 1)),
    ],
)
def test_without_a_hint_the_number_of_gpus_decides(
    gpu_count: int,
    tensor_parallel_size: int,
    strategy: ParallelismType,
    expected: tuple[int, int, int, int],
) -> None:
    chosen, config = plan(gpu_count, tensor_parallel_size=tensor_parallel_size)
    assert (chosen, sizes(config)) == (strategy, expected)


@pytest.mark.parametrize(
    ("hint", "gpu_count", "strategy", "expected"),
    [
        (T.PIPELINE, 6, T.PIPELINE, (1, 6, 1, 1)),
        (T.DATA, 6, T.DATA, (1, 1, 6, 1)),
        (T.TENSOR, 8, T.TENSOR, (8, 1, 1, 1)),
        (T.TENSOR, 6, T.HYBRID, (2, 1, 3, 1)),
        (T.TENSOR, 16, T.HYBRID, (8, 1, 2, 1)),
        (T.EXPERT, 8, T.EXPERT, (8, 1, 1, 8)),
        (T.EXPERT, 16, T.EXPERT, (8, 1, 2, 16)),
        (T.HYBRID, 8, T.HYBRID, (4, 1, 2, 1)),
        (T.HYBRID, 6, T.HYBRID, (2, 1, 3, 1)),
        (T.HYBRID, 1, T.HYBRID, (1, 1, 1, 1)),
    ],
)
def test_a_hint_decides_where_it_can(
    hint: ParallelismType, gpu_count: int, strategy: ParallelismType, expected: tuple[int, int, int, int]
) -> None:
    chosen, config = plan(gpu_count, hint)
    assert (chosen, sizes(config)) == (strategy, expected)
    assert hint.value in config.rationale


@pytest.mark.parametrize("gpu_count", [0, -1])
def test_no_gpus_is_an_error_that_says_so(gpu_count: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"gpu_count: is {gpu_count}; at least one GPU is needed"):
        plan(gpu_count)


@given(
    st.integers(1, 4096),
    st.sampled_from([None, *ParallelismType]),
    st.sampled_from([1, 2, 8, 16]),
)
def test_every_gpu_is_used_exactly_once(
    gpu_count: int, hint: ParallelismType | None, tensor_parallel_size: int
) -> None:
    _, config = plan(gpu_count, hint, tensor_parallel_size)
    assert config.gpu_count == gpu_count
    assert config.rationale
    assert all(size >= 1 for size in sizes(config))
    # Tensor parallelism stays within a fast link, and experts within the GPUs.
    assert config.tensor_parallel_size <= 8
    assert gpu_count % config.expert_parallel_size == 0
