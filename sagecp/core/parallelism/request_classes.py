"""A workload reduced to a few kinds of requests, so that a plan is judged in milliseconds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagecp.core.parallelism.workload import LengthSample, Workload

Vector = NDArray[np.float64]

# Kinds of requests that a workload is reduced to.
MAX_CLASS_COUNT = 48


@dataclass(frozen=True, slots=True)
class RequestClasses:
    """A workload as few kinds of requests, one value per kind.

    Attributes:
        prompts: Prompt tokens.
        computed: Those that need work.
        outputs: Output tokens.
        pairs: Pairs of a computed token and a token before it.
        shares: Shares of the requests; they add up to 1.
        arrival_variation: Of the time between requests, relative to its mean.
    """

    prompts: Vector
    computed: Vector
    outputs: Vector
    pairs: Vector
    shares: Vector
    arrival_variation: float

    @classmethod
    def of(cls, workload: Workload) -> RequestClasses:
        """Reduce a workload: samples of like lengths become one, with their mean lengths."""
        samples = _reduced(workload.samples)
        prompts = np.array([float(sample.prompt_token_count) for sample in samples])
        cached = np.array([float(sample.cached_token_count) for sample in samples])
        # The last token of a prompt is always computed.
        computed = np.maximum(1.0, prompts - np.minimum(cached, prompts))
        weights = np.array([sample.weight for sample in samples])
        return cls(
            prompts,
            computed,
            np.array([max(1.0, float(sample.output_token_count)) for sample in samples]),
            computed * (prompts - computed / 2.0),
            weights / weights.sum(),
            workload.arrival_variation,
        )

    def mean(self, values: Vector) -> float:
        """Return the mean of one value per kind."""
        return float(self.shares @ values)


def _reduced(samples: tuple[LengthSample, ...]) -> list[LengthSample]:
    if len(samples) <= MAX_CLASS_COUNT:
        return list(samples)
    # Kinds on a logarithmic grid, as fine as their number allows.
    for per_octave in (3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2):
        groups: dict[tuple[int, int], list[LengthSample]] = defaultdict(list)
        for sample in samples:
            computed = max(1, sample.prompt_token_count - sample.cached_token_count)
            key = (
                round(per_octave * math.log2(computed)),
                round(per_octave * math.log2(max(1, sample.output_token_count))),
            )
            groups[key].append(sample)
        if len(groups) <= MAX_CLASS_COUNT:
            break
    return [_mean_sample(group) for _, group in sorted(groups.items())]


def _mean_sample(group: list[LengthSample]) -> LengthSample:
    weight = sum(sample.weight for sample in group)

    def mean(values: list[int]) -> int:
        return round(sum(value * sample.weight for value, sample in zip(values, group, strict=True)) / weight)

    return LengthSample(
        mean([sample.prompt_token_count for sample in group]),
        mean([sample.output_token_count for sample in group]),
        mean([sample.cached_token_count for sample in group]),
        weight,
    )
