"""Values that the whole system speaks in. No behaviour beyond what follows from their fields."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sagecp.core.duration_quantiles import NO_DURATIONS, DurationQuantiles
from sagecp.core.engine_state import EngineCapability, EngineCondition, EngineGauges
from sagecp.core.errors import ErrorReason, Failure, FieldViolation
from sagecp.core.gpu import GpuDevice, GpuReading
from sagecp.core.request_cost import RequestCost

if TYPE_CHECKING:
    from sagecp.core.placement import PlacementInputs
    from sagecp.core.prediction.step_time import StepTimeParameters

__all__ = [
    "AttemptRecord",
    "CandidateScore",
    "ControlPlaneStatus",
    "Durability",
    "DurationQuantiles",
    "EngineCapability",
    "EngineCondition",
    "EngineGauges",
    "ErrorReason",
    "ExecutionInstance",
    "FailoverMode",
    "Failure",
    "FieldViolation",
    "GpuDevice",
    "GpuReading",
    "InstanceState",
    "LoopStatus",
    "OpenAiApi",
    "ParallelismType",
    "PerformanceMetrics",
    "PriceSource",
    "PromptDigest",
    "RecentFault",
    "RequestCost",
    "RequestMetadata",
    "RequestPriority",
    "RequestState",
    "RequestStatus",
    "SamplingParameters",
    "SchedulingDecision",
    "Usage",
]


class RequestPriority(enum.IntEnum):
    """Classes of requests; a smaller number is more important. Numbers equal the contract's."""

    CRITICAL = 1
    HIGH = 2
    NORMAL = 3
    LOW = 4
    BACKGROUND = 5


class RequestState(enum.IntEnum):
    """Life cycle of a request; numbers equal the contract's. Transitions are in `core.states`."""

    QUEUED = 1
    DISPATCHED = 2
    RUNNING = 3
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6
    EXPIRED = 7

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return self >= RequestState.SUCCEEDED


class InstanceState(enum.IntEnum):
    """Life cycle of an instance; numbers equal the contract's. Transitions are in `core.states`."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    DRAINED = 4
    UNHEALTHY = 5
    LOST = 6


class ParallelismType(enum.Enum):
    """Ways to spread a model over GPUs."""

    TENSOR = "tensor"
    PIPELINE = "pipeline"
    DATA = "data"
    EXPERT = "expert"
    HYBRID = "hybrid"


class PriceSource(enum.IntEnum):
    """Where the price of an instance comes from; numbers equal the contract's."""

    UNKNOWN = 0
    INSTANCE = 1
    GPU_KIND = 2
    DEFAULT = 3
    USUAL = 4


class FailoverMode(enum.IntEnum):
    """What happens when an engine is lost; numbers equal the contract's."""

    DEFAULT = 0
    CONTINUE = 1
    RESTART = 2
    FAIL = 3


class Durability(enum.IntEnum):
    """What must survive a restart of the control plane; numbers equal the contract's."""

    DEFAULT = 0
    DURABLE = 1
    EPHEMERAL = 2


