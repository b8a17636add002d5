"""The model-based balancer: fast instances get more, and none is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from sagecp.core.fleet import InstanceRecord
from sagecp.core.router.balancers.predicted_latency import NEGLECTED_DISPATCH_COUNT, PredictedLatencyBalancer
from sagecp.core.types import ExecutionInstance


@dataclass
class View:
    """What the balancer reads of an instance."""

    latency_estimate_s: float | None
    in_flight_count: int = 0
    last_dispatch_sequence: int = 0
    concurrency_limit: int = 256


def scores(*views: View) -> list[float]:
    return PredictedLatencyBalancer().scores(cast("Any", None), cast("Any", views))


def spread(views: list[View], count: int) -> list[int]:
    """Place requests that all run at once; return how many each instance got."""
    placed = [0] * len(views)
    for sequence in range(1, count + 1):
        rated = scores(*views)
        chosen = min(range(len(views)), key=lambda i: (rated[i], views[i].last_dispatch_sequence))
        views[chosen].in_flight_count += 1
        views[chosen].last_dispatch_sequence = sequence
        placed[chosen] += 1
    return placed


def test_the_faster_of_two_idle_instances_is_chosen() -> None:
    slow, fast = scores(View(2.0), View(1.0))
    assert fast < slow


def test_a_burst_spreads_in_proportion_to_speed() -> None:
    assert spread([View(1.0), View(1.0)], 8) == [4, 4]
    assert spread([View(1.0), View(3.0)], 8) == [6, 2]


def test_a_burst_far_below_the_limits_leaves_nobody_idle() -> None:
    assert min(spread([View(0.5), View(1.5)], 8)) >= 1


def test_a_newcomer_is_tried_at_the_mean_of_the_others() -> None:
    assert scores(View(1.0), View(3.0), View(None)) == [1.0, 3.0, 2.0]


def test_an_unmeasured_fleet_is_used_evenly() -> None:
    assert spread([View(None), View(None), View(None)], 9) == [3, 3, 3]


def test_an_instance_that_looked_slow_is_measured_again() -> None:
    views = [View(1.0), View(50.0)]
    chosen = []
    for sequence in range(1, 6 * NEGLECTED_DISPATCH_COUNT):
        rated = scores(*views)
        best = min((0, 1), key=lambda i: (rated[i], views[i].last_dispatch_sequence))
        views[best].last_dispatch_sequence = sequence
        chosen.append(best)
    assert 1 <= chosen.count(1) <= 3, "now and then, and no more"


def test_an_instance_is_rated_by_its_speed_and_not_by_the_length_of_what_it_was_asked() -> None:
    spec = ExecutionInstance(instance_id="one", host="localhost", port=8000, model_name="m")
    short, long, idle = (InstanceRecord(spec, 1, 0.0, 16) for _ in range(3))
    short.learn(latency_s=0.1 + 9 * 0.01, ttft_s=0.1, output_token_count=10)
    long.learn(latency_s=0.1 + 999 * 0.01, ttft_s=0.1, output_token_count=1000)
    assert short.latency_estimate_s == pytest.approx(long.latency_estimate_s)
    assert short.latency_estimate_s == pytest.approx(0.1 + 99 * 0.01)
    # One token tells nothing about the time between tokens.
    idle.learn(latency_s=0.1, ttft_s=0.1, output_token_count=1)
    assert idle.latency_estimate_s is None
