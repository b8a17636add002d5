"""What the page shows, as values that JSON can say. Times are Unix seconds, durations seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sagecp.core.fleet_event import FleetEvent
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import CandidateRow
from sagecp.core.prediction.learned import learned_performance
from sagecp.core.types import (
    ControlPlaneStatus,
    DurationQuantiles,
    PerformanceMetrics,
    RequestStatus,
    SchedulingDecision,
)

WallTime = Callable[[float], float]
"""Turns a time on the core's clock into Unix seconds."""


def instance_row(record: InstanceRecord, wall_time: WallTime, now: float) -> dict[str, Any]:
    """Return one instance. Says only what changes when the instance does: no ages."""
    spec, gauges = record.spec, record.gauges
    learned = learned_performance(record.load, now)
    return {
        "id": record.instance_id,
        "state": record.state.name,
        "reason": record.state_reason,
        "model": spec.model_name,
        "host": spec.host_id or spec.host,
        "gpu": spec.gpu_name,
        "gpu_count": spec.gpu_count,
        "url": spec.engine_url,
        "version": spec.engine_version,
        "in_flight": record.in_flight_count,
        "limit": record.concurrency_limit,
        "running": gauges and gauges.running_request_count,
        "waiting": gauges and gauges.waiting_request_count,
        "kv_usage": None if gauges is None else _rounded(gauges.key_value_cache_usage, 3),
        "sleeping": bool(gauges and gauges.sleeping),
        "ttft_s": _rounded(record.ttft_estimate_s, 4),
        "tpot_s": _rounded(record.tpot_estimate_s, 5),
        # So coarse that it does not change all the time.
        "slowdown": None if learned is None else _rounded(learned.slowdown, 1),
        "gpus": [
            {
                "index": gpu.index,
                "utilization": _rounded(gpu.utilization, 2),
                "used_memory_bytes": gpu.used_memory_bytes,
                "total_memory_bytes": gpu.total_memory_bytes,
                "temperature_celsius": gpu.temperature_celsius,
                "power_watts": _rounded(gpu.power_watts, 0),
                "throttle_reasons": [each for each in gpu.throttle_reasons if each != "GpuIdle"],
            }
            for gpu in record.gpus
        ],
        "gpu_absent_reason": record.gpu_absent_reason,
        "faults": [fault.message for fault in record.gpu_faults],
        "draining": record.drain is not None,
        "completed": record.completed_request_count,
        "failed": record.failed_attempt_count,
        "heartbeat_time": _rounded(None if record.heartbeat_s is None else wall_time(record.heartbeat_s), 0),
    }


def status_values(status: ControlPlaneStatus) -> dict[str, Any]:
    """Return the state of the control plane."""
    return {
        "version": status.version,
        "start_time": status.start_time_s,
        "accepting": status.accepting,
        "policy": status.scheduling_policy,
        "policy_reason": status.policy_reason,
        "routing": status.routing_strategy,
        "balancer": status.load_balancer,
        "config_version": status.config_version,
        "queued": status.queued_requests,
        "queue_capacity": status.queue_capacity,
        "active": status.active_requests,
        "queued_by_model": dict(status.queued_count_by_model),
        "queued_by_priority": dict(status.queued_count_by_priority),
        "queued_by_tenant": dict(status.queued_count_by_tenant),
        "loop_lag_s": _rounded(status.event_loop_lag_s, 4),
    }


def metrics_values(metrics: PerformanceMetrics) -> dict[str, Any]:
    """Return how the fleet did over a window."""
    return {
        "requests_per_second": _rounded(metrics.requests_per_second, 2),
        "tokens_per_second": _rounded(metrics.tokens_per_second, 1),
        "completed": metrics.completed_requests,
        "failed": metrics.failed_requests,
        "cancelled": metrics.cancelled_requests,
        "slo_compliance": _rounded(metrics.slo_compliance_rate, 4),
        "slo_violations": metrics.slo_violations,
        "ttft": _quantiles(metrics.ttft),
        "tpot": _quantiles(metrics.tpot),
        "latency": _quantiles(metrics.latency),
        "queue_wait": _quantiles(metrics.queue_wait),
        "gpu_utilization": _rounded(metrics.average_gpu_utilization, 3),
    }


def decision_values(decision: SchedulingDecision, wall_time: WallTime) -> dict[str, Any]:
    """Return the receipt of a dispatch."""
    inputs = {} if decision.inputs is None else {row.instance_id: row for row in decision.inputs.candidates}
    return {
        "request_id": decision.request_id,
        "epoch": decision.epoch,
        "instance_id": decision.instance_id,
        "time": wall_time(decision.decision_time_s),
        "queue_wait_s": decision.queue_wait_s,
        "policy": decision.policy_in_force or decision.scheduling_policy,
        "routing": decision.routing_strategy,
        "balancer": decision.load_balancer,
        "config_version": decision.config_version,
        "reason": decision.reason,
        "candidate_count": decision.candidate_count,
        "candidates": [
            {
                "instance_id": each.instance_id,
                "score": _rounded(each.score, 6),
                "terms": {name: _rounded(value, 6) for name, value in each.terms.items()},
                "excluded_reason": each.excluded_reason,
                **(_candidate_inputs(inputs[each.instance_id]) if each.instance_id in inputs else {}),
            }
            for each in decision.candidates
        ],
    }


def _candidate_inputs(row: CandidateRow) -> dict[str, Any]:
    return {
        "in_flight": row.in_flight_count,
        "backlog_s": _rounded(row.backlog_s, 4),
        "cached_tokens": row.cached_token_count,
    }


def request_values(status: RequestStatus) -> dict[str, Any]:
    """Return what is known of a request, without anything of its prompt or output."""
    return {
        "request_id": status.request_id,
        "state": status.state.name,
        "model": status.model_name,
        "priority": status.priority.name,
        "tenant_id": status.tenant_id,
        "user_id": status.user_id,
        "instance_id": status.instance_id,
        "create_time": status.create_time_s,
        "first_token_time": status.first_token_time_s,
        "end_time": status.end_time_s,
        "output_tokens": status.usage.completion_token_count,
        "prompt_tokens": status.usage.prompt_token_count,
        "cost_usd": None if status.cost is None else status.cost.actual_usd,
        "predicted_cost_usd": None if status.cost is None else status.cost.predicted_p50_usd or None,
        "failure": status.failure.message if status.failure is not None else "",
        "attempts": len(status.attempts),
    }


def event_values(event: FleetEvent) -> dict[str, Any]:
    """Return an event."""
    return {
        "sequence": event.sequence,
        "time": event.time_s,
        "severity": event.severity.name,
        "kind": event.kind.name,
        "message": event.message,
        "instance_id": event.instance_id,
        "request_id": event.request_id,
    }


def _quantiles(value: DurationQuantiles) -> dict[str, Any] | None:
    if not value.sample_count:
        return None
    return {
        "p50_s": _rounded(value.p50_s, 4),
        "p95_s": _rounded(value.p95_s, 4),
        "p99_s": _rounded(value.p99_s, 4),
        "mean_s": _rounded(value.mean_s, 4),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    """Return a figure as a page needs it: short, and nothing that JSON does not have."""
    return None if value is None or not math.isfinite(value) else round(value, digits)
