"""The adaptive policy in simulations: it finds the better policy, goes back, and lets calm be calm."""

from __future__ import annotations

import random

import numpy as np

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.types import RequestPriority
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationResult
from sagecp.sim.fleet.traces import Trace, TraceRequest

FLEET = read_fleet("2x70b-h100-tp4")
BLOCK = 512


def arrivals(
    kind: str,
    start_s: float,
    duration_s: float,
    rate: float,
    prompt: int,
    ttft_s: float,
    priority: RequestPriority = RequestPriority.NORMAL,
) -> list[TraceRequest]:
    generator = random.Random(kind)
    found: list[TraceRequest] = []
    now = start_s
    while (now := now + generator.expovariate(rate)) < start_s + duration_s:
        found.append(
            TraceRequest(
                request_id=f"{kind}{len(found)}",
                arrival_s=now,
                prompt_token_count=prompt,
                output_token_count=60,
                priority=priority,
                ttft_slo_ms=ttft_s * 1000.0,
                tpot_slo_ms=200.0,
            )
        )
    return found


def short(kind: str, start_s: float, rate: float) -> list[TraceRequest]:
    return arrivals(kind, start_s, 120.0, rate, 2_000, 3.0)


def long(kind: str, start_s: float, rate: float, priority: RequestPriority) -> list[TraceRequest]:
    return arrivals(kind, start_s, 120.0, rate, 32_000, 8.0, priority)


def run(
    requests: list[TraceRequest], policy: str = "adaptive"
) -> tuple[SimulationResult, list[fx.Effect], list[ev.PoliciesEvaluated]]:
    """Run a trace; return also the effects and events of the adaptive policy."""
    effects: list[fx.Effect] = []
    answers: list[ev.PoliciesEvaluated] = []

    def listen(_now: float, event: ev.Event, found: list[fx.Effect]) -> None:
        effects.extend(each for each in found if isinstance(each, (fx.EvaluatePolicies, fx.PolicySwitched)))
        if isinstance(event, ev.PoliciesEvaluated):
            answers.append(event)

    requests = sorted(requests, key=lambda each: each.arrival_s)
    controller = SchedulerController(SchedulerSetup(scheduling_policy=policy), BLOCK, listener=listen)
    trace = Trace("mixed", BLOCK, tuple(requests), requests[-1].arrival_s, False)
    return Simulation(trace, FLEET, controller).run(), effects, answers


def switches(effects: list[fx.Effect]) -> list[tuple[str, str]]:
    return [(each.previous, each.policy) for each in effects if isinstance(each, fx.PolicySwitched)]


def attainment(result: SimulationResult) -> float:
    return float(np.mean(result.outcomes.as_arrays().good))


def overload(start_s: float) -> list[TraceRequest]:
    """Long prompts among short ones, more than two instances serve."""
    return short("s", start_s, 8.0) + long("l", start_s, 0.4, RequestPriority.NORMAL)


def important(start_s: float) -> list[TraceRequest]:
    """Here what is long is important, and least work first is wrong."""
    return short("t", start_s, 2.0) + long("m", start_s, 0.6, RequestPriority.CRITICAL)


def test_in_overload_it_stays_with_the_policy_that_meets_more_objectives() -> None:
    requests = overload(0.0)
    result, effects, answers = run(requests)
    assert switches(effects) == []
    assert len(answers) == sum(isinstance(each, fx.EvaluatePolicies) for each in effects) > 1
    assert all({score.policy for score in each.scores} >= {"priority", "slo_aware"} for each in answers)
    fixed = {policy: attainment(run(requests, policy)[0]) for policy in ("priority", "slo_aware")}
    assert fixed["priority"] < attainment(result) == fixed["slo_aware"]


def test_equal_runs_are_equal_with_their_replays() -> None:
    part = [each for each in overload(0.0) if each.arrival_s < 70.0]
    first, second = run(part), run(part)
    assert first[2] == second[2]
    assert first[1] == second[1]
    assert first[0].outcomes.as_arrays().request_ids == second[0].outcomes.as_arrays().request_ids
    assert np.array_equal(first[0].outcomes.as_arrays().finish_s, second[0].outcomes.as_arrays().finish_s)


def test_it_changes_where_important_requests_suffer_and_goes_back_in_overload() -> None:
    # A pause lets the first load end.
    requests = important(0.0) + overload(200.0)
    result, effects, _ = run(requests)
    assert switches(effects) == [("slo_aware", "priority"), ("priority", "slo_aware")]
    fixed = {policy: attainment(run(requests, policy)[0]) for policy in ("priority", "slo_aware")}
    assert fixed["priority"] < attainment(result)
    assert attainment(result) - fixed["priority"] > 0.5 * (fixed["slo_aware"] - fixed["priority"])


def test_calm_is_never_replayed() -> None:
    result, effects, _ = run(short("s", 0.0, 1.0))
    assert not effects
    assert attainment(result) == 1.0
