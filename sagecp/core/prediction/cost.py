"""What a request costs in US dollars on an instance."""

from __future__ import annotations

import math
from typing import NamedTuple

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.prediction.output_length import LengthEstimate, length_limit
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT, Prediction


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


# 90 % quantile of a standard normal.
_Z_90 = 1.2815515655446004


class CostQuantiles(NamedTuple):
    """What a request costs, US dollars, over how long its answer may get."""

    p10_usd: float
    p50_usd: float
    p90_usd: float


class CostBasis(NamedTuple):
    """What a prediction was made from at a dispatch, so that it can be made later, and is the same.

    Attributes:
        lengths: How long answers get, as far as was known.
        spent_usd: What earlier attempts had cost.
        factor: Observed over predicted engine time on the instance of late.
        sigma: Spread of the logarithm of that ratio.
    """

    lengths: LengthEstimate
    spent_usd: float
    factor: float
    sigma: float


class EngineTimeCurve(NamedTuple):
    """The predicted share of a request in its engine's busy time, by the length of its answers.

    Attributes:
        prompt_s: For the prompt and the first token.
        token_s: For each further token, beside what it reads.
        context_per_token_s: For each of those, per token of its own context.
        prompt_token_count: Context that a first token has.
        choice_count: Answers, each as long.
    """

    prompt_s: float
    token_s: float
    context_per_token_s: float
    prompt_token_count: int
    choice_count: int

    def seconds(self, output_token_count: float) -> float:
        """Return the share for answers of this length."""
        further = self.choice_count * max(0.0, output_token_count - 1.0)
        context = self.prompt_token_count + output_token_count / 2
        return self.prompt_s + further * (self.token_s + self.context_per_token_s * context)


def engine_time(request: RequestRow, candidate: CandidateRow, choice_count: int = 1) -> EngineTimeCurve:
    """Return the predicted share of a request in its engine's busy time.

    By the rules of :mod:`sagecp.core.engine_time`, if what runs beside it stays as it is.
    Other than :func:`request_cost_usd`, which asks what a request adds to an engine that
    is well used, this asks what it will be charged: alone, it pays for whole steps.

    Args:
        request: The request.
        candidate: The instance.
        choice_count: Answers to the one prompt.
    """
    step = candidate.step_time
    prompt, decodes = request.prompt_token_count, candidate.decode_count
    context = candidate.context_token_count
    uncached = max(1, prompt - candidate.cached_token_count)
    prompt_s = step.prefill_s(uncached, prompt, decodes, context, BATCH_TOKEN_COUNT)
    if decodes:
        step_count = math.ceil(uncached / max(1, BATCH_TOKEN_COUNT - decodes))
        per_token_s = step.full_step_token_s(BATCH_TOKEN_COUNT)
        beside_s = step_count * (decodes * per_token_s + step.context_per_token_s * context)
        prompt_s = max(0.0, prompt_s - beside_s)
    token_s = (step.overhead_s + step.memory_base_s) / (decodes + choice_count) + step.memory_per_token_s
    factor = candidate.tpot_factor
    return EngineTimeCurve(
        prompt_s * candidate.ttft_factor,
        token_s * factor,
        step.context_per_token_s * factor,
        prompt,
        choice_count,
    )


def cost_quantiles_usd(
    curve: EngineTimeCurve,
    usd_per_hour: float,
    basis: CostBasis,
    *,
    max_tokens: int | None,
    produced_token_count: int = 0,
) -> CostQuantiles:
    """Return what a request will probably cost in the end, if it goes to an instance.

    Two things are uncertain, and taken to be independent of each other: how long the
    answer gets, and how much else the engine will have to do meanwhile. Spreads of
    logarithms add up as squares, as those of log-normal factors do.

    Args:
        curve: Its share in the instance's time, by length.
        usd_per_hour: Price of the instance.
        basis: What else is known.
        max_tokens: Most tokens of each answer; ``None``: no limit.
        produced_token_count: Tokens that earlier attempts produced, over all choices. The curve's
            prompt has them already.
    """
    produced, limit = produced_token_count / curve.choice_count, length_limit(max_tokens)
    quantile = basis.lengths.quantile
    low_s = curve.seconds(quantile(0.1, produced, limit) - produced)
    median_s = curve.seconds(quantile(0.5, produced, limit) - produced)
    high_s = curve.seconds(quantile(0.9, produced, limit) - produced)
    spent_usd = basis.spent_usd
    if low_s <= 0.0:
        # Constants that say that the engine takes no time.
        return CostQuantiles(spent_usd, spent_usd, spent_usd)
    wide = _Z_90 * basis.sigma
    median_usd = usd_per_hour / 3600.0 * basis.factor * median_s
    return CostQuantiles(
        spent_usd + median_usd * math.exp(-math.hypot(math.log(median_s / low_s), wide)),
        spent_usd + median_usd,
        spent_usd + median_usd * math.exp(math.hypot(math.log(high_s / median_s), wide)),
    )
