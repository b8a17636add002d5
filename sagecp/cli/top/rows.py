"""From the contract's messages to what the screen shows. Reads only the fields that are shown."""

from __future__ import annotations

from sagecp.cli import render
from sagecp.cli.top.model import EventRow, InstanceRow, MetricsView, StatusView
from sagecp.cli.top.text import plain
from sagecp.v1 import admin_service_pb2, event_pb2, instance_pb2, metrics_pb2
from sagecp.wire.times import seconds_of, time_s

_STATES = {
    number: name.removeprefix("INSTANCE_STATE_") for name, number in instance_pb2.InstanceState.items()
}


def instance_row(message: instance_pb2.Instance, now_s: float) -> InstanceRow:
    """Return the row of an instance.

    Args:
        message: As the server tells it.
        now_s: When it was read, on the console's clock.
    """
    spec = message.spec
    running = waiting = usage = None
    sleeping = False
    if message.HasField("engine"):
        engine = message.engine
        running = engine.running_request_count if engine.HasField("running_request_count") else None
        waiting = engine.waiting_request_count if engine.HasField("waiting_request_count") else None
        usage = engine.key_value_cache_usage if engine.HasField("key_value_cache_usage") else None
        sleeping = engine.sleeping
    utilization_sum, utilization_count = 0.0, 0
    used = total = 0
    hottest = None
    for gpu in message.gpus:
        if gpu.HasField("utilization"):
            utilization_sum += gpu.utilization
            utilization_count += 1
        if gpu.HasField("used_memory_bytes"):
            size = gpu.total_memory_bytes
            if size:
                used += gpu.used_memory_bytes
                total += size
        if gpu.HasField("temperature_celsius"):
            heat = gpu.temperature_celsius
            hottest = heat if hottest is None or heat > hottest else hottest
    state = _STATES.get(message.state, "UNKNOWN")
    return InstanceRow(
        instance_id=plain(spec.instance_id),
        state=state,
        state_reason=plain(message.state_reason),
        model=plain(spec.model_name),
        host_id=plain(spec.host_id),
        load=message.in_flight_request_count,
        limit=message.max_concurrent_request_count,
        running=running,
        waiting=waiting,
        key_value_usage=usage,
        ttft_s=seconds_of(message.mean_ttft) if message.HasField("mean_ttft") else None,
        gpu_utilization=utilization_sum / utilization_count if utilization_count else None,
        gpu_memory_usage=used / total if total else None,
        temperature_celsius=hottest,
        drained=message.HasField("drain"),
        sleeping=sleeping or message.HasField("sleep"),
        note=_note(message, state, sleeping=sleeping),
        read_s=now_s,
    )


def _note(message: instance_pb2.Instance, state: str, *, sleeping: bool) -> str:
    """Return what is out of the ordinary, the most urgent first."""
    notes = []
    faults = message.gpu_faults
    if faults:
        first = faults[0]
        kind = instance_pb2.GpuFaultKind.Name(first.kind).removeprefix("GPU_FAULT_KIND_")
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        notes.append(f"GPU {first.gpu_index} {kind}{more}")
    if message.HasField("engine_process"):
        process = message.engine_process
        if process.state == instance_pb2.ENGINE_PROCESS_STATE_BACKING_OFF:
            notes.append(f"engine ended, {render.plural(process.restart_count, 'restart')}")
    if message.HasField("sleep"):
        notes.append("asleep" if message.sleep.asleep else "goes to sleep")
    elif sleeping:
        notes.append("asleep")
    if message.HasField("drain"):
        drain = message.drain
        if drain.moved_request_count:
            notes.append(f"{drain.moved_request_count} moved")
        if drain.forced:
            notes.append("forced")
        if drain.cause:
            notes.append(f"drain: {plain(drain.cause)}")
    elif state not in {"READY", "DRAINED"} and message.state_reason:
        notes.append(plain(message.state_reason))
    return ", ".join(notes)


def status_view(message: admin_service_pb2.GetStatusResponse) -> StatusView:
    """Return the state of the control plane."""
    scheduling = message.scheduling
    placement = scheduling.routing_strategy
    if placement == "load_balanced":
        placement = scheduling.load_balancer
    return StatusView(
        version=plain(message.version),
        start_time_s=time_s(message.start_time),
        uptime_s=seconds_of(message.uptime),
        accepting=message.accepting,
        order=scheduling.scheduling_policy,
        in_force=message.policy_in_force,
        reason=plain(message.policy_reason or scheduling.comment),
        placement=placement,
        config_version=scheduling.version,
        count_by_state=dict(message.instance_count_by_state),
        queued_by_class=dict(message.queued_count_by_priority),
        queued_by_model=dict(message.queued_count_by_model),
        queued_by_tenant=dict(message.queued_count_by_tenant),
        active=message.active_request_count,
        queue_capacity=message.queue_capacity,
        last_event_sequence=message.last_event_sequence,
    )


def metrics_view(message: metrics_pb2.MetricsSnapshot) -> MetricsView:
    """Return the figures of a window."""
    overall = message.overall
    ttft = overall.ttft if overall.ttft.sample_count else None
    return MetricsView(
        requests_per_second=overall.requests_per_second,
        tokens_per_second=overall.tokens_per_second,
        ttft_p50_s=ttft.p50_s if ttft else None,
        ttft_p95_s=ttft.p95_s if ttft else None,
        slo_compliance=overall.slo_compliance_rate if overall.HasField("slo_compliance_rate") else None,
    )


def event_row(message: event_pb2.FleetEvent) -> EventRow:
    """Return an event."""
    return EventRow(
        time_s=time_s(message.event_time),
        severity=message.severity or 1,
        message=plain(message.message),
        instance_id=plain(message.instance_id),
        request_id=plain(message.request_id),
        sequence=message.sequence,
    )
