"""How many tokens per second an engine gives when it is never idle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sagecp.core.parallelism.engine_options import EngineOptions


class StepTime(Protocol):
    """The duration of a step."""

    def step_s(
        self, token_count: float, decode_context_tokens: float = 0.0, token_pairs: float = 0.0
    ) -> float:
        """Return it, in seconds."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """A steady state of one copy.

    Attributes:
        output_tokens_per_second: Of all its requests together.
        requests_per_second: That end, and are taken up.
        running_request_count: Requests that decode at a time.
        step_s: Mean duration of a step, seconds: the time between two tokens of a request.
        limited_by: ``batch`` (the largest number of requests), ``memory`` (the KV cache),
            ``compute`` (prefill fills the steps), or ``load``: there are no more requests.
    """

    output_tokens_per_second: float
    requests_per_second: float
    running_request_count: float
    step_s: float
    limited_by: str


# vLLM admits requests until no block is free, and preempts when those grow: nearly all is used.
_FULL_SHARE = 0.95


def saturated_throughput(
    step_time: StepTime,
    key_value_token_capacity: float,
    prompt_token_count: float,
    output_token_count: float,
    options: EngineOptions,
    *,
    cached_token_count: float = 0.0,
    stage_count: int = 1,
    held_token_count: float | None = None,
) -> Throughput:
    """Return what one copy gives when requests never run out.

    See ``throughput_at``.
    """
    return throughput_at(
        step_time,
        float("inf"),
        key_value_token_capacity,
        prompt_token_count,
        output_token_count,
        options,
        cached_token_count=cached_token_count,
        stage_count=stage_count,
        held_token_count=held_token_count,
    )


def throughput_at(
    step_time: StepTime,
    concurrent_request_count: float,
    key_value_token_capacity: float,
    prompt_token_count: float,
    output_token_count: float,
    options: EngineOptions,
    *,
    cached_token_count: float = 0.0,
    stage_count: int = 1,
    held_token_count: float | None = None,
) -> Throughput:
    """Return what one copy gives with so many requests that follow each other without a pause.

    In the steady state ``n`` requests decode, and ``n / output`` requests end in each step and
    are replaced. Their prompts are computed in a share of the steps, whole or as far as the
    budget goes, beside the decodes; so a step has ``n (1 + prompt / output)`` tokens on average,
    at most the budget. ``n`` is what the budget, the batch, the memory and the load allow. With
    several pipeline stages as many batches share the memory and the requests, and each takes
    its turn.

    Args:
        step_time: Of the copy.
        concurrent_request_count: Requests at a time; infinite: any number.
        key_value_token_capacity: Tokens that fit the copy's KV cache.
        prompt_token_count: Mean prompt.
        output_token_count: Mean answer, from 1.
        options: Settings of the engine.
        cached_token_count: Leading tokens of the prompt that need no work.
        stage_count: Pipeline stages.
        held_token_count: Tokens that a request holds while it decodes, in the mean over time;
            ``None``: as if all requests had the mean lengths.
    """
    output = max(1.0, output_token_count)
    computed = max(0.0, prompt_token_count - cached_token_count)
    # The first token comes out of the prefill.
    per_decode = computed / output
    mean_context = held_token_count or prompt_token_count + output / 2.0
    limits = {
        "load": concurrent_request_count / stage_count,
        "batch": options.max_running_request_count / stage_count,
        "memory": _FULL_SHARE * key_value_token_capacity / stage_count / max(1.0, mean_context),
        "compute": options.max_batch_token_count / (1.0 + per_decode),
    }
    limited_by = min(limits, key=lambda name: limits[name])
    count = limits[limited_by]
    if count <= 0.0:
        return Throughput(0.0, 0.0, 0.0, float("inf"), limited_by)
    # Less than one: one of them, part of the time.
    running = max(1.0, count)
    context = running * mean_context
    step_s = step_time.step_s(running, context)
    prefill_per_step = running * per_decode
    if prefill_per_step > 0.0:
        # Prompts come whole, as far as the budget goes: few steps have much prefill, the others none.
        room = max(1.0, options.max_batch_token_count - running)
        chunk = min(room, max(computed, prefill_per_step))
        share = min(1.0, prefill_per_step / chunk)
        pairs = chunk * (prompt_token_count - computed / 2.0)
        step_s = (1.0 - share) * step_s + share * step_time.step_s(running + chunk, context, pairs)
    tokens_per_s = stage_count * count / step_s
    return Throughput(tokens_per_s, tokens_per_s / output, stage_count * count, step_s, limited_by)
