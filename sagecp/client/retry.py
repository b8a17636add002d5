"""When to try again, and when not to: one layer retries, and it is this one."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from sagecp.client.errors import ClientError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a call is repeated.

    A call is repeated when the server could not be reached or is going away,
    or when it was refused with a time to come back. What a caller learned to
    be wrong stays wrong and is never repeated.

    Attributes:
        max_attempt_count: Tries in all, the first included, of a call that asks for something new.
        base_s: Upper bound of the first pause; it doubles with each try.
        max_s: Upper bound of every pause.
        max_pushback_s: A server that asks for a longer pause than this is not
            waited for: the error is raised at once, with ``retry_after_s``.
        resume_s: How long an open stream that was lost is asked for again: the
            request runs meanwhile, and the control plane may be restarting.
            It counts anew after every piece of output. 0: not at all.
    """

    max_attempt_count: int = 4
    base_s: float = 0.1
    max_s: float = 5.0
    max_pushback_s: float = 30.0
    resume_s: float = 30.0

    def pause_s(self, attempt: int, error: ClientError, generator: random.Random) -> float | None:
        """Return how long to wait after a failed try, or ``None`` to give up.

        Args:
            attempt: Number of the try that failed, from 1.
            error: Its error.
            generator: For the jitter. The pause is drawn from zero to its bound
                (full jitter), so that clients that failed together do not come back together.
        """
        return None if attempt >= self.max_attempt_count else self._pause_s(attempt, error, generator)

    def resume_pause_s(
        self, attempt: int, lost_s: float, error: ClientError, generator: random.Random
    ) -> float | None:
        """Return how long to wait before a lost stream is asked for again, or ``None`` to give up.

        Args:
            attempt: Number of the try that failed, from 1.
            lost_s: How long ago the stream was lost.
            error: As for :meth:`pause_s`.
            generator: Likewise.
        """
        return None if lost_s >= self.resume_s else self._pause_s(attempt, error, generator)

    def _pause_s(self, attempt: int, error: ClientError, generator: random.Random) -> float | None:
        if not is_transient(error):
            return None
        bound_s = min(self.max_s, self.base_s * 2.0 ** min(attempt - 1, 32))
        if error.retry_after_s is None:
            return generator.uniform(0.0, bound_s)
        if error.retry_after_s > self.max_pushback_s:
            return None
        # Never before the server said, and spread over as much again.
        return error.retry_after_s + generator.uniform(0.0, max(bound_s, error.retry_after_s))


NO_RETRY = RetryPolicy(max_attempt_count=1, resume_s=0.0)


def is_transient(error: ClientError) -> bool:
    """Return whether the same call can succeed later without anybody changing anything."""
    if error.ended_request:
        return False
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None


class RetryBudget:
    """Bounds retries to a share of the calls, so that an outage is not answered with a storm.

    A bucket of tokens: a retry takes one, a success puts back a part of one.
    While it is empty nothing is repeated.
    """

    __slots__ = ("_capacity", "_refill", "_tokens")

    def __init__(self, capacity: float = 10.0, refill_per_success: float = 0.1) -> None:
        self._capacity = capacity
        self._refill = refill_per_success
        self._tokens = capacity

    def take(self) -> bool:
        """Return whether a retry is allowed, and count it."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def succeeded(self) -> None:
        """Note a call that succeeded."""
        self._tokens = min(self._capacity, self._tokens + self._refill)


class OverloadThrottle:
    """Keeps calls back that an overloaded server would only refuse.

    Counts calls, those kept back included, and those accepted, over a window. When
    fewer than one in ``multiplier`` gets through, new calls fail here with the
    probability (calls - multiplier * accepted) / (calls + 1), which leaves
    ``multiplier`` attempts per accepted call ("Handling Overload" in Google's
    "Site Reliability Engineering").
    """

    __slots__ = ("_clock", "_multiplier", "_seconds", "_window_s")

    def __init__(
        self, *, multiplier: float = 2.0, window_s: int = 30, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._multiplier = multiplier
        self._window_s = window_s
        self._clock = clock
        # One entry per second: when, calls, accepted ones.
        self._seconds: deque[list[int]] = deque(maxlen=window_s)

    def note(self, *, accepted: bool) -> None:
        """Note a call that was answered: with anything but a refusal for overload, or with one."""
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += accepted

    def refuse(self, generator: random.Random) -> bool:
        """Return whether to keep a call back; then it is counted."""
        if not self._seconds:
            return False
        oldest = self._clock() - self._window_s
        recent = [entry for entry in self._seconds if entry[0] >= oldest]
        calls = sum(entry[1] for entry in recent)
        excess = calls - self._multiplier * sum(entry[2] for entry in recent)
        # A few refusals are no overload: some calls always pass.
        if excess <= 10 or generator.random() >= excess / (calls + 1):
            return False
        self.note(accepted=False)
        return True
