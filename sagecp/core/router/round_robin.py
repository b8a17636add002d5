"""One after the other."""

from __future__ import annotations

import heapq
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
        order = heapq.nsmallest(
            RECEIPT_CANDIDATE_LIMIT, [(c.last_dispatch_sequence, c.instance_id) for c in candidates]
        )
        return Placement(
            order[0][1],
            tuple(CandidateScore(instance_id, float(sequence)) for sequence, instance_id in order),
            "round_robin: chosen longest ago",
        )
