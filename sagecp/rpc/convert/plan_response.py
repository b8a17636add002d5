"""From what the planner found to a `PlanParallelismResponse`."""

from __future__ import annotations

import math

from sagecp.core.parallelism.engine_command import engine_arguments, serve_commands
from sagecp.core.parallelism.estimates import MemoryEstimate, PlanEstimate, PlanningResult, RejectedPlan
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import count_parameters, weight_bytes
from sagecp.core.parallelism.plan_query import PlanQuery
from sagecp.core.types import ParallelismType
from sagecp.rpc.convert.plan_request import DEFAULT_PLAN_COUNT
from sagecp.v1 import admin_service_pb2, parallelism_pb2

MAX_REJECTED_COUNT = 1000
MAX_FRONT_COUNT = 1000
# A plan of many processes has up to 256 commands: those of all plans would not fit a message.
COMMANDS_PLAN_COUNT = 20

_TYPE_NUMBERS = {
    ParallelismType.TENSOR: parallelism_pb2.PARALLELISM_TYPE_TENSOR,
    ParallelismType.PIPELINE: parallelism_pb2.PARALLELISM_TYPE_PIPELINE,
    ParallelismType.DATA: parallelism_pb2.PARALLELISM_TYPE_DATA,
    ParallelismType.EXPERT: parallelism_pb2.PARALLELISM_TYPE_EXPERT,
    ParallelismType.HYBRID: parallelism_pb2.PARALLELISM_TYPE_HYBRID,
}


def plans_to_proto(
    request: admin_service_pb2.PlanParallelismRequest, query: PlanQuery, result: PlanningResult
) -> admin_service_pb2.PlanParallelismResponse:
    """Return the answer to a request.

    Args:
        request: What was asked for; says how much of the result is wanted.
        query: The same, as it was understood.
        result: What was found.
    """
    shown = list(result.plans[: request.max_plan_count or DEFAULT_PLAN_COUNT])
    front = {plan_key(plan) for plan in result.pareto_front}
    if request.include_pareto_front:
        present = {plan_key(plan) for plan in shown}
        shown += [plan for plan in result.pareto_front[:MAX_FRONT_COUNT] if plan_key(plan) not in present]
    rejected = result.rejected[:MAX_REJECTED_COUNT] if request.include_rejected else ()
    return admin_service_pb2.PlanParallelismResponse(
        plans=[
            plan_to_proto(
                query,
                plan,
                pareto_optimal=plan_key(plan) in front,
                with_commands=rank < COMMANDS_PLAN_COUNT,
            )
            for rank, plan in enumerate(shown)
        ],
        rejected=[_rejected_to_proto(each) for each in rejected],
        summary=result.summary,
        warnings=result.warnings,
        model=model_summary(query.model, query.options.key_value_bytes),
        considered_plan_count=len(result.plans) + len(result.rejected),
        rejected_plan_count=len(result.rejected),
    )


def plan_key(plan: PlanEstimate) -> tuple[str, tuple[int, ...]]:
    """Return what tells a plan from every other of a result."""
    return plan.gpu_name, plan.config.sizes


def plan_to_proto(
    query: PlanQuery, plan: PlanEstimate, *, pareto_optimal: bool = False, with_commands: bool = True
) -> parallelism_pb2.ParallelismPlan:
    """Return one plan as a message."""
    config, copies = plan.config, plan.config.data_parallel_size
    price = plan.usd_per_million_output_tokens
    options = query.options_of(plan)
    commands: tuple[str, ...] = ()
    if with_commands:
        commands = serve_commands(query.model, query.pool_of(plan.gpu_name), config, options)
    return parallelism_pb2.ParallelismPlan(
        type=_TYPE_NUMBERS[config.type],
        sizes=sizes_to_proto(config),
        replica_count=config.replica_count,
        gpu_count=config.gpu_count,
        key_value_token_capacity=plan.memory.key_value_token_capacity * copies,
        predicted_ttft_s=plan.ttft_s,
        predicted_tpot_s=plan.tpot_s,
        predicted_goodput=plan.goodput,
        usd_per_hour=plan.usd_per_hour,
        rationale=config.rationale,
        engine_arguments=engine_arguments(query.model, config, options),
        memory=_memory_to_proto(plan.memory),
        single_ttft_s=plan.single_ttft_s,
        single_tpot_s=plan.single_tpot_s,
        output_tokens_per_second=plan.output_tokens_per_second,
        usd_per_million_output_tokens=price if math.isfinite(price) else 0.0,
        request_rate=plan.request_rate,
        concurrent_request_count=plan.concurrent_request_count * copies,
        pareto_optimal=pareto_optimal,
        carries_load=plan.carries_load,
        limited_by=plan.limited_by,
        gpu_name=plan.gpu_name,
        idle_gpu_count=config.idle_gpu_count,
        commands=commands,
    )


def model_summary(model: ModelDescription, key_value_bytes: float) -> parallelism_pb2.ModelSummary:
    """Return what the planner takes a model for; ``key_value_bytes``: of one element of its cache."""
    counts = count_parameters(model)
    total = model.parameter_count or counts.total
    latent = model.latent_attention
    per_layer = (
        model.key_value_head_count * (model.head_size + model.value_head_size)
        if latent is None
        else latent.key_value_rank + latent.rope_head_size
    )
    return parallelism_pb2.ModelSummary(
        name=model.name,
        architecture=model.architecture,
        parameter_count=total,
        active_parameter_count=total - (counts.total - counts.active),
        weight_bytes=weight_bytes(model),
        key_value_bytes_per_token=key_value_bytes * per_layer * model.layer_count,
        max_context_token_count=model.max_context_token_count,
        weight_format=model.weight_format.value,
    )


def sizes_to_proto(config: ParallelismConfig) -> parallelism_pb2.ParallelSizes:
    """Return the sizes of one replica as a message."""
    return parallelism_pb2.ParallelSizes(
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        data_parallel_size=config.data_parallel_size,
        expert_parallel_size=config.expert_parallel_size,
    )


def _memory_to_proto(memory: MemoryEstimate) -> parallelism_pb2.PlanMemory:
    return parallelism_pb2.PlanMemory(
        total_bytes=memory.total_bytes,
        weight_bytes=memory.weight_bytes,
        activation_bytes=memory.activation_bytes,
        cuda_graph_bytes=memory.cuda_graph_bytes,
        runtime_bytes=memory.runtime_bytes,
        key_value_bytes=max(0, memory.key_value_bytes),
        key_value_bytes_per_token=memory.key_value_bytes_per_token,
    )


def _rejected_to_proto(plan: RejectedPlan) -> parallelism_pb2.RejectedPlan:
    return parallelism_pb2.RejectedPlan(
        sizes=sizes_to_proto(plan.config),
        replica_count=plan.config.replica_count,
        gpu_name=plan.gpu_name,
        reasons=plan.reasons,
    )
