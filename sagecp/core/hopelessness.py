"""Whether a request would miss its objective for the first token wherever it went."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.core.placement import PlacementInputs
from sagecp.core.prediction.placement import miss_probability, predict
from sagecp.core.prediction.residual import LARGEST_SIGMA
from sagecp.core.request import RequestRecord


def is_hopeless(inputs: PlacementInputs) -> bool:
    """Return whether a request would probably miss its objective on every candidate."""
    request, parameters = inputs.request, inputs.parameters
    threshold = parameters["slo_aware.demote_probability"]
    least_sigma = parameters["predicted_latency.ttft_sigma"]
    return all(
        miss_probability(
            predict(request, row).ttft_s + request.waited_s,
            request.ttft_objective_s,
            max(least_sigma, row.sigma),
        )
        > threshold
        for row in inputs.candidates
    )


def is_overdue(record: RequestRecord, parameters: Mapping[str, float], now: float) -> bool:
    """Return whether a waiting request is hopeless for how long it waited, however fast an instance were.

    What :func:`is_hopeless` would find for zero seconds to the first token and a spread that
    no instance exceeds, without a row: thousands of requests may be overdue.
    """
    waited_s, objective_s = now - record.arrival_s, record.ttft_objective_s
    if waited_s < objective_s:
        return False
    threshold = max(0.5, parameters["slo_aware.demote_probability"])
    sigma = max(LARGEST_SIGMA, parameters["predicted_latency.ttft_sigma"])
    return miss_probability(waited_s, objective_s, sigma) > threshold
