"""Finds the best plan: looks at every one, says of each that cannot be why, and ranks the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import MemoryEstimate, PlanEstimate, PlanningResult, RejectedPlan
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.pareto import pareto_front
from sagecp.core.parallelism.plan_space import plan_space, with_replica_count
from sagecp.core.parallelism.planning_words import explain_choice, explain_impossible, warnings_of
from sagecp.core.parallelism.request_classes import RequestClasses
from sagecp.core.parallelism.serving import estimate_plan
from sagecp.core.parallelism.validity import fit_violation, violations
from sagecp.core.parallelism.workload import PlanGoal, PlanObjectives, Workload

# A context that had to be shortened ends at a multiple of this.
_CONTEXT_STEP = 1024
# Of plans as good as each other, the one with the smaller sizes is the better.
_ALIKE = 0.005

Referee = Callable[[PlanEstimate], float]
"""Returns the goodput that a plan has in a closer look, for example in the simulator."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A plan that can be, with the settings that it needs."""

    pool: GpuPool
    config: ParallelismConfig
    options: EngineOptions
    memory: MemoryEstimate


def search_plans(
    model: ModelDescription,
    pools: Sequence[GpuPool],
    workload: Workload,
    objectives: PlanObjectives,
    goal: PlanGoal,
    options: EngineOptions,
    *,
    referee: Referee | None = None,
    refereed_count: int = 4,
) -> PlanningResult:
    """Look at every plan for the GPUs and rank those that can be.

    A plan uses one pool; plans of several pools are compared with each other. Where the longest
    context of the model does not fit and the options ask for none, it is shortened to what
    does, if that is enough for the workload.

    Args:
        model: What is to run.
        pools: The GPUs there are; each gives plans of its own.
        workload: The traffic.
        objectives: What a good request is.
        goal: What the best plan is best at.
        options: Settings of the engine.
        referee: Has the last word on the goodput of the plans that seem best.
        refereed_count: How many of them it looks at.
    """
    rejected: list[RejectedPlan] = []
    classes = RequestClasses.of(workload)
    plans: list[PlanEstimate] = []
    for pool in pools:
        for config in plan_space(model, pool):
            candidate = _examine(model, pool, config, options, workload)
            if isinstance(candidate, RejectedPlan):
                rejected.append(candidate)
            else:
                plans += _estimates(model, candidate, workload, objectives, goal, classes)
    has_rate = workload.request_rate is not None
    plans.sort(key=lambda plan: _rank(plan, goal, has_rate=has_rate))
    if referee is not None:
        plans = _refereed(plans, goal, referee, refereed_count, has_rate=has_rate)
    if not plans:
        summary = explain_impossible(model, pools, workload, options, rejected)
        return PlanningResult(plans=(), pareto_front=(), rejected=tuple(rejected), summary=summary)
    summary, rationale = explain_choice(plans, goal, objectives, workload)
    plans[0] = replace(plans[0], config=replace(plans[0].config, rationale=rationale))
    return PlanningResult(
        plans=tuple(plans),
        pareto_front=pareto_front(plans, at_rate=has_rate),
        rejected=tuple(rejected),
        summary=summary,
        warnings=warnings_of(model, pools, plans, workload, options),
    )


def best_plan(
    model: ModelDescription,
    pool: GpuPool,
    configs: Iterable[ParallelismConfig],
    workload: Workload,
    objectives: PlanObjectives,
    goal: PlanGoal,
    options: EngineOptions,
) -> PlanEstimate | None:
    """Return the best of some plans; ``None``: none of them can be. Arguments as of ``search_plans``."""
    classes = RequestClasses.of(workload)
    plans = [
        plan
        for config in configs
        if isinstance(candidate := _examine(model, pool, config, options, workload), _Candidate)
        for plan in _estimates(model, candidate, workload, objectives, goal, classes)
    ]
    has_rate = workload.request_rate is not None
    return min(plans, key=lambda plan: _rank(plan, goal, has_rate=has_rate), default=None)


def feasible_memory(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    workload: Workload,
) -> tuple[EngineOptions, MemoryEstimate]:
    """Return the memory of a plan, and the options with the context that fits.

    The context is shortened only where the options leave it open, and never below what the
    workload needs; whether it then fits is for the caller to see.
    """
    memory = estimate_memory(model, pool, config, options)
    if memory.fits or options.max_context_token_count is not None:
        return options, memory
    room = memory.key_value_token_capacity // _CONTEXT_STEP * _CONTEXT_STEP
    needed = workload.max_context_token_count
    if room < needed:
        return options, memory
    shorter = replace(options, max_context_token_count=min(room, model.max_context_token_count))
    return shorter, estimate_memory(model, pool, config, shorter)


