"""What operators are told as it happens."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class EventSeverity(enum.IntEnum):
    """How much an event matters to an operator; numbers equal the contract's."""

    INFO = 1
    WARNING = 2
    ERROR = 3


class EventKind(enum.IntEnum):
    """What happened; numbers equal the contract's."""

    INSTANCE_REGISTERED = 1
    INSTANCE_STATE_CHANGED = 2
    INSTANCE_REMOVED = 3
    INSTANCE_ORDERED = 4
    GPU_FAULT = 5
    GPU_FAULT_CLEARED = 6
    ENGINE_PROCESS_CHANGED = 7
    HEARTBEAT_REFUSED = 8
    CLOCK_SKEW = 9
    SCHEDULING_CONFIGURED = 10
    POLICY_SWITCHED = 11
    OVERLOAD = 12
    REQUEST_FAILED = 13
    CONTROL_PLANE_TROUBLE = 14
    CONTROL_PLANE_STATE_CHANGED = 15
    PREDICTION_DRIFT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvent:
    """Something that happened.

    Attributes:
        sequence: Grows by one with every event of a server process, from 1.
        time_s: Unix seconds.
        message: What happened, in a sentence, without anything of a prompt.
        attributes: Further facts, by stable names.
    """

    sequence: int
    time_s: float
    severity: EventSeverity
    kind: EventKind
    message: str
    instance_id: str = ""
    request_id: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
