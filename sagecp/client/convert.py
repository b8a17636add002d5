"""From the contract's messages to plain values."""

from __future__ import annotations

import dataclasses
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.message import Message

from sagecp.client.errors import invalid_argument
from sagecp.client.values import Chunk, Drain, Instance, Metrics, Price, Sleep
from sagecp.core.errors import ErrorReason, Failure, FieldViolation
from sagecp.core.placement import CandidateRow, PlacementInputs, RequestRow
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.types import (
    AttemptRecord,
    CandidateScore,
    ControlPlaneStatus,
    ExecutionInstance,
    InstanceState,
    LoopStatus,
    PerformanceMetrics,
    PriceSource,
    RecentFault,
    RequestCost,
    RequestPriority,
    RequestState,
    RequestStatus,
    SchedulingDecision,
    Usage,
)
from sagecp.v1 import (
    admin_service_pb2,
    inference_service_pb2,
    instance_pb2,
    metrics_pb2,
    parallelism_pb2,
    request_pb2,
    scheduling_pb2,
)
from sagecp.wire.engine import (
    adapters_from_proto,
    capabilities_from_proto,
    capabilities_to_proto,
    gauges_from_proto,
    learned_from_proto,
    process_from_proto,
    quantiles_from_proto,
)
from sagecp.wire.gpu import device_from_proto, device_to_proto, fault_from_proto, reading_from_proto
from sagecp.wire.times import seconds_of, time_s

_ENGINE_KINDS = {
    instance_pb2.ENGINE_KIND_UNSPECIFIED: "vllm",
    instance_pb2.ENGINE_KIND_VLLM: "vllm",
    instance_pb2.ENGINE_KIND_SIMULATED: "simulated",
}
_ENGINE_KIND_NUMBERS = {
    "vllm": instance_pb2.ENGINE_KIND_VLLM,
    "simulated": instance_pb2.ENGINE_KIND_SIMULATED,
}


def _given(message: Message, field: str) -> Any:  # noqa: ANN401 - the type is the field's
    """Return an optional field, or ``None`` when it is absent."""
    return getattr(message, field) if message.HasField(field) else None


def _time_or_none(message: Message, field: str) -> float | None:
    return time_s(getattr(message, field)) if message.HasField(field) else None


def usage(message: request_pb2.Usage) -> Usage:
    """Return token counts."""
    return Usage(
        _given(message, "prompt_token_count"),
        message.completion_token_count,
        _given(message, "cached_prompt_token_count"),
    )


def failure(message: request_pb2.Failure) -> Failure:
    """Return why something failed; reasons newer than this client become ``INTERNAL``."""
    try:
        reason = ErrorReason(message.reason)
    except ValueError:
        reason = ErrorReason.INTERNAL
    return Failure(reason, message.message)


def _failure_or_none(message: request_pb2.Request | request_pb2.Attempt) -> Failure | None:
    return failure(message.failure) if message.HasField("failure") else None


def request_state(number: int) -> RequestState:
    """Return a state; unknown numbers, of a newer server, count as RUNNING."""
    try:
        return RequestState(number)
    except ValueError:
        return RequestState.RUNNING


def request_status(message: request_pb2.Request) -> RequestStatus:
    """Return what is known of a request."""
    return RequestStatus(
        request_id=message.request_id,
        state=request_state(message.state),
        model_name=message.model,
        priority=RequestPriority(message.priority or RequestPriority.NORMAL),
        create_time_s=time_s(message.create_time),
        user_id=message.user_id,
        session_id=message.session_id,
        tenant_id=message.tenant_id,
        dispatch_time_s=_time_or_none(message, "dispatch_time"),
        first_token_time_s=_time_or_none(message, "first_token_time"),
        end_time_s=_time_or_none(message, "end_time"),
        deadline_time_s=_time_or_none(message, "deadline_time"),
        instance_id=message.instance_id,
        attempts=tuple(
            AttemptRecord(
                epoch=each.epoch,
                instance_id=each.instance_id,
                dispatch_time_s=time_s(each.dispatch_time),
                end_time_s=_time_or_none(each, "end_time"),
                failure=_failure_or_none(each),
            )
            for each in message.attempts
        ),
        usage=usage(message.usage),
        finish_reason=message.finish_reason,
        failure=_failure_or_none(message),
        queue_position=_given(message, "queue_position"),
        labels=dict(message.labels),
        cost=_cost(message.cost) if message.HasField("cost") else None,
    )


