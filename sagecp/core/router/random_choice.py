"""Chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, RoutingStrategy, ScorerContext


class RandomStrategy(RoutingStrategy):
    """Takes any instance with equal chance, from the core's seeded generator."""

    name: ClassVar[str] = "random"

    def __init__(self, context: ScorerContext, balancer: LoadBalancer) -> None:
        super().__init__(context, balancer)
        self._random = context.random

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Draw one candidate: its extra is 0, the others' 1."""
        drawn = [1.0] * len(instances)
        drawn[self._random.randrange(len(instances))] = 0.0
        return drawn

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return 0 for the one that was drawn."""
        return candidate.extra

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        return "random: drawn by chance"
