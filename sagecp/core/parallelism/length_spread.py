"""Lengths of requests of which only the means are known."""

from __future__ import annotations

import math
from statistics import NormalDist

from sagecp.core.parallelism.workload import LengthSample

USUAL_SPREAD = 0.95
"""Standard deviation relative to the mean: of the prompts of Azure's conversations of 2023 (0.95);
their answers have 0.77."""

_LEVEL_COUNT = 6


def spread_lengths(
    mean_prompt_token_count: float,
    mean_output_token_count: float,
    *,
    cached_share: float = 0.0,
    prompt_spread: float = USUAL_SPREAD,
    output_spread: float = USUAL_SPREAD,
) -> tuple[LengthSample, ...]:
    """Return requests with given mean lengths, prompts and answers independent of each other.

    Both are log-normal, cut into equally likely parts of which each is told by
    its middle, and scaled so that the means are kept.

    Args:
        mean_prompt_token_count: From 1.
        mean_output_token_count: From 1.
        cached_share: Share of each prompt that a prefix cache would have, below 1.
        prompt_spread: Standard deviation of the prompts relative to their mean; 0: all are alike.
        output_spread: Likewise, of the answers.
    """
    prompts = _levels(mean_prompt_token_count, prompt_spread)
    outputs = _levels(mean_output_token_count, output_spread)
    return tuple(
        LengthSample(prompt, output, min(prompt - 1, round(prompt * cached_share)))
        for prompt in prompts
        for output in outputs
    )


def _levels(mean: float, spread: float) -> list[int]:
    if spread <= 0.0:
        return [max(1, round(mean))]
    sigma = math.sqrt(math.log1p(spread * spread))
    normal = NormalDist()
    raw = [math.exp(sigma * normal.inv_cdf((index + 0.5) / _LEVEL_COUNT)) for index in range(_LEVEL_COUNT)]
    scale = mean * _LEVEL_COUNT / sum(raw)
    return [max(1, round(value * scale)) for value in raw]
