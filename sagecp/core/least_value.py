"""The least of values that come and go."""

from __future__ import annotations

import heapq

_COMPACT_ABOVE = 32


class LeastValue:
    """A multiset of numbers that knows its least: O(log n) for each distinct value that comes.

    The heap holds each distinct value, and forgets lazily what is gone.
    """

    __slots__ = ("_counts", "_heap")

    def __init__(self) -> None:
        self._counts: dict[float, int] = {}
        self._heap: list[float] = []

    def add(self, value: float) -> None:
        """Add a value once more."""
        count = self._counts.get(value, 0)
        self._counts[value] = count + 1
        if not count:
            heapq.heappush(self._heap, value)
            if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * len(self._counts):
                self._heap = sorted(self._counts)

    def discard(self, value: float) -> None:
        """Take a value out once, if it is there."""
        count = self._counts.get(value, 0)
        if count > 1:
            self._counts[value] = count - 1
        elif count:
            del self._counts[value]

    def least(self, default: float) -> float:
        """Return the least value; the default when there is none."""
        heap, counts = self._heap, self._counts
        while heap and heap[0] not in counts:
            heapq.heappop(heap)
        return heap[0] if heap else default
