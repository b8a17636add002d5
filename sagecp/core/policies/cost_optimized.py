"""The cheapest instance that still meets the objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.prediction.cost import request_cost_usd
from sagecp.core.prediction.placement import miss_probability, predict
from sagecp.core.request import RequestRecord
from sagecp.core.slo_line import SloLine
from sagecp.core.waiting_line import WaitingLine


class CostOptimizedPolicy(SchedulingPolicy):
    """Earliest deadline first, each to where it costs least without endangering its objectives.

    An instance's score is the request's price there, in units of what a missed
    objective is worth, plus the chance to miss beyond the tolerated one. While
    an instance has little to do, the fuller one is preferred, so that others
    run empty and can be released (the load gradient of PolyServe,
    arXiv 2507.17769). The load balancer's own score only breaks ties.
    """

    name: ClassVar[str] = "cost_optimized"
    is_patient = True
    is_paced = True
    demotes = True
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "cost_optimized.usd_per_miss", 0.02, 1e-6, 1000.0, "Worth of one request within its objectives."
        ),
        Parameter("cost_optimized.tolerated_miss", 0.05, 0.0, 1.0, "Chance to miss that costs nothing."),
        Parameter(
            "cost_optimized.fill_weight", 0.05, 0.0, 10.0, "Loss of an empty instance against a full one."
        ),
        Parameter(
            "cost_optimized.fill_below_share",
            0.6,
            0.0,
            1.0,
            "Prefill share below which instances are filled.",
        ),
        Parameter(
            "cost_optimized.decode_sharing",
            8.0,
            1.0,
            1024.0,
            "Decodes that a step is taken to serve at least.",
        ),
        Parameter(
            "cost_optimized.best_effort_share", 0.1, 0.0, 0.9, "Engine time kept for requests out of reach."
        ),
    )

    def new_line(self) -> WaitingLine:
        """Return a line by deadline."""
        return SloLine(self.key, self.parameters["cost_optimized.best_effort_share"])

    def key(self, record: RequestRecord) -> float:
        """Return the moment by which its first token is due, on the core's clock."""
        return record.arrival_s + record.ttft_objective_s

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        """Return price, danger and emptiness of a candidate, as a loss."""
        predicted = predict(request, candidate)
        sigma = max(parameters["predicted_latency.ttft_sigma"], candidate.sigma)
        missed = miss_probability(predicted.ttft_s + request.waited_s, request.ttft_objective_s, sigma)
        slow = miss_probability(
            predicted.tpot_s, request.tpot_objective_s, parameters["predicted_latency.tpot_sigma"]
        )
        danger = 1.0 - (1.0 - missed) * (1.0 - slow) - parameters["cost_optimized.tolerated_miss"]
        cost_usd = request_cost_usd(
            request, candidate, predicted, parameters["cost_optimized.decode_sharing"]
        )
        loss = cost_usd / parameters["cost_optimized.usd_per_miss"] + max(0.0, danger)
        if candidate.prefill_share < parameters["cost_optimized.fill_below_share"]:
            emptiness = 1.0 - candidate.in_flight_count / candidate.concurrency_limit
            # Between requests all are idle: the one that worked last goes on, or they would take turns.
            emptiness *= 1.0 - candidate.prefill_share
            loss += parameters["cost_optimized.fill_weight"] * emptiness
        # Small enough to decide only between equals.
        return loss + 1e-6 * score

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        return "cost_optimized: earliest deadline; placed where it is cheapest within its objectives"
