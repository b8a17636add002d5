"""The default: order of arrival, bent by priority where classes compete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestPriority

# A head start in seconds per class. A request that has waited this much longer
# than a NORMAL one counts as its equal, so nothing starves.
HEAD_START_S: Mapping[RequestPriority, float] = {
    RequestPriority.CRITICAL: 300.0,
    RequestPriority.HIGH: 30.0,
    RequestPriority.NORMAL: 0.0,
    RequestPriority.LOW: -60.0,
    RequestPriority.BACKGROUND: -600.0,
}


class AdaptivePolicy(SchedulingPolicy):
    """Arrival time minus a head start per priority class.

    Adapts by construction: while one class is present this is exactly ``fifo``;
    when several compete, important requests overtake by at most their head
    start, and age does the rest. Choosing between whole policies by evidence
    needs the policies that this version does not have yet.
    """

    name: ClassVar[str] = "adaptive"

    def key(self, request: RequestRecord) -> float:
        """Return the arrival time minus the head start, in seconds."""
        return request.arrival_s - HEAD_START_S[request.metadata.priority]

    def explain(self, request: RequestRecord) -> str:
        """Return why the request was next."""
        return (
            f"adaptive: first by arrival with the head start of {request.metadata.priority.name} "
            f"({HEAD_START_S[request.metadata.priority]:+.0f} s)"
        )
