"""Replays for the adaptive policy: equal ones give equal scores, here and in a process of their own."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from sagecp.core.policy_replay import PolicyReplay, ReplayArrival, ReplayInstance
from sagecp.core.types import RequestPriority
from sagecp.runtime.policy_evaluation import EvaluationError, EvaluationProcess
from sagecp.sim.fleet.policy_evaluation import score_policies
from tests.support.core_world import STEP_TIME

MODULE = [sys.executable, "-m", "sagecp.sim.fleet.policy_evaluation"]


def arrival(arrival_s: float, prompt: int = 1000, **fields: Any) -> ReplayArrival:
    values: dict[str, Any] = {
        "model": "m",
        "tenant_id": "",
        "session_id": "",
        "user_id": "",
        "priority": RequestPriority.NORMAL,
        "block_hashes": (),
        "output_token_count": 20,
        "output_known": True,
        "max_tokens": None,
        "ttft_objective_s": 2.0,
        "tpot_objective_s": 0.2,
    }
    return ReplayArrival(arrival_s=arrival_s, prompt_token_count=prompt, **values | fields)


def instance(instance_id: str = "a", **fields: Any) -> ReplayInstance:
    values: dict[str, Any] = {
        "kind": 0,
        "model": "m",
        "model_aliases": (),
        "gpu_name": "",
        "gpu_count": 1,
        "tensor_parallel_size": 1,
        "step_time": STEP_TIME,
        "slowness": 1.0,
        "key_value_token_capacity": None,
        "max_request_count": 64,
        "usd_per_hour": 0.0,
    }
    return ReplayInstance(instance_id=instance_id, **values | fields)


def replay(*arrivals: ReplayArrival, **fields: Any) -> PolicyReplay:
    values: dict[str, Any] = {
        "evaluation_id": 1,
        "candidates": ("priority", "slo_aware"),
        "duration_s": 60.0,
        "judged_from_s": 0.0,
        "block_token_count": 256,
        "instances": (instance(),),
        "routing_strategy": "load_balanced",
        "load_balancer": "predicted_latency",
        "parameters": {},
        "class_weights": dict.fromkeys(RequestPriority, 1.0),
    }
    return PolicyReplay(arrivals=arrivals, **values | fields)


def overload() -> PolicyReplay:
    """Long prompts among many short ones, half as many again as the engine serves."""
    mixed = [arrival(number * 0.25, 30_000 if number % 8 == 0 else 1_000) for number in range(240)]
    return replay(*mixed)


def test_equal_replays_give_equal_scores_and_the_order_shows() -> None:
    scores = score_policies(overload())
    assert scores == score_policies(overload())
    priority, slo_aware = scores
    assert (priority.policy, slo_aware.policy) == ("priority", "slo_aware")
    assert 0.0 <= priority.attainment < slo_aware.attainment <= 1.0
    assert priority.usd_per_good is None


def test_an_idle_fleet_meets_everything() -> None:
    scores = score_policies(replay(*(arrival(float(number)) for number in range(60))))
    assert {(each.attainment, each.token_weighted_attainment) for each in scores} == {(1.0, 1.0)}


def test_classes_count_by_their_weights() -> None:
    weights = dict.fromkeys(RequestPriority, 1.0) | {RequestPriority.CRITICAL: 3.0}
    met, missed = arrival(0.0), arrival(1.0, priority=RequestPriority.CRITICAL, ttft_objective_s=1e-6)
    [score] = score_policies(replay(met, missed, class_weights=weights, candidates=("priority",)))
    assert score.attainment == 0.25
    assert score.token_weighted_attainment == 0.5


def test_arrivals_before_the_judged_ones_only_fill_the_fleet() -> None:
    early = arrival(0.0, ttft_objective_s=1e-6)
    [score] = score_policies(replay(early, arrival(20.0), judged_from_s=10.0, candidates=("fifo",)))
    assert score.attainment == 1.0


def test_engines_are_as_slow_as_they_were_found_to_be() -> None:
    asked = [arrival(number * 0.5, 4_000, ttft_objective_s=0.5) for number in range(60)]
    fast, slow = (
        score_policies(replay(*asked, instances=(instance(slowness=slowness),)))[0] for slowness in (1.0, 3.0)
    )
    assert slow.attainment < fast.attainment == 1.0


def test_requests_for_an_alias_and_of_any_size_are_replayed() -> None:
    small = instance(key_value_token_capacity=2_000, model_aliases=("nick",), max_request_count=9_999)
    asked = [
        arrival(0.0, model="nick", ttft_objective_s=60.0),
        arrival(1.0, 1_000_000, output_token_count=1_000_000, ttft_objective_s=60.0),
    ]
    [score] = score_policies(replay(*asked, instances=(small,), candidates=("priority",)))
    assert score.attainment == 1.0


def test_the_cheaper_engine_costs_less_where_prices_are_known() -> None:
    asked = [arrival(float(number)) for number in range(60)]
    fleet = (instance("dear", usd_per_hour=10.0), instance("cheap", kind=1, usd_per_hour=1.0))
    priority, cost_optimized = score_policies(
        replay(*asked, instances=fleet, candidates=("priority", "cost_optimized"))
    )
    assert priority.usd_per_good is not None
    assert cost_optimized.usd_per_good is not None
    assert cost_optimized.usd_per_good < priority.usd_per_good
    unpriced = dataclasses.replace(fleet[0], usd_per_hour=0.0)
    assert score_policies(replay(*asked, instances=(unpriced, fleet[1])))[0].usd_per_good is None


async def test_a_process_of_its_own_comes_to_the_same() -> None:
    assert await EvaluationProcess(MODULE).evaluate(overload()) == score_policies(overload())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/nowhere/python"], "cannot be started"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "exit status 3: it said nothing"),
        ([sys.executable, "-c", "raise ValueError('bad luck')"], "ValueError: bad luck"),
        ([sys.executable, "-c", "pass"], "no scores"),
    ],
)
async def test_a_process_that_fails_says_why(command: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        await EvaluationProcess(command).evaluate(overload())


async def test_a_process_that_takes_too_long_is_ended() -> None:
    endless = EvaluationProcess([sys.executable, "-c", "import signal; signal.pause()"], timeout_s=0.05)
    with pytest.raises(EvaluationError, match=r"longer than 0\.05 s"):
        await endless.evaluate(replay())
