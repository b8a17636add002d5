"""What goes through a fleet engine, what comes out of it, and what it counts."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class EngineJob:
    """One request as a fleet engine sees it: lengths and the contents of its blocks.

    Attributes:
        request_id: Unique among the engine's live jobs.
        prompt_token_count: Tokens of the prompt, at least 1.
        output_token_count: Tokens after which it ends, at least 1.
        block_hashes: Content ids of its leading full blocks, equal where all
            tokens up to the block's end are equal. Ids beyond the prompt's
            full blocks are ignored, and so are those from a repetition on.
        added_s: When it was added. This and all below are set by the engine; negative means not yet.
        scheduled_s: When its first step began.
        first_token_s: When it had its first token.
        finish_s: When it had its last token.
        cached_token_count: Prompt tokens found in the prefix cache when it was first scheduled.
        preemption_count: How often it lost its blocks.
    """

    request_id: str
    prompt_token_count: int
    output_token_count: int
    block_hashes: tuple[int, ...] = ()
    added_s: float = -1.0
    scheduled_s: float = -1.0
    first_token_s: float = -1.0
    finish_s: float = -1.0
    cached_token_count: int = -1
    preemption_count: int = 0


class NewsKind(enum.IntEnum):
    """What happened to a job."""

    FIRST_TOKEN = 0
    FINISHED = 1


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened to a job.

    Attributes:
        time_s: When.
        kind: What.
        job: To whom.
    """

    time_s: float
    kind: NewsKind
    job: EngineJob


@dataclass(slots=True)
class FleetCounters:
    """What an engine did since it started.

    Attributes:
        steps: Steps finished.
        preemptions: Jobs that lost their blocks.
        prefix_query_tokens: Prompt tokens looked up in the prefix cache.
        prefix_hit_tokens: Prompt tokens found there.
        prompt_tokens: Prompt tokens of jobs that had their first token.
        generation_tokens: Tokens generated.
        busy_s: Seconds in finished steps.
    """

    steps: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    busy_s: float = 0.0


class Stage(enum.IntEnum):
    """What a sequence is doing."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2


class EngineSequence:
    """A job inside an engine: the engine's own notes on it.

    Attributes:
        job: The job.
        contents: Content ids of the blocks that can be shared.
        stage: What it is doing.
        order: Number of its latest admission.
        target_token_count: Tokens to compute before its next token, in prefill: the prompt
            and, after a preemption, the output so far.
        computed_token_count: Tokens computed, in prefill.
        produced_token_count: Output tokens, outside decode.
        tick_offset: Tokens computed minus the batch's ticks, in decode.
        end_tick: The tick of its last token, in decode.
        held: Known contents that it holds.
        committed_block_count: Leading contents that are known or were found to be.
    """

    __slots__ = (
        "committed_block_count",
        "computed_token_count",
        "contents",
        "end_tick",
        "held",
        "job",
        "order",
        "produced_token_count",
        "stage",
        "target_token_count",
        "tick_offset",
    )

    def __init__(self, job: EngineJob, contents: tuple[int, ...]) -> None:
        self.job = job
        self.contents = contents
        self.stage = Stage.WAITING
        self.order = -1
        self.target_token_count = job.prompt_token_count
        self.computed_token_count = 0
        self.produced_token_count = 0
        self.tick_offset = 0
        self.end_tick = 0
        self.held: list[int] = []
        self.committed_block_count = 0
