"""What happens to the core: the inputs of :meth:`Scheduler.handle`."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.engine_state import EngineProcess, KvCacheUpdate, LoraAdapter
from sagecp.core.errors import Failure
from sagecp.core.policy_replay import PolicyScore
from sagecp.core.settings import SettingsChange
from sagecp.core.types import EngineCondition, EngineGauges, ExecutionInstance, GpuReading, RequestMetadata


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A request asks to be accepted. Its id is set and not in use."""

    metadata: RequestMetadata


@dataclass(frozen=True, slots=True)
class RestoredRequest:
    """A request that was accepted before a restart.

    Attributes:
        metadata: What was asked.
        model: Served name that it waits for.
        arrival_s: When it arrived, on the core's clock: earlier than the clock's start, maybe.
        size_bytes: What it counts in the queue's byte bound.
        epoch: Number of its last attempt; 0: there was none.
        lost_instance_ids: Instances that lost an attempt of it.
        lost_attempt_count: Attempts lost, but for those that were moved on purpose.
        engine_kill_count: Engines that died of it, as far as could be told.
        has_output: Whether any attempt produced output.
        output_token_count: Tokens that exist.
        cannot_continue: Why another attempt could not go on after those; ``""``: it can.
    """

    metadata: RequestMetadata
    model: str
    arrival_s: float
    size_bytes: int
    epoch: int = 0
    lost_instance_ids: tuple[str, ...] = ()
    lost_attempt_count: int = 0
    engine_kill_count: int = 0
    has_output: bool = False
    output_token_count: int = 0
    cannot_continue: str = ""


