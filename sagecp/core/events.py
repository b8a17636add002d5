"""What happens to the core: the inputs of :meth:`Scheduler.handle`."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.errors import Failure
from sagecp.core.policy_replay import PolicyScore
from sagecp.core.settings import SettingsChange
from sagecp.core.types import EngineCondition, EngineGauges, ExecutionInstance, GpuReading, RequestMetadata


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A request asks to be accepted. Its id is set and not in use."""

    metadata: RequestMetadata


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Somebody who may wants the request stopped."""

    request_id: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """The control plane itself gives the request up, for example because it shuts down."""

    request_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class AttemptProgressed:
    """The first output of an attempt arrived."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """The engine said why it finished.

    Attributes:
        output_token_count: Tokens produced, over all choices.
        prompt_token_count: As the engine counted it; ``None``: unknown.
        cached_prompt_token_count: Prompt tokens that the engine had cached; ``None``: unknown.
    """

    request_id: str
    epoch: int
    output_token_count: int = 0
    prompt_token_count: int | None = None
    cached_prompt_token_count: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt ended without a finish reason.

    Attributes:
        retryable: Another attempt, elsewhere, could succeed.
        engine_down: There is proof that the engine does not answer at all.
        counts_against_engine: A 4xx never does.
    """

    request_id: str
    epoch: int
    failure: Failure
    retryable: bool
    engine_down: bool = False
    counts_against_engine: bool = True


@dataclass(frozen=True, slots=True)
class InstanceRegistered:
    """An instance joins, or a newer incarnation replaces an older one.

    Attributes:
        incarnation: 0: no agent, no lease; its health is probed.
        condition: What is known of its engine.
    """

    instance: ExecutionInstance
    incarnation: int = 0
    condition: EngineCondition = EngineCondition.UNKNOWN


@dataclass(frozen=True, slots=True)
class InstanceDeregistered:
    """An instance leaves. ``incarnation`` 0: whichever is registered."""

    instance_id: str
    incarnation: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    """An agent reported. ``gauges`` ``None``: the engine's metrics could not be read."""

    instance_id: str
    incarnation: int
    condition: EngineCondition
    condition_reason: str = ""
    gauges: EngineGauges | None = None
    gpus: tuple[GpuReading, ...] = ()
    gpu_absent_reason: str = ""


@dataclass(frozen=True, slots=True)
class HealthProbed:
    """The control plane probed an engine itself."""

    instance_id: str
    condition: EngineCondition
    condition_reason: str = ""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator wants no new work on an instance, or wants that undone."""

    instance_id: str
    undo: bool = False


@dataclass(frozen=True, slots=True)
class SchedulingConfigured:
    """The settings change while the core runs."""

    change: SettingsChange


@dataclass(frozen=True, slots=True)
class PoliciesEvaluated:
    """A replay was made. ``scores`` empty: it could not be."""

    evaluation_id: int
    scores: tuple[PolicyScore, ...] = ()


@dataclass(frozen=True, slots=True)
class ClockAdvanced:
    """Time passed: deadlines and leases are looked at."""


Event = (
    RequestArrived
    | RequestCancelled
    | RequestAborted
    | AttemptProgressed
    | AttemptSucceeded
    | AttemptFailed
    | InstanceRegistered
    | InstanceDeregistered
    | HeartbeatReceived
    | HealthProbed
    | DrainRequested
    | SchedulingConfigured
    | PoliciesEvaluated
    | ClockAdvanced
)
