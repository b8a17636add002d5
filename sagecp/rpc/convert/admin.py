"""Metrics, and the state of the control plane."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.types import ControlPlaneStatus, DurationQuantiles, PerformanceMetrics
from sagecp.v1 import admin_service_pb2, metrics_pb2, scheduling_pb2
from sagecp.wire.times import duration, timestamp


def metrics_to_proto(metrics: PerformanceMetrics) -> metrics_pb2.PerformanceMetrics:
    """Return metrics as a message."""
    return metrics_pb2.PerformanceMetrics(
        total_request_count=metrics.total_requests,
        completed_request_count=metrics.completed_requests,
        failed_request_count=metrics.failed_requests,
        cancelled_request_count=metrics.cancelled_requests,
        active_request_count=metrics.active_requests,
        queued_request_count=metrics.queued_requests,
        latency=_quantiles_to_proto(metrics.latency),
        ttft=_quantiles_to_proto(metrics.ttft),
        tpot=_quantiles_to_proto(metrics.tpot),
        queue_wait=_quantiles_to_proto(metrics.queue_wait),
        tokens_per_second=metrics.tokens_per_second,
        requests_per_second=metrics.requests_per_second,
        average_gpu_utilization=metrics.average_gpu_utilization,
        total_gpu_memory_gib=metrics.total_gpu_memory_gb,
        used_gpu_memory_gib=metrics.used_gpu_memory_gb,
        slo_violation_count=metrics.slo_violations,
        slo_compliance_rate=metrics.slo_compliance_rate,
    )


def _quantiles_to_proto(quantiles: DurationQuantiles) -> metrics_pb2.DurationQuantiles:
    return metrics_pb2.DurationQuantiles(
        sample_count=quantiles.sample_count,
        mean_s=quantiles.mean_s,
        p50_s=quantiles.p50_s,
        p95_s=quantiles.p95_s,
        p99_s=quantiles.p99_s,
    )


def status_to_proto(
    status: ControlPlaneStatus,
    scheduling: scheduling_pb2.SchedulingConfig,
    policy_in_force: str,
    accuracy: Mapping[str, QuantityAccuracy],
) -> admin_service_pb2.GetStatusResponse:
    """Return the state of the control plane as a message.

    Args:
        status: The state.
        scheduling: The configuration in force.
        policy_in_force: The policy that orders the queue.
        accuracy: How right predictions were, by quantity.
    """
    return admin_service_pb2.GetStatusResponse(
        version=status.version,
        start_time=timestamp(status.start_time_s),
        uptime=duration(status.uptime_s),
        accepting=status.accepting,
        scheduling=scheduling,
        policy_in_force=policy_in_force,
        instance_count_by_state=dict(status.instance_count_by_state),
        queued_count_by_model=dict(status.queued_count_by_model),
        queued_count_by_priority=dict(status.queued_count_by_priority),
        active_request_count=status.active_requests,
        queue_capacity=status.queue_capacity,
        event_loop_lag=duration(status.event_loop_lag_s),
        models=status.models,
        policy_reason=status.policy_reason,
        recent_faults=[
            admin_service_pb2.RecentFault(
                fault_time=timestamp(fault.time_s),
                message=fault.message,
                instance_id=fault.instance_id,
                request_id=fault.request_id,
            )
            for fault in status.recent_faults
        ],
        prediction_accuracy=[
            admin_service_pb2.PredictionAccuracy(
                quantity=quantity,
                sample_count=each.count,
                bias=each.bias_ratio,
                median_error=each.median_error_ratio,
                p90_error=each.p90_error_ratio,
                coverage=each.upper_coverage,
            )
            for quantity, each in accuracy.items()
        ],
    )
