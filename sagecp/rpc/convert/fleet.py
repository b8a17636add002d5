"""Instances, gauges and heartbeats."""

from __future__ import annotations

import dataclasses
from typing import Any
from urllib.parse import urlsplit

from sagecp.core.drain_order import DrainOrder
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.prediction.learned import learned_performance
from sagecp.core.types import (
    ExecutionInstance,
    GpuReading,
    InstanceState,
)
from sagecp.core.validation import instance_violations
from sagecp.rpc.convert.common import check_enum, prefixed
from sagecp.v1 import fleet_service_pb2, instance_pb2, parallelism_pb2
from sagecp.wire.engine import (
    adapters_from_proto,
    adapters_to_proto,
    capabilities_from_proto,
    capabilities_to_proto,
    gauges_to_proto,
    learned_to_proto,
    process_to_proto,
)
from sagecp.wire.gpu import device_from_proto, device_to_proto, fault_to_proto, reading_to_proto
from sagecp.wire.times import duration, seconds_of, timestamp

_ENGINE_KINDS = {
    instance_pb2.ENGINE_KIND_UNSPECIFIED: "vllm",
    instance_pb2.ENGINE_KIND_VLLM: "vllm",
    instance_pb2.ENGINE_KIND_SIMULATED: "simulated",
}
_ENGINE_KIND_NUMBERS = {
    "vllm": instance_pb2.ENGINE_KIND_VLLM,
    "simulated": instance_pb2.ENGINE_KIND_SIMULATED,
}
_OPTIONAL_SPEC_FIELDS = (
    "max_context_token_count",
    "key_value_token_capacity",
    "max_concurrent_request_count",
    "usd_per_gpu_hour",
)
_LAST_SECOND = 253_402_300_799.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_GRACE_S = 30 * 86_400.0
"""Longest grace period of a drain: a month."""
MAX_ADAPTER_COUNT = 128
"""Most LoRA adapters that an engine can be told to have."""
MAX_GPU_DEVICE_COUNT = 64
"""Most GPUs of one instance whose particulars are kept."""


def instance_from_proto(spec: instance_pb2.InstanceSpec) -> ExecutionInstance:
    """Return what an instance is, validated.

    Raises:
        InvalidRequestError: Names every bad field at once, below ``spec``.
    """
    violations: list[FieldViolation] = []
    scheme, host, port = _split_engine_url(spec.engine_url, violations)
    check_enum("engine_kind", spec.engine_kind, instance_pb2.EngineKind.DESCRIPTOR, violations)
    optional: dict[str, Any] = {
        name: getattr(spec, name)
        for name in _OPTIONAL_SPEC_FIELDS
        if spec.HasField(name)  # type: ignore[arg-type]  # the names are its fields
    }
    sizes = spec.parallel_sizes
    instance = ExecutionInstance(
        instance_id=spec.instance_id,
        host=host,
        port=port,
        scheme=scheme,
        model_name=spec.model_name,
        model_aliases=tuple(spec.model_aliases),
        tensor_parallel_size=sizes.tensor_parallel_size or 1,
        pipeline_parallel_size=sizes.pipeline_parallel_size or 1,
        data_parallel_size=sizes.data_parallel_size or 1,
        expert_parallel_size=sizes.expert_parallel_size or 1,
        gpu_count=spec.gpu_count,
        gpu_memory_gb=spec.gpu_memory_gib if spec.HasField("gpu_memory_gib") else None,
        gpu_name=spec.gpu_name,
        engine_kind=_ENGINE_KINDS.get(spec.engine_kind, "vllm"),
        engine_version=spec.engine_version,
        host_id=spec.host_id,
        labels=dict(spec.labels),
        api_key=spec.engine_api_key,
        gpu_devices=tuple(device_from_proto(device) for device in spec.gpu_devices[:MAX_GPU_DEVICE_COUNT]),
        engine_configuration=dict(spec.engine_configuration),
        engine_capabilities=capabilities_from_proto(list(spec.engine_capabilities)),
        **optional,
    )
    named = {violation.field for violation in violations}
    violations.extend(v for v in instance_violations(instance) if v.field not in named)
    if violations:
        raise InvalidRequestError(prefixed("spec", violations))
    return instance


