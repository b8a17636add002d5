"""Everything that can go wrong, as one tree of exceptions with stable reasons.

Callers branch on :class:`ErrorReason` or on the class, never on the message.
Edges map reasons to their own vocabulary (gRPC codes, exit codes) in one table each.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar


class ErrorReason(enum.Enum):
    """Stable causes; names and numbers equal ``sagecp.v1.ErrorReason`` without its prefix."""

    INVALID_REQUEST = 1
    MODEL_NOT_FOUND = 2
    REQUEST_NOT_FOUND = 3
    INSTANCE_NOT_FOUND = 4
    REQUEST_ID_CONFLICT = 5
    STALE_INCARNATION = 6
    QUEUE_FULL = 7
    MESSAGE_TOO_LARGE = 8
    DEADLINE_EXCEEDED = 9
    REQUEST_CANCELLED = 10
    ENGINE_REJECTED = 11
    ENGINE_FAILED = 12
    ENGINE_TIMEOUT = 13
    ENGINE_UNREACHABLE = 14
    SHUTTING_DOWN = 15
    ILLEGAL_STATE = 16
    TOKEN_INDEX_OUT_OF_RANGE = 17
    NOT_IMPLEMENTED = 18
    INTERNAL = 19
    UNKNOWN_POLICY = 20
    POISON_REQUEST = 21
    UNAUTHENTICATED = 22
    PERMISSION_DENIED = 23
    INFEASIBLE = 24
    FLEET_FULL = 25
    TOO_MANY_STREAMS = 26
    SETTINGS_VERSION_CONFLICT = 27
    JOURNAL_UNAVAILABLE = 28
    DRAIN_REFUSED = 29
    READER_STALLED = 30
    OUTPUT_LOST = 31


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request did not succeed.

    Attributes:
        reason: The stable cause.
        message: A sentence for a person: what was wrong and what to do.
    """

    reason: ErrorReason
    message: str


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field.

    Attributes:
        field: Path of the field, in the contract's names: ``sampling.temperature``.
        description: What is wrong with which value, and what is allowed.
    """

    field: str
    description: str


class SageError(Exception):
    """Root of the tree.

    Attributes:
        reason: The stable cause.
        retry_after_s: When a retry makes sense, or ``None`` when it does not.
        metadata: Facts for programs, such as the names that exist.
    """

    reason: ClassVar[ErrorReason] = ErrorReason.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata = metadata

    def as_failure(self) -> Failure:
        """Return this error as a value that can be stored."""
        return Failure(self.reason, self.message)


class InvalidRequestError(SageError):
    """One or more fields are missing, malformed or out of range; names all of them at once."""

    reason = ErrorReason.INVALID_REQUEST

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations[:8])
        if len(violations) > 8:
            text += f"; and {len(violations) - 8} more"
        super().__init__(text)
        self.violations = tuple(violations)


class UnknownNameError(SageError):
    """A policy, strategy or balancer name is not known; lists those that are."""

    reason = ErrorReason.UNKNOWN_POLICY

    def __init__(self, kind: str, name: str, known: Iterable[str], planned: Iterable[str] = ()) -> None:
        known_names = sorted(known)
        state = "is not available in this version" if name in set(planned) else "is unknown"
        super().__init__(
            f"{kind} {name!r} {state}; choose one of: {', '.join(known_names)}", known=",".join(known_names)
        )
        self.kind = kind
        self.name = name
        self.known = tuple(known_names)


class ModelNotFoundError(SageError):
    """No registered instance serves the model."""

    reason = ErrorReason.MODEL_NOT_FOUND

    def __init__(self, model: str, available: Iterable[str]) -> None:
        names = sorted(available)
        if not names:
            hint = "no instance is registered yet; start an agent beside an engine"
        else:
            hint = f"models served now: {', '.join(names[:20])}" + (", ..." if len(names) > 20 else "")
        what = (
            f"model {model!r} is not served" if model else "no model was named, and not exactly one is served"
        )
        super().__init__(f"{what}; {hint}", model=model, available_models=",".join(names[:20]))
        self.model = model
        self.available = tuple(names)


class RequestNotFoundError(SageError):
    """No request with this id is known, or no longer."""

    reason = ErrorReason.REQUEST_NOT_FOUND

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request {request_id!r} is not known; it was never accepted, or ended too long ago to be kept",
            request_id=request_id,
        )


class InstanceNotFoundError(SageError):
    """No instance with this id is registered."""

    reason = ErrorReason.INSTANCE_NOT_FOUND

    def __init__(self, instance_id: str) -> None:
        super().__init__(
            f"instance {instance_id!r} is not registered; register it first", instance_id=instance_id
        )


class RequestIdConflictError(SageError):
    """The id was used before for something else."""

    reason = ErrorReason.REQUEST_ID_CONFLICT

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request id {request_id!r} was used before with a different body; choose another id",
            request_id=request_id,
        )


class StaleIncarnationError(SageError):
    """A newer incarnation of the instance is registered."""

    reason = ErrorReason.STALE_INCARNATION

    def __init__(self, instance_id: str, offered: int, registered: int) -> None:
        super().__init__(
            f"instance {instance_id!r} is registered with incarnation {registered}; {offered} is older: "
            "another agent owns this id",
            instance_id=instance_id,
        )


class DrainRefusedError(SageError):
    """The rest of the fleet could not carry the load of the instance to be drained.

    Args:
        instance_id: The instance.
        shortfalls: A clause, in figures, for everything that is missing.
    """

    reason = ErrorReason.DRAIN_REFUSED

    def __init__(self, instance_id: str, shortfalls: Sequence[str]) -> None:
        super().__init__(
            f"instance {instance_id!r} is not drained, as the rest of the fleet could not carry its load: "
            f"{'; '.join(shortfalls)}. Add instances, wait for less load, or use force to drain it "
            "all the same",
            instance_id=instance_id,
        )
        self.shortfalls = tuple(shortfalls)


class QueueFullError(SageError):
    """The queue is full, by count or by bytes."""

    reason = ErrorReason.QUEUE_FULL


class FleetFullError(SageError):
    """A bound on the number of registered instances was reached."""

    reason = ErrorReason.FLEET_FULL


class InfeasibleError(SageError):
    """A deadline or a budget cannot be met; carries the predicted figure."""

    reason = ErrorReason.INFEASIBLE


class SettingsVersionError(SageError):
    """Another version of the scheduling settings is in force, or one is not kept any more."""

    reason = ErrorReason.SETTINGS_VERSION_CONFLICT

    def __init__(self, message: str, *, version: int) -> None:
        super().__init__(message, version=str(version))
        self.version = version


class ShuttingDownError(SageError):
    """The control plane is going away, or has not started."""

    reason = ErrorReason.SHUTTING_DOWN


class IllegalTransitionError(SageError):
    """A state machine was asked for a step it does not have: a defect, with its history.

    Attributes:
        history: The states gone through, oldest first.
    """

    reason = ErrorReason.ILLEGAL_STATE

    def __init__(self, subject: str, history: Sequence[enum.Enum], target: enum.Enum) -> None:
        path = " -> ".join(state.name for state in history)
        super().__init__(f"{subject} cannot become {target.name}; its states so far: {path}")
        self.history = tuple(history)
        self.target = target


class IllegalOrderError(SageError):
    """An instance cannot be told to do this; says why, and what can be done instead."""

    reason = ErrorReason.ILLEGAL_STATE


class PermissionDeniedError(SageError):
    """The caller is not the one that it says it is."""

    reason = ErrorReason.PERMISSION_DENIED


class TokenIndexOutOfRangeError(SageError):
    """The stream position asked for does not exist."""

    reason = ErrorReason.TOKEN_INDEX_OUT_OF_RANGE


class TooManyStreamsError(SageError):
    """Too many streams read the same request at once."""

    reason = ErrorReason.TOO_MANY_STREAMS


class ReaderStalledError(SageError):
    """A reader of output took nothing for too long and was detached."""

    reason = ErrorReason.READER_STALLED


class NotImplementedYetError(SageError):
    """The operation exists in the contract and not in this version."""

    reason = ErrorReason.NOT_IMPLEMENTED


class RequestFailedError(SageError):
    """A request ended without success; carries its failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.reason = failure.reason  # type: ignore[misc]  # one class for every failure
        self.failure = failure
