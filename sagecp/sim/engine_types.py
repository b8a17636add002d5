"""What goes through an engine model: its limits, its requests, and its totals."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sagecp.sim.kv_cache import BlockTable


class TokenChooser(Protocol):
    """Chooses a request's tokens."""

    def next_token(self, may_end: bool) -> int:
        """Return the next token; the end token only if it may end."""


class RequestState(enum.Enum):
    """Where a request is in the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    STALLED = "stalled"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine can hold.

    Attributes:
        kv_token_capacity: Tokens in the KV cache.
        max_running_requests: Requests in one batch.
        max_batch_tokens: Token budget of one step.
        block_size: Tokens in a KV block.
        prefix_caching: Whether prompts share blocks.
    """

    kv_token_capacity: int
    max_running_requests: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_token_capacity", "max_running_requests", "max_batch_tokens", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.kv_token_capacity < self.block_size:
            raise ValueError(
                f"a KV cache of {self.kv_token_capacity} tokens holds no block of {self.block_size} tokens"
            )


class EngineRequest:
    """One sequence in the engine, and what happened to it.

    Attributes:
        request_id: Unique among the engine's live requests.
        tokens: Prompt and output so far.
        prompt_token_count: Leading tokens that are the prompt.
        max_tokens: Output tokens after which it ends.
        min_tokens: Output tokens before which it may not end by itself.
        context: The caller's own; never read here.
        output_token_count: Tokens emitted.
        cached_token_count: Prompt tokens found in the prefix cache at admission, -1 before it.
        preemption_count: How often it lost its blocks.
        finish_reason: ``stop``, ``length``, or what the caller gave; empty while it lives.
        stop_token_id: The stop token that ended it, else ``None``.
        arrival_s: When it was added.
        scheduled_s: When it first ran; negative before.
        first_token_s: When it emitted its first token; negative before.
        last_token_s: When it emitted its latest token.
        token_gap_s: Seconds between its latest two tokens.
    """

    __slots__ = (
        "arrival_s",
        "cached_token_count",
        "capacity",
        "chooser",
        "chunk",
        "computed",
        "context",
        "end_token_ids",
        "finish_reason",
        "first_token_s",
        "last_token_s",
        "max_tokens",
        "min_tokens",
        "next_commit",
        "output_token_count",
        "preemption_count",
        "prompt_token_count",
        "request_id",
        "scheduled_s",
        "state",
        "stop_token_id",
        "table",
        "token_gap_s",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        chooser: TokenChooser,
        *,
        end_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        context: object = None,
    ) -> None:
        self.request_id = request_id
        self.tokens = list(prompt_token_ids)
        self.prompt_token_count = len(self.tokens)
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self.chooser = chooser
        self.end_token_ids = end_token_ids
        self.context = context
        self.state = RequestState.WAITING
        self.output_token_count = 0
        self.cached_token_count = -1
        self.preemption_count = 0
        self.finish_reason = ""
        self.stop_token_id: int | None = None
        self.arrival_s = self.scheduled_s = self.first_token_s = self.last_token_s = -1.0
        self.token_gap_s = 0.0
        # Tokens whose keys and values are computed; room in the table; this step's share.
        self.computed = self.capacity = self.chunk = 0
        # The count of computed tokens at which the next block is full.
        self.next_commit = 0
        self.table: BlockTable | None = None

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens emitted so far."""
        return self.tokens[self.prompt_token_count :]


TokenOutput = tuple[EngineRequest, int, str]
"""One token of one request: the request, the token, and a finish reason if it is the last, else ``""``."""


@dataclass(slots=True)
class EngineCounters:
    """What the engine did since it started.

    Attributes:
        steps: Steps finished.
        preemptions: Requests that lost their blocks.
        prefix_queries: Prompt tokens looked up in the prefix cache.
        prefix_hits: Prompt tokens found there.
        prompt_tokens: Prompt tokens of requests whose prefill ended.
        cached_prompt_tokens: Those of them that came from the prefix cache.
        generation_tokens: Tokens emitted.
    """

    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
