"""Waiting requests: one heap per model, ordered by the policy in force, bounded as a whole."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sagecp.core.errors import QueueFullError
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord

# Key, order of arrival, ticket of this stay in the queue, request. The ticket tells
# a request that came back from its own dead entry, and keeps entries comparable.
_Entry = tuple[float, int, int, RequestRecord]

# Key, order of arrival, request. The smallest goes first, over all models.
Head = tuple[float, int, RequestRecord]


class _Lane:
    """The heap of one model. Removed requests stay in it until they surface or outnumber the rest."""

    __slots__ = ("heap", "live_count", "stepped_over")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.stepped_over: list[_Entry] = []
        self.live_count = 0

    def head(self) -> _Entry | None:
        heap = self.heap
        while heap and not _is_live(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None


def _is_live(entry: _Entry) -> bool:
    return entry[3].queue_ticket == entry[2]


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
        self._ticket = 0

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
        self._ticket += 1
        request.queue_ticket = self._ticket
        heapq.heappush(lane.heap, (self._policy.key(request), request.sequence, self._ticket, request))
        lane.live_count += 1
        self._count += 1
        self.size_bytes += request.size_bytes

    def remove(self, request: RequestRecord) -> None:
        """Take a request out, wherever it is."""
        request.queue_ticket = 0
        self._count -= 1
        self.size_bytes -= request.size_bytes
        lane = self._lanes[request.model]
        lane.live_count -= 1
        if lane.live_count == 0:
            del self._lanes[request.model]
        elif len(lane.heap) > 64 and len(lane.heap) > 2 * lane.live_count:
            lane.heap = [entry for entry in lane.heap if _is_live(entry)]
            heapq.heapify(lane.heap)

    def models(self) -> list[str]:
        """Return the models that have waiting requests."""
        return list(self._lanes)

    def head(self, model: str) -> Head | None:
        """Return the request of a model that goes next, with its rank; ``None``: there is none."""
        lane = self._lanes.get(model)
        entry = lane.head() if lane is not None else None
        return (entry[0], entry[1], entry[3]) if entry is not None else None

    def step_over(self, model: str) -> None:
        """Let the next request of a model be its head until :meth:`step_back`."""
        lane = self._lanes[model]
        if lane.head() is not None:
            lane.stepped_over.append(heapq.heappop(lane.heap))

    def step_back(self, model: str) -> None:
        """Put the requests that were stepped over back in front. Nothing else may happen in between."""
        lane = self._lanes[model]
        for entry in lane.stepped_over:
            heapq.heappush(lane.heap, entry)
        lane.stepped_over.clear()

    def position(self, request: RequestRecord) -> int:
        """Return how many requests of its model go before it. O(n): for people, not for decisions."""
        mine = (self._policy.key(request), request.sequence)
        lane = self._lanes[request.model]
        return sum(1 for entry in lane.heap if entry[:2] < mine and _is_live(entry))

    def count_by_model(self) -> dict[str, int]:
        """Return how many requests wait, by model."""
        return {model: lane.live_count for model, lane in self._lanes.items()}

    def __iter__(self) -> Iterator[RequestRecord]:
        for lane in self._lanes.values():
            for entry in lane.heap:
                if _is_live(entry):
                    yield entry[3]

    def reorder(self, policy: SchedulingPolicy) -> None:
        """Put every waiting request in the order of another policy."""
        self._policy = policy
        for lane in self._lanes.values():
            lane.heap = [(policy.key(entry[3]), *entry[1:]) for entry in lane.heap if _is_live(entry)]
            heapq.heapify(lane.heap)
