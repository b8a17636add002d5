"""From a `PlanParallelismRequest` to what the planner asks, every bad field named at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sagecp.core.errors import InvalidRequestError
from sagecp.core.gpu_specifications import GpuSpecification, UnknownGpuError, find_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.length_spread import USUAL_SPREAD, spread_lengths
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.plan_query import PlanQuery
from sagecp.core.parallelism.workload import LengthSample, PlanGoal, PlanObjectives, Workload
from sagecp.core.types import ParallelismType
from sagecp.rpc.convert.common import check_enum
from sagecp.rpc.convert.field_checks import FieldChecks
from sagecp.rpc.convert.plan_model import model_from_proto
from sagecp.v1 import admin_service_pb2, parallelism_pb2, request_pb2
from sagecp.wire.times import seconds_of

MAX_POOL_COUNT = 64
MAX_GPU_COUNT = 100_000
MAX_SAMPLE_COUNT = 4096
MAX_PLAN_COUNT = 1000
DEFAULT_PLAN_COUNT = 5
_MAX_GPUS_PER_NODE = 1024
_MAX_TOKENS = 100_000_000
_MAX_RATE = 1e7
_MAX_OBJECTIVE_S = 7 * 24 * 3600.0
_MAX_NAME_LENGTH = 64
_KEY_VALUE_BYTES = {"": 2.0, "auto": 2.0, "fp8": 1.0}
# What can be overridden: field of the message, of the data sheet, and the largest value.
_OVERRIDES = (
    ("memory_gib", "memory_gib", 1e5),
    ("memory_gb_per_s", "memory_gb_per_s", 1e6),
    ("dense_tflops", "dense_tflops", 1e6),
    ("eight_bit_tflops", "eight_bit_tflops", 1e6),
    ("link_gb_per_s", "link_gb_per_s", 1e6),
)
_NEEDED_OF_UNKNOWN_GPUS = ("memory_gib", "memory_gb_per_s", "dense_tflops")


def plan_query_from_proto(
    request: admin_service_pb2.PlanParallelismRequest, prices: Mapping[str, float] | None = None
) -> PlanQuery:
    """Return what is asked.

    Args:
        request: The message.
        prices: Rent of one GPU for an hour, by the short name of its kind, where a pool has no price.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    checks = FieldChecks()
    warnings: list[str] = []
    model = model_from_proto(request, checks)
    pools = _pools(request, prices or {}, checks)
    options = _options(request, checks)
    objectives = _objectives(request.objectives, request.attainment, checks)
    goal_is_given = check_enum("goal", request.goal, parallelism_pb2.PlanGoal.DESCRIPTOR, checks.violations)
    goal = _GOALS[request.goal] if goal_is_given else PlanGoal.GOODPUT_PER_USD
    type_is_given = check_enum(
        "type", request.type, parallelism_pb2.ParallelismType.DESCRIPTOR, checks.violations
    )
    checks.count("max_plan_count", request.max_plan_count, 0, MAX_PLAN_COUNT)
    longest = options.max_context_token_count or (model.max_context_token_count if model else None)
    workload = _workload(request, longest, checks, warnings)
    if checks.violations or model is None or workload is None:
        raise InvalidRequestError(checks.violations)
    if options.max_context_token_count is None and request.HasField("model_shape"):
        model = _with_context_of(model, workload, warnings)
    return PlanQuery(
        model=model,
        pools=pools,
        workload=workload,
        objectives=objectives,
        goal=goal,
        options=options,
        type=_TYPES[request.type] if type_is_given else None,
        warnings=tuple(warnings),
    )


_GOALS = {
    parallelism_pb2.PLAN_GOAL_GOODPUT_PER_USD: PlanGoal.GOODPUT_PER_USD,
    parallelism_pb2.PLAN_GOAL_LOWEST_TTFT: PlanGoal.LOWEST_TTFT,
    parallelism_pb2.PLAN_GOAL_CHEAPEST: PlanGoal.CHEAPEST,
    parallelism_pb2.PLAN_GOAL_HIGHEST_THROUGHPUT: PlanGoal.HIGHEST_THROUGHPUT,
}
_TYPES = {
    parallelism_pb2.PARALLELISM_TYPE_TENSOR: ParallelismType.TENSOR,
    parallelism_pb2.PARALLELISM_TYPE_PIPELINE: ParallelismType.PIPELINE,
    parallelism_pb2.PARALLELISM_TYPE_DATA: ParallelismType.DATA,
    parallelism_pb2.PARALLELISM_TYPE_EXPERT: ParallelismType.EXPERT,
    parallelism_pb2.PARALLELISM_TYPE_HYBRID: ParallelismType.HYBRID,
}


# -- GPUs ----------------------------------------------------------------------------


