"""What operators are told of how the fleet does: what ended, what has not, and what GPUs report."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.core.scheduler import Scheduler
from sagecp.core.types import RequestPriority
from sagecp.runtime.metrics_table import GpuSums, LiveCount, MetricsTable
from sagecp.runtime.monitor import Monitor
from sagecp.runtime.monitor_keys import EVERYTHING, MetricsDimension, MetricsKey

MAX_GROUP_COUNT = 1000
"""Groups in one answer; of more, the first ones by name."""

_EVERYONE = ""


def fleet_metrics(
    scheduler: Scheduler,
    monitor: Monitor,
    now: float,
    window_s: float,
    match: MetricsKey,
    dimension: MetricsDimension | None = None,
    instance_gpus: Mapping[str, GpuSums] | None = None,
) -> MetricsTable:
    """Return how the fleet does, or the part of it that passes a filter, together or by group.

    Groups are what requests ended, wait or run of, and registered instances and their models.

    Args:
        scheduler: The core.
        monitor: Knows what ended.
        now: The end of the window, on the core's clock.
        window_s: Of rates and quantiles.
        match: The filter.
        dimension: What to group by; ``None``: nothing.
        instance_gpus: What `gpus_by_instance` returned for it, where several tables are made at once.
    """
    live = _live_counts(scheduler, match, dimension)
    if instance_gpus is None:
        instance_gpus = gpus_by_instance(scheduler, match)
    gpus = _gpu_sums(scheduler, instance_gpus, match, dimension)
    values = [_EVERYONE]
    if dimension is not None:
        found = monitor.values(dimension, match).union(live, gpus)
        values = sorted(value for value in found if value)[:MAX_GROUP_COUNT]
    return monitor.table(
        now,
        window_s=window_s,
        match=match,
        dimension=dimension,
        values=values,
        live=[live.get(value) or LiveCount() for value in values],
        gpus=[gpus.get(value) or GpuSums() for value in values],
    )


def _live_counts(
    scheduler: Scheduler, match: MetricsKey, dimension: MetricsDimension | None
) -> dict[str, LiveCount]:
    """Return what has not ended, by group."""
    if dimension is None and match == EVERYTHING:
        return {_EVERYONE: LiveCount(scheduler.active_count, len(scheduler.queue))}
    counts: dict[str, LiveCount] = {}
    # Of instances alone, nobody asks what kinds of requests they have.
    by_kind = dimension is not MetricsDimension.INSTANCE or match._replace(instance_id="") != EVERYTHING
    for instance in scheduler.fleet.holders():
        instance_id = instance.instance_id
        if not instance.in_flight_count or match.instance_id not in ("", instance_id):
            continue
        if not by_kind:
            counts[instance_id] = LiveCount(instance.in_flight_count)
            continue
        for kind, count in instance.in_flight_kinds.items():
            group = _group_of(kind, instance_id, match, dimension)
            if group is not None:
                counts.setdefault(group, LiveCount()).active += count
    if not match.instance_id:
        for kind, count in scheduler.queue.kinds.items():
            group = _group_of(kind, "", match, dimension)
            if group is not None:
                counts.setdefault(group, LiveCount()).queued += count
    return counts


def _group_of(
    kind: tuple[str, str, int], instance_id: str, match: MetricsKey, dimension: MetricsDimension | None
) -> str | None:
    """Return the group of requests of a kind; ``None``: they do not pass the filter."""
    model, tenant_id, priority = kind
    if (
        match.model not in ("", model)
        or match.tenant_id not in ("", tenant_id)
        or (match.priority is not None and match.priority != priority)
    ):
        return None
    if dimension is None:
        return _EVERYONE
    return MetricsKey(model, instance_id, tenant_id, RequestPriority(priority)).value_of(dimension)


def gpus_by_instance(scheduler: Scheduler, match: MetricsKey) -> dict[str, GpuSums]:
    """Return what GPUs report, of instances that pass a filter. GPUs are nobody's: tenants have none."""
    if match.tenant_id or match.priority is not None:
        return {}
    found: dict[str, GpuSums] = {}
    for instance in scheduler.fleet:
        if match.instance_id in ("", instance.instance_id) and (
            not match.model or match.model in instance.spec.served_models
        ):
            sums = found[instance.instance_id] = GpuSums()
            sums.add(instance.gpus)
    return found


def _gpu_sums(
    scheduler: Scheduler,
    instance_gpus: Mapping[str, GpuSums],
    match: MetricsKey,
    dimension: MetricsDimension | None,
) -> Mapping[str, GpuSums]:
    """Return what GPUs report, by group; of tenants and classes, nothing."""
    if dimension is MetricsDimension.INSTANCE:
        return instance_gpus
    sums: dict[str, GpuSums] = {}
    if dimension is None:
        everyone = sums[_EVERYONE] = GpuSums()
        for each in instance_gpus.values():
            everyone.merge(each)
    elif dimension is MetricsDimension.MODEL:
        for instance_id, each in instance_gpus.items():
            models = (match.model,) if match.model else scheduler.fleet.get(instance_id).spec.served_models
            for model in models:
                sums.setdefault(model, GpuSums()).merge(each)
    return sums
