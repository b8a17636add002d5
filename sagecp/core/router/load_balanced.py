"""The load balancer decides."""

from __future__ import annotations

import heapq
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
        # Ids are unique: no comparison gets as far as the candidates themselves.
        ranked = heapq.nsmallest(
            RECEIPT_CANDIDATE_LIMIT,
            zip(
                scores,
                [c.last_dispatch_sequence for c in candidates],
                [c.instance_id for c in candidates],
                candidates,
                strict=True,
            ),
        )
        score, _, instance_id, best = ranked[0]
        return Placement(
            instance_id,
            tuple(CandidateScore(candidate_id, value) for value, _, candidate_id, _ in ranked),
            self._balancer.reason(request, best, score),
        )
