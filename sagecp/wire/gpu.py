"""GPUs: what they are, how they do, and what is wrong with them."""

from __future__ import annotations

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
_DEVICE_SCALARS = tuple(field.name for field in pb.GpuDevice.DESCRIPTOR.fields if field.name != "links")
_LINK_KINDS = frozenset(each.value for each in GpuLinkKind)
_FAULT_KINDS = frozenset(each.value for each in GpuFaultKind)


def reading_to_proto(reading: GpuReading) -> pb.GpuReading:
    """Return a GPU's reading; unknown figures stay absent."""
    message = pb.GpuReading(
        throttle_reasons=reading.throttle_reasons,
        xid_errors=[
            pb.XidError(code=each.code, error_time=timestamp(each.time_s)) for each in reading.xid_errors
        ],
    )
    for name in _READING_SCALARS:
        value = getattr(reading, name)
        if value is not None:
            setattr(message, name, value)
    return message


def reading_from_proto(message: pb.GpuReading) -> GpuReading:
    """Return a GPU's reading as it is; an absent figure is unknown, not zero."""
    values: dict[str, Any] = {descriptor.name: value for descriptor, value in message.ListFields()}
    values["index"] = message.index
    if "throttle_reasons" in values:
        values["throttle_reasons"] = tuple(message.throttle_reasons)
    if "xid_errors" in values:
        values["xid_errors"] = tuple(
            XidError(each.code, time_s(each.error_time)) for each in message.xid_errors
        )
    return GpuReading(**values)


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
    values: dict[str, Any] = {descriptor.name: value for descriptor, value in message.ListFields()}
    values["index"] = message.index
    values["links"] = tuple(
        GpuLink(
            link.peer_uuid,
            GpuLinkKind(link.kind) if link.kind in _LINK_KINDS else GpuLinkKind.UNKNOWN,
            link.nvlink_count,
        )
        for link in message.links
    )
    return GpuDevice(**values)


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
