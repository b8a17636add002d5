"""Fits the step-time formula to measured steps, and says how well constants predict them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sagecp.core.prediction.step_time import StepTimeModel, StepTimeParameters

_BAR = 0.1
_PASS_COUNT = 3
_REASSIGNMENT_COUNT = 30
_CONSTANT_COUNT = 6


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One measured kind of step.

    Attributes:
        family: What it belongs to in the report.
        token_count: Scheduled tokens, ``T``.
        decode_count: Those of them that are decodes.
        decode_context_tokens: ``KV``.
        token_pairs: Sum of ``c * (p + c/2)`` over the prefill chunks.
        duration_s: Measured.
    """

    family: str
    token_count: int
    decode_count: int
    decode_context_tokens: int
    token_pairs: float
    duration_s: float

    def error_of(self, parameters: StepTimeParameters) -> float:
        """Relative error of the formula with these constants: positive if it predicts too long."""
        predicted_s = parameters.step_s(self.token_count, self.decode_context_tokens, self.token_pairs)
        return predicted_s / self.duration_s - 1.0


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative errors over some steps.

    Attributes:
        count: Steps.
        mean: Mean of the absolute errors.
        worst: Largest absolute error.
        bias: Mean of the errors with their signs.
        within_bar: Share of the steps whose error is at most 10 %.
    """

    count: int
    mean: float
    worst: float
    bias: float
    within_bar: float


def summarise(observations: Sequence[StepObservation], parameters: StepTimeParameters) -> ErrorSummary:
    """Return how well constants predict these steps."""
    errors = [observation.error_of(parameters) for observation in observations]
    absolutes = [abs(error) for error in errors]
    return ErrorSummary(
        len(errors),
        statistics.fmean(absolutes),
        max(absolutes),
        statistics.fmean(errors),
        statistics.fmean(error <= _BAR for error in absolutes),
    )


def fit(observations: Sequence[StepObservation]) -> StepTimeParameters:
    """Return the constants with the least squared relative errors; the overhead is left at 0.

    The formula is a maximum of two planes: for every split of the steps by
    token count into memory-bound and compute-bound, solve the two linear
    problems together, then let each step choose the arm that is larger until
    none changes (Magnani and Boyd, "Convex piecewise-linear fitting", 2009).
    """
    tokens = np.array([observation.token_count for observation in observations], dtype=float)
    best: StepTimeParameters | None = None
    for boundary in sorted(set(tokens.tolist()))[1:]:
        memory_bound = tokens < boundary
        for _ in range(_REASSIGNMENT_COUNT):
            candidate = _solve(observations, memory_bound)
            if best is None or _loss(observations, candidate) < _loss(observations, best):
                best = candidate
            reassigned = (
                candidate.memory_base_s + candidate.memory_per_token_s * tokens
                > candidate.compute_base_s + candidate.compute_per_token_s * tokens
            )
            if np.array_equal(reassigned, memory_bound):
                break
            memory_bound = reassigned
    if best is None:
        raise ValueError("steps of one size only: there is nothing to fit")
    return best


def learn(
    observations: Sequence[StepObservation], prior: StepTimeParameters, seed: int = 0
) -> StepTimeParameters:
    """Return what the control plane's own learner makes of the steps, in random order, from a prior."""
    model = StepTimeModel(prior)
    generator = random.Random(seed)
    for _ in range(_PASS_COUNT):
        for observation in generator.sample(observations, len(observations)):
            if observation.token_count == observation.decode_count:
                model.observe_decode(
                    observation.duration_s, observation.decode_count, observation.decode_context_tokens
                )
            else:
                model.observe_prefill(
                    observation.duration_s,
                    1,
                    observation.token_count,
                    observation.decode_context_tokens,
                    observation.token_pairs,
                )
    return model.parameters


def without_overhead(parameters: StepTimeParameters) -> StepTimeParameters:
    """Return the constants of the GPU's own work."""
    return replace(parameters, overhead_s=0.0)


def _loss(observations: Sequence[StepObservation], parameters: StepTimeParameters) -> float:
    return sum(observation.error_of(parameters) ** 2 for observation in observations)


def _solve(
    observations: Sequence[StepObservation], memory_bound: npt.NDArray[np.bool_]
) -> StepTimeParameters:
    rows = [
        (
            memory,
            memory * step.token_count,
            1 - memory,
            (1 - memory) * step.token_count,
            step.decode_context_tokens,
            step.token_pairs,
        )
        for step, memory in zip(observations, memory_bound.astype(float).tolist(), strict=True)
    ]
    durations = np.array([[observation.duration_s] for observation in observations])
    a0, a1, b0, b1, g, d = _least_squares_not_negative(np.array(rows) / durations)
    return StepTimeParameters(
        overhead_s=0.0,
        memory_base_s=a0,
        memory_per_token_s=a1,
        compute_base_s=b0,
        compute_per_token_s=b1,
        context_per_token_s=g,
        attention_per_token_pair_s=d,
    )


def _least_squares_not_negative(features: npt.NDArray[np.float64]) -> list[float]:
    """Solve ``features @ x = 1``; what comes out negative becomes 0, the worst first."""
    scales = np.abs(features).max(axis=0)
    scales[scales == 0.0] = 1.0
    used = list(range(_CONSTANT_COUNT))
    while True:
        solution, *_ = np.linalg.lstsq(features[:, used] / scales[used], np.ones(len(features)), rcond=None)
        worst = int(np.argmin(solution))
        if solution[worst] >= 0.0:
            break
        del used[worst]
    result = [0.0] * _CONSTANT_COUNT
    for place, value in zip(used, solution.tolist(), strict=True):
        result[place] = value / float(scales[place])
    return result