def _cost(message: request_pb2.RequestCost) -> RequestCost:
    return RequestCost(
        predicted_p10_usd=message.predicted_p10_usd,
        predicted_p50_usd=message.predicted_p50_usd,
        predicted_p90_usd=message.predicted_p90_usd,
        actual_usd=_given(message, "actual_usd"),
    )


def chunk(message: inference_service_pb2.TokenChunk) -> Chunk:
    """Return a piece of output."""
    return Chunk(
        message.text,
        message.first_token_index,
        message.token_count,
        tuple(message.token_ids),
        message.choice_index,
        message.finish_reason,
        message.stop_reason,
        message.epoch,
        tuple(message.openai_events),
    )


def decision(message: scheduling_pb2.SchedulingDecision) -> SchedulingDecision:
    """Return the receipt of a dispatch; `core.receipts.run_again` takes it."""
    return SchedulingDecision(
        request_id=message.request_id,
        epoch=message.epoch,
        instance_id=message.instance_id,
        decision_time_s=time_s(message.decision_time),
        queue_wait_s=seconds_of(message.queue_wait),
        scheduling_policy=message.scheduling_policy,
        routing_strategy=message.routing_strategy,
        load_balancer=message.load_balancer,
        config_version=message.config_version,
        reason=message.reason,
        candidates=tuple(
            CandidateScore(each.instance_id, each.score, dict(each.terms), each.excluded_reason)
            for each in message.candidates
        ),
        candidate_count=message.candidate_count,
        policy_in_force=message.policy_in_force,
        inputs=_placement_inputs(message.inputs) if message.HasField("inputs") else None,
    )


def _placement_inputs(message: scheduling_pb2.PlacementInputs) -> PlacementInputs:
    # The rows' fields and the messages' have the same names.
    request = {name: getattr(message.request, name) for name in RequestRow._fields}
    return PlacementInputs(
        RequestRow(**request),
        tuple(_candidate_row(each) for each in message.candidates),
        dict(message.parameters),
    )


def _candidate_row(message: scheduling_pb2.PlacementCandidateInputs) -> CandidateRow:
    values: dict[str, Any] = {name: getattr(message, name) for name in CandidateRow._fields}
    values["is_open"] = int(message.is_open)
    constants = {
        each.name: getattr(message.step_time, each.name) for each in dataclasses.fields(StepTimeParameters)
    }
    values["step_time"] = StepTimeParameters(**constants)
    return CandidateRow(**values)


def instance(message: instance_pb2.Instance) -> Instance:
    """Return an instance."""
    return Instance(
        spec=_execution_instance(message.spec),
        state=InstanceState(message.state or InstanceState.STARTING),
        state_reason=message.state_reason,
        incarnation=message.incarnation,
        in_flight_request_count=message.in_flight_request_count,
        max_concurrent_request_count=message.max_concurrent_request_count,
        engine=gauges_from_proto(message.engine) if message.HasField("engine") else None,
        gpus=tuple(reading_from_proto(each) for each in message.gpus),
        gpu_absent_reason=message.gpu_absent_reason,
        register_time_s=time_s(message.register_time),
        heartbeat_time_s=_time_or_none(message, "heartbeat_time"),
        lease_expire_time_s=_time_or_none(message, "lease_expire_time"),
        mean_ttft_s=seconds_of(message.mean_ttft) if message.HasField("mean_ttft") else None,
        completed_request_count=message.completed_request_count,
        failed_attempt_count=message.failed_attempt_count,
        drain=_drain(message.drain) if message.HasField("drain") else None,
        gpu_faults=tuple(fault_from_proto(each) for each in message.gpu_faults),
        learned=learned_from_proto(message.learned) if message.HasField("learned") else None,
        sleep=_sleep(message.sleep) if message.HasField("sleep") else None,
        desired_lora_adapters=adapters_from_proto(message.desired_lora_adapters)
        if message.HasField("desired_lora_adapters")
        else None,
        engine_process=process_from_proto(message.engine_process)
        if message.HasField("engine_process")
        else None,
        clock_offset_s=seconds_of(message.clock_offset) if message.HasField("clock_offset") else None,
        refused_heartbeat_count=message.refused_heartbeat_count,
        heartbeat_refusal=message.heartbeat_refusal,
        agent_version=message.agent_version,
        price=_price(message.price) if message.HasField("price") else None,
    )


