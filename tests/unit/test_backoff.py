"""Full jitter, at the cap too."""

from __future__ import annotations

import random
import statistics

import pytest

from sagecp.agent.backoff import Backoff, Reminder


def test_the_bound_doubles_up_to_the_cap_and_starts_over() -> None:
    backoff = Backoff(base_s=0.2, cap_s=10.0, draw=lambda: 1.0)
    waits = [backoff.next_wait_s() for _ in range(9)]
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10])
    backoff.reset()
    assert backoff.next_wait_s() == pytest.approx(0.2)


def test_jitter_is_full_at_the_cap() -> None:
    source = random.Random(3)
    backoff = Backoff(draw=source.random)
    for _ in range(20):
        backoff.next_wait_s()
    waits = [backoff.next_wait_s() for _ in range(2000)]
    assert min(waits) < 0.1
    assert max(waits) > 9.9
    assert statistics.fmean(waits) == pytest.approx(5.0, abs=0.3)


def test_a_thousand_agents_do_not_come_back_in_step() -> None:
    """After an outage all have tried for long; no tenth of the cap gets more than twice its share."""
    agents = [Backoff(draw=random.Random(seed).random) for seed in range(1000)]
    for agent in agents:
        for _ in range(12):
            agent.next_wait_s()
    counts = [0] * 10
    for agent in agents:
        counts[int(agent.next_wait_s())] += 1
    assert max(counts) < 200


def test_it_never_overflows() -> None:
    backoff = Backoff(draw=lambda: 1.0)
    for _ in range(5000):
        wait_s = backoff.next_wait_s()
    assert wait_s == 10.0


def test_a_reminder_speaks_of_news_and_now_and_then() -> None:
    now_s = 0.0
    reminder = Reminder(lambda: now_s, interval_s=30.0)
    assert reminder.is_due("refused")
    assert not reminder.is_due("refused")
    assert reminder.is_due("timed out")
    now_s = 29.0
    assert not reminder.is_due("timed out")
    now_s = 31.0
    assert reminder.is_due("timed out")
    reminder.reset()
    assert reminder.is_due("timed out")