class OpenAiApi(enum.IntEnum):
    """Engine endpoint that an opaque body is meant for; numbers equal the contract's."""

    COMPLETIONS = 1
    CHAT_COMPLETIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How tokens are chosen. ``None`` and empty mean the engine's default.

    The fields are those of ``sagecp.v1.SamplingParameters``, which documents
    each with its range. ``structured_output`` is a mapping with exactly one of
    ``json_schema``, ``json_object``, ``regex``, ``grammar``, ``choice``.
    """

    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool | None = None
    structured_output: Mapping[str, Any] = field(default_factory=dict)
    engine_extras: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_SAMPLING = SamplingParameters()


@dataclass(frozen=True, slots=True)
class PromptDigest:
    """Length and content of a prompt, without its text.

    Attributes:
        token_count: Tokens, exact or estimated.
        block_hashes: One number per full block from its start; equal numbers mean equal
            content, and equal content before it.
        block_token_count: Tokens in a block.
    """

    token_count: int
    block_hashes: tuple[int, ...] = ()
    block_token_count: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetadata:
    """What a user asks for.

    At most one of ``prompt``, ``messages``, ``prompt_token_ids`` and
    ``openai_body`` may be given. With none of them the engine is sent an empty
    prompt and judges it: vLLM refuses it, and the request ends as FAILED. (The
    gRPC edge asks for a prompt.)

    Attributes:
        request_id: Chosen by the caller so that a repetition is recognised;
            empty: made by the control plane.
        model_name: Served model name; may be empty when exactly one is served.
        prompt: Plain text.
        messages: A conversation, each message in the OpenAI form.
        tools: Tools in the OpenAI form, with ``messages``.
        tool_choice: In the OpenAI form, with ``tools``.
        prompt_token_ids: Ids of the model's own tokenizer.
        openai_body: A JSON object passed to the engine, with ``openai_api``.
        max_tokens: Most tokens per choice; ``None``: the engine's default.
        slo_deadline_ms: From receipt to the last token; the request expires when it passes.
        ttft_slo_ms: Objective from receipt to the first token.
        tpot_slo_ms: Objective for (end-to-end - TTFT) / (output tokens - 1).
        cost_budget: Most the request may cost, US dollars.
        user_id: End user, for fairness and affinity. Not an identity.
        session_id: Requests of one session prefer one instance under affinity.
        tenant_id: Owner, from the credential at the edge.
        include_openai_events: Keep every engine event's JSON for the reader.
        prompt_digest: Length and content of the prompt where they are known
            better than from the prompt itself; ``None``: they are estimated from it.
    """

    request_id: str = ""
    model_name: str = ""
    prompt: str | None = field(default=None, repr=False)
    messages: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    tool_choice: Any = field(default=None, repr=False)
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    openai_body: bytes = field(default=b"", repr=False)
    openai_api: OpenAiApi | None = None
    max_tokens: int | None = None
    sampling: SamplingParameters = DEFAULT_SAMPLING
    priority: RequestPriority = RequestPriority.NORMAL
    slo_deadline_ms: float | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    cost_budget: float | None = None
    user_id: str = ""
    session_id: str = ""
    tenant_id: str = ""
    parallelism_hint: ParallelismType | None = None
    failover_mode: FailoverMode = FailoverMode.DEFAULT
    durability: Durability = Durability.DEFAULT
    labels: Mapping[str, str] = field(default_factory=dict)
    include_openai_events: bool = False
    prompt_digest: PromptDigest | None = field(default=None, repr=False)

    @property
    def paying_tenant(self) -> str:
        """Whose share of the queue and of the engines it counts against; ``""``: nobody is named."""
        return self.tenant_id or self.user_id

    @property
    def choice_count(self) -> int:
        """Number of choices the typed parameters ask for (an opaque body may say otherwise)."""
        return self.sampling.n or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionInstance:
    """An engine that can run requests: what its agent, or an operator, says of it.

    Attributes:
        instance_id: Name, unique in the fleet.
        host: Host of the engine.
        port: Port of the engine.
        scheme: ``http`` or ``https``.
        model_name: Served model name.
        model_aliases: Further served names (aliases, LoRA adapters).
        gpu_memory_gb: Memory of one GPU, GiB; ``None``: unknown.
        max_context_token_count: Longest context; ``None``: unknown.
        key_value_token_capacity: Tokens that fit the KV cache; ``None``: unknown.
        max_concurrent_request_count: Most requests on the engine at once;
            ``None``: the control plane's default.
        usd_per_gpu_hour: Price of one GPU; ``None``: unknown.
        api_key: Bearer token for the engine. Never shown or logged.
        step_time: What is known of its speed; ``None``: a prior for its GPU and
            model is used. Either way it is learned from there.
        gpu_devices: The GPUs it runs on, as far as its agent knows them.
        engine_configuration: Settings that tell apart two engines of one version.
        engine_capabilities: What the engine can be told to do.
    """

    instance_id: str
    host: str
    port: int
    model_name: str
    scheme: str = "http"
    model_aliases: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    gpu_count: int = 0
    gpu_memory_gb: float | None = None
    gpu_name: str = ""
    max_context_token_count: int | None = None
    key_value_token_capacity: int | None = None
    max_concurrent_request_count: int | None = None
    engine_kind: str = "vllm"
    engine_version: str = ""
    usd_per_gpu_hour: float | None = None
    host_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    api_key: str = field(default="", repr=False)
    step_time: StepTimeParameters | None = None
    gpu_devices: tuple[GpuDevice, ...] = ()
    engine_configuration: Mapping[str, str] = field(default_factory=dict)
    engine_capabilities: frozenset[EngineCapability] = frozenset()

    @property
    def engine_url(self) -> str:
        """Scheme, host and port; an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def served_models(self) -> tuple[str, ...]:
        """Every name under which the instance takes requests."""
        return (self.model_name, *self.model_aliases)


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """How one instance compared in a decision; lower is better."""

    instance_id: str
    score: float
    terms: Mapping[str, float] = field(default_factory=dict)
    excluded_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingDecision:
    """The receipt of one dispatch.

    Attributes:
        epoch: Number of the attempt, from 1.
        decision_time_s: On the core's clock.
        queue_wait_s: How long the request had waited.
        reason: Why, in a sentence.
        candidates: The best candidates, best first.
        candidate_count: Instances that could have taken the request.
        policy_in_force: The policy that decided, where ``scheduling_policy`` chooses among others.
        inputs: What the choice was made from; the same inputs give the same choice.
    """

    request_id: str
    epoch: int
    instance_id: str
    decision_time_s: float = 0.0
    queue_wait_s: float = 0.0
    scheduling_policy: str = ""
    routing_strategy: str = ""
    load_balancer: str = ""
    config_version: int = 1
    reason: str = ""
    candidates: tuple[CandidateScore, ...] = ()
    candidate_count: int = 0
    policy_in_force: str = ""
    inputs: PlacementInputs | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; ``None`` is unknown."""

    prompt_token_count: int | None = None
    completion_token_count: int = 0
    cached_prompt_token_count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One execution of a request on an instance. Times are Unix seconds."""

    epoch: int
    instance_id: str
    dispatch_time_s: float
    end_time_s: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """What is known of a request at one moment. Times are Unix seconds."""

    request_id: str
    state: RequestState
    model_name: str
    priority: RequestPriority
    create_time_s: float
    user_id: str = ""
    session_id: str = ""
    tenant_id: str = ""
    dispatch_time_s: float | None = None
    first_token_time_s: float | None = None
    end_time_s: float | None = None
    deadline_time_s: float | None = None
    instance_id: str = ""
    attempts: tuple[AttemptRecord, ...] = ()
    usage: Usage = Usage()
    finish_reason: str = ""
    failure: Failure | None = None
    queue_position: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    cost: RequestCost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceMetrics:
    """How the fleet does. Rates and quantiles are over a window, counts since the start.

    ``None`` means that nothing reports the figure.
    """

    total_requests: int = 0
    completed_requests: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0
    active_requests: int = 0
    queued_requests: int = 0
    avg_latency_ms: float = 0.0
    p50_latency_ms: float = 0.0
    p95_latency_ms: float = 0.0
    p99_latency_ms: float = 0.0
    latency: DurationQuantiles = NO_DURATIONS
    ttft: DurationQuantiles = NO_DURATIONS
    tpot: DurationQuantiles = NO_DURATIONS
    queue_wait: DurationQuantiles = NO_DURATIONS
    tokens_per_second: float = 0.0
    requests_per_second: float = 0.0
    average_gpu_utilization: float | None = None
    total_gpu_memory_gb: float | None = None
    used_gpu_memory_gb: float | None = None
    slo_violations: int = 0
    slo_compliance_rate: float | None = None
    cost_usd: float | None = None
    usd_per_million_output_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class RecentFault:
    """Something that went wrong. Time is Unix seconds."""

    time_s: float
    message: str
    instance_id: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """One of the periodic loops of the server. ``last_run_time_s`` in Unix seconds; ``None``: not yet."""

    name: str
    interval_s: float
    last_run_time_s: float | None = None
    run_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlaneStatus:
    """State of the control plane at one moment.

    Attributes:
        queued_count_by_tenant: Of the tenants with the most that waits.
        refused_heartbeat_count_by_reason: Since the start, by the name of the reason.
        cpu_seconds: CPU time of the process since it started.
        resident_memory_bytes: Memory of the process; 0: unknown.
        last_event_sequence: Of the latest event.
    """

    version: str
    start_time_s: float
    uptime_s: float
    accepting: bool
    scheduling_policy: str
    routing_strategy: str
    load_balancer: str
    config_version: int
    policy_reason: str
    instance_count_by_state: Mapping[str, int]
    queued_count_by_model: Mapping[str, int]
    queued_count_by_priority: Mapping[str, int]
    active_requests: int
    queued_requests: int
    queue_capacity: int
    event_loop_lag_s: float
    models: tuple[str, ...]
    recent_faults: tuple[RecentFault, ...]
    queued_count_by_tenant: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[LoopStatus, ...] = ()
    heartbeat_count: int = 0
    refused_heartbeat_count_by_reason: Mapping[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    resident_memory_bytes: int = 0
    last_event_sequence: int = 0
    lease_duration_s: float = 0.0
