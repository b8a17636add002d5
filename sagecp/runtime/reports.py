"""What operators are told of the state of the control plane."""

from __future__ import annotations

from collections import Counter

from sagecp.core.scheduler import Scheduler
from sagecp.core.types import ControlPlaneStatus, LoopStatus, RecentFault
from sagecp.runtime.event_log import EventLog
from sagecp.runtime.heartbeat_counts import HeartbeatCounts
from sagecp.runtime.monitor import Monitor
from sagecp.runtime.process_figures import cpu_seconds, resident_memory_bytes
from sagecp.version import __version__

MAX_TENANT_COUNT = 100
"""Most tenants whose waiting requests are told, those with the most."""


def recent_faults(events: EventLog) -> tuple[RecentFault, ...]:
    """Return the latest events that somebody should look at, newest first."""
    return tuple(
        RecentFault(event.time_s, event.message, event.instance_id, event.request_id)
        for event in reversed(events.warnings)
    )


def control_plane_status(
    scheduler: Scheduler,
    monitor: Monitor,
    events: EventLog,
    *,
    start_time_s: float,
    uptime_s: float,
    accepting: bool,
    policy_reason: str,
    loops: tuple[LoopStatus, ...],
    heartbeats: HeartbeatCounts,
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
        recent_faults=recent_faults(events),
        queued_count_by_tenant=_queued_count_by_tenant(scheduler),
        loops=loops,
        heartbeat_count=heartbeats.runs.count,
        refused_heartbeat_count_by_reason=dict(heartbeats.refused_counts),
        cpu_seconds=cpu_seconds(),
        resident_memory_bytes=resident_memory_bytes(),
        last_event_sequence=events.last_sequence,
        lease_duration_s=scheduler.config.lease_duration_s,
    )


def _queued_count_by_tenant(scheduler: Scheduler) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (_, tenant_id, _), count in scheduler.queue.kinds.items():
        if tenant_id:
            counts[tenant_id] += count
    return dict(counts.most_common(MAX_TENANT_COUNT))
