"""The state of the control plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sagecp.core.parallelism.fleet_advice import FleetAdvice
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.prediction.step_time_report import StepTimeReport
from sagecp.core.types import ControlPlaneStatus, LoopStatus
from sagecp.rpc.convert.plan_response import plan_to_proto, sizes_to_proto
from sagecp.v1 import admin_service_pb2, scheduling_pb2
from sagecp.wire.times import duration, timestamp


def status_to_proto(
    status: ControlPlaneStatus,
    scheduling: scheduling_pb2.SchedulingConfig,
    policy_in_force: str,
    accuracy: Mapping[str, QuantityAccuracy],
    step_times: Iterable[StepTimeReport] = (),
    advice: Iterable[FleetAdvice] = (),
) -> admin_service_pb2.GetStatusResponse:
    """Return the state of the control plane as a message.

    Args:
        status: The state.
        scheduling: The configuration in force.
        policy_in_force: The policy that orders the queue.
        accuracy: How right predictions were, by quantity.
        step_times: How kinds of instances keep to their planned step times.
        advice: What the planner thinks of the fleet's plans.
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
        queued_count_by_tenant=dict(status.queued_count_by_tenant),
        loops=[_loop_to_proto(loop) for loop in status.loops],
        heartbeat_count=status.heartbeat_count,
        refused_heartbeat_count_by_reason=dict(status.refused_heartbeat_count_by_reason),
        cpu_seconds=status.cpu_seconds,
        resident_memory_bytes=status.resident_memory_bytes,
        last_event_sequence=status.last_event_sequence,
        lease_duration=duration(status.lease_duration_s),
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
        step_time_accuracy=map(_step_times_to_proto, step_times),
        fleet_plans=map(_advice_to_proto, advice),
    )


def _step_times_to_proto(report: StepTimeReport) -> admin_service_pb2.StepTimeAccuracy:
    return admin_service_pb2.StepTimeAccuracy(
        kind=report.kind,
        model=report.model,
        gpu_name=report.gpu_name,
        sizes=sizes_to_proto(report.config),
        source=report.source,
        observation_count=report.observation_count,
        observed_ratio=report.ratio,
        decode_ratio=report.decode_ratio or 0.0,
        prefill_ratio=report.prefill_ratio or 0.0,
        drifting=report.drifting,
    )


def _advice_to_proto(advice: FleetAdvice) -> admin_service_pb2.FleetPlan:
    group = advice.group
    message = admin_service_pb2.FleetPlan(
        model=group.model,
        gpu_name=group.gpu_name,
        instance_count=group.instance_count,
        gpu_count=group.gpu_count,
        sizes=sizes_to_proto(group.config),
        gain_ratio=advice.gain_ratio,
        change_advised=advice.change_advised,
        message=advice.message,
    )
    if advice.recommended is not None and advice.query is not None:
        message.recommended.CopyFrom(plan_to_proto(advice.query, advice.recommended))
    return message


def _loop_to_proto(loop: LoopStatus) -> admin_service_pb2.LoopStatus:
    message = admin_service_pb2.LoopStatus(
        name=loop.name, interval=duration(loop.interval_s), run_count=loop.run_count
    )
    if loop.last_run_time_s is not None:
        message.last_run_time.CopyFrom(timestamp(loop.last_run_time_s))
    return message
