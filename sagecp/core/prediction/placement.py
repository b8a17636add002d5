"""What a request would meet on an instance: predicted times, from two rows of numbers."""

# ruff: noqa: FURB136, PLR1730 (see predict)
from __future__ import annotations

import math
from typing import NamedTuple

from sagecp.core.placement import CandidateRow, RequestRow

# Token budget of one engine step: vLLM's default for online serving.
BATCH_TOKEN_COUNT = 2048
_SQRT_2 = math.sqrt(2.0)


class Prediction(NamedTuple):
    """Predicted times on one instance, in seconds.

    Attributes:
        ttft_s: From a dispatch now to the first token.
        tpot_s: Between tokens after it.
        work_s: Engine time that the prompt's uncached part costs by itself.
    """

    ttft_s: float
    tpot_s: float
    work_s: float


def predict(request: RequestRow, candidate: CandidateRow) -> Prediction:
    """Predict what the request would meet.

    Time to first token: what is left of the prefill work before it, half of the
    step in progress, then its own chunks, each a step that all decodes share.
    Time per output token: decode steps and prefill steps alternate as of late:
    ``1 / (phi / t_prefill_step + (1 - phi) / t_decode_step)``.
    """
    # The formulas of StepTimeParameters, written out: each candidate of each placement comes through
    # here, and calls, max() included, would be half of what it costs. A test holds both to equal results.
    step = candidate.step_time
    overhead_s, context_per_token_s = step.overhead_s, step.context_per_token_s
    memory_base_s, memory_per_token_s = step.memory_base_s, step.memory_per_token_s
    compute_base_s, compute_per_token_s = step.compute_base_s, step.compute_per_token_s
    prompt = request.prompt_token_count
    uncached = prompt - candidate.cached_token_count
    if uncached < 1:
        uncached = 1
    decodes = candidate.decode_count
    context = candidate.context_token_count
    # step.decode_step_s(decodes + 1, context + prompt)
    memory_s = memory_base_s + memory_per_token_s * (decodes + 1)
    compute_s = compute_base_s + compute_per_token_s * (decodes + 1)
    linear_s = memory_s if memory_s > compute_s else compute_s
    decode_step_s = overhead_s + linear_s + context_per_token_s * (context + prompt)
    # step.prefill_s(uncached, prompt, decodes, context, BATCH_TOKEN_COUNT)
    room = BATCH_TOKEN_COUNT - decodes
    if room < 1:
        room = 1
    full_step_count = math.ceil(uncached / room) - 1
    last_token_count = decodes + uncached - full_step_count * room
    memory_s = memory_base_s + memory_per_token_s * last_token_count
    compute_s = compute_base_s + compute_per_token_s * last_token_count
    linear_s = memory_s if memory_s > compute_s else compute_s
    if full_step_count:
        memory_s = memory_base_s + memory_per_token_s * (decodes + room)
        compute_s = compute_base_s + compute_per_token_s * (decodes + room)
        linear_s += full_step_count * (memory_s if memory_s > compute_s else compute_s)
    per_step_s = overhead_s + context_per_token_s * context
    pair_count = prompt - 0.5 * uncached
    if pair_count < 0.0:
        pair_count = 0.0
    own_s = (full_step_count + 1) * per_step_s + linear_s
    own_s += step.attention_per_token_pair_s * (uncached * pair_count)
    # step.work_s(uncached, prompt, BATCH_TOKEN_COUNT)
    per_token_s = (overhead_s + compute_base_s) / BATCH_TOKEN_COUNT + compute_per_token_s
    work_s = uncached * (per_token_s + step.attention_per_token_pair_s * pair_count)
    half_step_s = decode_step_s / 2 if decodes else 0.0
    # The share of the backlog in chunks pays for decodes as well; it was counted when it was dispatched.
    ttft_factor = candidate.ttft_factor
    ttft_s = candidate.backlog_s + (half_step_s + own_s) * ttft_factor
    share = candidate.prefill_share
    if share > 0.0:
        prefill_step_s = step.step_s(BATCH_TOKEN_COUNT, context)
        tpot_s = 1.0 / (share / prefill_step_s + (1.0 - share) / decode_step_s)
    else:
        tpot_s = decode_step_s
    return Prediction(ttft_s, tpot_s * candidate.tpot_factor, work_s * ttft_factor)


def miss_probability(predicted_s: float, objective_s: float, sigma: float) -> float:
    """Return the chance that a log-normal time with this median exceeds an objective."""
    if predicted_s <= 0.0 or objective_s == math.inf:
        return 0.0
    if objective_s <= 0.0 or predicted_s == math.inf:
        return 1.0
    return 0.5 * math.erfc(math.log(objective_s / predicted_s) / (sigma * _SQRT_2))