def _split_engine_url(url: str, violations: list[FieldViolation]) -> tuple[str, str, int]:
    """Return scheme, host and port; anything beyond them is refused, because calls would not use it."""
    hint = "give http or https, a host and a port, such as http://10.0.0.7:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        violations.append(FieldViolation("engine_url", f"{url[:200]!r} is not a URL; {hint}"))
        return "http", "", 0
    if parts.username is not None or parts.path not in {"", "/"} or parts.query or parts.fragment:
        violations.append(FieldViolation("engine_url", f"has more than scheme, host and port; {hint}"))
    elif parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        violations.append(FieldViolation("engine_url", f"{url[:200]!r} is not usable; {hint}"))
    return parts.scheme, parts.hostname or "", _DEFAULT_PORTS.get(parts.scheme, 0) if port is None else port


def instance_to_proto(record: InstanceRecord, wall_offset_s: float, now: float) -> instance_pb2.Instance:
    """Return an instance as an operator sees it.

    Args:
        record: The instance.
        wall_offset_s: Add to times on the core's clock to get Unix seconds.
        now: The time on the core's clock.
    """
    spec = record.spec
    skew_s = record.clock.offset_s if record.clock.skewed and record.clock.offset_s else 0.0
    message = instance_pb2.Instance(
        spec=instance_pb2.InstanceSpec(
            instance_id=spec.instance_id,
            engine_url=spec.engine_url,
            model_name=spec.model_name,
            model_aliases=spec.model_aliases,
            parallel_sizes=parallelism_pb2.ParallelSizes(
                tensor_parallel_size=spec.tensor_parallel_size,
                pipeline_parallel_size=spec.pipeline_parallel_size,
                data_parallel_size=spec.data_parallel_size,
                expert_parallel_size=spec.expert_parallel_size,
            ),
            gpu_count=spec.gpu_count,
            gpu_memory_gib=spec.gpu_memory_gb,
            gpu_name=spec.gpu_name,
            max_context_token_count=spec.max_context_token_count,
            key_value_token_capacity=spec.key_value_token_capacity,
            max_concurrent_request_count=spec.max_concurrent_request_count,
            engine_kind=_ENGINE_KIND_NUMBERS.get(spec.engine_kind, instance_pb2.ENGINE_KIND_VLLM),
            engine_version=spec.engine_version,
            usd_per_gpu_hour=spec.usd_per_gpu_hour,
            host_id=spec.host_id,
            labels=dict(spec.labels),
            gpu_devices=[device_to_proto(device) for device in spec.gpu_devices],
            engine_configuration=dict(spec.engine_configuration),
            engine_capabilities=capabilities_to_proto(spec.engine_capabilities),
        ),
        state=instance_pb2.InstanceState.ValueType(record.state.value),
        state_reason=_state_reason(record),
        incarnation=record.incarnation,
        in_flight_request_count=record.in_flight_count,
        max_concurrent_request_count=record.concurrency_limit,
        gpus=[reading_to_proto(_in_our_time(gpu, skew_s)) for gpu in record.gpus],
        gpu_absent_reason=record.gpu_absent_reason,
        register_time=timestamp(record.register_s + wall_offset_s),
        completed_request_count=record.completed_request_count,
        failed_attempt_count=record.failed_attempt_count,
        gpu_faults=[fault_to_proto(fault, wall_offset_s) for fault in record.gpu_faults],
        refused_heartbeat_count=record.refused_heartbeat_count,
        heartbeat_refusal=record.heartbeat_refusal,
        agent_version=record.agent_version,
    )
    if record.price.usd_per_gpu_hour is not None:
        message.price.usd_per_gpu_hour = record.price.usd_per_gpu_hour
        message.price.source = instance_pb2.PriceSource.ValueType(record.price.source.value)
        message.price.busy_usd = record.meter.busy_usd(now)
        message.price.idle_usd = record.meter.idle_usd(now)
    learned = learned_performance(record.load, now)
    if learned is not None:
        message.learned.CopyFrom(learned_to_proto(learned))
    if record.desired_lora_adapters is not None:
        message.desired_lora_adapters.CopyFrom(adapters_to_proto(record.desired_lora_adapters))
    if record.engine_process is not None:
        message.engine_process.CopyFrom(process_to_proto(record.engine_process))
    if record.clock.offset_s is not None:
        message.clock_offset.CopyFrom(duration(record.clock.offset_s))
    if record.gauges is not None:
        message.engine.CopyFrom(gauges_to_proto(record.gauges))
    if record.heartbeat_s is not None:
        message.heartbeat_time.CopyFrom(timestamp(record.heartbeat_s + wall_offset_s))
    if record.lease_expire_s is not None:
        message.lease_expire_time.CopyFrom(timestamp(record.lease_expire_s + wall_offset_s))
    if record.ttft_estimate_s is not None:
        message.mean_ttft.CopyFrom(duration(record.ttft_estimate_s))
    if record.drain is not None:
        message.drain.CopyFrom(_drain_to_proto(record.drain, wall_offset_s))
        if record.drain.sleep_level:
            message.sleep.begin_time.CopyFrom(timestamp(record.drain.begin_s + wall_offset_s))
            message.sleep.level = record.drain.sleep_level
            message.sleep.asleep = record.sleeping
    return message