def _examine(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    workload: Workload,
) -> _Candidate | RejectedPlan:
    reasons = violations(model, pool, config, options)
    if reasons:
        return RejectedPlan(config=config, gpu_name=pool.gpu.name, reasons=reasons)
    fitting, memory = feasible_memory(model, pool, config, options, workload)
    if not memory.fits:
        reason = fit_violation(model, pool, config, options, memory)
        return RejectedPlan(config=config, gpu_name=pool.gpu.name, reasons=(reason,))
    return _Candidate(pool, config, fitting, memory)


def _estimates(
    model: ModelDescription,
    candidate: _Candidate,
    workload: Workload,
    objectives: PlanObjectives,
    goal: PlanGoal,
    classes: RequestClasses,
) -> Iterator[PlanEstimate]:
    """Yield the plan with all its replicas, and with the fewest that carry the load."""

    def estimate(config: ParallelismConfig) -> PlanEstimate:
        return estimate_plan(
            model,
            candidate.pool,
            config,
            candidate.options,
            workload,
            objectives,
            classes=classes,
            memory=candidate.memory,
        )

    full = estimate(candidate.config)
    yield full
    most = candidate.config.replica_count
    if most == 1:
        return
    rate = workload.request_rate
    if rate is None:
        if goal is PlanGoal.CHEAPEST:
            yield estimate(with_replica_count(candidate.pool, candidate.config, 1))
        return
    if not full.carries_load:
        return
    # More replicas share waiting better, so that one alone does a little less than its part.
    fewest = min(most, max(1, math.ceil(rate / (full.goodput / most))))
    for count in range(fewest, most):
        fewer = estimate(with_replica_count(candidate.pool, candidate.config, count))
        if fewer.carries_load:
            yield fewer
            return


def _rank(plan: PlanEstimate, goal: PlanGoal, *, has_rate: bool) -> tuple[float, ...]:
    """Return what plans are sorted by, least first; ends with the sizes, so that ties are decided."""
    carries = 0.0 if plan.carries_load or not has_rate else 1.0
    served = min(plan.goodput, plan.request_rate) if has_rate else plan.goodput
    sizes = tuple(float(size) for size in plan.config.sizes)
    # Of plans that cannot carry the load, the one that carries most of it is nearest to the goal.
    missing = -_rounded(plan.goodput) if carries else 0.0
    if goal is PlanGoal.LOWEST_TTFT:
        ttft_s = plan.ttft_s if has_rate and not carries else plan.single_ttft_s
        return (carries, missing, _rounded(ttft_s), plan.usd_per_hour, *sizes)
    if goal is PlanGoal.CHEAPEST:
        useless = float(plan.goodput <= 0.0)
        return (carries, useless, missing, _rounded(plan.usd_per_hour), -plan.goodput, *sizes)
    if goal is PlanGoal.HIGHEST_THROUGHPUT:
        return (-_rounded(plan.output_tokens_per_second), plan.usd_per_hour, *sizes)
    per_usd = served / plan.usd_per_hour if plan.usd_per_hour > 0.0 else served
    # Without any goodput: the fastest is nearest to it.
    ttft_s = plan.ttft_s if has_rate and math.isfinite(plan.ttft_s) else plan.single_ttft_s
    return (carries, -_rounded(per_usd), _rounded(ttft_s), plan.usd_per_hour, *sizes)


def _rounded(value: float) -> float:
    """Round to steps in which plans are alike."""
    if not math.isfinite(value) or value <= 0.0:
        return value
    return math.exp(round(math.log(value) / _ALIKE) * _ALIKE)


def _refereed(
    plans: list[PlanEstimate], goal: PlanGoal, referee: Referee, count: int, *, has_rate: bool
) -> list[PlanEstimate]:
    """Return the plans with the best ones in the referee's order."""
    looked_at = []
    for plan in plans[:count]:
        goodput = referee(plan)
        per_hour = goodput / plan.goodput if plan.goodput > 0.0 else 0.0
        looked_at.append(
            replace(
                plan,
                goodput=goodput,
                usd_per_million_output_tokens=(
                    plan.usd_per_million_output_tokens / per_hour if per_hour > 0.0 else math.inf
                ),
                carries_load=goodput > 0.0 and (not has_rate or goodput >= plan.request_rate),
            )
        )
    looked_at.sort(key=lambda plan: _rank(plan, goal, has_rate=has_rate))
    return looked_at + plans[count:]
