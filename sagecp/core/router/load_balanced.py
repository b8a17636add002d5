"""The load balancer decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import (
    RECEIPT_CANDIDATE_LIMIT,
    InstanceView,
    Placement,
    RoutingContext,
    RoutingStrategy,
)
from sagecp.core.types import CandidateScore


class LoadBalancedStrategy(RoutingStrategy):
    """Takes the instance with the lowest score of the load balancer.

    Ties go to the instance that was chosen longest ago, so that an idle fleet
    is used evenly, and deterministically.
    """

    name: ClassVar[str] = "load_balanced"

    def __init__(self, context: RoutingContext) -> None:
        self._balancer = context.load_balancer

    def place(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> Placement:
        """Choose the lowest score."""
        scores = self._balancer.scores(request, candidates)
        order = sorted(
            range(len(candidates)),
            key=lambda i: (scores[i], candidates[i].last_dispatch_sequence, candidates[i].instance_id),
        )
        best = order[0]
        return Placement(
            candidates[best].instance_id,
            tuple(
                CandidateScore(candidates[i].instance_id, scores[i]) for i in order[:RECEIPT_CANDIDATE_LIMIT]
            ),
            self._balancer.reason(request, candidates[best], scores[best]),
        )
