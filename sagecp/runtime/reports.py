"""What operators are told of the whole: figures, and the state of the control plane."""

from __future__ import annotations

from sagecp.core.scheduler import Scheduler
from sagecp.core.types import ControlPlaneStatus, PerformanceMetrics
from sagecp.runtime.monitor import MetricsKey, Monitor
from sagecp.version import __version__


def fleet_metrics(
    scheduler: Scheduler, monitor: Monitor, now: float, window_s: float, match: MetricsKey
) -> PerformanceMetrics:
    """Return how the fleet does, or the part of it that passes a filter."""
    everything = match == MetricsKey()
    queued = len(scheduler.queue) if everything else 0
    active = scheduler.active_count if everything else 0
    for record in () if everything else scheduler.requests():
        metadata = record.metadata
        instance_id = "" if record.queued else record.instance_id
        if match.matches(MetricsKey(record.model, instance_id, metadata.tenant_id, metadata.priority)):
            queued += record.queued
            active += not record.queued
    gpus = [
        gpu
        for instance in scheduler.fleet
        if (not match.instance_id or match.instance_id == instance.instance_id)
        and (not match.model or match.model in instance.spec.served_models)
        for gpu in instance.gpus
    ]
    return monitor.metrics(
        now,
        active_count=active,
        queued_count=queued,
        gpus=gpus,
        window_s=window_s,
        match=match,
    )


def control_plane_status(
    scheduler: Scheduler,
    monitor: Monitor,
    *,
    start_time_s: float,
    uptime_s: float,
    accepting: bool,
    policy_reason: str,
) -> ControlPlaneStatus:
    """Return the state of the control plane. Times in Unix seconds."""
    settings = scheduler.settings.current
    return ControlPlaneStatus(
        version=__version__,
        start_time_s=start_time_s,
        uptime_s=uptime_s,
        accepting=accepting,
        scheduling_policy=settings.scheduling_policy,
        routing_strategy=settings.routing_strategy,
        load_balancer=settings.load_balancer,
        config_version=settings.version,
        policy_reason=policy_reason,
        instance_count_by_state={s.name: n for s, n in scheduler.fleet.count_by_state().items() if n},
        queued_count_by_model=scheduler.queue.count_by_model(),
        queued_count_by_priority={p.name: n for p, n in scheduler.queue.count_by_priority().items()},
        active_requests=scheduler.active_count,
        queued_requests=len(scheduler.queue),
        queue_capacity=scheduler.queue.max_request_count,
        event_loop_lag_s=monitor.event_loop_lag_s,
        models=scheduler.fleet.models(),
        recent_faults=monitor.recent_faults(),
    )
