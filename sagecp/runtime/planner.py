"""Has plans searched for outside the event loop, few at a time.

Run as a module it is the process that searches: one :class:`PlanQuery` is read
from the standard input, and the result, or what is wrong with the question, is
written to the standard output, both pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
from typing import IO, Protocol, cast

from sagecp.core.errors import FieldViolation, InvalidRequestError, QueueFullError
from sagecp.core.parallelism.estimates import PlanningResult
from sagecp.core.parallelism.plan_query import PlanQuery, answer_plan_query
from sagecp.runtime.computation_process import ComputationProcess

SEARCH_COMMAND = (sys.executable, "-m", "sagecp.runtime.planner")
# The largest search takes about 2 s of CPU; a machine may be busy.
_TIMEOUT_S = 60.0
_MAX_WAITING_COUNT = 8
# What a caller who is turned away should wait, per search before it.
_USUAL_SEARCH_S = 1.0
_NICENESS = 5


class PlanSearch(Protocol):
    """Whoever can run one search; cancelling ends it."""

    async def run(self, question: object) -> object:
        """Return the :class:`PlanningResult`, or the violations of a bad question."""


class Planner:
    """Answers questions one after the other; a few may wait, more are turned away.

    Args:
        search: Runs one search; default: a process of its own for each.
        max_waiting_count: Most questions that wait while one is answered.
    """

    def __init__(self, search: PlanSearch | None = None, max_waiting_count: int = _MAX_WAITING_COUNT) -> None:
        self._search = search or ComputationProcess(
            SEARCH_COMMAND, _TIMEOUT_S, what="search for plans", result="plans"
        )
        self._max_waiting_count = max_waiting_count
        self._turn = asyncio.Lock()
        self._present_count = 0

    async def plan(self, query: PlanQuery) -> PlanningResult:
        """Return the plans. Cancelling ends the work for it.

        Raises:
            QueueFullError: Too many wait already.
            InvalidRequestError: The search found the question wanting.
            ComputationError: The search failed.
        """
        if self._present_count > self._max_waiting_count:
            raise QueueFullError(
                f"{self._present_count} searches for plans are under way or waiting, and no more may wait; "
                "ask again later, or plan where you are: `sagecp plan` needs no server",
                retry_after_s=self._present_count * _USUAL_SEARCH_S,
            )
        self._present_count += 1
        try:
            async with self._turn:
                answer = await self._search.run(query)
        finally:
            self._present_count -= 1
        if not isinstance(answer, PlanningResult):
            raise InvalidRequestError(cast("tuple[FieldViolation, ...]", answer))
        return answer


def answer_one(source: IO[bytes], target: IO[bytes]) -> None:
    """Answer one question; both sides are processes of one server."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICENESS)
    query: PlanQuery = pickle.load(source)  # noqa: S301 - written by the server that started this
    answer: PlanningResult | tuple[FieldViolation, ...]
    try:
        answer = answer_plan_query(query)
    except InvalidRequestError as error:
        # Exceptions with arguments of their own cannot be unpickled.
        answer = error.violations
    pickle.dump(answer, target)
    target.flush()


if __name__ == "__main__":
    answer_one(sys.stdin.buffer, sys.stdout.buffer)
