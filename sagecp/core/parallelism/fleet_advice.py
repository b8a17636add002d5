"""How a fleet is spread over its GPUs, beside what the planner would do with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sagecp.core.gpu_specifications import find_gpu
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.parallelism.estimates import PlanEstimate, PlanningResult
from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT, GpuPool
from sagecp.core.parallelism.length_spread import spread_lengths
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_query import PlanQuery
from sagecp.core.parallelism.workload import PlanObjectives, Workload
from sagecp.core.types import InstanceState

ADVISED_GAIN = 1.2
"""A plan this many times as good for the money is worth a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetGroup:
    """The instances of a model on one kind of GPU.

    Attributes:
        model: Served model name.
        gpu_name: As NVML gives it; ``""``: unknown.
        instance_count: Instances.
        gpu_count: Their GPUs.
        config: Sizes of most of them.
        host_count: Hosts that they are on; 0: unknown.
        usd_per_gpu_hour: Price of one GPU; ``None``: unknown.
    """

    model: str
    gpu_name: str
    instance_count: int
    gpu_count: int
    config: ParallelismConfig
    host_count: int = 0
    usd_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAdvice:
    """What the planner says of a group.

    Attributes:
        group: The group.
        recommended: What it would do with the same GPUs; ``None``: too little is known.
        query: What was asked for it; ``None``: nothing was.
        gain_ratio: Good requests for the money: recommended by present; 0: unknown.
        change_advised: Whether the present plan is far from it.
        message: In words.
    """

    group: FleetGroup
    recommended: PlanEstimate | None = None
    query: PlanQuery | None = None
    gain_ratio: float = 0.0
    change_advised: bool = False
    message: str = ""


def groups_of(instances: Iterable[InstanceRecord]) -> tuple[FleetGroup, ...]:
    """Return the groups of a fleet, by model and GPU; instances that are lost do not count."""
    members: dict[tuple[str, str], list[InstanceRecord]] = {}
    for instance in instances:
        if instance.state is not InstanceState.LOST and instance.spec.gpu_name:
            members.setdefault((instance.spec.model_name, instance.spec.gpu_name), []).append(instance)
    return tuple(_group(*key, found) for key, found in sorted(members.items()))


def _group(model: str, gpu_name: str, members: list[InstanceRecord]) -> FleetGroup:
    configs = Counter(each.plan for each in members)
    config = min(configs, key=lambda each: (-configs[each], each.sizes))
    gpu_count = sum(max(each.spec.gpu_count, each.plan.gpus_per_replica) for each in members)
    hosts = {each.spec.host_id for each in members}
    usd_per_hour = sum(each.usd_per_hour for each in members)
    return FleetGroup(
        model=model,
        gpu_name=gpu_name,
        instance_count=len(members),
        gpu_count=gpu_count,
        config=config,
        host_count=0 if "" in hosts else len(hosts),
        usd_per_gpu_hour=usd_per_hour / gpu_count if usd_per_hour else None,
    )


def question_for(
    group: FleetGroup,
    knowledge: ModelKnowledge,
    mean_prompt_tokens: float,
    mean_output_tokens: float,
    parameters: Mapping[str, float],
) -> PlanQuery | FleetAdvice:
    """Return what to ask the planner about a group, or why nothing can be asked.

    Args:
        group: The group.
        knowledge: Finds models.
        mean_prompt_tokens: Of the traffic of late; 0: there was none.
        mean_output_tokens: Likewise.
        parameters: The scheduler's, for the objectives of requests that state none.
    """
    model, gpu = knowledge.find(group.model), find_gpu(group.gpu_name)
    why = ""
    if model is None:
        why = (
            f"nothing is known of the model {group.model!r}; name its config.json in [planner.models] "
            "of the configuration"
        )
    elif gpu is None:
        why = f"the GPU {group.gpu_name!r} is not known"
    elif mean_prompt_tokens < 1.0 or mean_output_tokens < 1.0:
        why = "there was no traffic of late to plan for"
    if model is None or gpu is None or why:
        return FleetAdvice(group=group, message=f"no recommendation: {why}")
    # Hosts are told apart by their ids where agents give them.
    hosts = group.host_count or -(-group.gpu_count // USUAL_GPUS_PER_NODE_COUNT)
    per_host = -(-group.gpu_count // hosts)
    pool = GpuPool(
        gpu=gpu,
        gpus_per_node_count=per_host,
        node_count=max(1, group.gpu_count // per_host),
        usd_per_gpu_hour=group.usd_per_gpu_hour,
    )
    ttft_s = parameters["objectives.ttft_base_s"]
    ttft_s += parameters["objectives.ttft_per_1000_tokens_s"] * mean_prompt_tokens / 1000.0
    return PlanQuery(
        model=model,
        pools=(pool,),
        workload=Workload(samples=spread_lengths(mean_prompt_tokens, mean_output_tokens)),
        objectives=PlanObjectives(ttft_s=ttft_s, tpot_s=parameters["objectives.tpot_s"]),
    )


def advice_from(group: FleetGroup, query: PlanQuery, result: PlanningResult) -> FleetAdvice:
    """Compare a group's present plan with the planner's answer."""
    best = result.recommended
    if best is None:
        return FleetAdvice(group=group, query=query, message=f"no recommendation: {result.summary}")
    present = next((plan for plan in result.plans if plan.config.sizes[:4] == group.config.sizes[:4]), None)
    now = f"{group.instance_count} x {group.config}"
    if present is None or present.goodput <= 0.0:
        reasons = [
            plan.reasons[0] for plan in result.rejected if plan.config.sizes[:4] == group.config.sizes[:4]
        ]
        why = reasons[0] if reasons else f"{now} would have no request within the objectives"
        advised = best.goodput > 0.0
        return FleetAdvice(
            group=group,
            query=query,
            recommended=best,
            change_advised=advised,
            message=f"{best.config} is recommended: {why}" if advised else "no plan meets the objectives",
        )
    gain = best.goodput_per_usd / present.goodput_per_usd
    if gain < ADVISED_GAIN:
        message = f"{now} is within {ADVISED_GAIN - 1:.0%} of the best plan, {best.config}"
    else:
        message = (
            f"{best.config} would serve {gain:.2f} times as many requests within the objectives for the same "
            f"money as {now}; see `sagecp plan`"
        )
    return FleetAdvice(
        group=group,
        query=query,
        recommended=best,
        gain_ratio=gain,
        change_advised=gain >= ADVISED_GAIN,
        message=message,
    )
