"""The planner's answer in words: why this plan, what would make one possible, what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sagecp.core.gpu_specifications import GPU_SPECIFICATIONS
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate, RejectedPlan
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import weight_bytes
from sagecp.core.parallelism.plan_space import plan_space
from sagecp.core.parallelism.validity import violations
from sagecp.core.parallelism.workload import PlanGoal, PlanObjectives, Workload

# GPUs of a kind that are tried to see what would suffice.
_LARGEST_GPU_COUNT = 1024
_LEAST_CONTEXT = 1024
# With a cache for fewer of them, the goodput of a plan was up to 2.2 times too high (`bench.plan_regret`).
_FEW_REQUESTS = 16


def explain_choice(
    plans: Sequence[PlanEstimate], goal: PlanGoal, objectives: PlanObjectives, workload: Workload
) -> tuple[str, str]:
    """Return why the first plan is the best, with the alternatives' trade, and that in short.

    Args:
        plans: Those that can be, best first; at least one.
        goal: What they were sorted for.
        objectives: What a good request is.
        workload: The traffic.
    """
    best = plans[0]
    sentences = [f"{best.config} on {best.gpu_name}: {_figures(best, objectives, workload)}."]
    if not best.carries_load:
        sentences.append(_shortfall(plans, objectives, workload))
    quicker = min(plans, key=lambda plan: plan.single_ttft_s)
    if quicker.single_ttft_s < 0.8 * best.single_ttft_s:
        sentences.append(
            f"{quicker.config} on {quicker.gpu_name} would have the first token of a request that is alone "
            f"{_less(quicker.single_ttft_s, best.single_ttft_s)} sooner, "
            f"{_price_compared(quicker, best)}."
        )
    rival = _best_rival(plans)
    if goal is PlanGoal.GOODPUT_PER_USD and rival is not None and rival is not quicker:
        sentences.append(f"Next is {rival.config} on {rival.gpu_name}, {_price_compared(rival, best)}.")
    return " ".join(sentences), f"{_GOAL_WORDS[goal]}: {_figures(best, objectives, workload)}"


_GOAL_WORDS = {
    PlanGoal.GOODPUT_PER_USD: "most good requests for the money",
    PlanGoal.LOWEST_TTFT: "soonest first token",
    PlanGoal.CHEAPEST: "fewest dollars per hour",
    PlanGoal.HIGHEST_THROUGHPUT: "most tokens per second",
}


def explain_impossible(
    model: ModelDescription,
    pools: Sequence[GpuPool],
    workload: Workload,
    options: EngineOptions,
    rejected: Sequence[RejectedPlan],
) -> str:
    """Return what would make a plan possible, found by trying.

    Each by itself: the fewest GPUs of the same kind, the cheapest kind with more memory, a
    shorter context, smaller weights.
    """
    if not rejected:
        return "There are no GPUs to plan for; name at least one."
    name = model.name or "The model"
    weights = f"{weight_bytes(model) / 2**30:,.0f} GiB of weights"
    where = " or ".join(str(pool) for pool in pools)
    ways = [way for pool in pools for way in _ways(model, pool, workload, options)]
    most_common = _commonest_reason(rejected)
    text = f"No plan of {len(rejected)} looked at can serve {name} ({weights}) on {where}."
    if ways:
        return f"{text} It would be possible with {'; or with '.join(dict.fromkeys(ways))}."
    return f"{text} The commonest reason: {most_common}"


def warnings_of(
    model: ModelDescription,
    pools: Sequence[GpuPool],
    plans: Sequence[PlanEstimate],
    workload: Workload,
    options: EngineOptions,
) -> tuple[str, ...]:
    """Return what to know before trusting the plans."""
    found: list[str] = []
    best = plans[0]
    context = best.memory.max_context_token_count
    wanted = options.max_context_token_count or model.max_context_token_count
    if context < wanted:
        found.append(
            f"the longest context is cut to {context:,} tokens, because {wanted:,} do not fit beside the "
            "weights; the workload needs no more than "
            f"{workload.max_context_token_count:,}"
        )
    held = workload.mean_prompt_token_count + workload.mean_output_token_count
    if best.memory.key_value_token_capacity < _FEW_REQUESTS * held * best.config.pipeline_parallel_size:
        found.append(
            f"the KV cache holds about {best.memory.key_value_token_capacity / held:.0f} requests of mean "
            "length per copy; with so few, waiting and preemption are worse than predicted"
        )
    if any(pool.usd_per_gpu_hour is None for pool in pools):
        prices = ", ".join(
            f"{pool.gpu.name} ${pool.price_usd:g}" for pool in pools if pool.usd_per_gpu_hour is None
        )
        found.append(f"usual prices per GPU and hour are taken ({prices}); give your own to compare plans")
    if len(pools) > 1:
        found.append(
            "each plan is of one kind of GPU; traffic that is spread over several kinds is not planned for"
        )
    if model.is_mixture:
        found.append(
            "tokens are taken to choose their experts alike; skewed choices make steps with whole experts "
            "per GPU longer"
        )
    if workload.mean_cached_token_count > 0.0:
        found.append(
            f"{workload.mean_cached_token_count / workload.mean_prompt_token_count:.0%} of the prompt tokens "
            "are taken to be in the prefix cache, whatever its size"
        )
    if best.config.pipeline_parallel_size > 1:
        found.append(
            "pipeline stages are taken to be kept busy by as many batches; with few requests at a time they "
            "are not"
        )
    return tuple(found)


def _figures(plan: PlanEstimate, objectives: PlanObjectives, workload: Workload) -> str:
    within = _objectives_text(objectives)
    if plan.goodput > 0.0:
        text = f"{plan.goodput:.3g} requests/s"
        if within:
            text += f" of which {objectives.attainment:.0%} are within {within}"
    else:
        text = f"{plan.output_tokens_per_second:,.0f} output tokens/s at most, not within {within}"
    text += f", for ${plan.usd_per_hour:,.2f} an hour"
    if math.isfinite(plan.usd_per_million_output_tokens):
        text += f" (${plan.usd_per_million_output_tokens:.3g} per million output tokens)"
    if workload.request_rate is not None and math.isfinite(plan.ttft_s):
        text += (
            f"; at {workload.request_rate:.3g} requests/s TTFT {plan.ttft_s:.3g} s and "
            f"TPOT {plan.tpot_s * 1000:.3g} ms"
        )
    if plan.config.idle_gpu_count:
        text += f"; {plan.config.idle_gpu_count} GPUs stay free"
    return text


def _shortfall(plans: Sequence[PlanEstimate], objectives: PlanObjectives, workload: Workload) -> str:
    best = plans[0]
    if best.goodput <= 0.0:
        reasons = []
        if objectives.ttft_s is not None and best.single_ttft_s > objectives.ttft_s:
            reasons.append(
                f"even alone a mean request has its first token after {best.single_ttft_s:.3g} s, "
                f"{objectives.ttft_s:g} s being the objective"
            )
        if objectives.tpot_s is not None and best.single_tpot_s > objectives.tpot_s:
            reasons.append(
                f"even alone a request has a token every {best.single_tpot_s * 1000:.3g} ms, "
                f"{objectives.tpot_s * 1000:g} ms being the objective"
            )
        why = " and ".join(reasons) or "too many of the requests are longer than the objectives allow"
        good = [plan for plan in plans if plan.goodput > 0.0]
        if good:
            best_good = max(good, key=lambda plan: plan.goodput)
            return (
                f"It does not meet the objectives ({why}); {best_good.config} on {best_good.gpu_name} does."
            )
        return f"No plan meets the objectives: {why}. Use faster or more GPUs per copy, or looser objectives."
    if workload.request_rate is None:
        return ""
    gpu_count = math.ceil(workload.request_rate / best.goodput * best.config.gpu_count)
    return (
        f"That is not the {workload.request_rate:.3g} requests/s wanted: about {gpu_count} GPUs of the kind "
        f"would carry them; bound by {best.limited_by}."
    )


def _objectives_text(objectives: PlanObjectives) -> str:
    parts = []
    if objectives.ttft_s is not None:
        parts.append(f"TTFT {objectives.ttft_s:g} s")
    if objectives.tpot_s is not None:
        parts.append(f"TPOT {objectives.tpot_s * 1000:g} ms")
    return " and ".join(parts)


def _less(smaller: float, larger: float) -> str:
    return f"{1.0 - smaller / larger:.0%}"


def _price_compared(plan: PlanEstimate, best: PlanEstimate) -> str:
    mine, its = plan.usd_per_million_output_tokens, best.usd_per_million_output_tokens
    if not math.isfinite(mine):
        return "with no request within the objectives"
    if not math.isfinite(its):
        return f"at ${mine:.3g} per million output tokens"
    if mine > its:
        return f"at {mine / its:.2f} times the price per token"
    return f"at {1.0 - mine / its:.0%} less per token"


def _best_rival(plans: Sequence[PlanEstimate]) -> PlanEstimate | None:
    """The next plan with other sizes than the first."""
    best = plans[0]
    return next(
        (
            plan
            for plan in plans[1:]
            if plan.config.sizes[:4] != best.config.sizes[:4] or plan.gpu_name != best.gpu_name
        ),
        None,
    )


def _ways(
    model: ModelDescription, pool: GpuPool, workload: Workload, options: EngineOptions
) -> Iterator[str]:
    """What would make a plan possible on GPUs of this kind, each by itself."""
    needed = replace(
        options,
        max_context_token_count=options.max_context_token_count
        or min(model.max_context_token_count, max(_LEAST_CONTEXT, workload.max_context_token_count)),
    )
    more = pool
    while more.gpu_count < _LARGEST_GPU_COUNT:
        more = _more_gpus(more)
        if _is_possible(model, more, needed):
            yield f"{more}"
            break
    larger_gpus = [gpu for gpu in GPU_SPECIFICATIONS if gpu.memory_gib > pool.gpu.memory_gib]
    for gpu in sorted(larger_gpus, key=lambda each: (each.usd_per_hour, each.name)):
        larger = replace(pool, gpu=gpu)
        if _is_possible(model, larger, needed):
            yield f"{larger}"
            break
    context = needed.max_context_token_count or 0
    while context > _LEAST_CONTEXT:
        context = max(_LEAST_CONTEXT, context // 2)
        if _is_possible(model, pool, replace(needed, max_context_token_count=context)):
            yield f"a context of {context:,} tokens on {pool}"
            break
    for smaller in (WeightFormat.FP8, WeightFormat.INT4):
        if smaller.bits_per_weight < model.weight_format.bits_per_weight and _is_possible(
            replace(model, weight_format=smaller), pool, needed
        ):
            yield f"{smaller.value} weights on {pool}"
            break


def _more_gpus(pool: GpuPool) -> GpuPool:
    """Return the next size of a pool: hosts of up to eight GPUs, then more of them."""
    if pool.gpus_per_node_count < 8:
        return replace(pool, gpus_per_node_count=max(1, pool.gpus_per_node_count + 1))
    return replace(pool, node_count=pool.node_count + max(1, pool.node_count // 4))


def _is_possible(model: ModelDescription, pool: GpuPool, options: EngineOptions) -> bool:
    return any(_can_be(model, pool, config, options) for config in plan_space(model, pool))


def _can_be(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> bool:
    return not violations(model, pool, config, options) and estimate_memory(model, pool, config, options).fits


def _commonest_reason(rejected: Sequence[RejectedPlan]) -> str:
    counts: dict[str, int] = {}
    for plan in rejected:
        for reason in plan.reasons:
            counts[reason] = counts.get(reason, 0) + 1
    return max(counts, key=lambda reason: counts[reason])
