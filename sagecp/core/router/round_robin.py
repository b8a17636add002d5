"""One after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import (
    RECEIPT_CANDIDATE_LIMIT,
    InstanceView,
    Placement,
    RoutingStrategy,
)
from sagecp.core.types import CandidateScore


class RoundRobinStrategy(RoutingStrategy):
    """Takes the instance that was chosen longest ago.

    Unlike a counter over a list this stays even when instances come and go or
    are full for a while.
    """

    name: ClassVar[str] = "round_robin"

    def place(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> Placement:
        """Choose the one whose last dispatch is oldest."""
        order = sorted(candidates, key=lambda c: (c.last_dispatch_sequence, c.instance_id))
        return Placement(
            order[0].instance_id,
            tuple(
                CandidateScore(c.instance_id, float(c.last_dispatch_sequence))
                for c in order[:RECEIPT_CANDIDATE_LIMIT]
            ),
            "round_robin: chosen longest ago",
        )
