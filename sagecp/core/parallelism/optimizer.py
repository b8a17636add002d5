"""Chooses how to spread a model over the GPUs of an instance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.parallelism.data import DataParallelism
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.expert import ExpertParallelism, expert_count_of
from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT, GpuPool
from sagecp.core.parallelism.hybrid import HybridParallelism
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.pipeline import PipelineParallelism
from sagecp.core.parallelism.search import search_plans
from sagecp.core.parallelism.strategy import (
    USUAL_TENSOR_SIZE,
    ParallelismStrategy,
    behind_one_endpoint,
    check_gpu_count,
    known_ground,
    objectives_of,
    workload_of,
)
from sagecp.core.parallelism.tensor import TensorParallelism
from sagecp.core.parallelism.workload import PlanGoal
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata

_MAX_KEPT_COUNT = 1024

_Choice = tuple[ParallelismType, ParallelismConfig]


class ParallelismOptimizer:
    """Chooses a strategy for a request on an instance.

    Args:
        models: What is known of models, by the name they are served under; it wins over what
            is known of public models by their names.
        options: Settings of the engine; ``None``: usual ones.

    Attributes:
        strategies: The five ways, by type.
    """

    def __init__(
        self,
        models: Mapping[str, ModelDescription] | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        knowledge = ModelKnowledge(models)
        self.strategies: Mapping[ParallelismType, ParallelismStrategy] = {
            strategy.type: strategy
            for strategy in (
                TensorParallelism(knowledge, options),
                PipelineParallelism(knowledge, options),
                DataParallelism(knowledge, options),
                ExpertParallelism(knowledge, options),
                HybridParallelism(knowledge, options),
            )
        }
        self._knowledge = knowledge
        self._options = options or EngineOptions()
        self._kept: dict[tuple[object, ...], _Choice] = {}

    def select_strategy(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> _Choice:
        """Choose how to use up to ``gpu_count`` GPUs.

        Where the model (by its name, or from ``models``) and the GPU (by ``instance.gpu_name``) are
        known: the plan with the most requests within the request's objectives for the money.
        Otherwise by rule of thumb:

        * a mixture of experts: tensor 4, experts over as many GPUs as there are experts;
        * 1 GPU: tensor 1; 2 and 3: tensor 2; 4 to 7: tensor 4;
        * 8 to 15: tensor 4, and copies; 16 and more: tensor 4, two stages, and copies.

        ``request.parallelism_hint`` decides the way where it can be followed; where it cannot,
        ``rationale`` says so. ``idle_gpu_count`` tells the GPUs that are not used.

        Raises:
            InvalidRequestError: ``gpu_count`` is below one, or the model cannot be served with so many.
        """
        check_gpu_count(gpu_count)
        key = self._key(request, instance, gpu_count)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._choose(request, instance, gpu_count)
            if len(self._kept) >= _MAX_KEPT_COUNT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = kept
        return kept

    def _choose(self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int) -> _Choice:
        hint = request.parallelism_hint
        refusal = ""
        if hint is not None:
            try:
                config = self.strategies[hint].optimize(request, instance, gpu_count)
            except InvalidRequestError as error:
                refusal = (
                    f"not {hint.value} parallelism, as the request asks: {error.violations[0].description}"
                )
            else:
                config = replace(
                    config, rationale=f"the request asks for {hint.value} parallelism: {config.rationale}"
                )
                return hint, config
        way, config = self._best(request, instance, gpu_count)
        if refusal:
            config = replace(config, rationale=f"{config.rationale} ({refusal})")
        return way, config

    def _best(self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int) -> _Choice:
        known = known_ground(self._knowledge, request, instance, gpu_count)
        if known is not None:
            best = self._best_plan(request, *known, gpu_count)
            return best.type, best
        if expert_count_of(request, instance) or instance.expert_parallel_size > 1:
            way = ParallelismType.EXPERT
            return way, self.strategies[way].usual(request, instance, gpu_count)
        if gpu_count >= USUAL_GPUS_PER_NODE_COUNT:
            way = ParallelismType.HYBRID
            return way, self.strategies[way].usual(request, instance, gpu_count)
        way = ParallelismType.TENSOR
        usable = min(gpu_count, 2 * USUAL_TENSOR_SIZE - 1)
        config = self.strategies[way].usual(request, instance, usable)
        return way, replace(config, idle_gpu_count=gpu_count - config.gpu_count)

    def _best_plan(
        self, request: RequestMetadata, model: ModelDescription, pool: GpuPool, gpu_count: int
    ) -> ParallelismConfig:
        result = search_plans(
            model,
            (pool,),
            workload_of(request),
            objectives_of(request),
            PlanGoal.GOODPUT_PER_USD,
            self._options,
        )
        if result.recommended is None:
            raise InvalidRequestError([FieldViolation("gpu_count", result.summary)])
        return behind_one_endpoint(result.recommended.config, gpu_count)

    def _key(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> tuple[object, ...]:
        """Return what a choice depends on: requests of like lengths and the same objectives are alike."""
        sample = workload_of(request).samples[0]
        return (
            request.model_name or instance.model_name,
            request.parallelism_hint,
            request.ttft_slo_ms,
            request.tpot_slo_ms,
            sample.prompt_token_count.bit_length(),
            sample.output_token_count.bit_length(),
            instance.gpu_name,
            instance.gpu_memory_gb,
            instance.usd_per_gpu_hour,
            instance.expert_parallel_size > 1,
            gpu_count,
        )