@dataclass(frozen=True, slots=True)
class RequestsRestored:
    """Requests are there again after a restart, oldest first. None is refused."""

    requests: tuple[RestoredRequest, ...]


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
    """The first output of an attempt arrived.

    Attributes:
        prompt_token_count: Tokens of the prompt as the engine reads it; 0: it did not say,
            or nobody needs to know.
        prompt_block_hashes: The blocks of those tokens, as digests of token ids have them.
    """

    request_id: str
    epoch: int
    prompt_token_count: int = 0
    prompt_block_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """The engine said why it finished.

    Attributes:
        output_token_count: Tokens produced, over all choices.
        prompt_token_count: As the engine counted it; ``None``: unknown.
        cached_prompt_token_count: Prompt tokens that the engine had cached; ``None``: unknown.
        finish_reasons: Of every choice, as the engine said.
    """

    request_id: str
    epoch: int
    output_token_count: int = 0
    prompt_token_count: int | None = None
    cached_prompt_token_count: int | None = None
    finish_reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt ended without a finish reason.

    Attributes:
        retryable: Another attempt, elsewhere, could succeed.
        engine_down: There is proof that the engine does not answer at all.
        counts_against_engine: A 4xx never does.
        output_token_count: Tokens of the request that exist by now, over all attempts.
        cannot_continue: Why another attempt could not go on after those; ``""``: it can.
        engine_died: The engine worked on the attempt when it died.
        counts: Whether it is one of the attempts that a request may lose: one that
            was moved on purpose is not.
    """

    request_id: str
    epoch: int
    failure: Failure
    retryable: bool
    engine_down: bool = False
    counts_against_engine: bool = True
    output_token_count: int = 0
    cannot_continue: str = ""
    engine_died: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class InstanceRegistered:
    """An instance joins, or a newer incarnation replaces an older one.

    Attributes:
        incarnation: 0: no agent, no lease; its health is probed.
        condition: What is known of its engine.
        agent_version: ``""``: unknown, or there is no agent.
    """

    instance: ExecutionInstance
    incarnation: int = 0
    condition: EngineCondition = EngineCondition.UNKNOWN
    agent_version: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRestored:
    """An instance that was registered before a restart: its agent, if it has one, must come back.

    Attributes:
        draining: There is an order to drain it.
        sleep_level: Its engine is to sleep then; 0: it is not.
        lora_adapters: What it was told to have loaded; ``None``: nothing.
    """

    instance: ExecutionInstance
    incarnation: int = 0
    draining: bool = False
    sleep_level: int = 0
    lora_adapters: tuple[LoraAdapter, ...] | None = None


@dataclass(frozen=True, slots=True)
class InstanceDeregistered:
    """An instance leaves. ``incarnation`` 0: whichever is registered."""

    instance_id: str
    incarnation: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    """An agent reported.

    Attributes:
        gauges: ``None``: the engine's metrics could not be read.
        process: The engine's process; ``None``: the agent does not supervise it.
        order_trouble: What an order came to that did not work; ``""``: all work.
        agent_time_s: Time of the agent's clock, in Unix seconds; ``None``: unknown.
        clock_offset_s: How far that was ahead of ours when the report came.
        refusals: What of the report was no possible value and was left out, a clause each.
        kv_cache_update: What changed in the engine's prefix cache; ``None``: nothing, or it does not tell.
    """

    instance_id: str
    incarnation: int
    condition: EngineCondition
    condition_reason: str = ""
    gauges: EngineGauges | None = None
    gpus: tuple[GpuReading, ...] = ()
    gpu_absent_reason: str = ""
    process: EngineProcess | None = None
    order_trouble: str = ""
    agent_time_s: float | None = None
    clock_offset_s: float | None = None
    refusals: tuple[str, ...] = ()
    kv_cache_update: KvCacheUpdate | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatRefused:
    """A report of an instance was refused. ``why`` is for a person."""

    instance_id: str
    why: str


@dataclass(frozen=True, slots=True)
class HealthProbed:
    """The control plane probed an engine itself."""

    instance_id: str
    condition: EngineCondition
    condition_reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineSilent:
    """No attempt on an instance has produced output for a while."""

    instance_id: str
    silent_s: float


@dataclass(frozen=True, slots=True)
class EngineProbed:
    """The engine was asked for one token, as :class:`~sagecp.core.effects.ProbeEngine` wanted.

    Attributes:
        answered: It gave one in time.
        detail: Otherwise, what went wrong.
    """

    instance_id: str
    answered: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator wants no new work on an instance, or wants that undone.

    Attributes:
        undo: Take work again; the rest but the incarnation says nothing then.
        incarnation: Which one is meant; 0: whichever is registered.
        grace_s: After this time, what still runs there is moved; ``None``: never.
        force: Even if the rest of the fleet could not carry the load.
        cause: Why, for the record.
        sleep_level: Have its engine sleep once it is drained: 1 keeps the weights in the
            host's memory, 2 drops them; 0: it stays awake.
    """

    instance_id: str
    undo: bool = False
    incarnation: int = 0
    grace_s: float | None = None
    force: bool = False
    cause: str = ""
    sleep_level: int = 0


@dataclass(frozen=True, slots=True)
class LoraAdaptersRequested:
    """An operator says which LoRA adapters an engine should have; ``None``: nothing any more."""

    instance_id: str
    adapters: tuple[LoraAdapter, ...] | None


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
class ClockSkipped:
    """The control plane itself stood still: nobody could be heard meanwhile.

    Attributes:
        gap_s: For how long.
    """

    gap_s: float


@dataclass(frozen=True, slots=True)
class ClockAdvanced:
    """Time passed: deadlines and leases are looked at."""


Event = (
    RequestArrived
    | RequestsRestored
    | RequestCancelled
    | RequestAborted
    | AttemptProgressed
    | AttemptSucceeded
    | AttemptFailed
    | InstanceRegistered
    | InstanceRestored
    | InstanceDeregistered
    | HeartbeatReceived
    | HeartbeatRefused
    | HealthProbed
    | EngineSilent
    | EngineProbed
    | DrainRequested
    | LoraAdaptersRequested
    | SchedulingConfigured
    | PoliciesEvaluated
    | ClockSkipped
    | ClockAdvanced
)
