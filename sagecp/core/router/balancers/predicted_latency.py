"""Least expected loss, from what a model of the engines predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.prediction.placement import miss_probability, predict
from sagecp.core.router.base import LoadBalancer


class PredictedLatencyBalancer(LoadBalancer):
    """The chance to miss an objective, plus the price of the engine time that is spent.

    ``J = 1 - (1 - P(ttft misses)) (1 - P(tpot misses)) + price * work + tilt * ttft / objective``

    The price of a second of engine time is in expected good requests: work that
    a cached prefix saves is worth as much as a better chance elsewhere. The
    last term decides where no objective is in danger.
    """

    name: ClassVar[str] = "predicted_latency"
    is_loss: ClassVar[bool] = True
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "predicted_latency.work_price", 0.25, 0.0, 100.0, "Good requests one engine second is worth."
        ),
        Parameter(
            "predicted_latency.ttft_tilt",
            0.2,
            0.0,
            10.0,
            "Weight of the predicted share of the TTFT objective.",
        ),
        Parameter("predicted_latency.ttft_sigma", 0.35, 0.01, 3.0, "Least assumed spread of log TTFT."),
        Parameter("predicted_latency.tpot_sigma", 0.6, 0.01, 3.0, "Assumed spread of log TPOT."),
    )

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the expected loss J."""
        ttft_s, tpot_s, work_s = predict(request, candidate)
        ttft_s += request.waited_s
        sigma = max(parameters["predicted_latency.ttft_sigma"], candidate.sigma)
        objective_s = request.ttft_objective_s
        missed = miss_probability(ttft_s, objective_s, sigma)
        slow = miss_probability(tpot_s, request.tpot_objective_s, parameters["predicted_latency.tpot_sigma"])
        return (
            1.0
            - (1.0 - missed) * (1.0 - slow)
            + parameters["predicted_latency.work_price"] * work_s
            + parameters["predicted_latency.ttft_tilt"] * ttft_s / objective_s
        )

    def terms(
        self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the predictions behind the loss."""
        predicted = predict(request, candidate)
        return {
            "ttft_s": predicted.ttft_s,
            "tpot_s": predicted.tpot_s,
            "work_s": predicted.work_s,
            "cached_tokens": float(candidate.cached_token_count),
            "backlog_s": candidate.backlog_s,
        }

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        predicted = predict(request, best)
        cached = f", {best.cached_token_count} tokens cached" if best.cached_token_count else ""
        return (
            f"predicted_latency: least expected loss {score:.3f}; first token in {predicted.ttft_s:.3f} s, "
            f"then {predicted.tpot_s * 1000:.0f} ms per token{cached}"
        )
