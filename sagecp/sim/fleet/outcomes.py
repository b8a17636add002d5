"""What became of each request of a simulated run, kept in columns."""

from __future__ import annotations

import enum
import math
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagecp.core.types import RequestPriority

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class OutcomeState(enum.IntEnum):
    """How a request ended."""

    SUCCEEDED = 1
    REJECTED = 2
    EXPIRED = 3
    FAILED = 4
    CANCELLED = 5
    UNFINISHED = 6
    """The run ended first."""


@dataclass(frozen=True, slots=True)
class OutcomeArrays:
    """The columns of a run, one entry per request; times in seconds since the run began.

    Attributes:
        request_ids: As in the trace.
        tenant_ids: Names that ``tenant_index`` points to.
        arrival_s: When it was submitted.
        dispatch_s: When it last was given to an instance; NaN: never.
        scheduled_s: When an engine first ran it; NaN: never.
        first_token_s: When it got its first token; NaN: never.
        finish_s: When it ended, whichever way; NaN: not by the end of the run.
        prompt_token_count: Tokens of the prompt.
        output_token_count: Tokens that a full answer has.
        produced_token_count: Tokens that it got.
        cached_token_count: Prompt tokens found in the instance's cache.
        tenant_index: Into ``tenant_ids``.
        priority: Number of the :class:`RequestPriority`.
        instance_index: Into the fleet; -1: none.
        state: Number of the :class:`OutcomeState`.
        ttft_slo_s: Objective for the time to the first token; NaN: none.
        tpot_slo_s: Objective for the time per further token; NaN: none.
        deadline_s: Longest time from arrival to end; NaN: none.
        preemption_count: How often an engine took its memory away.
    """

    request_ids: tuple[str, ...]
    tenant_ids: tuple[str, ...]
    arrival_s: Floats
    dispatch_s: Floats
    scheduled_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt_token_count: Integers
    output_token_count: Integers
    produced_token_count: Integers
    cached_token_count: Integers
    tenant_index: Integers
    priority: Integers
    instance_index: Integers
    state: Integers
    ttft_slo_s: Floats
    tpot_slo_s: Floats
    deadline_s: Floats
    preemption_count: Integers

    @property
    def succeeded(self) -> Flags:
        """Whether each request ran to its end."""
        return np.asarray(self.state == OutcomeState.SUCCEEDED)

    @property
    def ttft_s(self) -> Floats:
        """Time to the first token; NaN where there is none."""
        return self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> Floats:
        """Time from arrival to end; NaN where there is none."""
        return self.finish_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Time per token after the first; NaN unless it succeeded with two tokens or more."""
        further = np.where(self.succeeded & (self.output_token_count > 1), self.output_token_count - 1, 1)
        gaps = (self.finish_s - self.first_token_s) / further
        return np.where(self.succeeded & (self.output_token_count > 1), gaps, np.nan)

    @property
    def good(self) -> Flags:
        """Whether each request succeeded and met every objective that it has."""
        # A comparison with NaN is false: an objective that is absent is never missed.
        missed = (self.ttft_s > self.ttft_slo_s) | (self.tpot_s > self.tpot_slo_s)
        return self.succeeded & ~(missed | (self.latency_s > self.deadline_s))


class Outcomes:
    """Collects one row per request of a run."""

    def __init__(self) -> None:
        self._request_ids: list[str] = []
        self._tenants: dict[str, int] = {}
        self._times = [array("d") for _ in range(8)]
        self._numbers = [array("q") for _ in range(9)]

    def __len__(self) -> int:
        return len(self._request_ids)

    def add(
        self,
        *,
        request_id: str,
        arrival_s: float,
        state: OutcomeState,
        prompt_token_count: int,
        output_token_count: int,
        produced_token_count: int | None = None,
        cached_token_count: int = 0,
        dispatch_s: float | None = None,
        scheduled_s: float | None = None,
        first_token_s: float | None = None,
        finish_s: float | None = None,
        tenant_id: str = "",
        priority: RequestPriority = RequestPriority.NORMAL,
        instance_index: int = -1,
        ttft_slo_s: float | None = None,
        tpot_slo_s: float | None = None,
        deadline_s: float | None = None,
        preemption_count: int = 0,
    ) -> None:
        """Add what became of one request.

        Args:
            request_id: As in the trace.
            arrival_s: When it was submitted, like all times on the run's clock.
            state: How it ended.
            prompt_token_count: Tokens of its prompt.
            output_token_count: Tokens of a full answer, whether it got one or not.
            produced_token_count: Tokens that it got; by default all if it succeeded, else none.
            cached_token_count: Prompt tokens found in the instance's cache; negative counts as 0.
            dispatch_s: When it last was given to an instance.
            scheduled_s: When an engine first ran it; by default ``dispatch_s``.
            first_token_s: When it got its first token.
            finish_s: When it ended; a rejection too has a time.
            tenant_id: Whose it is.
            priority: Its class.
            instance_index: Its last instance's place in the fleet.
            ttft_slo_s: Objective for the time to the first token.
            tpot_slo_s: Objective for the time per further token.
            deadline_s: Longest time from arrival to end, not a time on the clock.
            preemption_count: How often an engine took its memory away.

        Raises:
            ValueError: It succeeded without times for its first token and its end.
        """
        has_succeeded = state is OutcomeState.SUCCEEDED
        if has_succeeded and (first_token_s is None or finish_s is None):
            raise ValueError(f"request {request_id!r} succeeded, but has no first_token_s or finish_s")
        if produced_token_count is None:
            produced_token_count = output_token_count if has_succeeded else 0
        self._request_ids.append(request_id)
        tenant_index = self._tenants.setdefault(tenant_id, len(self._tenants))
        times = (
            arrival_s,
            dispatch_s,
            dispatch_s if scheduled_s is None else scheduled_s,
            first_token_s,
            finish_s,
            ttft_slo_s,
            tpot_slo_s,
            deadline_s,
        )
        for time_column, time_s in zip(self._times, times, strict=True):
            time_column.append(math.nan if time_s is None else time_s)
        numbers = (
            prompt_token_count,
            output_token_count,
            produced_token_count,
            max(0, cached_token_count),
            tenant_index,
            priority,
            instance_index,
            state,
            preemption_count,
        )
        for number_column, number in zip(self._numbers, numbers, strict=True):
            number_column.append(number)

    def as_arrays(self) -> OutcomeArrays:
        """Return a copy of everything added so far."""
        times = [np.array(column, dtype=np.float64) for column in self._times]
        numbers = [np.array(column, dtype=np.int64) for column in self._numbers]
        return OutcomeArrays(
            request_ids=tuple(self._request_ids),
            tenant_ids=tuple(self._tenants),
            arrival_s=times[0],
            dispatch_s=times[1],
            scheduled_s=times[2],
            first_token_s=times[3],
            finish_s=times[4],
            ttft_slo_s=times[5],
            tpot_slo_s=times[6],
            deadline_s=times[7],
            prompt_token_count=numbers[0],
            output_token_count=numbers[1],
            produced_token_count=numbers[2],
            cached_token_count=numbers[3],
            tenant_index=numbers[4],
            priority=numbers[5],
            instance_index=numbers[6],
            state=numbers[7],
            preemption_count=numbers[8],
        )
