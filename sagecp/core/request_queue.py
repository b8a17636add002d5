"""Waiting requests: one line per model, in the order of the policy in force, bounded as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sagecp.core.prompt_size import payload_size_bytes
from sagecp.core.request import RequestRecord
from sagecp.core.request_counts import RequestCounts
from sagecp.core.shedding import ClassShares, QueueShares
from sagecp.core.types import RequestMetadata, RequestPriority
from sagecp.core.waiting_line import WaitingLine


class RequestQueue:
    """Requests that wait in the control plane.

    Args:
        new_line: Makes the line of a model: what the policy in force orders by.
        max_request_count: Most requests that may wait.
        max_size_bytes: Most prompt bytes that may wait.
        shares: How much of either each class may fill; default: as configured by default.

    Attributes:
        work_s: Predicted engine seconds of all that waits.
        kinds: What waits, counted by kind.
    """

    def __init__(
        self,
        new_line: Callable[[], WaitingLine],
        max_request_count: int,
        max_size_bytes: int,
        shares: ClassShares | None = None,
    ) -> None:
        self._new_line = new_line
        self._lines: dict[str, WaitingLine] = {}
        self.max_request_count = max_request_count
        self._shares = QueueShares(max_request_count, max_size_bytes, shares or ClassShares())
        self.work_s = 0.0
        self.kinds = RequestCounts()
        self._ticket = 0

    def __len__(self) -> int:
        return self._shares.request_count

    @property
    def size_bytes(self) -> int:
        """Prompt bytes that wait."""
        return self._shares.size_bytes

    def check_room(self, metadata: RequestMetadata, now: float) -> int:
        """Make sure that a request may wait, at the least cost that can tell; return its size in bytes.

        Raises:
            QueueFullError: It may not; says which bound, and when to try again.
        """
        priority, tenant = metadata.priority, metadata.paying_tenant
        self._shares.check_count(priority, tenant, now)
        # Only now: a long conversation takes a while to add up.
        size_bytes = payload_size_bytes(metadata)
        self._shares.check_bytes(priority, tenant, size_bytes, now)
        return size_bytes

    def note_departure(self, now: float) -> None:
        """Note that a place came free, for what refusals say of when to try again."""
        self._shares.note_departure(now)

    def push(self, request: RequestRecord) -> None:
        """Add a request. Bounds are the caller's business: a lost attempt always gets its place back."""
        line = self._lines.get(request.model)
        if line is None:
            line = self._lines[request.model] = self._new_line()
        self._ticket += 1
        request.queue_ticket = self._ticket
        line.push(request)
        metadata = request.metadata
        self._shares.enter(metadata.priority, metadata.paying_tenant, request.size_bytes)
        self.work_s += request.work_s
        self.kinds.add(request)

    def remove(self, request: RequestRecord) -> None:
        """Take a request out, wherever it is."""
        request.queue_ticket = 0
        line = self._lines[request.model]
        line.discard(request)
        self.kinds.discard(request)
        metadata = request.metadata
        self._shares.leave(metadata.priority, metadata.paying_tenant, request.size_bytes)
        # Sums of floats drift; an empty queue is exactly empty.
        self.work_s = self.work_s - request.work_s if self._shares.request_count else 0.0
        if not len(line):
            del self._lines[request.model]

    def line(self, model: str) -> WaitingLine | None:
        """Return the line of a model; ``None``: nothing waits for it."""
        return self._lines.get(model)

    def lines(self) -> Iterator[tuple[str, WaitingLine]]:
        """Return the models that have waiting requests, with their lines."""
        return iter(self._lines.items())

    def demote(self, request: RequestRecord) -> None:
        """Move a waiting request to the place of the hopeless."""
        self._lines[request.model].demote(request)

    def position(self, request: RequestRecord, now: float) -> int:
        """Return how many requests of its model go before it. O(n): for people, not for decisions."""
        return self._lines[request.model].position(request, now)

    def count_by_model(self) -> dict[str, int]:
        """Return how many requests wait, by model."""
        return {model: len(line) for model, line in self._lines.items()}

    def count_by_priority(self) -> dict[RequestPriority, int]:
        """Return how many requests wait, by class, but for classes of which none does."""
        return {priority: count for priority in RequestPriority if (count := self._shares.counts[priority])}

    def __iter__(self) -> Iterator[RequestRecord]:
        for line in self._lines.values():
            yield from line

    def reorder(self, new_line: Callable[[], WaitingLine]) -> None:
        """Put every waiting request in the order of another policy. Nothing is lost."""
        self._new_line = new_line
        for model, old in self._lines.items():
            line = self._lines[model] = new_line()
            # In order of arrival, so that accounts that lines keep do not depend on the old order.
            for record in sorted(old, key=lambda each: each.sequence):
                line.push(record)
