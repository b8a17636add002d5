"""What every way to spread a model has in common: choosing sizes, and saying what they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.gpu_specifications import find_gpu, require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate
from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT, GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_space import plan_space
from sagecp.core.parallelism.search import best_plan
from sagecp.core.parallelism.serving import estimate_plan
from sagecp.core.parallelism.validity import violations
from sagecp.core.parallelism.workload import LengthSample, PlanGoal, PlanObjectives, Workload
from sagecp.core.prompt_digest import digest_prompt
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata

USUAL_TENSOR_SIZE = 4
"""GPUs that share each layer where nothing is known of the model and there are enough of them."""
_USUAL_OUTPUT_TOKEN_COUNT = 256


class ParallelismStrategy(ABC):
    """One way to spread a model over the GPUs of an instance.

    Where the model and the GPU are known, the best of the plans that vLLM accepts and that fit;
    otherwise a rule of thumb.

    Args:
        knowledge: Finds models by the name they are served under; ``None``: those known by name.
        options: Settings of the engine; ``None``: usual ones.
    """

    type: ClassVar[ParallelismType]

    def __init__(self, knowledge: ModelKnowledge | None = None, options: EngineOptions | None = None) -> None:
        self._knowledge = knowledge or ModelKnowledge()
        self._options = options or EngineOptions()

    def optimize(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return the best sizes of this way for a request on an instance with so many GPUs.

        At most ``gpu_count`` GPUs are used; ``idle_gpu_count`` says how many are left.

        Raises:
            InvalidRequestError: ``gpu_count`` is below one, or no plan of this way can be; the
                message says what would make one possible.
        """
        check_gpu_count(gpu_count)
        known = known_ground(self._knowledge, request, instance, gpu_count)
        if known is None:
            return self.usual(request, instance, gpu_count)
        model, pool = known
        configs = list(self.configs(model, pool))
        plan = best_plan(
            model,
            pool,
            configs,
            workload_of(request),
            objectives_of(request),
            PlanGoal.GOODPUT_PER_USD,
            self._options,
        )
        if plan is None:
            raise InvalidRequestError([FieldViolation("gpu_count", self._impossible(model, pool, configs))])
        return behind_one_endpoint(plan.config, gpu_count)

    def estimate(
        self,
        request: RequestMetadata,
        instance: ExecutionInstance,
        config: ParallelismConfig,
        *,
        workload: Workload | None = None,
    ) -> PlanEstimate:
        """Return what sizes would give, for traffic like a request on GPUs like an instance's.

        Args:
            request: Tells lengths and objectives.
            instance: Tells model and GPU.
            config: The sizes.
            workload: Traffic, instead of requests like this one.

        Raises:
            InvalidRequestError: The model or the GPU is not known, or the plan cannot be.
        """
        require_gpu(instance.gpu_name)
        known = known_ground(self._knowledge, request, instance, max(1, config.gpu_count))
        if known is None:
            name = request.model_name or instance.model_name
            raise InvalidRequestError(
                [
                    FieldViolation(
                        "model_name",
                        f"nothing is known of the model {name[:128]!r}; give its config.json "
                        f"(`[planner.models]` in the configuration, or `sagecp plan --model`)",
                    )
                ]
            )
        model, pool = known
        reasons = violations(model, pool, config, self._options)
        if reasons:
            raise InvalidRequestError([FieldViolation("config", reason) for reason in reasons])
        return estimate_plan(
            model, pool, config, self._options, workload or workload_of(request), objectives_of(request)
        )

    def configs(self, model: ModelDescription, pool: GpuPool) -> Iterator[ParallelismConfig]:
        """Yield the plans of this way for some GPUs, whether they can be or not."""
        return (config for config in plan_space(model, pool) if config.type is self.type)

    @abstractmethod
    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return sizes by rule of thumb, where nothing is known of the model."""

    def _impossible(self, model: ModelDescription, pool: GpuPool, configs: list[ParallelismConfig]) -> str:
        if not configs:
            return f"{pool} allow no {self.type.value} parallelism; use more GPUs or another way"
        reasons = violations(model, pool, configs[0], self._options)
        why = reasons[0] if reasons else f"{configs[0]} does not fit; see `sagecp plan --rejected`"
        return f"no {self.type.value} plan of {model.name or 'the model'} can be on {pool}: {why}"


def check_gpu_count(gpu_count: int) -> None:
    """Refuse to plan for no GPUs.

    Raises:
        InvalidRequestError: ``gpu_count`` is below one.
    """
    if gpu_count < 1:
        raise InvalidRequestError(
            [FieldViolation("gpu_count", f"is {gpu_count}; at least one GPU is needed")]
        )


def known_ground(
    knowledge: ModelKnowledge, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
) -> tuple[ModelDescription, GpuPool] | None:
    """Return the model and the GPUs that a plan can be made for; ``None``: too little is known of either."""
    model = knowledge.find(request.model_name or instance.model_name)
    gpu = find_gpu(instance.gpu_name)
    if model is None or gpu is None:
        return None
    if instance.gpu_memory_gb:
        gpu = replace(gpu, memory_gib=instance.gpu_memory_gb)
    per_node_count = min(USUAL_GPUS_PER_NODE_COUNT, gpu_count)
    pool = GpuPool(
        gpu=gpu,
        gpus_per_node_count=per_node_count,
        node_count=max(1, gpu_count // per_node_count),
        usd_per_gpu_hour=instance.usd_per_gpu_hour,
    )
    return model, pool


def behind_one_endpoint(config: ParallelismConfig, gpu_count: int) -> ParallelismConfig:
    """Return a plan's replicas as the data-parallel copies of one instance.

    Copies that share experts stay replicas: behind one endpoint all of them would.
    """
    if config.expert_parallel_size > 1:
        return replace(config, idle_gpu_count=gpu_count - config.gpu_count)
    return replace(
        config,
        data_parallel_size=config.copy_count,
        replica_count=1,
        idle_gpu_count=gpu_count - config.gpu_count,
    )


def workload_of(request: RequestMetadata) -> Workload:
    """Return traffic of requests like one."""
    digest = request.prompt_digest or digest_prompt(request)
    output = request.max_tokens or _USUAL_OUTPUT_TOKEN_COUNT
    return Workload(samples=(LengthSample(max(1, digest.token_count), max(1, output)),))


def objectives_of(request: RequestMetadata) -> PlanObjectives:
    """Return a request's objectives as those of a plan."""
    ttft_ms, tpot_ms = request.ttft_slo_ms, request.tpot_slo_ms
    return PlanObjectives(
        ttft_s=None if ttft_ms is None else ttft_ms / 1000.0,
        tpot_s=None if tpot_ms is None else tpot_ms / 1000.0,
    )


def largest_power_of_two(limit: int) -> int:
    """Return the largest power of two that is at most ``limit``, which is at least one."""
    return 1 << (limit.bit_length() - 1)
