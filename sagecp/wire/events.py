"""Events of the fleet."""

from __future__ import annotations

from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent
from sagecp.v1 import event_pb2 as pb
from sagecp.wire.times import time_s, timestamp

_KINDS = frozenset(each.value for each in EventKind)
_SEVERITIES = frozenset(each.value for each in EventSeverity)


def event_to_proto(event: FleetEvent) -> pb.FleetEvent:
    """Return an event."""
    return pb.FleetEvent(
        sequence=event.sequence,
        event_time=timestamp(event.time_s),
        severity=pb.EventSeverity.ValueType(event.severity.value),
        kind=pb.EventKind.ValueType(event.kind.value),
        message=event.message,
        instance_id=event.instance_id,
        request_id=event.request_id,
        attributes=dict(event.attributes),
    )


def event_from_proto(message: pb.FleetEvent) -> FleetEvent:
    """Return an event; kinds and severities of a newer version count as trouble and warning."""
    kind, severity = message.kind, message.severity
    return FleetEvent(
        sequence=message.sequence,
        time_s=time_s(message.event_time),
        severity=EventSeverity(severity) if severity in _SEVERITIES else EventSeverity.WARNING,
        kind=EventKind(kind) if kind in _KINDS else EventKind.CONTROL_PLANE_TROUBLE,
        message=message.message,
        instance_id=message.instance_id,
        request_id=message.request_id,
        attributes=dict(message.attributes),
    )
