"""Fewest requests, relative to what an instance may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer


class LeastConnectionsBalancer(LoadBalancer):
    """Requests in flight divided by the concurrency limit.

    Counts only what this control plane sent: an engine's own gauges are older.
    """

    name: ClassVar[str] = "least_connections"

    def scores(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> list[float]:
        """Return the share of each limit in use, 0 to 1."""
        return [c.in_flight_count / c.concurrency_limit for c in candidates]

    def reason(self, request: RequestRecord, best: InstanceView, score: float) -> str:
        """Return why ``best`` won."""
        return f"least_connections: {best.in_flight_count} of {best.concurrency_limit} in flight"