def _price(message: instance_pb2.InstancePrice) -> Price:
    try:
        source = PriceSource(message.source)
    except ValueError:
        source = PriceSource.UNKNOWN
    return Price(
        usd_per_gpu_hour=message.usd_per_gpu_hour,
        source=source,
        busy_usd=message.busy_usd,
        idle_usd=message.idle_usd,
    )


def _sleep(message: instance_pb2.Sleep) -> Sleep:
    return Sleep(begin_time_s=time_s(message.begin_time), level=message.level, asleep=message.asleep)


def _drain(message: instance_pb2.Drain) -> Drain:
    return Drain(
        begin_time_s=time_s(message.begin_time),
        grace_end_time_s=_time_or_none(message, "grace_end_time"),
        moved_request_count=message.moved_request_count,
        forced=message.forced,
        cause=message.cause,
    )


def _execution_instance(spec: instance_pb2.InstanceSpec) -> ExecutionInstance:
    url = urlsplit(spec.engine_url)
    sizes = spec.parallel_sizes
    return ExecutionInstance(
        instance_id=spec.instance_id,
        host=url.hostname or "",
        port=url.port or (443 if url.scheme == "https" else 80),
        scheme=url.scheme or "http",
        model_name=spec.model_name,
        model_aliases=tuple(spec.model_aliases),
        tensor_parallel_size=sizes.tensor_parallel_size or 1,
        pipeline_parallel_size=sizes.pipeline_parallel_size or 1,
        data_parallel_size=sizes.data_parallel_size or 1,
        expert_parallel_size=sizes.expert_parallel_size or 1,
        gpu_count=spec.gpu_count,
        gpu_memory_gb=_given(spec, "gpu_memory_gib"),
        gpu_name=spec.gpu_name,
        max_context_token_count=_given(spec, "max_context_token_count"),
        key_value_token_capacity=_given(spec, "key_value_token_capacity"),
        max_concurrent_request_count=_given(spec, "max_concurrent_request_count"),
        engine_kind=_ENGINE_KINDS.get(spec.engine_kind, "vllm"),
        engine_version=spec.engine_version,
        usd_per_gpu_hour=_given(spec, "usd_per_gpu_hour"),
        host_id=spec.host_id,
        labels=dict(spec.labels),
        gpu_devices=tuple(device_from_proto(each) for each in spec.gpu_devices),
        engine_configuration=dict(spec.engine_configuration),
        engine_capabilities=capabilities_from_proto(list(spec.engine_capabilities)),
    )


def instance_spec(value: ExecutionInstance) -> instance_pb2.InstanceSpec:
    """Return an instance as the contract describes it.

    Raises:
        InvalidArgumentError: A number does not fit its field.
    """
    optional = {
        "gpu_memory_gib": value.gpu_memory_gb,
        "max_context_token_count": value.max_context_token_count,
        "key_value_token_capacity": value.key_value_token_capacity,
        "max_concurrent_request_count": value.max_concurrent_request_count,
        "usd_per_gpu_hour": value.usd_per_gpu_hour,
        "gpu_count": value.gpu_count,
    }
    spec = instance_pb2.InstanceSpec(
        instance_id=value.instance_id,
        engine_url=value.engine_url,
        model_name=value.model_name,
        model_aliases=value.model_aliases,
        gpu_name=value.gpu_name,
        engine_kind=_ENGINE_KIND_NUMBERS.get(value.engine_kind, instance_pb2.ENGINE_KIND_VLLM),
        engine_version=value.engine_version,
        host_id=value.host_id,
        labels=dict(value.labels),
        gpu_devices=[device_to_proto(each) for each in value.gpu_devices],
        engine_configuration=dict(value.engine_configuration),
        engine_capabilities=capabilities_to_proto(value.engine_capabilities),
    )
    violations = []
    for name, number in optional.items():
        if number is not None:
            try:
                setattr(spec, name, number)
            except (ValueError, TypeError):
                violations.append(FieldViolation(f"spec.{name}", f"is {number!r}, which does not fit"))
    sizes = parallelism_pb2.ParallelSizes()
    for kind in ("tensor", "pipeline", "data", "expert"):
        name = f"{kind}_parallel_size"
        try:
            setattr(sizes, name, getattr(value, name))
        except (ValueError, TypeError):
            violations.append(
                FieldViolation(
                    f"spec.parallel_sizes.{name}", f"is {getattr(value, name)!r}, which does not fit"
                )
            )
    if violations:
        raise invalid_argument(violations)
    spec.parallel_sizes.CopyFrom(sizes)
    return spec


