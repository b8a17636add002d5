"""GPUs: what they are, how they do, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from sys import intern
from typing import Any

from sagecp.core.gpu import (
    GpuDevice,
    GpuFault,
    GpuFaultKind,
    GpuLink,
    GpuLinkKind,
    GpuReading,
    XidError,
)
from sagecp.v1 import instance_pb2 as pb
from sagecp.wire.times import time_s, timestamp

_READING_SCALARS = tuple(
    field.name
    for field in pb.GpuReading.DESCRIPTOR.fields
    if field.name not in {"throttle_reasons", "xid_errors"}
)
_scalars_of = operator.attrgetter(*_READING_SCALARS)
_DEVICE_SCALARS = tuple(field.name for field in pb.GpuDevice.DESCRIPTOR.fields if field.name != "links")
_LINK_KINDS = frozenset(each.value for each in GpuLinkKind)
_FAULT_KINDS = frozenset(each.value for each in GpuFaultKind)


class _Draft:
    """What becomes a reading: it has the slots of one, and is not frozen."""

    __slots__ = tuple(field.name for field in dataclasses.fields(GpuReading))


def reading_to_proto(reading: GpuReading) -> pb.GpuReading:
    """Return a GPU's reading; unknown figures stay absent."""
    message = pb.GpuReading(**dict(zip(_READING_SCALARS, _scalars_of(reading), strict=True)))
    if reading.throttle_reasons:
        message.throttle_reasons.extend(reading.throttle_reasons)
    for each in reading.xid_errors:
        message.xid_errors.add(code=each.code, error_time=timestamp(each.time_s))
    return message


def reading_from_proto(message: pb.GpuReading) -> GpuReading:
    """Return a GPU's reading as it is; an absent figure is unknown, not zero."""
    # Agents send thousands of these a second. What makes a frozen object sets field by field
    # through a call each, or two: half of a heartbeat's time. Plain assignments take a fifth of that.
    draft: Any = object.__new__(_Draft)
    has = message.HasField
    draft.index = message.index
    # Every reading of a GPU has the same ones: once in memory, not once per beat.
    draft.uuid, draft.name = intern(message.uuid), intern(message.name)
    draft.utilization = message.utilization or (0.0 if has("utilization") else None)
    draft.used_memory_bytes = message.used_memory_bytes or (0 if has("used_memory_bytes") else None)
    draft.total_memory_bytes = message.total_memory_bytes or (0 if has("total_memory_bytes") else None)
    draft.temperature_celsius = message.temperature_celsius or (0.0 if has("temperature_celsius") else None)
    draft.power_watts = message.power_watts or (0.0 if has("power_watts") else None)
    draft.power_limit_watts = message.power_limit_watts or (0.0 if has("power_limit_watts") else None)
    draft.sm_clock_mhz = message.sm_clock_mhz or (0 if has("sm_clock_mhz") else None)
    draft.uncorrected_ecc_error_count = message.uncorrected_ecc_error_count or (
        0 if has("uncorrected_ecc_error_count") else None
    )
    draft.corrected_ecc_error_count = message.corrected_ecc_error_count or (
        0 if has("corrected_ecc_error_count") else None
    )
    draft.row_remap_pending = message.row_remap_pending or (False if has("row_remap_pending") else None)
    draft.row_remap_failed = message.row_remap_failed or (False if has("row_remap_failed") else None)
    draft.memory_clock_mhz = message.memory_clock_mhz or (0 if has("memory_clock_mhz") else None)
    draft.memory_utilization = message.memory_utilization or (0.0 if has("memory_utilization") else None)
    draft.memory_temperature_celsius = message.memory_temperature_celsius or (
        0.0 if has("memory_temperature_celsius") else None
    )
    draft.nvlink_count = message.nvlink_count or (0 if has("nvlink_count") else None)
    draft.active_nvlink_count = message.active_nvlink_count or (0 if has("active_nvlink_count") else None)
    draft.nvlink_error_count = message.nvlink_error_count or (0 if has("nvlink_error_count") else None)
    draft.engine_memory_bytes = message.engine_memory_bytes or (0 if has("engine_memory_bytes") else None)
    draft.foreign_process_count = message.foreign_process_count or (
        0 if has("foreign_process_count") else None
    )
    reasons, errors = message.throttle_reasons, message.xid_errors
    draft.throttle_reasons = tuple(reasons) if reasons else ()
    draft.xid_errors = (
        tuple(XidError(each.code, time_s(each.error_time)) for each in errors) if errors else ()
    )
    draft.__class__ = GpuReading
    reading: GpuReading = draft
    return reading


def device_to_proto(device: GpuDevice) -> pb.GpuDevice:
    """Return what never changes about a GPU."""
    message = pb.GpuDevice(
        links=[
            pb.GpuLink(
                peer_uuid=link.peer_uuid,
                kind=pb.GpuLinkKind.ValueType(link.kind.value),
                nvlink_count=link.nvlink_count,
            )
            for link in device.links
        ]
    )
    for name in _DEVICE_SCALARS:
        value = getattr(device, name)
        if value is not None:
            setattr(message, name, value)
    return message


def device_from_proto(message: pb.GpuDevice) -> GpuDevice:
    """Return what never changes about a GPU."""
    values: dict[str, Any] = {
        descriptor.name: intern(value) if isinstance(value, str) else value
        for descriptor, value in message.ListFields()
    }
    values["index"] = message.index
    values["links"] = tuple(_link(link.peer_uuid, link.kind, link.nvlink_count) for link in message.links)
    return GpuDevice(**values)


# The GPUs of a host name each other: the links to each of them are mostly the same.
@functools.lru_cache(maxsize=128)
def _link(peer_uuid: str, kind: int, nvlink_count: int) -> GpuLink:
    return GpuLink(
        intern(peer_uuid),
        GpuLinkKind(kind) if kind in _LINK_KINDS else GpuLinkKind.UNKNOWN,
        nvlink_count,
    )


def fault_to_proto(fault: GpuFault, wall_offset_s: float = 0.0) -> pb.GpuFault:
    """Return what is wrong with a GPU; ``wall_offset_s`` turns its time into Unix seconds."""
    return pb.GpuFault(
        gpu_uuid=fault.gpu_uuid,
        gpu_index=fault.gpu_index,
        kind=pb.GpuFaultKind.ValueType(fault.kind.value),
        message=fault.message,
        begin_time=timestamp(fault.begin_s + wall_offset_s),
        quarantines=fault.quarantines,
    )


def fault_from_proto(message: pb.GpuFault) -> GpuFault:
    """Return what is wrong with a GPU; a kind of a newer version counts as XID."""
    kind = message.kind
    return GpuFault(
        gpu_uuid=message.gpu_uuid,
        gpu_index=message.gpu_index,
        kind=GpuFaultKind(kind) if kind in _FAULT_KINDS else GpuFaultKind.XID,
        message=message.message,
        begin_s=time_s(message.begin_time),
        quarantines=message.quarantines,
    )
