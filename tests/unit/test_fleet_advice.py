"""What the planner says of a fleet: groups, questions, and when a change is advised."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.instance_record import InstanceRecord
from sagecp.core.parallelism.fleet_advice import (
    FleetAdvice,
    FleetGroup,
    advice_from,
    groups_of,
    question_for,
)
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_query import PlanQuery, answer_plan_query
from sagecp.core.settings import PARAMETERS
from tests.support.core_world import make_instance_record

H100 = "NVIDIA H100 80GB HBM3"
VALUES = {parameter.name: parameter.default for parameter in PARAMETERS}


def instance(number: int, **fields: Any) -> InstanceRecord:
    fields = {
        "gpu_name": H100,
        "gpu_count": 4,
        "tensor_parallel_size": 4,
        "host_id": f"h{number // 2}",
        **fields,
    }
    return make_instance_record(f"i{number}", fields.pop("model", "llama-3.1-8b"), **fields)


def advice(group: FleetGroup, prompt: float = 1000.0, output: float = 300.0) -> FleetAdvice:
    question = question_for(group, ModelKnowledge(), prompt, output, VALUES)
    if isinstance(question, FleetAdvice):
        return question
    return advice_from(group, question, answer_plan_query(question))


def test_instances_are_grouped_by_model_and_gpu() -> None:
    fleet = [
        *(instance(number) for number in range(4)),
        instance(4, tensor_parallel_size=2, gpu_count=2, usd_per_gpu_hour=2.0),
        instance(5, model="other"),
        instance(6, gpu_name=""),
    ]
    first, second = groups_of(fleet)
    assert (first.model, first.instance_count, first.gpu_count, first.host_count) == (
        "llama-3.1-8b",
        5,
        18,
        3,
    )
    assert first.config == ParallelismConfig(tensor_parallel_size=4)
    assert (second.model, second.usd_per_gpu_hour) == ("other", None)


def group(**fields: Any) -> FleetGroup:
    values: dict[str, Any] = {
        "model": "llama-3.1-8b",
        "gpu_name": H100,
        "instance_count": 2,
        "gpu_count": 8,
        "config": ParallelismConfig(tensor_parallel_size=4),
        "host_count": 1,
    }
    return FleetGroup(**{**values, **fields})


def test_a_plan_far_from_the_best_is_advised_against_with_the_gain() -> None:
    found = advice(group())
    assert found.change_advised
    assert found.gain_ratio > 1.2
    assert found.recommended is not None
    assert found.recommended.config.sizes == (1, 1, 1, 1, 8)
    assert f"{found.gain_ratio:.2f} times as many requests" in found.message


def test_a_plan_near_the_best_is_left_alone() -> None:
    found = advice(group(config=ParallelismConfig(), instance_count=8))
    assert not found.change_advised
    assert found.gain_ratio == pytest.approx(1.0)
    assert "is within 20% of the best plan" in found.message


def test_a_plan_that_cannot_be_is_named_with_the_reason() -> None:
    found = advice(group(model="llama-3.1-70b", config=ParallelismConfig(), instance_count=8))
    assert found.change_advised
    assert "does not fit" in found.message


@pytest.mark.parametrize(
    ("fields", "prompt", "expected"),
    [
        ({"model": "nobody-knows"}, 1000.0, "name its config.json in [planner.models]"),
        ({"gpu_name": "NVIDIA Z9"}, 1000.0, "the GPU 'NVIDIA Z9' is not known"),
        ({}, 0.0, "there was no traffic of late"),
    ],
)
def test_too_little_knowledge_is_told(fields: dict[str, Any], prompt: float, expected: str) -> None:
    found = advice(group(**fields), prompt=prompt)
    assert found.recommended is None
    assert not found.change_advised
    assert expected in found.message


def test_the_question_has_the_hosts_and_the_objectives_of_the_scheduler() -> None:
    question = question_for(group(gpu_count=16, host_count=2), ModelKnowledge(), 2000.0, 300.0, VALUES)
    assert isinstance(question, PlanQuery)
    (pool,) = question.pools
    assert (pool.gpus_per_node_count, pool.node_count) == (8, 2)
    assert question.objectives.ttft_s == pytest.approx(1.5)
    assert question.objectives.tpot_s == pytest.approx(0.15)