def _pools(
    request: admin_service_pb2.PlanParallelismRequest, prices: Mapping[str, float], checks: FieldChecks
) -> tuple[GpuPool, ...]:
    if not request.gpu_pools:
        checks.note("gpu_pools", "is empty; say which GPUs there are, for example 8 of H100 in 1 node")
    if not checks.length("gpu_pools", len(request.gpu_pools), MAX_POOL_COUNT, "pools"):
        return ()
    pools: list[GpuPool] = []
    for index, message in enumerate(request.gpu_pools):
        field = f"gpu_pools[{index}]"
        pool = _pool(message, field, prices, checks)
        if pool is None:
            continue
        if any(pool.gpu.name == other.gpu.name for other in pools):
            checks.note(
                f"{field}.gpu_name",
                f"{pool.gpu.name} is in a pool before this one; put equal nodes into one pool "
                "(node_count), and plan for unequal ones apart: no plan spans two pools",
            )
        pools.append(pool)
    if sum(pool.gpu_count for pool in pools) > MAX_GPU_COUNT:
        checks.note("gpu_pools", f"have more than {MAX_GPU_COUNT:,} GPUs together; plan for parts of them")
    return tuple(pools)


def _pool(
    message: parallelism_pb2.GpuPool, field: str, prices: Mapping[str, float], checks: FieldChecks
) -> GpuPool | None:
    before = len(checks.violations)
    checks.count(f"{field}.gpus_per_node_count", message.gpus_per_node_count, 1, _MAX_GPUS_PER_NODE)
    checks.count(f"{field}.node_count", message.node_count, 1, MAX_GPU_COUNT)
    checks.number(f"{field}.usd_per_gpu_hour", message.usd_per_gpu_hour, 0.0, 1e6, unit="US dollars")
    for name, _, high in _OVERRIDES:
        if message.HasField(name):  # type: ignore[arg-type]  # names of its fields
            checks.number(f"{field}.{name}", getattr(message, name), 0.0, high, above=True)
    if message.HasField("fast_link_gpu_count"):
        checks.count(f"{field}.fast_link_gpu_count", message.fast_link_gpu_count, 1, _MAX_GPUS_PER_NODE)
    if message.HasField("node_link_gb_per_s"):
        checks.number(f"{field}.node_link_gb_per_s", message.node_link_gb_per_s, 0.0, 1e6, above=True)
    checks.length(f"{field}.gpu_name", len(message.gpu_name), _MAX_NAME_LENGTH, "characters")
    gpu = _gpu(message, f"{field}.gpu_name", checks)
    if len(checks.violations) > before or gpu is None:
        return None
    price = message.usd_per_gpu_hour or prices.get(gpu.name)
    link = message.node_link_gb_per_s if message.HasField("node_link_gb_per_s") else None
    return GpuPool(
        gpu=gpu,
        gpus_per_node_count=message.gpus_per_node_count,
        node_count=message.node_count,
        usd_per_gpu_hour=price,
        **({} if link is None else {"node_link_gb_per_s": link}),
    )


def _gpu(message: parallelism_pb2.GpuPool, field: str, checks: FieldChecks) -> GpuSpecification | None:
    changes = {
        name: getattr(message, field_name)
        for field_name, name, _ in _OVERRIDES
        if message.HasField(field_name)  # type: ignore[arg-type]  # names of its fields
    }
    if message.HasField("fast_link_gpu_count"):
        changes["fast_link_gpu_count"] = message.fast_link_gpu_count
    gpu = find_gpu(message.gpu_name)
    if gpu is not None:
        return dataclasses.replace(gpu, **changes)
    if message.gpu_name and all(name in changes for name in _NEEDED_OF_UNKNOWN_GPUS):
        return GpuSpecification(name=message.gpu_name, words=(), **changes)
    if not message.gpu_name:
        checks.note(field, "is not set; name the kind of the GPUs, for example H100")
    else:
        checks.violations += UnknownGpuError(message.gpu_name, field).violations
    return None


# -- traffic -------------------------------------------------------------------------


def _workload(
    request: admin_service_pb2.PlanParallelismRequest,
    longest: int | None,
    checks: FieldChecks,
    warnings: list[str],
) -> Workload | None:
    message = request.workload
    before = len(checks.violations)
    checks.number("workload.request_rate", message.request_rate, 0.0, _MAX_RATE, unit="requests per second")
    if message.HasField("arrival_variation"):
        checks.number("workload.arrival_variation", message.arrival_variation, 0.0, 100.0)
    checks.length("workload.samples", len(message.samples), MAX_SAMPLE_COUNT, "kinds of requests")
    if not message.samples:
        if not (message.mean_prompt_token_count or message.mean_output_token_count):
            checks.note(
                "workload",
                "says no lengths; give samples of a trace, or mean_prompt_token_count and "
                "mean_output_token_count",
            )
        else:
            for name in ("mean_prompt_token_count", "mean_output_token_count"):
                checks.number(f"workload.{name}", getattr(message, name), 1.0, _MAX_TOKENS, unit="tokens")
    if len(checks.violations) > before:
        return None
    if message.samples:
        samples = [_sample(each, f"workload.samples[{index}]", checks)
                   for index, each in enumerate(message.samples)]  # fmt: skip
    else:
        samples = list(spread_lengths(message.mean_prompt_token_count, message.mean_output_token_count))
        warnings.append(
            "only mean lengths are given: prompts and answers are taken as log-normal and independent, "
            f"with a standard deviation of {USUAL_SPREAD:g} of the mean; a trace tells better"
        )
    if len(checks.violations) > before:
        return None
    kept = _within_context(samples, longest, checks, warnings)
    if not kept:
        return None
    return Workload(
        samples=kept,
        request_rate=message.request_rate or None,
        arrival_variation=message.arrival_variation if message.HasField("arrival_variation") else 1.0,
    )


