"""Heartbeats: what is possible in them is taken, and what is not is left out and named.

An agent with one broken gauge must not cost its instance the lease: only a
heartbeat that cannot be told whose it is is refused as a whole.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal

from google.protobuf.timestamp_pb2 import Timestamp

from sagecp.core.engine_state import EngineProcess, KvCacheUpdate
from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.events import HeartbeatReceived
from sagecp.core.types import EngineCondition, EngineGauges, GpuReading
from sagecp.core.validation import ID_HINT, ID_PATTERN
from sagecp.v1 import fleet_service_pb2, instance_pb2
from sagecp.wire.engine import gauges_from_proto, process_from_proto
from sagecp.wire.gpu import reading_from_proto
from sagecp.wire.times import time_s

MAX_GPU_COUNT = 64
"""Most GPUs of one instance that are taken."""
MAX_ADAPTER_COUNT = 128
MAX_NAME_LENGTH = 128
MAX_TEXT_LENGTH = 512
MAX_THROTTLE_REASON_COUNT = 16
MAX_XID_COUNT = 8
MAX_LOG_LINE_COUNT = 20
MAX_LOG_LINE_LENGTH = 256
MAX_BLOCK_HASH_COUNT = 4096
"""Most hashes of one update of what an engine has cached."""
MAX_REFUSAL_COUNT = 8
"""Most bad figures of one heartbeat that are named."""

# A full cache may be reported as a little more than full.
_ROUNDING = 0.01
_LARGEST_S = 1e9
_LAST_SECOND = 253_402_300_799
_CONDITIONS = frozenset(condition.value for condition in EngineCondition)
# Name, lowest, highest.
_SHARE = (0.0, 1.0)
_GAUGE_RANGES = (
    ("key_value_cache_usage", *_SHARE),
    ("max_key_value_cache_usage", *_SHARE),
)
_GPU_RANGES = (
    ("utilization", *_SHARE),
    ("memory_utilization", *_SHARE),
    ("temperature_celsius", -100.0, 1000.0),
    ("memory_temperature_celsius", -100.0, 1000.0),
    ("power_watts", 0.0, 1e6),
    ("power_limit_watts", 0.0, 1e6),
)
_QUANTILES = ("ttft", "inter_token_latency", "queue_wait")
_QUANTILE_FIELDS = ("mean_s", "p50_s", "p95_s", "p99_s")
_gauge_figures = operator.attrgetter(*(name for name, _, _ in _GAUGE_RANGES))
_gpu_figures = operator.attrgetter(*(name for name, _, _ in _GPU_RANGES))
_quantile_figures = operator.attrgetter(*_QUANTILE_FIELDS)


class _Refusals:
    """What was left out of a heartbeat. Counts all, names the first few."""

    def __init__(self) -> None:
        self._clauses: list[str] = []
        self._count = 0

    def add(self, field: str, what: str) -> None:
        self._count += 1
        if self._count <= MAX_REFUSAL_COUNT:
            self._clauses.append(f"{field} {what}")

    def clauses(self) -> tuple[str, ...]:
        more = self._count - len(self._clauses)
        return (*self._clauses, f"and {more} more") if more else tuple(self._clauses)


def heartbeat_from_proto(
    beat: fleet_service_pb2.HeartbeatRequest, wall_time_s: float | None = None
) -> HeartbeatReceived:
    """Return a heartbeat; ``refusals`` says what of it was not possible.

    Args:
        beat: As it came.
        wall_time_s: When it came, in Unix seconds; ``None``: clocks are not compared.

    Raises:
        InvalidRequestError: The instance id is none.
    """
    if not ID_PATTERN.fullmatch(beat.instance_id):
        raise InvalidRequestError(
            [FieldViolation("instance_id", f"{beat.instance_id[:80]!r} is not an id; {ID_HINT}")]
        )
    refusals = _Refusals()
    condition = beat.engine_condition
    agent_time_s = None
    if beat.HasField("agent_time"):
        agent_time_s = _time(beat.agent_time, "agent_time", refusals)
    return HeartbeatReceived(
        instance_id=beat.instance_id,
        incarnation=beat.incarnation,
        condition=EngineCondition(condition) if condition in _CONDITIONS else EngineCondition.UNKNOWN,
        condition_reason=beat.condition_reason[:MAX_TEXT_LENGTH],
        gauges=_gauges(beat.engine, refusals) if beat.HasField("engine") else None,
        gpus=_gpus(beat.gpus, refusals) if beat.gpus else (),
        gpu_absent_reason=beat.gpu_absent_reason[:MAX_TEXT_LENGTH],
        process=_process(beat.engine_process, refusals) if beat.HasField("engine_process") else None,
        order_trouble=beat.order_trouble[:MAX_TEXT_LENGTH],
        agent_time_s=agent_time_s,
        clock_offset_s=None
        if agent_time_s is None or wall_time_s is None
        else max(-_LARGEST_S, min(_LARGEST_S, agent_time_s - wall_time_s)),
        kv_cache_update=_kv_cache_update(beat.kv_cache_update, refusals)
        if beat.HasField("kv_cache_update")
        else None,
        refusals=refusals.clauses(),
    )


def _gauges(message: instance_pb2.EngineGauges, refusals: _Refusals) -> EngineGauges:
    gauges = gauges_from_proto(message)
    changed: dict[str, Any] = {}
    _check_ranges(_gauge_figures(gauges), _GAUGE_RANGES, "engine", changed, refusals)
    for name in _QUANTILES:
        quantiles = getattr(gauges, name)
        if quantiles is None:
            continue
        for field, value in zip(_QUANTILE_FIELDS, _quantile_figures(quantiles), strict=True):
            if not 0.0 <= value <= _LARGEST_S:
                refusals.add(f"engine.{name}.{field}", f"is {value:g}; must be 0 or more seconds")
                changed[name] = None
    for name in ("loaded_lora_adapters", "running_lora_adapters"):
        names = getattr(gauges, name)
        if len(names) > MAX_ADAPTER_COUNT or any(len(each) > MAX_NAME_LENGTH for each in names):
            refusals.add(
                f"engine.{name}",
                f"has {len(names)} names; at most {MAX_ADAPTER_COUNT} of {MAX_NAME_LENGTH} characters",
            )
            changed[name] = tuple(each for each in names if len(each) <= MAX_NAME_LENGTH)[:MAX_ADAPTER_COUNT]
    return dataclasses.replace(gauges, **changed) if changed else gauges


def _gpus(messages: Sequence[instance_pb2.GpuReading], refusals: _Refusals) -> tuple[GpuReading, ...]:
    if len(messages) > MAX_GPU_COUNT:
        refusals.add("gpus", f"has {len(messages)} readings; the first {MAX_GPU_COUNT} are taken")
    found: dict[str, GpuReading] = {}
    for number, message in enumerate(messages[:MAX_GPU_COUNT]):
        reading = reading_from_proto(message)
        uuid = reading.uuid
        if len(uuid) > MAX_NAME_LENGTH:
            refusals.add(f"gpus[{number}].uuid", f"has {len(uuid)} characters; at most {MAX_NAME_LENGTH}")
        elif (key := uuid or str(reading.index)) in found:
            refusals.add(f"gpus[{number}]", f"is another reading of GPU {key}")
        else:
            found[key] = _possible(reading, message, number, refusals)
    return tuple(found.values())


def _possible(
    reading: GpuReading, message: instance_pb2.GpuReading, number: int, refusals: _Refusals
) -> GpuReading:
    """Return a reading without what cannot be."""
    changed: dict[str, Any] = {}
    field = f"gpus[{number}]"
    _check_ranges(_gpu_figures(reading), _GPU_RANGES, field, changed, refusals)
    if len(reading.name) > MAX_NAME_LENGTH:
        changed["name"] = reading.name[:MAX_NAME_LENGTH]
    reasons = reading.throttle_reasons
    if reasons and (len(reasons) > MAX_THROTTLE_REASON_COUNT or max(map(len, reasons)) > MAX_NAME_LENGTH):
        kept = reasons[:MAX_THROTTLE_REASON_COUNT]
        changed["throttle_reasons"] = tuple(each[:MAX_NAME_LENGTH] for each in kept)
    if reading.xid_errors:
        possible = [
            error
            for error, each in zip(reading.xid_errors, message.xid_errors, strict=True)
            if _time(each.error_time, f"{field}.xid_errors.error_time", refusals) is not None
        ]
        changed["xid_errors"] = tuple(possible[-MAX_XID_COUNT:])
    return dataclasses.replace(reading, **changed) if changed else reading


def _check_ranges(
    figures: Sequence[float | None],
    ranges: Sequence[tuple[str, float, float]],
    field: str,
    changed: dict[str, Any],
    refusals: _Refusals,
) -> None:
    """Note figures that are out of their ranges as unknown."""
    for figure, (name, low, high) in zip(figures, ranges, strict=True):
        if figure is None or low <= figure <= high:
            continue
        if high < figure <= high + _ROUNDING:
            changed[name] = high
            continue
        refusals.add(f"{field}.{name}", f"is {figure:g}; must be {low:g} to {high:g}")
        changed[name] = None


def _process(message: instance_pb2.EngineProcess, refusals: _Refusals) -> EngineProcess:
    process = process_from_proto(message)
    changed: dict[str, Any] = {}
    names: tuple[Literal["start_time", "next_start_time"], ...] = ("start_time", "next_start_time")
    for name in names:
        is_given = message.HasField(name)
        if is_given and _time(getattr(message, name), f"engine_process.{name}", refusals) is None:
            changed[f"{name}_s"] = None
    if process.last_log_lines:
        lines = process.last_log_lines[-MAX_LOG_LINE_COUNT:]
        changed["last_log_lines"] = tuple(line[:MAX_LOG_LINE_LENGTH] for line in lines)
    return dataclasses.replace(process, **changed) if changed else process


def _kv_cache_update(message: fleet_service_pb2.KvCacheUpdate, refusals: _Refusals) -> KvCacheUpdate:
    stored, removed = message.stored_block_hashes, message.removed_block_hashes
    count = len(stored) + len(removed)
    if count > MAX_BLOCK_HASH_COUNT:
        refusals.add("kv_cache_update", f"has {count} hashes; at most {MAX_BLOCK_HASH_COUNT}, the rest later")
        # What is left out may have been a removal: nothing is certain any more.
        return KvCacheUpdate(message.sequence, reset=True)
    return KvCacheUpdate(message.sequence, message.reset, tuple(stored), tuple(removed))


def _time(value: Timestamp, field: str, refusals: _Refusals) -> float | None:
    """Return a time in Unix seconds; ``None``: it is none of this era."""
    if 0 <= value.seconds <= _LAST_SECOND and 0 <= value.nanos < 1_000_000_000:
        return time_s(value)
    refusals.add(field, "is no time of the years 1970 to 9999")
    return None
