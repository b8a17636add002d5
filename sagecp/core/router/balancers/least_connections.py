"""Fewest requests, relative to what an instance may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.router.base import LoadBalancer


class LeastConnectionsBalancer(LoadBalancer):
    """Requests in flight divided by the concurrency limit.

    Counts only what this control plane sent: an engine's own gauges are older.
    """

    name: ClassVar[str] = "least_connections"

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the share of the limit in use, 0 to 1."""
        return candidate.in_flight_count / candidate.concurrency_limit

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        return f"least_connections: {best.in_flight_count} of {best.concurrency_limit} in flight"
