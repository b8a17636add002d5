"""When the client tries again, how long it waits, and when it stops."""

from __future__ import annotations

import random

import grpc
import pytest

from sagecp.client.errors import ClientError
from sagecp.client.retry import NO_RETRY, OverloadThrottle, RetryBudget, RetryPolicy, is_transient


def failure(code: str, retry_after_s: float | None = None, *, ended: bool = False) -> ClientError:
    return ClientError("x", code=grpc.StatusCode[code], retry_after_s=retry_after_s, ended_request=ended)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (failure("UNAVAILABLE"), True),
        (failure("UNAVAILABLE", ended=True), False),
        (failure("RESOURCE_EXHAUSTED"), False),
        (failure("RESOURCE_EXHAUSTED", 1.0), True),
        (failure("INVALID_ARGUMENT"), False),
        (failure("DEADLINE_EXCEEDED"), False),
        (failure("INTERNAL"), False),
        (failure("NOT_FOUND"), False),
    ],
)
def test_what_is_worth_another_try(error: ClientError, transient: bool) -> None:
    assert is_transient(error) is transient
    pause_s = RetryPolicy().pause_s(1, error, random.Random(0))
    assert (pause_s is not None) is transient


def test_full_jitter_below_a_doubling_bound() -> None:
    policy, generator = RetryPolicy(max_attempt_count=10, base_s=0.1, max_s=1.0), random.Random(1)
    for attempt, bound_s in ((1, 0.1), (2, 0.2), (3, 0.4), (6, 1.0), (9, 1.0)):
        pauses = [policy.pause_s(attempt, failure("UNAVAILABLE"), generator) or 0.0 for _ in range(400)]
        assert 0 <= min(pauses) < 0.1 * bound_s
        assert 0.9 * bound_s < max(pauses) <= bound_s
    assert policy.pause_s(10, failure("UNAVAILABLE"), generator) is None


def test_never_before_the_server_said() -> None:
    generator = random.Random(1)
    pauses = [RetryPolicy().pause_s(1, failure("RESOURCE_EXHAUSTED", 2.0), generator) for _ in range(200)]
    known = [pause_s for pause_s in pauses if pause_s is not None]
    assert len(known) == 200
    assert min(known) >= 2.0
    assert max(known) > 3.5
    assert RetryPolicy().pause_s(1, failure("RESOURCE_EXHAUSTED", 31.0), generator) is None
    assert NO_RETRY.pause_s(1, failure("UNAVAILABLE"), generator) is None


def test_the_budget_bounds_retries_in_an_outage() -> None:
    budget = RetryBudget(capacity=10, refill_per_success=0.1)
    assert sum(budget.take() for _ in range(1000)) == 10
    for _ in range(25):
        budget.succeeded()
    assert sum(budget.take() for _ in range(1000)) == 2
    for _ in range(1000):
        budget.succeeded()
    assert sum(budget.take() for _ in range(1000)) == 10


def test_the_throttle_keeps_calls_back_only_under_overload() -> None:
    now = [0.0]
    throttle, generator = OverloadThrottle(window_s=30, clock=lambda: now[0]), random.Random(2)
    for _ in range(1000):
        assert not throttle.refuse(generator)
        throttle.note(accepted=True)
    now[0] = 100.0
    for _ in range(100):
        throttle.note(accepted=False)
    refused = sum(throttle.refuse(generator) for _ in range(1000))
    assert refused > 950, "nearly everything is kept back when nothing gets through"
    now[0] = 131.0
    assert not throttle.refuse(generator), "what is older than the window is forgotten"
    for _ in range(100):
        throttle.note(accepted=True)
        throttle.note(accepted=False)
    assert not any(throttle.refuse(generator) for _ in range(1000)), "half gets through"


@pytest.mark.parametrize("overload", [4, 10, 100])
def test_about_two_attempts_per_accepted_call_are_left(overload: int) -> None:
    """The server takes one call per second in `overload` that are wanted."""
    now = [0.0]
    throttle, generator = OverloadThrottle(clock=lambda: now[0]), random.Random(3)
    sent = taken = 0
    for second in range(300):
        now[0] = float(second)
        accepted = 0
        for _ in range(10 * overload):
            if throttle.refuse(generator):
                continue
            sent += second >= 60
            throttle.note(accepted=accepted < 10)
            taken += second >= 60 and accepted < 10
            accepted += 1
    assert taken == 10 * 240, "what the server can take it gets"
    assert sent / taken == pytest.approx(2.0, rel=0.15)


def test_resuming_is_bounded_by_time_instead_of_tries() -> None:
    policy, generator = RetryPolicy(resume_s=30.0, max_s=5.0), random.Random(1)
    lost = failure("UNAVAILABLE")
    assert policy.pause_s(policy.max_attempt_count, lost, generator) is None
    pauses = [policy.resume_pause_s(attempt, 29.9, lost, generator) for attempt in range(1, 2000)]
    assert all(pause_s is not None and pause_s <= 5.0 for pause_s in pauses)
    assert policy.resume_pause_s(1, 30.0, lost, generator) is None
    assert policy.resume_pause_s(1, 0.0, failure("NOT_FOUND"), generator) is None
    assert NO_RETRY.resume_pause_s(1, 0.0, lost, generator) is None
