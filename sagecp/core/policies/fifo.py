"""First in, first out."""

from __future__ import annotations

from typing import ClassVar

from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord


class FifoPolicy(SchedulingPolicy):
    """Order of arrival. Fair by age, blind to importance and to deadlines."""

    name: ClassVar[str] = "fifo"

    def key(self, request: RequestRecord) -> float:
        """Return the arrival time."""
        return request.arrival_s

    def explain(self, request: RequestRecord) -> str:
        """Return why the request was next."""
        return f"fifo: oldest request waiting for {request.model}"