def _sample(message: parallelism_pb2.LengthSample, field: str, checks: FieldChecks) -> LengthSample:
    checks.count(f"{field}.prompt_token_count", message.prompt_token_count, 1, _MAX_TOKENS)
    checks.count(f"{field}.output_token_count", message.output_token_count, 1, _MAX_TOKENS)
    checks.number(f"{field}.weight", message.weight, 0.0, 1e9)
    if message.cached_token_count > message.prompt_token_count:
        checks.note(
            f"{field}.cached_token_count",
            f"is {message.cached_token_count:,}, of a prompt of {message.prompt_token_count:,} tokens; "
            "give at most so many",
        )
    return LengthSample(
        message.prompt_token_count,
        message.output_token_count,
        message.cached_token_count,
        message.weight or 1.0,
    )


def _within_context(
    samples: list[LengthSample], longest: int | None, checks: FieldChecks, warnings: list[str]
) -> tuple[LengthSample, ...]:
    """Return the requests that an engine would take; others are told of."""
    if longest is None:
        return tuple(samples)
    kept = tuple(each for each in samples if each.prompt_token_count + each.output_token_count <= longest)
    if not kept:
        least = min(each.prompt_token_count + each.output_token_count for each in samples)
        checks.note(
            "workload",
            f"every request is longer than the context of {longest:,} tokens (the shortest has {least:,}); "
            "set max_context_token_count where the model allows more, or choose another model",
        )
    elif len(kept) < len(samples):
        share = 1.0 - sum(each.weight for each in kept) / sum(each.weight for each in samples)
        warnings.append(
            f"{share * 100:.2g} % of the requests are longer than the context of {longest:,} tokens and are "
            "left out: an engine would refuse them"
        )
    return kept


def _with_context_of(model: ModelDescription, workload: Workload, warnings: list[str]) -> ModelDescription:
    """Return a model whose context nobody tells, with the one that the traffic needs."""
    longest = workload.max_context_token_count
    warnings.append(f"model_shape tells no context: that of the longest request is taken, {longest:,} tokens")
    return dataclasses.replace(model, max_context_token_count=longest)


# -- objectives and engine -------------------------------------------------------------


def _objectives(message: request_pb2.Objectives, attainment: float, checks: FieldChecks) -> PlanObjectives:
    checks.number("attainment", attainment, 0.0, 1.0)
    if message.HasField("end_to_end_deadline"):
        checks.note(
            "objectives.end_to_end_deadline",
            "is not planned for; give time_to_first_token and time_per_output_token",
        )
    spans: dict[str, float | None] = {}
    for name in ("time_to_first_token", "time_per_output_token"):
        spans[name] = None
        if message.HasField(name):
            spans[name] = seconds_of(getattr(message, name))
            checks.number(
                f"objectives.{name}", spans[name] or 0.0, 0.0, _MAX_OBJECTIVE_S, above=True, unit="seconds"
            )
    return PlanObjectives(
        ttft_s=spans["time_to_first_token"],
        tpot_s=spans["time_per_output_token"],
        attainment=attainment or PlanObjectives().attainment,
    )


def _options(request: admin_service_pb2.PlanParallelismRequest, checks: FieldChecks) -> EngineOptions:
    message, field, default = request.engine_options, "engine_options", EngineOptions()
    utilization = default.gpu_memory_utilization
    if message.HasField("gpu_memory_utilization"):
        utilization = message.gpu_memory_utilization
        checks.number(f"{field}.gpu_memory_utilization", utilization, 0.0, 1.0, above=True)
    batch = message.max_batch_token_count or default.max_batch_token_count
    checks.count(f"{field}.max_batch_token_count", batch, 1, _MAX_TOKENS)
    running = message.max_running_request_count or default.max_running_request_count
    checks.count(f"{field}.max_running_request_count", running, 1, 1_000_000)
    kind = message.key_value_cache_type
    if kind not in _KEY_VALUE_BYTES:
        checks.note(f"{field}.key_value_cache_type", f"is {kind[:64]!r}; choose auto or fp8")
    checks.count("workload.max_context_token_count", request.workload.max_context_token_count, 0, _MAX_TOKENS)
    return EngineOptions(
        gpu_memory_utilization=utilization,
        max_batch_token_count=batch,
        max_running_request_count=running,
        max_context_token_count=request.workload.max_context_token_count or None,
        key_value_bytes=_KEY_VALUE_BYTES.get(kind, 2.0),
        cuda_graphs=not message.enforce_eager,
    )
