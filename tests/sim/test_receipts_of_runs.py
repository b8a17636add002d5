"""Receipts of whole simulated runs: every decision can be made again from its own record, bit for bit."""

from __future__ import annotations

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.receipts import run_again
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.types import SchedulingDecision
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation
from sagecp.sim.fleet.traces import Trace, read_trace
from tests.support.sim_traces import FLEET, HARSH_WORLD, mixed_requests, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A short trace that makes the fleet queue."""
    rows = mixed_requests(60, seed=4, per_s=40.0)
    return read_trace(write_trace(tmp_path_factory.mktemp("trace") / "trace.jsonl", rows))


@pytest.mark.parametrize("scheduling_policy", SCHEDULING_POLICIES.names)
@pytest.mark.parametrize("routing_strategy", ROUTING_STRATEGIES.names)
@pytest.mark.parametrize("load_balancer", LOAD_BALANCERS.names)
def test_every_decision_of_a_run_is_made_again_from_its_receipt(
    trace: Trace, scheduling_policy: str, routing_strategy: str, load_balancer: str
) -> None:
    decisions: list[SchedulingDecision] = []

    def note(_now: float, _event: ev.Event, effects: list[fx.Effect]) -> None:
        decisions.extend(effect.decision for effect in effects if isinstance(effect, fx.DispatchAttempt))

    setup = SchedulerSetup(
        scheduling_policy=scheduling_policy,
        routing_strategy=routing_strategy,
        load_balancer=load_balancer,
        model_error=0.2,
        seed=7,
    )
    controller = SchedulerController(setup, trace.block_token_count, listener=note)
    Simulation(trace, read_fleet(FLEET), controller, HARSH_WORLD).run()
    assert len(decisions) > 40
    # Only now, when everything that they were made from has changed.
    for decision in decisions:
        assert run_again(decision) == (decision.instance_id, decision.candidates)
