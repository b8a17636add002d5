"""What the client gives to a program: plain values, no protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sagecp.core.engine_state import EngineProcess, LearnedPerformance, LoraAdapter
from sagecp.core.gpu import GpuFault
from sagecp.core.types import (
    EngineGauges,
    ExecutionInstance,
    FailoverMode,
    GpuReading,
    InstanceState,
    OpenAiApi,
    ParallelismType,
    PerformanceMetrics,
    PriceSource,
    RequestPriority,
    RequestState,
    RequestStatus,
    SchedulingDecision,
    Usage,
)


class RequestOptions(TypedDict, total=False):
    """What can be said of a request beside its text prompt. Everything is optional.

    Exactly one kind of prompt must be given: the text, ``messages``,
    ``token_ids`` or ``openai``. The sampling parameters are those of
    ``sagecp.v1.SamplingParameters``, which documents each with its range; an
    absent one means the engine's default.

    Keys:
        model: Served name; may be left out when exactly one model is served.
        messages: A conversation in the OpenAI form.
        tools, tool_choice: In the OpenAI form, with ``messages``.
        token_ids: Ids of the model's own tokenizer.
        openai: An endpoint and the JSON object to pass to it. Everything the
            engine should know must be in the object.
        request_id: Made by the client when absent.
        priority: Class of the request.
        deadline_s: From receipt to the last token; the request expires when it passes.
        ttft_s: Objective for the time to the first token.
        tpot_s: Objective for the time per output token after the first.
        cost_budget_usd: Most the request may cost.
        user_id, session_id, labels: For fairness, affinity and accounting.
        parallelism_hint, failover_mode: See ``sagecp.v1.RequestSpec``.
        include_openai_events: Also return the engine's own events.
        engine_extras: Fields of the engine's body that have no name here.
        structured_output: One of ``json_schema``, ``json_object``, ``regex``,
            ``grammar``, ``choice``, with its value.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: Any
    token_ids: Sequence[int]
    openai: tuple[OpenAiApi | str, Mapping[str, Any] | bytes | str]
    request_id: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    include_stop_str_in_output: bool
    truncate_prompt_tokens: int
    echo: bool
    structured_output: Mapping[str, Any]
    engine_extras: Mapping[str, Any]
    priority: RequestPriority | str
    deadline_s: float
    ttft_s: float
    tpot_s: float
    cost_budget_usd: float
    user_id: str
    session_id: str
    labels: Mapping[str, str]
    parallelism_hint: ParallelismType
    failover_mode: FailoverMode
    include_openai_events: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """How to speak TLS to the control plane.

    Attributes:
        ca_file: PEM of the authorities to trust; empty: those that gRPC ships.
        certificate_file: PEM chain to show to the server (mTLS).
        private_key_file: Its key.
        server_name: Name to expect in the server's certificate, where it is
            not the host of the address.
    """

    ca_file: str = ""
    certificate_file: str = ""
    private_key_file: str = ""
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output: all tokens of one choice that were waiting when it was sent.

    Attributes:
        text: The text. May be empty: a token can complete no character.
        first_token_index: Position of the first token in the whole request, from 0.
        token_count: Number of tokens.
        token_ids: Their ids, where the engine gives them.
        choice_index: Which choice, from 0.
        finish_reason: Set on the last chunk of a choice.
        stop_reason: The stop string or token that ended it, where known.
        epoch: Attempt that produced the tokens, from 1.
        openai_events: The engine's events behind this chunk, as JSON, when asked for.
    """

    text: str
    first_token_index: int = 0
    token_count: int = 0
    token_ids: tuple[int, ...] = ()
    choice_index: int = 0
    finish_reason: str = ""
    stop_reason: str = ""
    epoch: int = 1
    openai_events: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete output of a request."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    stop_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEnd:
    """How a stream ended: with success, or `RequestFailedError` would have been raised.

    Attributes:
        finish_reason: Of the first choice.
        usage: Tokens, for accounting.
        token_count: Tokens of the whole request.
        instance_id: Instance that produced the last attempt.
        status: All that is known of the request, times included.
    """

    request_id: str
    finish_reason: str
    usage: Usage
    token_count: int
    instance_id: str
    status: RequestStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A complete answer.

    Attributes:
        text: Of the first choice.
        finish_reason: Of the first choice.
        choices: Every choice.
        openai_events: The engine's events, when asked for.
        state: Always ``SUCCEEDED``; other ends raise.
    """

    request_id: str
    text: str
    finish_reason: str
    usage: Usage
    instance_id: str
    choices: tuple[Choice, ...]
    status: RequestStatus
    openai_events: tuple[bytes, ...] = ()
    state: RequestState = RequestState.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request was accepted.

    Attributes:
        created: Whether this call created it; false for a repetition.
    """

    request_id: str
    status: RequestStatus
    created: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What became of a request that was to be stopped.

    Attributes:
        cancelled: Whether this call ended it; false when it had ended before.
    """

    status: RequestStatus
    cancelled: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request went where it went: one decision per dispatch, oldest first. Times are Unix seconds."""

    status: RequestStatus
    decisions: tuple[SchedulingDecision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """An order that an instance takes no new work, and how far it is. Times are Unix seconds.

    Attributes:
        begin_time_s: When it was first ordered.
        grace_end_time_s: When requests that still run there are moved; ``None``: never.
        moved_request_count: Requests that went on elsewhere.
        forced: Whether it was ordered even if the rest of the fleet could not carry the load.
        cause: Why, for the record.
    """

    begin_time_s: float
    grace_end_time_s: float | None = None
    moved_request_count: int = 0
    forced: bool = False
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """An order that an engine sleeps.

    Attributes:
        begin_time_s: When it was ordered, Unix seconds.
        level: 1: weights in the host's memory. 2: weights dropped.
        asleep: Whether the engine says that it sleeps.
    """

    begin_time_s: float
    level: int = 1
    asleep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an instance costs, US dollars.

    Attributes:
        usd_per_gpu_hour: One of its GPUs for an hour.
        source: Where that comes from.
        busy_usd: What its time cost while it ran requests, since it registered.
        idle_usd: What its time cost while it ran none.
    """

    usd_per_gpu_hour: float
    source: PriceSource
    busy_usd: float = 0.0
    idle_usd: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance as the control plane sees it. Times are Unix seconds; ``None`` is unknown.

    Attributes:
        spec: What it is.
        state_reason: Why it is in this state, in a sentence.
        in_flight_request_count: Requests that the control plane has on it.
        gpu_absent_reason: Why there are no GPU readings.
        mean_ttft_s: Mean time to first token of its recent requests.
        drain: The order that it takes no new work; ``None``: there is none.
        gpu_faults: What is wrong with its GPUs. Times in Unix seconds.
        learned: How fast it is by what was seen of it, beside what its engine says.
        sleep: The order that its engine sleeps; ``None``: there is none.
        desired_lora_adapters: What it was told to have loaded; ``None``: nothing was said.
        engine_process: Its engine's process, where its agent supervises it.
        clock_offset_s: How far the clock of its agent is ahead of the control plane's.
        refused_heartbeat_count: Heartbeats of it that were refused.
        heartbeat_refusal: Why the last one was.
        price: The price in force; ``None``: no price is known.
    """

    spec: ExecutionInstance
    state: InstanceState
    state_reason: str = ""
    incarnation: int = 0
    in_flight_request_count: int = 0
    max_concurrent_request_count: int = 0
    engine: EngineGauges | None = None
    gpus: tuple[GpuReading, ...] = ()
    gpu_absent_reason: str = ""
    register_time_s: float = 0.0
    heartbeat_time_s: float | None = None
    lease_expire_time_s: float | None = None
    mean_ttft_s: float | None = None
    completed_request_count: int = 0
    failed_attempt_count: int = 0
    drain: Drain | None = None
    gpu_faults: tuple[GpuFault, ...] = ()
    learned: LearnedPerformance | None = None
    sleep: Sleep | None = None
    desired_lora_adapters: tuple[LoraAdapter, ...] | None = None
    engine_process: EngineProcess | None = None
    clock_offset_s: float | None = None
    refused_heartbeat_count: int = 0
    heartbeat_refusal: str = ""
    agent_version: str = ""
    price: Price | None = None

    @property
    def instance_id(self) -> str:
        """Its name."""
        return self.spec.instance_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """An instance was registered.

    Attributes:
        lease_duration_s: How long it lives without a heartbeat.
        heartbeat_interval_s: How often to send one.
    """

    instance: Instance
    lease_duration_s: float
    heartbeat_interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """How the fleet did over a window.

    Attributes:
        time_s: When, Unix seconds.
        overall: Everything together.
        groups: By value of the dimension that was asked for.
    """

    time_s: float
    window_s: float
    overall: PerformanceMetrics
    groups: Mapping[str, PerformanceMetrics] = field(default_factory=dict)
