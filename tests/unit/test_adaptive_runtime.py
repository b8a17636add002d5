"""The adaptive policy in a running control plane: replays happen beside it and change what is in force."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sys
from collections.abc import AsyncIterator, Sequence

import pytest

from sagecp.core import events as ev
from sagecp.core.policies.base import PolicyVerdict
from sagecp.core.policy_replay import PolicyReplay, PolicyScore
from sagecp.core.settings import SettingsChange
from sagecp.core.types import InstanceState, PromptDigest, RequestMetadata
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.policy_evaluation import EvaluationError, EvaluationProcess, PolicyEvaluator
from tests.support.core_world import STEP_TIME
from tests.support.scripted_client import ScriptedFleet
from tests.support.waiting import other_tasks, turns, until

INTERVAL_S = 20.0


class ScriptedEvaluator:
    """Answers replays when a test says so."""

    def __init__(self) -> None:
        self.replays: list[PolicyReplay] = []
        self.answers: list[asyncio.Future[Sequence[PolicyScore]]] = []

    async def evaluate(self, replay: PolicyReplay) -> tuple[PolicyScore, ...]:
        self.replays.append(replay)
        self.answers.append(asyncio.get_running_loop().create_future())
        return tuple(await self.answers[-1])


class Plane:
    """A control plane whose clock only the test moves, with more requests than its engine serves."""

    def __init__(self, evaluator: PolicyEvaluator | None) -> None:
        self.now = 0.0
        self.fleet = ScriptedFleet()
        self.manager = ControlPlaneManager(
            client_factory=self.fleet, clock=lambda: self.now, policy_evaluator=evaluator
        )

    async def crowd(self) -> None:
        """Let an interval pass with arrivals, long prompts and short ones, until a replay is due."""
        for number in range(100):
            self.now += INTERVAL_S / 100
            digest = PromptDigest(30_000 if number % 8 == 0 else 1_000)
            await self.manager.submit_request(RequestMetadata(prompt_digest=digest, prompt=""))
        due_s = self.manager.scheduler.adaptation.next_timer_s()
        assert due_s is not None
        self.now = max(self.now, due_s)
        self.manager._loop.feed(ev.ClockAdvanced())
        await turns()

    @property
    def in_force(self) -> str:
        return self.manager.scheduler.policy_in_force


@contextlib.asynccontextmanager
async def running(evaluator: PolicyEvaluator | None) -> AsyncIterator[Plane]:
    plane = Plane(evaluator)
    await plane.manager.start()
    try:
        instance = dataclasses.replace(plane.fleet.instance("a", limit=1), step_time=STEP_TIME)
        plane.manager.register_instance(instance)
        await until(lambda: plane.manager.instance("a").state is InstanceState.READY)
        yield plane
    finally:
        await plane.manager.stop()
        await turns(3)
        assert other_tasks() == set()


PRIORITY_IS_BETTER = [
    PolicyScore(policy=policy, attainment=share, token_weighted_attainment=share)
    for policy, share in (("slo_aware", 0.5), ("priority", 0.9))
]


async def test_scores_change_the_policy_in_force_and_it_says_since_when(
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluator = ScriptedEvaluator()
    async with running(evaluator) as plane:
        assert plane.manager.get_status().policy_reason == "nothing to judge by yet"
        with caplog.at_level(logging.INFO, logger="sagecp.runtime.control_loop"):
            for count in (1, 2):
                await plane.crowd()
                assert len(evaluator.replays) == count
                evaluator.answers[-1].set_result(PRIORITY_IS_BETTER)
                await turns()
        assert plane.in_force == "priority"
        reason = plane.manager.get_status().policy_reason
        assert reason.startswith("since ")
        assert "UTC: replaying the last" in reason
        [switched] = [each for each in caplog.records if each.message == "scheduling policy switched"]
        assert (switched.__dict__["previous"], switched.__dict__["policy"]) == ("slo_aware", "priority")


async def test_a_lasting_fault_is_logged_once_and_the_policy_stays(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = ScriptedEvaluator()
    async with running(evaluator) as plane:
        for error in (EvaluationError("no memory"), EvaluationError("no memory"), RuntimeError("a bug")):
            await plane.crowd()
            evaluator.answers[-1].set_exception(error)
            await turns()
        assert len(evaluator.replays) == 3
        assert plane.in_force == "slo_aware"
    messages = [each.message for each in caplog.records if "evalua" in each.message]
    assert messages == [
        "policies could not be evaluated; the one in force stays",
        "policy evaluation crashed",
    ]


async def test_a_replay_that_takes_too_long_makes_way_for_the_next() -> None:
    evaluator = ScriptedEvaluator()
    async with running(evaluator) as plane:
        for _ in range(4):
            await plane.crowd()
        assert [each.evaluation_id for each in evaluator.replays] == [1, 2]
        assert evaluator.answers[0].cancelled()
        assert not evaluator.answers[1].done()
    # Stopping ended the other one.
    assert evaluator.answers[1].cancelled()


async def test_without_an_evaluator_the_first_policy_stays() -> None:
    async with running(None) as plane:
        await plane.crowd()
        await plane.crowd()
        assert plane.in_force == "slo_aware"


async def test_a_real_process_replays_and_leaves_nothing_behind() -> None:
    evaluator = EvaluationProcess([sys.executable, "-m", "sagecp.sim.fleet.policy_evaluation"])
    async with running(evaluator) as plane:
        book = plane.manager.scheduler.adaptation
        # The load is one for slo_aware, with which it would begin.
        book.verdict = PolicyVerdict("priority", "a test", 0.0)
        plane.manager.update_scheduling(SettingsChange())
        assert plane.in_force == "priority"
        for count in (1, 2):
            await plane.crowd()
            await until(lambda count=count: book.evaluation_count == count, "the replay", 60.0)  # type: ignore[misc]
        assert plane.in_force == "slo_aware"
        # Stopping in the middle of a replay ends its process, or this would not return.
        await plane.crowd()
