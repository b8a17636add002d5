"""One after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.router.base import RoutingStrategy


class RoundRobinStrategy(RoutingStrategy):
    """Takes the instance that was chosen longest ago.

    Unlike a counter over a list this stays even when instances come and go or
    are full for a while.
    """

    name: ClassVar[str] = "round_robin"

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the number of its last dispatch."""
        return float(candidate.last_dispatch_sequence)

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        return "round_robin: chosen longest ago"
