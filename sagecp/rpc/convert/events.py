"""Filters and pages of events."""

from __future__ import annotations

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.fleet_event import EventKind, EventSeverity
from sagecp.rpc.convert.common import check_enum
from sagecp.rpc.servicers.paging import not_our_token, page_size, position_of
from sagecp.runtime.event_log import EventFilter
from sagecp.v1 import admin_service_pb2, event_pb2


def filter_from_proto(message: admin_service_pb2.EventFilter) -> EventFilter:
    """Return which events are wanted.

    Raises:
        InvalidRequestError: A severity or a kind does not exist.
    """
    violations: list[FieldViolation] = []
    wanted = _filter(message, violations)
    if violations:
        raise InvalidRequestError(violations)
    return wanted


def event_page_from_proto(
    request: admin_service_pb2.ListEventsRequest,
) -> tuple[EventFilter, int, int | None]:
    """Return which events are wanted, how many, and before which one; ``None``: the latest.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    violations: list[FieldViolation] = []
    wanted = _filter(request.filter, violations)
    size = page_size(request.page_size, violations)
    position = position_of("event", request.page_token, violations)
    before = None
    if position:
        if position.isascii() and position.isdigit() and len(position) < 20:
            before = int(position)
        else:
            violations.append(not_our_token())
    if violations:
        raise InvalidRequestError(violations)
    return wanted, size, before


def _filter(message: admin_service_pb2.EventFilter, violations: list[FieldViolation]) -> EventFilter:
    severity = EventSeverity.INFO
    if check_enum(
        "filter.min_severity", message.min_severity, event_pb2.EventSeverity.DESCRIPTOR, violations
    ):
        severity = EventSeverity(message.min_severity)
    kinds = frozenset(
        EventKind(number)
        for number in message.kinds
        if check_enum("filter.kinds", number, event_pb2.EventKind.DESCRIPTOR, violations)
    )
    return EventFilter(severity, kinds, message.instance_id)
