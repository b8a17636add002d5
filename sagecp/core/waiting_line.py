"""Waiting requests of one model, in the order of a policy."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from sagecp.core.request import RequestRecord

# Key, order of arrival, ticket of this stay in the queue, request. The ticket tells
# a request that came back from its own dead entry, and keeps entries comparable.
_Entry = tuple[float, int, int, RequestRecord]


class LazyHeap:
    """A heap of requests; those that left it stay in it until they surface or outnumber the rest."""

    __slots__ = ("_heap", "_stepped_over", "live_count")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._stepped_over: list[_Entry] = []
        self.live_count = 0

    def push(self, key: float, record: RequestRecord) -> None:
        """Add a request that has its queue ticket."""
        heapq.heappush(self._heap, (key, record.sequence, record.queue_ticket, record))
        self.live_count += 1

    def discard(self) -> None:
        """Take notice that one request of this heap has lost its ticket."""
        self.live_count -= 1
        if len(self._heap) > 64 and len(self._heap) > 2 * self.live_count:
            self._heap = [entry for entry in self._heap if _is_live(entry)]
            heapq.heapify(self._heap)

    def head(self) -> _Entry | None:
        """Return the first live entry."""
        heap = self._heap
        while heap and not _is_live(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def pop(self, record: RequestRecord) -> None:
        """Take the first live entry out for good; its request keeps its ticket.

        Raises:
            ValueError: The first entry is another request's.
        """
        entry = self.head()
        if entry is None or entry[3] is not record:
            raise ValueError(f"request {record.request_id!r} is not the head")
        heapq.heappop(self._heap)
        self.live_count -= 1

    def step_over(self) -> None:
        """Let the next entry be the head until :meth:`step_back`."""
        if self.head() is not None:
            self._stepped_over.append(heapq.heappop(self._heap))

    def step_back(self) -> None:
        """Put the entries that were stepped over back in front."""
        for entry in self._stepped_over:
            if _is_live(entry):
                heapq.heappush(self._heap, entry)
        self._stepped_over.clear()

    def __iter__(self) -> Iterator[_Entry]:
        for heap in (self._heap, self._stepped_over):
            for entry in heap:
                if _is_live(entry):
                    yield entry


def _is_live(entry: _Entry) -> bool:
    return entry[3].queue_ticket == entry[2]


class WaitingLine(ABC):
    """The waiting requests of one model.

    The caller sets a request's ``queue_ticket`` before :meth:`push` and clears
    it before :meth:`discard`.
    """

    @abstractmethod
    def push(self, record: RequestRecord) -> None:
        """Add a request."""

    @abstractmethod
    def discard(self, record: RequestRecord) -> None:
        """Take a request out, wherever it is."""

    @abstractmethod
    def head(self, now: float) -> RequestRecord | None:
        """Return the request that goes next; ``None``: none, or all were stepped over."""

    @abstractmethod
    def rank(self, now: float) -> tuple[float, int]:
        """Return the rank of the head among the heads of all models; the smallest goes first."""

    @abstractmethod
    def step_over(self) -> None:
        """Let the next request be the head until :meth:`step_back`."""

    @abstractmethod
    def step_back(self) -> None:
        """Put the requests that were stepped over back in front."""

    @abstractmethod
    def position(self, record: RequestRecord, now: float) -> int:
        """Return how many requests go before it. O(n): for people, not for decisions."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[RequestRecord]: ...

    def demote(self, record: RequestRecord) -> None:
        """Move the head to where hopeless ones wait, in lines that have such a place."""
        raise NotImplementedError(f"{type(self).__name__} has no place for {record.request_id}")

    def note_dispatch(self, record: RequestRecord, cost_s: float) -> None:
        """Charge a dispatched request, in lines that keep accounts.

        Args:
            record: The request, already taken out.
            cost_s: Predicted engine seconds.
        """
        del record, cost_s

    def note_settled(self, record: RequestRecord) -> None:
        """Take notice that the account of a request's tenant was corrected."""
        del record


class KeyedLine(WaitingLine):
    """Order of a key that never changes; ties go to the earlier arrival.

    Push and pop cost O(log n); removal is lazy and amortised O(1).

    Args:
        key: Gives a request its key; the smallest goes first.
    """

    def __init__(self, key: Callable[[RequestRecord], float]) -> None:
        self._key = key
        self._heap = LazyHeap()

    def push(self, record: RequestRecord) -> None:
        """Add a request."""
        self._heap.push(self._key(record), record)

    def discard(self, record: RequestRecord) -> None:
        """Take a request out."""
        self._heap.discard()

    def head(self, now: float) -> RequestRecord | None:
        """Return the request with the smallest key."""
        entry = self._heap.head()
        return entry[3] if entry is not None else None

    def rank(self, now: float) -> tuple[float, int]:
        """Return the head's key."""
        entry = self._heap.head()
        return (entry[0], entry[1]) if entry is not None else (float("inf"), 0)

    def step_over(self) -> None:
        """Let the next request be the head."""
        self._heap.step_over()

    def step_back(self) -> None:
        """Put the requests that were stepped over back in front."""
        self._heap.step_back()

    def position(self, record: RequestRecord, now: float) -> int:
        """Return how many requests have a smaller key."""
        mine = (self._key(record), record.sequence)
        return sum(1 for entry in self._heap if entry[:2] < mine)

    def __len__(self) -> int:
        return self._heap.live_count

    def __iter__(self) -> Iterator[RequestRecord]:
        return (entry[3] for entry in self._heap)
