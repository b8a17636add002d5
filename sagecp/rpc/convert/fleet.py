"""Instances, gauges and heartbeats."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from urllib.parse import urlsplit

from sagecp.core.drain_order import DrainOrder
from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.events import HeartbeatReceived
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.types import (
    EngineCondition,
    EngineGauges,
    ExecutionInstance,
    GpuReading,
    InstanceState,
)
from sagecp.core.validation import instance_violations
from sagecp.rpc.convert.common import check_enum, prefixed
from sagecp.v1 import fleet_service_pb2, instance_pb2, parallelism_pb2
from sagecp.wire.engine import (
    capabilities_from_proto,
    capabilities_to_proto,
    gauges_from_proto,
    gauges_to_proto,
)
from sagecp.wire.gpu import device_from_proto, device_to_proto, reading_from_proto, reading_to_proto
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
_DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_GRACE_S = 30 * 86_400.0
"""Longest grace period of a drain: a month."""
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


def instance_to_proto(record: InstanceRecord, wall_offset_s: float) -> instance_pb2.Instance:
    """Return an instance as an operator sees it; ``wall_offset_s`` turns core times into Unix seconds."""
    spec = record.spec
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
        state_reason=record.state_reason,
        incarnation=record.incarnation,
        in_flight_request_count=record.in_flight_count,
        max_concurrent_request_count=record.concurrency_limit,
        gpus=[reading_to_proto(gpu) for gpu in record.gpus],
        gpu_absent_reason=record.gpu_absent_reason,
        register_time=timestamp(record.register_s + wall_offset_s),
        completed_request_count=record.completed_request_count,
        failed_attempt_count=record.failed_attempt_count,
    )
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
    return message


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


def grace_from_proto(request: fleet_service_pb2.DrainInstanceRequest) -> float | None:
    """Return the grace period of a drain in seconds; ``None``: there is none.

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
    if request.undo:
        given = {"grace_period": request.HasField("grace_period"), "force": request.force}
        violations += [
            FieldViolation(name, "does not go with undo; leave one of them out")
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


def heartbeat_from_proto(beat: fleet_service_pb2.HeartbeatRequest) -> HeartbeatReceived:
    """Return a beat.

    Raises:
        InvalidRequestError: A figure is negative, not a number or out of range.
    """
    gauges = _gauges_from_proto(beat.engine) if beat.HasField("engine") else None
    condition = beat.engine_condition
    return HeartbeatReceived(
        instance_id=beat.instance_id,
        incarnation=beat.incarnation,
        condition=EngineCondition(condition) if condition in _CONDITIONS else EngineCondition.UNKNOWN,
        condition_reason=beat.condition_reason[:512],
        gauges=gauges,
        gpus=tuple(_gpu_from_proto(gpu) for gpu in beat.gpus[:256]),
        gpu_absent_reason=beat.gpu_absent_reason[:512],
    )


# A full cache may be reported as a little more than full; that must not cost the instance its lease.
_ROUNDING = 0.01
_CONDITIONS = frozenset(condition.value for condition in EngineCondition)


def _gauges_from_proto(message: instance_pb2.EngineGauges) -> EngineGauges:
    gauges = gauges_from_proto(message)
    usage = gauges.key_value_cache_usage
    if usage is not None:
        if not 0.0 <= usage <= 1.0 + _ROUNDING:
            raise InvalidRequestError(
                [FieldViolation("engine.key_value_cache_usage", f"is {usage:g}; must be 0 to 1")]
            )
        gauges = dataclasses.replace(gauges, key_value_cache_usage=min(usage, 1.0))
    return gauges


def _gpu_from_proto(message: instance_pb2.GpuReading) -> GpuReading:
    for name in ("utilization", "temperature_celsius", "power_watts", "power_limit_watts"):
        value = getattr(message, name)
        if not math.isfinite(value):
            raise InvalidRequestError([FieldViolation(f"gpus.{name}", f"is {value}; must be a number")])
    return reading_from_proto(message)