def _state_reason(record: InstanceRecord) -> str:
    if not record.order_trouble:
        return record.state_reason
    return f"{record.state_reason}; its agent could not do what it was told to: {record.order_trouble}"


def _in_our_time(reading: GpuReading, skew_s: float) -> GpuReading:
    """Return a reading whose times are by our clock, where the agent's is far off."""
    if not skew_s or not reading.xid_errors:
        return reading
    errors = tuple(
        dataclasses.replace(each, time_s=min(max(0.0, each.time_s - skew_s), _LAST_SECOND))
        for each in reading.xid_errors
    )
    return dataclasses.replace(reading, xid_errors=errors)


def _drain_to_proto(order: DrainOrder, wall_offset_s: float) -> instance_pb2.Drain:
    message = instance_pb2.Drain(
        begin_time=timestamp(order.begin_s + wall_offset_s),
        moved_request_count=order.moved_request_count,
        forced=order.forced,
        cause=order.cause,
    )
    if order.grace_end_s is not None:
        message.grace_end_time.CopyFrom(timestamp(order.grace_end_s + wall_offset_s))
    return message


def wanted_adapters_from_proto(message: instance_pb2.LoraAdapters) -> tuple[LoraAdapter, ...]:
    """Return the adapters that an engine should have, by name.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    violations: list[FieldViolation] = []
    adapters = adapters_from_proto(message)
    if len(adapters) > MAX_ADAPTER_COUNT:
        violations.append(
            FieldViolation(
                "adapters", f"has {len(adapters)} entries; at most {MAX_ADAPTER_COUNT} are allowed"
            )
        )
    names: set[str] = set()
    for number, adapter in enumerate(adapters[:MAX_ADAPTER_COUNT]):
        for field, text, longest in (("name", adapter.name, 128), ("path", adapter.path, 1024)):
            if not 1 <= len(text) <= longest or not text.isprintable():
                violations.append(
                    FieldViolation(
                        f"adapters.adapters[{number}].{field}",
                        f"has {len(text)} characters; must have 1 to {longest} that can be printed",
                    )
                )
        if adapter.name in names:
            violations.append(
                FieldViolation(
                    f"adapters.adapters[{number}].name",
                    f"{adapter.name[:80]!r} is given twice; give each adapter one path",
                )
            )
        names.add(adapter.name)
    if violations:
        raise InvalidRequestError(violations)
    return tuple(sorted(adapters, key=lambda adapter: adapter.name))


def grace_from_proto(
    request: fleet_service_pb2.DrainInstanceRequest | fleet_service_pb2.SleepInstanceRequest,
) -> float | None:
    """Return the grace period of a drain or a sleep in seconds; ``None``: there is none.

    Raises:
        InvalidRequestError: It is negative or too long, or is given to undo a drain.
    """
    violations: list[FieldViolation] = []
    grace_s = None
    if request.HasField("grace_period"):
        grace_s = seconds_of(request.grace_period)
        if not 0.0 <= grace_s <= MAX_GRACE_S:
            violations.append(
                FieldViolation(
                    "grace_period",
                    f"is {grace_s:g} s; must be 0 to {MAX_GRACE_S:g} s, or absent to move nothing",
                )
            )
    if isinstance(request, fleet_service_pb2.DrainInstanceRequest):
        undoing = "undo" if request.undo else ""
    else:
        undoing = "wake" if request.wake else ""
    if undoing:
        given = {"grace_period": request.HasField("grace_period"), "force": request.force}
        violations += [
            FieldViolation(name, f"does not go with {undoing}; leave one of them out")
            for name, is_given in given.items()
            if is_given
        ]
    if violations:
        raise InvalidRequestError(violations)
    return grace_s


def states_from_proto(
    field: str, states: list[int], violations: list[FieldViolation]
) -> frozenset[InstanceState]:
    """Return the states of a filter; unset ones match nothing and are left out."""
    return frozenset(
        InstanceState(number)
        for number in states
        if check_enum(field, number, instance_pb2.InstanceState.DESCRIPTOR, violations)
    )
