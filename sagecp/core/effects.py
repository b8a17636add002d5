"""What the core wants done: the outputs of :meth:`Scheduler.handle`."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.engine_state import EngineProcess
from sagecp.core.errors import Failure, SageError
from sagecp.core.gpu import GpuFault
from sagecp.core.policy_replay import PolicyReplay
from sagecp.core.request import RequestRecord
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import InstanceState, RequestState, SchedulingDecision


@dataclass(frozen=True, slots=True)
class RequestAccepted:
    """The request waits, or is dispatched by a later effect of the same step."""

    record: RequestRecord


@dataclass(frozen=True, slots=True)
class RequestRejected:
    """The request was refused and is not known to the core."""

    request_id: str
    error: SageError


@dataclass(frozen=True, slots=True)
class DispatchAttempt:
    """Run the request on the instance."""

    record: RequestRecord
    epoch: int
    instance_id: str
    decision: SchedulingDecision


@dataclass(frozen=True, slots=True)
class AbortAttempt:
    """Stop the engine's work for the request, at once."""

    request_id: str
    epoch: int
    instance_id: str


@dataclass(frozen=True, slots=True)
class InterruptAttempt:
    """Stop the engine's work for an attempt, so that the request goes on elsewhere.

    Answered with :class:`~sagecp.core.events.AttemptFailed`, unless the attempt is over already.

    Attributes:
        request_id: The request.
        epoch: The attempt.
        instance_id: Where it runs.
        failure: Why.
        must_stop: Stop it even if the request cannot go on elsewhere and fails by it.
            Otherwise such an attempt is left alone.
        counts: Whether it is one of the attempts that a request may lose.
    """

    request_id: str
    epoch: int
    instance_id: str
    failure: Failure
    must_stop: bool
    counts: bool


@dataclass(frozen=True, slots=True)
class RequestRequeued:
    """An attempt was lost; the request waits for another."""

    record: RequestRecord
    failure: Failure


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The request reached its one terminal state and is no longer known to the core."""

    record: RequestRecord
    state: RequestState
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    """An instance changed its state. ``previous`` ``None``: it joined."""

    instance_id: str
    state: InstanceState
    previous: InstanceState | None
    reason: str


@dataclass(frozen=True, slots=True)
class InstanceRemoved:
    """An instance is gone."""

    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class GpuFaultBegan:
    """A GPU of an instance has a fault, or it became worse.

    Attributes:
        outcome: ``"out"``: the instance is out of the rotation for it; ``""``: that
            is not called for; else why it stays in all the same.
    """

    instance_id: str
    fault: GpuFault
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class GpuFaultCleared:
    """A GPU's fault is over."""

    instance_id: str
    fault: GpuFault


@dataclass(frozen=True, slots=True)
class EngineProcessChanged:
    """The process of a supervised engine ended, was started, or is well."""

    instance_id: str
    previous: EngineProcess | None
    process: EngineProcess


@dataclass(frozen=True, slots=True)
class ClockSkewChanged:
    """The clocks of an agent and of the control plane came apart, or together again.

    Attributes:
        offset_s: How far the agent's is ahead.
        skewed: Whether they are far apart.
    """

    instance_id: str
    offset_s: float
    skewed: bool


@dataclass(frozen=True, slots=True)
class OrderTroubled:
    """An agent could not carry out what its instance was told to do."""

    instance_id: str
    trouble: str


@dataclass(frozen=True, slots=True)
class ProbeEngine:
    """Ask the engine for one token, and answer with :class:`~sagecp.core.events.EngineProbed`.

    A hung engine says that it is well; only work shows that it works.
    """

    instance_id: str


@dataclass(frozen=True, slots=True)
class FailStaticChanged:
    """Most leases ended together, and instances stay where they are; or that is over."""

    active: bool
    why: str


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """New settings are in force."""

    settings: SchedulingSettings


@dataclass(frozen=True, slots=True)
class EvaluatePolicies:
    """Replay the last arrivals under each candidate, and answer with :class:`PoliciesEvaluated`.

    Late answers and none are fine: another replay is asked for when this one is out of date.
    """

    replay: PolicyReplay


@dataclass(frozen=True, slots=True)
class PolicySwitched:
    """The adaptive policy lets another policy decide; the settings stay as they are."""

    previous: str
    policy: str
    why: str


Effect = (
    RequestAccepted
    | RequestRejected
    | DispatchAttempt
    | AbortAttempt
    | InterruptAttempt
    | RequestRequeued
    | RequestEnded
    | InstanceChanged
    | InstanceRemoved
    | GpuFaultBegan
    | GpuFaultCleared
    | EngineProcessChanged
    | ClockSkewChanged
    | OrderTroubled
    | ProbeEngine
    | FailStaticChanged
    | SettingsChanged
    | EvaluatePolicies
    | PolicySwitched
)
