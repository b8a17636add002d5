"""From the command line to the contract's request, and from its refusals back to options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.plan.options import GpusValue

if TYPE_CHECKING:
    from sagecp.cli.plan.model_source import ModelSource
    from sagecp.cli.plan.workload_source import WorkloadSource
    from sagecp.v1 import admin_service_pb2

# Fields of the contract, the longest first, and the options that fill them.
_OPTIONS = (
    ("gpu_pools", "--gpus"),
    ("model_config_json", "--model"),
    ("model_shape", "--model"),
    ("model_name", "--model"),
    ("weight_format", "--weight-format"),
    ("workload.max_context_token_count", "--max-model-len"),
    ("workload.request_rate", "--rate"),
    ("workload", "--workload"),
    ("objectives", "--slo"),
    ("attainment", "--attainment"),
    ("engine_options.gpu_memory_utilization", "--gpu-memory-utilization"),
    ("engine_options.max_batch_token_count", "--max-num-batched-tokens"),
    ("engine_options.max_running_request_count", "--max-num-seqs"),
    ("engine_options.key_value_cache_type", "--kv-cache-dtype"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the command line says of the question, beside model and workload.

    Attributes:
        gpus: The pools.
        node_count: Nodes of pools that do not say.
        objectives: Seconds by ``ttft`` and ``tpot``.
        prices: Rents by the name of a GPU as written; ``""``: of all.
        limit: Most plans wanted.
    """

    gpus: tuple[GpusValue, ...]
    node_count: int
    objectives: dict[str, float]
    prices: dict[str, float]
    attainment: float
    goal: str
    type: str
    weight_format: str
    max_model_len: int | None
    key_value_cache_type: str
    gpu_memory_utilization: float | None
    max_batch_token_count: int | None
    max_running_request_count: int | None
    enforce_eager: bool
    limit: int
    with_rejected: bool
    with_front: bool


def make_request(
    model: ModelSource, workload: WorkloadSource, options: PlanOptions
) -> admin_service_pb2.PlanParallelismRequest:
    """Return the question as the contract has it.

    Raises:
        CliError: A price is for no GPU of --gpus.
    """
    from sagecp.v1 import admin_service_pb2, parallelism_pb2
    from sagecp.wire.times import duration

    request = admin_service_pb2.PlanParallelismRequest(
        model_name=model.name,
        model_config_json=model.config_json,
        weight_format=options.weight_format,
        gpu_pools=_pools(options),
        workload=_workload(workload, options.max_model_len),
        goal=parallelism_pb2.PlanGoal.Value(f"PLAN_GOAL_{options.goal.upper()}"),
        attainment=options.attainment,
        max_plan_count=options.limit,
        include_rejected=options.with_rejected,
        include_pareto_front=options.with_front,
        engine_options=parallelism_pb2.PlanEngineOptions(
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_batch_token_count=options.max_batch_token_count or 0,
            max_running_request_count=options.max_running_request_count or 0,
            key_value_cache_type=options.key_value_cache_type,
            enforce_eager=options.enforce_eager,
        ),
    )
    if options.type:
        request.type = parallelism_pb2.ParallelismType.Value(f"PARALLELISM_TYPE_{options.type.upper()}")
    if "ttft" in options.objectives:
        request.objectives.time_to_first_token.CopyFrom(duration(options.objectives["ttft"]))
    if "tpot" in options.objectives:
        request.objectives.time_per_output_token.CopyFrom(duration(options.objectives["tpot"]))
    return request


def _pools(options: PlanOptions) -> list[Any]:
    from sagecp.core.gpu_specifications import find_gpu
    from sagecp.v1 import parallelism_pb2

    def kind(name: str) -> str:
        gpu = find_gpu(name)
        return gpu.name if gpu else name.lower()

    prices = {kind(name) if name else "": price for name, price in options.prices.items()}
    kinds = {kind(gpus.name) for gpus in options.gpus}
    if strange := sorted(prices.keys() - kinds - {""}):
        raise CliError(
            f"--price: {', '.join(strange)} is not among the GPUs of --gpus ({', '.join(sorted(kinds))})",
            exit_code=ExitCode.INVALID,
        )
    pools = []
    for gpus in options.gpus:
        pool = parallelism_pb2.GpuPool(
            gpu_name=gpus.name,
            gpus_per_node_count=gpus.gpus_per_node_count,
            node_count=gpus.node_count or options.node_count,
            usd_per_gpu_hour=prices.get(kind(gpus.name), prices.get("", 0.0)),
        )
        for name, number in gpus.facts:
            setattr(pool, name, int(number) if name == "fast_link_gpu_count" else number)
        pools.append(pool)
    return pools


def _workload(source: WorkloadSource, max_model_len: int | None) -> Any:  # noqa: ANN401 - a Workload message
    from sagecp.v1 import parallelism_pb2

    return parallelism_pb2.Workload(
        request_rate=source.request_rate or 0.0,
        mean_prompt_token_count=source.mean_prompt_token_count,
        mean_output_token_count=source.mean_output_token_count,
        max_context_token_count=max_model_len or 0,
        arrival_variation=source.arrival_variation,
        samples=[
            parallelism_pb2.LengthSample(
                prompt_token_count=each.prompt_token_count,
                output_token_count=each.output_token_count,
                cached_token_count=each.cached_token_count,
                weight=each.weight,
            )
            for each in source.samples
        ],
    )


def refusal(violations: Iterable[Any]) -> CliError:
    """Return a refused question as an error of the options that asked it.

    Args:
        violations: Values with ``field`` and ``description``.
    """
    lines = list(dict.fromkeys(_line(each.field, each.description) for each in violations))
    text = lines[0] if len(lines) == 1 else "\n  ".join(["this cannot be planned:", *lines])
    return CliError(text, hint=_hint(lines), exit_code=ExitCode.INVALID)


def _line(field: str, description: str) -> str:
    option = next((option for start, option in _OPTIONS if field.startswith(start)), "")
    # Of a model's configuration the field's own name tells more.
    inner = field.partition("model_config_json.")[2]
    return ": ".join(part for part in (option or field, inner, description) if part)


def _hint(lines: Sequence[str]) -> str:
    if all(line.startswith("--model") for line in lines):
        return "give the folder of a Hugging Face checkpoint, its config.json, or a name that is known"
    return ""
