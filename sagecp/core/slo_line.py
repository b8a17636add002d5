"""Waiting requests by urgency, with a lane for those whose objective is out of reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sagecp.core.request import RequestRecord
from sagecp.core.waiting_line import LazyHeap, WaitingLine

# Most engine seconds that the best-effort lane saves up while others are served, or owes.
_CREDIT_LIMIT_S = 60.0


class SloLine(WaitingLine):
    """Two lanes: the feasible in the order of a key, the hopeless in order of arrival.

    The second gets engine time that nobody of the first can use, and a share
    of the rest: it earns credit with every second the first is served, and
    goes first when its head can be paid from it. So even the longest prompt
    runs some day, however many short ones come.

    Args:
        key: Gives a feasible request its key; the smallest goes first.
        best_effort_share: Share of engine time kept for the hopeless, 0 to below 1.
    """

    def __init__(self, key: Callable[[RequestRecord], float], best_effort_share: float) -> None:
        self._key = key
        self._earning = best_effort_share / (1.0 - best_effort_share)
        self._main = LazyHeap()
        self._best_effort = LazyHeap()
        self._credit_s = 0.0

    def push(self, record: RequestRecord) -> None:
        """Add a request to its lane."""
        if record.demoted:
            self._best_effort.push(record.arrival_s, record)
        else:
            self._main.push(self._key(record), record)

    def discard(self, record: RequestRecord) -> None:
        """Take a request out."""
        (self._best_effort if record.demoted else self._main).discard()

    def demote(self, record: RequestRecord) -> None:
        """Move the head of the first lane to the second, where it keeps its age.

        Raises:
            ValueError: It is not the head.
        """
        if record.demoted:
            return
        self._main.pop(record)
        record.demoted = True
        self._best_effort.push(record.arrival_s, record)

    def _lane(self) -> LazyHeap:
        best_effort = self._best_effort.head()
        if best_effort is None:
            return self._main
        # Nobody can save up more than the limit: that must buy the longest prompt, too.
        price_s = min(_CREDIT_LIMIT_S, best_effort[3].work_s)
        if self._main.head() is None or self._credit_s >= price_s:
            return self._best_effort
        return self._main

    def head(self, now: float) -> RequestRecord | None:
        """Return the next request of the lane whose turn it is."""
        entry = self._lane().head()
        return entry[3] if entry is not None else None

    def rank(self, now: float) -> tuple[float, int]:
        """Return the head's key."""
        entry = self._lane().head()
        return (entry[0], entry[1]) if entry is not None else (float("inf"), 0)

    def step_over(self) -> None:
        """Let the next request be the head."""
        self._lane().step_over()

    def step_back(self) -> None:
        """Put the requests that were stepped over back in front."""
        self._main.step_back()
        self._best_effort.step_back()

    def note_dispatch(self, record: RequestRecord, cost_s: float) -> None:
        """Let the second lane earn from the first, and pay for its own."""
        if record.demoted:
            # Decodes are paid in arrears; time that nobody of the first lane wanted is free.
            least_s = -_CREDIT_LIMIT_S if self._main.live_count else 0.0
            self._credit_s = max(least_s, self._credit_s - cost_s)
        elif self._best_effort.live_count:
            self._credit_s = min(_CREDIT_LIMIT_S, self._credit_s + self._earning * cost_s)

    def position(self, record: RequestRecord, now: float) -> int:
        """Return how many requests of its lane go before it, and of the first if it is in the second."""
        if record.demoted:
            mine = (record.arrival_s, record.sequence)
            return self._main.live_count + sum(1 for entry in self._best_effort if entry[:2] < mine)
        mine = (self._key(record), record.sequence)
        return sum(1 for entry in self._main if entry[:2] < mine)

    @property
    def best_effort_count(self) -> int:
        """Requests in the second lane."""
        return self._best_effort.live_count

    def __len__(self) -> int:
        return self._main.live_count + self._best_effort.live_count

    def __iter__(self) -> Iterator[RequestRecord]:
        for lane in (self._main, self._best_effort):
            for entry in lane:
                yield entry[3]
