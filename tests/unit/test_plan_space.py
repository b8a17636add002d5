"""The plans that are looked at: none twice, none with more GPUs than there are, every one that matters."""

from __future__ import annotations

from collections import Counter

import pytest

from sagecp.core.parallelism.plan_placement import required_node_count
from sagecp.core.parallelism.plan_space import plan_space
from tests.support.plan_values import known_model, pool


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (3, 1), (6, 1), (8, 1), (8, 2), (4, 3), (8, 8)])
def test_plans_are_few_different_and_within_the_gpus(name: str, gpus: int, nodes: int) -> None:
    plans = list(plan_space(known_model(name), pool(gpus, nodes)))
    assert 0 < len(plans) < 200
    assert max(Counter(plan.sizes for plan in plans).values()) == 1
    for plan in plans:
        assert plan.gpu_count + plan.idle_gpu_count == gpus * nodes
        # Replicas fill the nodes, unless a single one does not stand on them at all.
        if plan.replica_count > 1:
            assert required_node_count(gpus, plan) <= nodes


def test_dense_models_on_four_gpus() -> None:
    sizes = {plan.sizes for plan in plan_space(known_model("llama-3.1-8b"), pool(4))}
    assert sizes == {
        (1, 1, 1, 1, 4), (1, 2, 1, 1, 2), (1, 3, 1, 1, 1), (1, 4, 1, 1, 1),
        (2, 1, 1, 1, 2), (2, 2, 1, 1, 1), (4, 1, 1, 1, 1),
    }  # fmt: skip


def test_a_mixture_is_also_spread_by_experts() -> None:
    sizes = {plan.sizes for plan in plan_space(known_model("mixtral-8x7b"), pool(4))}
    assert {(1, 1, 4, 4, 1), (1, 1, 2, 2, 2), (2, 1, 2, 4, 1), (2, 1, 1, 2, 2), (4, 1, 1, 4, 1)} <= sizes


def test_odd_head_counts_have_their_own_divisors() -> None:
    # 28 heads: seven and fourteen divide them, whatever vLLM says of the rest.
    tensor = {plan.tensor_parallel_size for plan in plan_space(known_model("qwen2.5-7b"), pool(8))}
    assert tensor == {1, 2, 4, 7, 8}