def performance(message: metrics_pb2.PerformanceMetrics) -> PerformanceMetrics:
    """Return metrics."""
    latency = quantiles_from_proto(message.latency)
    return PerformanceMetrics(
        total_requests=message.total_request_count,
        completed_requests=message.completed_request_count,
        failed_requests=message.failed_request_count,
        cancelled_requests=message.cancelled_request_count,
        active_requests=message.active_request_count,
        queued_requests=message.queued_request_count,
        avg_latency_ms=latency.mean_s * 1000,
        p50_latency_ms=latency.p50_s * 1000,
        p95_latency_ms=latency.p95_s * 1000,
        p99_latency_ms=latency.p99_s * 1000,
        latency=latency,
        ttft=quantiles_from_proto(message.ttft),
        tpot=quantiles_from_proto(message.tpot),
        queue_wait=quantiles_from_proto(message.queue_wait),
        tokens_per_second=message.tokens_per_second,
        requests_per_second=message.requests_per_second,
        average_gpu_utilization=_given(message, "average_gpu_utilization"),
        total_gpu_memory_gb=_given(message, "total_gpu_memory_gib"),
        used_gpu_memory_gb=_given(message, "used_gpu_memory_gib"),
        slo_violations=message.slo_violation_count,
        slo_compliance_rate=_given(message, "slo_compliance_rate"),
        cost_usd=_given(message, "cost_usd"),
        usd_per_million_output_tokens=_given(message, "usd_per_million_output_tokens"),
    )


def metrics(message: metrics_pb2.MetricsSnapshot) -> Metrics:
    """Return metrics at a time."""
    return Metrics(
        time_s=time_s(message.snapshot_time),
        window_s=seconds_of(message.window),
        overall=performance(message.overall),
        groups={group.value: performance(group.metrics) for group in message.groups},
    )


def control_plane_status(message: admin_service_pb2.GetStatusResponse) -> ControlPlaneStatus:
    """Return the state of the control plane."""
    return ControlPlaneStatus(
        version=message.version,
        start_time_s=time_s(message.start_time),
        uptime_s=seconds_of(message.uptime),
        accepting=message.accepting,
        scheduling_policy=message.scheduling.scheduling_policy,
        routing_strategy=message.scheduling.routing_strategy,
        load_balancer=message.scheduling.load_balancer,
        config_version=message.scheduling.version,
        policy_reason=message.policy_reason,
        instance_count_by_state=dict(message.instance_count_by_state),
        queued_count_by_model=dict(message.queued_count_by_model),
        queued_count_by_priority=dict(message.queued_count_by_priority),
        active_requests=message.active_request_count,
        queued_requests=sum(message.queued_count_by_model.values()),
        queue_capacity=message.queue_capacity,
        event_loop_lag_s=seconds_of(message.event_loop_lag),
        models=tuple(message.models),
        recent_faults=tuple(
            RecentFault(time_s(each.fault_time), each.message, each.instance_id, each.request_id)
            for each in message.recent_faults
        ),
        queued_count_by_tenant=dict(message.queued_count_by_tenant),
        loops=tuple(
            LoopStatus(
                each.name, seconds_of(each.interval), _time_or_none(each, "last_run_time"), each.run_count
            )
            for each in message.loops
        ),
        heartbeat_count=message.heartbeat_count,
        refused_heartbeat_count_by_reason=dict(message.refused_heartbeat_count_by_reason),
        cpu_seconds=message.cpu_seconds,
        resident_memory_bytes=message.resident_memory_bytes,
        last_event_sequence=message.last_event_sequence,
        lease_duration_s=seconds_of(message.lease_duration),
    )
