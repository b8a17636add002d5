"""Waiting requests: one heap per model, ordered by the policy in force, bounded as a whole."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sagecp.core.errors import QueueFullError
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord

_Entry = tuple[float, int, RequestRecord]


class _Lane:
    """The heap of one model. Removed requests stay in it until they surface or outnumber the rest."""

    __slots__ = ("heap", "live_count")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.live_count = 0

    def head(self) -> _Entry | None:
        heap = self.heap
        while heap and not heap[0][2].queued:
            heapq.heappop(heap)
        return heap[0] if heap else None


class RequestQueue:
    """Requests that wait in the control plane.

    Push and pop cost O(log n); removal is lazy and amortised O(1).

    Args:
        policy: Gives each request its key.
        max_request_count: Most requests that may wait.
        max_size_bytes: Most prompt bytes that may wait.
    """

    def __init__(self, policy: SchedulingPolicy, max_request_count: int, max_size_bytes: int) -> None:
        self._policy = policy
        self._lanes: dict[str, _Lane] = {}
        self.max_request_count = max_request_count
        self.max_size_bytes = max_size_bytes
        self.size_bytes = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def check_room(self, size_bytes: int, retry_after_s: float) -> None:
        """Make sure that a request of this size fits.

        Raises:
            QueueFullError: It does not; says which bound, and when to try again.
        """
        if self._count >= self.max_request_count:
            raise QueueFullError(
                f"the queue holds {self._count} requests, its limit; "
                f"try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )
        if self.size_bytes + size_bytes > self.max_size_bytes:
            raise QueueFullError(
                f"the queue holds {self.size_bytes} bytes of prompts and its limit is {self.max_size_bytes}; "
                f"try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def push(self, request: RequestRecord) -> None:
        """Add a request. Bounds are the caller's business: a lost attempt always gets its place back."""
        lane = self._lanes.get(request.model)
        if lane is None:
            lane = self._lanes[request.model] = _Lane()
        request.queued = True
        heapq.heappush(lane.heap, (self._policy.key(request), request.sequence, request))
        lane.live_count += 1
        self._count += 1
        self.size_bytes += request.size_bytes

    def remove(self, request: RequestRecord) -> None:
        """Take a request out, wherever it is."""
        request.queued = False
        self._count -= 1
        self.size_bytes -= request.size_bytes
        lane = self._lanes[request.model]
        lane.live_count -= 1
        if lane.live_count == 0:
            del self._lanes[request.model]
        elif len(lane.heap) > 64 and len(lane.heap) > 2 * lane.live_count:
            lane.heap = [entry for entry in lane.heap if entry[2].queued]
            heapq.heapify(lane.heap)

    def models(self) -> list[str]:
        """Return the models that have waiting requests, the most urgent head first."""
        heads = [(lane.head(), model) for model, lane in self._lanes.items()]
        return [model for _, model in sorted((head[:2], model) for head, model in heads if head is not None)]

    def head(self, model: str) -> RequestRecord | None:
        """Return the request of a model that goes next, or ``None``."""
        lane = self._lanes.get(model)
        entry = lane.head() if lane is not None else None
        return entry[2] if entry is not None else None

    def position(self, request: RequestRecord) -> int:
        """Return how many requests of its model go before it. O(n): for people, not for decisions."""
        mine = (self._policy.key(request), request.sequence)
        lane = self._lanes[request.model]
        return sum(1 for key, sequence, other in lane.heap if other.queued and (key, sequence) < mine)

    def count_by_model(self) -> dict[str, int]:
        """Return how many requests wait, by model."""
        return {model: lane.live_count for model, lane in self._lanes.items()}

    def __iter__(self) -> Iterator[RequestRecord]:
        for lane in self._lanes.values():
            for _, _, request in lane.heap:
                if request.queued:
                    yield request

    def reorder(self, policy: SchedulingPolicy) -> None:
        """Put every waiting request in the order of another policy."""
        self._policy = policy
        for lane in self._lanes.values():
            lane.heap = [
                (policy.key(request), sequence, request)
                for _, sequence, request in lane.heap
                if request.queued
            ]
            heapq.heapify(lane.heap)
