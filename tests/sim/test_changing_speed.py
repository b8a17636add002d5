"""The learned predictions follow an engine that becomes ten times slower, and one that recovers."""

from __future__ import annotations

from pathlib import Path

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationOptions, Slowdown
from sagecp.sim.fleet.traces import read_trace
from tests.support.sim_traces import write_trace

SLOW_FROM_S, SLOW_TO_S, END_S = 15.0, 45.0, 100.0
GAP_S = 1 / 60


def test_predictions_follow_an_engine_that_slows_down_and_recovers(tmp_path: Path) -> None:
    rows = [
        {
            "t_s": number * GAP_S,
            "prompt_tokens": 1500 + number % 7 * 100,
            "output_tokens": 20 + number % 5 * 10,
        }
        for number in range(int(END_S / GAP_S))
    ]
    trace = read_trace(write_trace(tmp_path / "even.jsonl", rows))
    fleet = read_fleet("4x8b-h100")
    dispatches: list[tuple[float, str]] = []
    factors: list[tuple[float, float]] = []

    def note(now: float, _event: ev.Event, effects: list[fx.Effect]) -> None:
        dispatches.extend(
            (now, effect.instance_id) for effect in effects if isinstance(effect, fx.DispatchAttempt)
        )
        slow = controller.scheduler.fleet.find(fleet[0].instance_id)
        if slow is not None:
            factors.append((now, slow.load.ttft.factor(now)))

    controller = SchedulerController(
        SchedulerSetup(scheduling_policy="slo_aware"), trace.block_token_count, listener=note
    )
    slowdowns = (Slowdown(SLOW_FROM_S, 0, 10.0), Slowdown(SLOW_TO_S, 0, 1.0))
    result = Simulation(trace, fleet, controller, SimulationOptions(slowdowns=slowdowns)).run()

    def share_of_slow(begin_s: float, end_s: float) -> float:
        chosen = [instance for now, instance in dispatches if begin_s <= now < end_s]
        return chosen.count(fleet[0].instance_id) / len(chosen)

    def factor_at(time_s: float) -> float:
        return next(factor for now, factor in factors if now >= time_s)

    assert 0.15 < share_of_slow(0.0, SLOW_FROM_S) < 0.35
    assert 0.8 < factor_at(SLOW_FROM_S - 1.0) < 1.25
    # Found out within a few requests, and hardly given any more.
    assert max(factor for now, factor in factors if SLOW_FROM_S < now < SLOW_FROM_S + 10.0) > 5.0
    assert share_of_slow(SLOW_FROM_S + 10.0, SLOW_TO_S) < 0.08
    # Tried again, believed again.
    assert share_of_slow(END_S - 30.0, END_S) > 0.15
    assert factor_at(END_S - 5.0) < 1.5
    arrays = result.outcomes.as_arrays()
    settled = (arrays.arrival_s > SLOW_FROM_S + 10.0) & (arrays.arrival_s < SLOW_TO_S)
    assert arrays.good[settled].mean() > 0.97
