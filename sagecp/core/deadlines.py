"""Times at which live requests expire."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from sagecp.core.request import RequestRecord

_COMPACT_ABOVE = 1024


class DeadlineHeap:
    """A heap of (time, request id) that forgets lazily.

    An entry counts while the request lives and still has that time as its
    ``expire_s``: a later request may have the same id, and a request may be
    given another time. It holds ids, not records, so that an ended request's
    prompt is freed at once; and it is rebuilt when dead entries outnumber live
    requests, so that its size is bounded by what is live.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time_s: float, request_id: str, live: Mapping[str, RequestRecord]) -> None:
        """Watch a request. ``live`` holds every request that has not ended."""
        heapq.heappush(self._heap, (time_s, request_id))
        if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * len(live):
            # A set: an entry made twice counts once.
            self._heap = list({entry for entry in self._heap if _counts(entry, live)})
            heapq.heapify(self._heap)

    def next_s(self, live: Mapping[str, RequestRecord]) -> float | None:
        """Return the earliest time of a live request, or ``None``."""
        while self._heap and not _counts(self._heap[0], live):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float, live: Mapping[str, RequestRecord]) -> list[RequestRecord]:
        """Return the live requests whose time has come, each once."""
        due: dict[str, RequestRecord] = {}
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if _counts(entry, live):
                due[entry[1]] = live[entry[1]]
        return list(due.values())


def _counts(entry: tuple[float, str], live: Mapping[str, RequestRecord]) -> bool:
    record = live.get(entry[1])
    return record is not None and record.expire_s == entry[0]
