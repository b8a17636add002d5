"""What somebody asks the planner: understood as meant, or refused with every bad field named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from sagecp.core.errors import InvalidRequestError
from sagecp.core.parallelism.length_spread import USUAL_SPREAD, spread_lengths
from sagecp.core.parallelism.parameter_count import count_parameters
from sagecp.core.parallelism.plan_query import PlanQuery
from sagecp.core.parallelism.workload import LengthSample, PlanGoal
from sagecp.core.types import ParallelismType
from sagecp.rpc.convert.plan_request import MAX_POOL_COUNT, MAX_SAMPLE_COUNT, plan_query_from_proto
from sagecp.v1 import admin_service_pb2, parallelism_pb2, request_pb2
from tests.support.plan_models import LLAMA_8B, MIXTRAL

pb = parallelism_pb2
H100 = pb.GpuPool(gpu_name="H100", gpus_per_node_count=8, node_count=1)
TRAFFIC = pb.Workload(mean_prompt_token_count=1000, mean_output_token_count=200)


def asked(**fields: Any) -> admin_service_pb2.PlanParallelismRequest:
    """Return a request that is right but for the fields given; ``None`` leaves one out."""
    wanted: dict[str, Any] = {
        "model_config_json": json.dumps(LLAMA_8B), "gpu_pools": [H100], "workload": TRAFFIC, **fields,
    }  # fmt: skip
    return admin_service_pb2.PlanParallelismRequest(
        **{name: value for name, value in wanted.items() if value is not None}
    )


def understood(**fields: Any) -> PlanQuery:
    return plan_query_from_proto(asked(**fields))


def refused(request: admin_service_pb2.PlanParallelismRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as error:
        plan_query_from_proto(request)
    return {each.field: each.description for each in error.value.violations}


def test_defaults() -> None:
    query = understood(model_name="llama")
    assert (query.model.name, query.model.layer_count) == ("llama", 32)
    assert str(query.pools[0]) == "8 x H100-SXM-80GB"
    assert query.pools[0].usd_per_gpu_hour is None
    assert query.workload.request_rate is None
    assert query.workload.mean_prompt_token_count == pytest.approx(1000, rel=0.01)
    assert query.objectives.attainment == 0.9
    assert (query.goal, query.type) == (PlanGoal.GOODPUT_PER_USD, None)
    assert query.options.max_context_token_count is None
    assert query.options.key_value_bytes == 2.0
    # That lengths are guessed around their means is said.
    assert any("log-normal" in warning for warning in query.warnings)


def test_everything_set() -> None:
    query = understood(
        gpu_pools=[
            pb.GpuPool(
                gpu_name="NVIDIA L4", gpus_per_node_count=2, node_count=3, usd_per_gpu_hour=0.5,
                memory_gib=20, fast_link_gpu_count=2, node_link_gb_per_s=12.5,
            ),
            pb.GpuPool(
                gpu_name="Wonder-1", gpus_per_node_count=1, node_count=1, memory_gib=96, memory_gb_per_s=4000,
                dense_tflops=500,
            ),
        ],
        workload=pb.Workload(
            request_rate=5,
            max_context_token_count=8192,
            arrival_variation=2.5,
            samples=[
                pb.LengthSample(
                    prompt_token_count=100, output_token_count=10, cached_token_count=50, weight=3
                ),
                pb.LengthSample(prompt_token_count=200, output_token_count=20),
            ],
        ),
        objectives=request_pb2.Objectives(
            time_to_first_token=Duration(seconds=1), time_per_output_token=Duration(nanos=50_000_000)
        ),
        attainment=0.99,
        goal=pb.PLAN_GOAL_CHEAPEST,
        type=pb.PARALLELISM_TYPE_TENSOR,
        engine_options=pb.PlanEngineOptions(
            gpu_memory_utilization=0.8, max_batch_token_count=4096, max_running_request_count=64,
            key_value_cache_type="fp8", enforce_eager=True,
        ),
    )  # fmt: skip
    l4, wonder = query.pools
    assert (l4.gpu.name, l4.gpu.memory_gib, l4.gpu.memory_gb_per_s) == ("L4-24GB", 20.0, 300.0)
    assert (l4.gpu_count, l4.price_usd, l4.node_link_gb_per_s) == (6, 0.5, 12.5)
    assert l4.gpu.fast_link_gpu_count == 2
    assert (wonder.gpu.name, wonder.gpu.dense_tflops) == ("Wonder-1", 500.0)
    assert query.pool_of("Wonder-1") is wonder
    assert query.workload.samples == (LengthSample(100, 10, 50, 3.0), LengthSample(200, 20, 0, 1.0))
    assert (query.workload.request_rate, query.workload.arrival_variation) == (5.0, 2.5)
    assert (query.objectives.ttft_s, query.objectives.tpot_s) == (1.0, 0.05)
    assert (query.goal, query.type) == (PlanGoal.CHEAPEST, ParallelismType.TENSOR)
    options = query.options
    assert (options.gpu_memory_utilization, options.max_batch_token_count) == (0.8, 4096)
    assert (options.max_running_request_count, options.key_value_bytes) == (64, 1.0)
    assert (options.max_context_token_count, options.cuda_graphs) == (8192, False)
    assert not query.warnings


def test_prices_are_the_pools_own_the_configurations_or_usual() -> None:
    pools = [
        pb.GpuPool(gpu_name=name, gpus_per_node_count=1, node_count=1) for name in ("H100", "L4", "A100")
    ]
    pools[1].usd_per_gpu_hour = 0.4
    query = plan_query_from_proto(asked(gpu_pools=pools), {"H100-SXM-80GB": 2.25, "L4-24GB": 9.0})
    assert [pool.usd_per_gpu_hour for pool in query.pools] == [2.25, 0.4, None]


def pool(**fields: Any) -> list[parallelism_pb2.GpuPool]:
    return [pb.GpuPool(**{"gpu_name": "H100", "gpus_per_node_count": 8, "node_count": 1, **fields})]


def sample(**fields: Any) -> parallelism_pb2.Workload:
    given = {"prompt_token_count": 10, "output_token_count": 10, **fields}
    return pb.Workload(samples=[pb.LengthSample(**given)])


NO_MODEL = {"model_config_json": ""}


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        (NO_MODEL, "model_name", "no model is given"),
        ({**NO_MODEL, "model_name": "nobody/knows-this"}, "model_name", "no model 'nobody/knows-this'"),
        ({"model_name": "x" * 300}, "model_name", "300 characters"),
        ({"model_config_json": "{"}, "model_config_json", "not valid JSON"),
        ({"model_config_json": '{"a": NaN}'}, "model_config_json", "NaN is no JSON number"),
        ({"model_config_json": "[1]"}, "model_config_json", "JSON list"),
        ({"model_config_json": "null"}, "model_config_json", "JSON null"),
        ({"model_config_json": "[" * 100_000}, "model_config_json", "nested too deeply"),
        ({"model_config_json": " " * 262_145}, "model_config_json", "262,145 bytes"),
        ({"weight_format": "fp7"}, "weight_format", "'fp7'"),
        ({"gpu_pools": []}, "gpu_pools", "is empty"),
        ({"gpu_pools": [H100] * (MAX_POOL_COUNT + 1)}, "gpu_pools", "65 pools"),
        ({"gpu_pools": [H100, H100]}, "gpu_pools[1].gpu_name", "in a pool before"),
        ({"gpu_pools": pool(gpu_name="")}, "gpu_pools[0].gpu_name", "not set"),
        ({"gpu_pools": pool(gpu_name="H1000")}, "gpu_pools[0].gpu_name", "not a GPU that is known"),
        ({"gpu_pools": pool(gpu_name="Wonder-1", memory_gib=96)}, "gpu_pools[0].gpu_name", "bandwidth"),
        ({"gpu_pools": pool(gpus_per_node_count=0)}, "gpu_pools[0].gpus_per_node_count", "is 0"),
        ({"gpu_pools": pool(gpus_per_node_count=2000)}, "gpu_pools[0].gpus_per_node_count", "2,000"),
        ({"gpu_pools": pool(node_count=0)}, "gpu_pools[0].node_count", "is 0"),
        ({"gpu_pools": pool(node_count=100_000)}, "gpu_pools", "100,000 GPUs"),
        ({"gpu_pools": pool(usd_per_gpu_hour=-1)}, "gpu_pools[0].usd_per_gpu_hour", "is -1"),
        ({"gpu_pools": pool(memory_gib=float("nan"))}, "gpu_pools[0].memory_gib", "nan"),
        ({"gpu_pools": pool(link_gb_per_s=0)}, "gpu_pools[0].link_gb_per_s", "above 0"),
        ({"gpu_pools": pool(fast_link_gpu_count=0)}, "gpu_pools[0].fast_link_gpu_count", "is 0"),
        ({"gpu_pools": pool(node_link_gb_per_s=-5)}, "gpu_pools[0].node_link_gb_per_s", "is -5"),
        ({"workload": None}, "workload", "says no lengths"),
        ({"workload": pb.Workload(mean_prompt_token_count=5)}, "workload.mean_output_token_count", "is 0"),
        ({"workload": pb.Workload(mean_prompt_token_count=float("inf"), mean_output_token_count=1)},
         "workload.mean_prompt_token_count", "inf"),
        ({"workload": sample(prompt_token_count=0)}, "workload.samples[0].prompt_token_count", "is 0"),
        ({"workload": sample(output_token_count=0)}, "workload.samples[0].output_token_count", "is 0"),
        ({"workload": sample(cached_token_count=11)}, "workload.samples[0].cached_token_count", "is 11"),
        ({"workload": sample(weight=-1)}, "workload.samples[0].weight", "is -1"),
        ({"workload": pb.Workload(samples=[pb.LengthSample()] * (MAX_SAMPLE_COUNT + 1))},
         "workload.samples", "4,097 kinds"),
        ({"workload": sample(prompt_token_count=200_000)}, "workload", "longer than the context of 131,072"),
        ({"attainment": 1.5}, "attainment", "is 1.5"),
        ({"attainment": -0.5}, "attainment", "is -0.5"),
        ({"objectives": request_pb2.Objectives(end_to_end_deadline=Duration(seconds=1))},
         "objectives.end_to_end_deadline", "not planned for"),
        ({"objectives": request_pb2.Objectives(time_to_first_token=Duration())},
         "objectives.time_to_first_token", "above 0"),
        ({"goal": 99}, "goal", "unknown value 99"),
        ({"type": 99}, "type", "unknown value 99"),
        ({"max_plan_count": 1001}, "max_plan_count", "1,001"),
        ({"engine_options": pb.PlanEngineOptions(gpu_memory_utilization=1.1)},
         "engine_options.gpu_memory_utilization", "is 1.1"),
        ({"engine_options": pb.PlanEngineOptions(key_value_cache_type="fp4")},
         "engine_options.key_value_cache_type", "'fp4'"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(fields: dict[str, Any], field: str, text: str) -> None:
    violations = refused(asked(**fields))
    assert field in violations, violations
    assert text in violations[field]


def test_every_bad_field_is_named_at_once() -> None:
    violations = refused(
        asked(gpu_pools=pool(gpu_name="H1000", node_count=0), attainment=2, goal=99, workload=None)
    )
    assert set(violations) == {
        "gpu_pools[0].gpu_name", "gpu_pools[0].node_count", "attainment", "goal", "workload",
    }  # fmt: skip


def test_what_is_wrong_within_a_configuration_has_its_place() -> None:
    config = {**LLAMA_8B, "num_hidden_layers": "many"}
    violations = refused(asked(model_config_json=json.dumps(config)))
    (field,) = violations
    assert field == "model_config_json.num_hidden_layers"


def test_requests_longer_than_the_context_are_left_out_and_told() -> None:
    workload = pb.Workload(
        samples=[
            pb.LengthSample(prompt_token_count=100, output_token_count=10, weight=3),
            pb.LengthSample(prompt_token_count=9000, output_token_count=10, weight=1),
        ],
        max_context_token_count=8192,
    )
    query = understood(workload=workload)
    assert [each.prompt_token_count for each in query.workload.samples] == [100]
    assert any("25 % of the requests" in warning for warning in query.warnings)


def test_a_shape_alone_describes_a_dense_model() -> None:
    shape = pb.ModelShape(
        parameter_count=8_030_000_000, layer_count=32, hidden_size=4096, attention_head_count=32,
        key_value_head_count=8, head_size=128, vocabulary_size=128_256,
    )  # fmt: skip
    query = understood(model_config_json="", model_shape=shape, model_name="mine")
    assert query.model.name == "mine"
    assert query.model.intermediate_size == pytest.approx(14336, rel=0.01)
    assert count_parameters(query.model).total == pytest.approx(8.03e9, rel=0.01)
    assert query.model.max_context_token_count == query.workload.max_context_token_count


def test_a_shape_alone_describes_a_mixture() -> None:
    experts = 32 * 8 * 3 * 4096 * 14336
    shape = pb.ModelShape(
        parameter_count=46_700_000_000, layer_count=32, hidden_size=4096, attention_head_count=32,
        key_value_head_count=8, head_size=128, vocabulary_size=32_000, expert_count=8, active_expert_count=2,
        expert_parameter_count=experts, bytes_per_weight=1,
    )  # fmt: skip
    query = understood(model_config_json="", model_shape=shape)
    assert query.model.experts is not None
    assert query.model.experts.intermediate_size == 14336
    assert query.model.weight_format.value == "fp8"
    assert count_parameters(query.model).total == pytest.approx(46.7e9, rel=0.01)


def test_the_configuration_wins_over_shape_and_name() -> None:
    shape = pb.ModelShape(parameter_count=1, layer_count=1)
    query = understood(model_config_json=json.dumps(MIXTRAL), model_shape=shape, model_name="mix")
    assert query.model.experts is not None
    assert query.model.experts.expert_count == 8


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"parameter_count": 0}, "parameter_count"),
        ({"layer_count": 0}, "layer_count"),
        ({"attention_head_count": 0}, "attention_head_count"),
        ({"expert_count": 8}, "active_expert_count"),
        ({"bytes_per_weight": 3}, "bytes_per_weight"),
        ({"parameter_count": 1_000_000}, "parameter_count"),
    ],
)
def test_a_bad_shape_is_named(fields: dict[str, Any], field: str) -> None:
    good = {
        "parameter_count": 8_000_000_000,
        "layer_count": 32,
        "hidden_size": 4096,
        "attention_head_count": 32,
    }
    violations = refused(asked(model_config_json="", model_shape=pb.ModelShape(**{**good, **fields})))
    assert f"model_shape.{field}" in violations


@pytest.mark.parametrize("spread", [0.0, USUAL_SPREAD, 3.0])
def test_a_spread_keeps_its_means(spread: float) -> None:
    samples = spread_lengths(5000, 800, cached_share=0.5, prompt_spread=spread, output_spread=spread)
    mean_prompt = sum(each.prompt_token_count for each in samples) / len(samples)
    mean_output = sum(each.output_token_count for each in samples) / len(samples)
    assert mean_prompt == pytest.approx(5000, rel=0.01)
    assert mean_output == pytest.approx(800, rel=0.01)
    assert all(each.cached_token_count < each.prompt_token_count for each in samples)
    assert len(samples) == (1 if spread == 0.0 else 36)
