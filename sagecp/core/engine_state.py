"""Engines as agents report them: condition, gauges, process, and what they can be told to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sagecp.core.duration_quantiles import DurationQuantiles


class EngineCondition(enum.IntEnum):
    """What was last heard of an engine's health; numbers equal the contract's."""

    UNKNOWN = 0
    STARTING = 1
    HEALTHY = 2
    UNHEALTHY = 3


class EngineCapability(enum.IntEnum):
    """Something that an engine can be told to do while it runs; numbers equal the contract's."""

    SLEEP = 1
    LORA = 2
    ABORT = 3
    SUPERVISED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGauges:
    """An engine's state as its metrics tell it; ``None`` is unknown, which is not zero.

    Counts of tokens, preemptions and finished requests run from the engine's start.

    Attributes:
        ttft: Of what finished since about a minute ago, as the engine measured it;
            the two after it likewise.
        loaded_lora_adapters: By name; empty: none, or unknown.
        running_lora_adapters: Those that running requests use.
        max_key_value_cache_usage: Of the fullest data-parallel rank.
    """

    running_request_count: int | None = None
    waiting_request_count: int | None = None
    key_value_cache_usage: float | None = None
    prefix_cache_query_token_count: int | None = None
    prefix_cache_hit_token_count: int | None = None
    prompt_token_count: int | None = None
    generation_token_count: int | None = None
    preemption_count: int | None = None
    finished_request_count: int | None = None
    sleeping: bool | None = None
    ttft: DurationQuantiles | None = None
    inter_token_latency: DurationQuantiles | None = None
    queue_wait: DurationQuantiles | None = None
    loaded_lora_adapters: tuple[str, ...] = ()
    running_lora_adapters: tuple[str, ...] = ()
    max_key_value_cache_usage: float | None = None


class EngineProcessState(enum.IntEnum):
    """Where the life of a supervised engine's process is; numbers equal the contract's."""

    STARTING = 1
    RUNNING = 2
    BACKING_OFF = 3
    STOPPING = 4
    STOPPED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """The process of an engine that its agent supervises. Times in Unix seconds.

    Attributes:
        process_id: 0: there is none now.
        start_time_s: When it was last started; ``None``: never.
        restart_count: How often it was started again since the agent started.
        last_exit_code: Of the last one that ended; negative: the signal that ended it.
        last_log_lines: Of that one, oldest first.
        next_start_time_s: When it is started again, while it is backing off.
    """

    state: EngineProcessState
    process_id: int = 0
    start_time_s: float | None = None
    restart_count: int = 0
    last_exit_code: int | None = None
    last_log_lines: tuple[str, ...] = ()
    next_start_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter, and the folder or repository where the engine finds it."""

    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPerformance:
    """How fast an instance is by what was seen of it.

    Attributes:
        kind: Kind of instance whose step-time model is used.
        observation_count: Of the kind's model; 0: it is a guess.
        slowdown: How many times as long as its kind it takes.
        single_step_s: Time of a step that decodes one sequence, as predicted.
        step_s: Of one that decodes as many as run there now.
        prefill_tokens_per_second: Of a long prompt alone, as predicted.
        ttft_s: That a request of 1,000 prompt tokens would have now, as predicted.
        prefill_request_count: Requests that wait for their first token there.
    """

    kind: str
    observation_count: int
    slowdown: float
    single_step_s: float
    step_s: float
    prefill_tokens_per_second: float
    ttft_s: float
    prefill_request_count: int = 0


@dataclass(frozen=True, slots=True)
class KvCacheUpdate:
    """What changed in an engine's prefix cache, by the hashes of blocks as digests of token ids have them.

    Attributes:
        sequence: Number of the update since the last reset, which has 1.
        reset: Whatever was known before is void.
        stored_block_hashes: Blocks that it has now, each after those that it builds on.
        removed_block_hashes: Blocks that it has no more, each after those that build on it.
    """

    sequence: int
    reset: bool = False
    stored_block_hashes: tuple[int, ...] = ()
    removed_block_hashes: tuple[int, ...] = ()
