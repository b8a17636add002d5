"""What a request would meet on an instance: predicted times, from two rows of numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

from sagecp.core.placement import CandidateRow, RequestRow

# Token budget of one engine step: vLLM's default for online serving.
BATCH_TOKEN_COUNT = 2048


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
    step = candidate.step_time
    prompt = request.prompt_token_count
    uncached = max(1, prompt - candidate.cached_token_count)
    decodes = candidate.decode_count
    context = candidate.context_token_count
    decode_step_s = step.decode_step_s(decodes + 1, context + prompt)
    own_s = step.prefill_s(uncached, prompt, decodes, context, BATCH_TOKEN_COUNT)
    half_step_s = decode_step_s / 2 if decodes else 0.0
    backlog_s = candidate.backlog_s
    # The share of the backlog in chunks pays for decodes as well; it was counted when it was dispatched.
    ttft_s = backlog_s + (half_step_s + own_s) * candidate.ttft_factor
    share = candidate.prefill_share
    if share > 0.0:
        prefill_step_s = step.step_s(BATCH_TOKEN_COUNT, context)
        tpot_s = 1.0 / (share / prefill_step_s + (1.0 - share) / decode_step_s)
    else:
        tpot_s = decode_step_s
    return Prediction(
        ttft_s,
        tpot_s * candidate.tpot_factor,
        step.work_s(uncached, prompt, BATCH_TOKEN_COUNT) * candidate.ttft_factor,
    )


def miss_probability(predicted_s: float, objective_s: float, sigma: float) -> float:
    """Return the chance that a log-normal time with this median exceeds an objective."""
    if predicted_s <= 0.0 or math.isinf(objective_s):
        return 0.0
    if objective_s <= 0.0 or math.isinf(predicted_s):
        return 1.0
    return 0.5 * math.erfc(math.log(objective_s / predicted_s) / (sigma * math.sqrt(2.0)))
