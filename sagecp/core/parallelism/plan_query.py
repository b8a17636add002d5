"""A question to the planner as one value, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate, PlanningResult
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.search import search_plans
from sagecp.core.parallelism.workload import PlanGoal, PlanObjectives, Workload
from sagecp.core.types import ParallelismType


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuery:
    """What somebody wants planned.

    Attributes:
        model: The model.
        pools: GPUs to choose from; a plan uses one pool. Their GPUs' names differ.
        workload: Traffic to carry.
        objectives: What a good request is.
        goal: What the best plan is best at.
        options: Settings of the engine.
        type: Only plans of this type; ``None``: any.
        warnings: What to know of the question before trusting the answer.
    """

    model: ModelDescription
    pools: tuple[GpuPool, ...]
    workload: Workload
    objectives: PlanObjectives = field(default_factory=PlanObjectives)
    goal: PlanGoal = PlanGoal.GOODPUT_PER_USD
    options: EngineOptions = field(default_factory=EngineOptions)
    type: ParallelismType | None = None
    warnings: tuple[str, ...] = ()

    def pool_of(self, gpu_name: str) -> GpuPool:
        """Return the pool of a plan, by the name of its GPUs.

        Raises:
            KeyError: There is none.
        """
        for pool in self.pools:
            if pool.gpu.name == gpu_name:
                return pool
        raise KeyError(gpu_name)

    def options_of(self, plan: PlanEstimate) -> EngineOptions:
        """Return the settings that a plan needs: its context may have been shortened to fit."""
        context = plan.memory.max_context_token_count
        if self.options.max_context_token_count is not None or context == self.model.max_context_token_count:
            return self.options
        return replace(self.options, max_context_token_count=context)


def answer_plan_query(query: PlanQuery) -> PlanningResult:
    """Search, and keep what was asked for. Takes up to seconds: not for an event loop."""
    result = search_plans(
        query.model, query.pools, query.workload, query.objectives, query.goal, query.options
    )
    if query.type is not None:
        result = of_type(result, query.type)
    return replace(result, warnings=(*query.warnings, *result.warnings))


def of_type(result: PlanningResult, wanted: ParallelismType) -> PlanningResult:
    """Return the plans of one type; what others would give is told in the summary."""
    plans = tuple(plan for plan in result.plans if plan.config.type is wanted)
    kept = replace(
        result,
        plans=plans,
        pareto_front=tuple(plan for plan in result.pareto_front if plan.config.type is wanted),
        rejected=tuple(plan for plan in result.rejected if plan.config.type is wanted),
    )
    if not result.plans or (plans and plans[0] is result.plans[0]):
        return kept
    if not plans:
        return replace(
            kept,
            summary=f"No plan of type {wanted.value} can be, of {len(kept.rejected)} looked at; without "
            f"that wish: {result.summary}",
        )
    return replace(
        kept,
        summary=f"Of the plans of type {wanted.value}, {plans[0].config} is the best. Without that wish: "
        f"{result.summary}",
    )
