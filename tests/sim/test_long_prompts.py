"""Prompts that only some instances can hold: they wait for one, and no engine refuses them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.sim.fleet.controller import ObjectiveRule
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationOptions
from sagecp.sim.fleet.traces import read_trace
from tests.support.sim_traces import write_trace

FLEET = "1x8b-h100+4x8b-l4"


@pytest.mark.parametrize("scheduling_policy", SCHEDULING_POLICIES.names)
def test_long_prompts_run_where_they_fit(tmp_path: Path, scheduling_policy: str) -> None:
    small = min(each.kv_token_capacity for each in read_fleet(FLEET))
    draw = random.Random(3)
    rows = [
        {
            "t_s": number // 5 * 4.0,
            "prompt_tokens": small + 1000 * (number % 7)
            if number % 5 < 2
            else draw.choice([200, 2000, 6000]),
            "output_tokens": 50,
        }
        for number in range(80)
    ]
    trace = read_trace(write_trace(tmp_path / "trace.jsonl", rows))
    setup = SchedulerSetup(scheduling_policy=scheduling_policy, seed=1)
    controller = SchedulerController(setup, trace.block_token_count)
    options = SimulationOptions(objectives=ObjectiveRule())
    outcomes = Simulation(trace, read_fleet(FLEET), controller, options).run().outcomes.as_arrays()
    states = outcomes.state
    assert np.all(states == OutcomeState.SUCCEEDED), np.unique(states, return_counts=True)
    long = outcomes.prompt_token_count >= small
    assert set(outcomes.instance_index[long]) == {0}
    assert len(set(outcomes.instance_index[~long])) > 1, "the others are not kept idle"
