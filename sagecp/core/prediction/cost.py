"""What a request costs in US dollars on an instance."""

from __future__ import annotations

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.prediction.placement import Prediction


def request_cost_usd(
    request: RequestRow,
    candidate: CandidateRow,
    predicted: Prediction,
    decode_sharing: float,
    choice_count: int = 1,
) -> float:
    """Return the price of the engine time that a request uses by itself.

    Its prefill, and for every token what one more decode adds to a step, with a
    share of the step's fixed part, which all decodes of the batch divide.

    Args:
        request: The request.
        candidate: The instance.
        predicted: What it would meet there.
        decode_sharing: Decodes that a step is taken to serve at least.
        choice_count: Answers to the one prompt, each as long as the row says.
    """
    step = candidate.step_time
    context = request.prompt_token_count + request.output_token_count / 2
    sharing = max(decode_sharing, candidate.decode_count + 1.0)
    token_s = (
        (step.overhead_s + step.memory_base_s) / sharing
        + step.memory_per_token_s
        + step.context_per_token_s * context
    )
    output_token_count = request.output_token_count * choice_count
    seconds = predicted.work_s + output_token_count * token_s * candidate.tpot_factor
    return candidate.usd_per_hour / 3600.0 * seconds
