"""The load balancer decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, RoutingStrategy, ScorerContext


class LoadBalancedStrategy(RoutingStrategy):
    """Takes the instance with the lowest score of the load balancer.

    Ties go to the instance that was chosen longest ago, so that an idle fleet
    is used evenly, and deterministically.
    """

    name: ClassVar[str] = "load_balanced"

    def __init__(self, context: ScorerContext, balancer: LoadBalancer) -> None:
        super().__init__(context, balancer)
        # Nothing is added to what the balancer does, not even a call.
        self.extras = balancer.extras  # type: ignore[method-assign]
        self.score = balancer.score  # type: ignore[method-assign]
        self.terms = balancer.terms  # type: ignore[method-assign]
        self.reason = balancer.reason  # type: ignore[method-assign]
        self.wants = balancer.wants  # type: ignore[method-assign]
        self.note_dispatch = balancer.note_dispatch  # type: ignore[method-assign]
        self.note_fleet = balancer.note_fleet  # type: ignore[method-assign]
        self.is_loss = balancer.is_loss  # type: ignore[misc]

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Leave it to the balancer."""
        return self.balancer.extras(request, instances)

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Leave it to the balancer."""
        return self.balancer.score(request, candidate, parameters)
