"""The execution coordinator: attempts, continuations, probes and progress of its engines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator

import pytest

from sagecp.core.errors import ErrorReason, InstanceNotFoundError
from sagecp.core.types import RequestMetadata, SamplingParameters, SchedulingDecision
from sagecp.runtime.engines.base import EngineSpliceError, EngineTimeoutError
from sagecp.runtime.engines.continuation import Continuation
from sagecp.runtime.executor import ExecutionCoordinator, failure_of
from tests.support.scripted_client import WAIT_S, ScriptedFleet

REQUEST = RequestMetadata(request_id="r", prompt="hello", max_tokens=10)


@pytest.fixture
def fleet() -> ScriptedFleet:
    return ScriptedFleet()


@pytest.fixture
async def coordinator(fleet: ScriptedFleet) -> AsyncIterator[ExecutionCoordinator]:
    made = ExecutionCoordinator(client_factory=fleet)
    made.attach(fleet.instance("a"))
    yield made
    await made.close()


@pytest.mark.parametrize(("epoch", "engine_id"), [(None, "r"), (1, "r"), (2, "r.2"), (3, "r.3")])
async def test_engines_tell_attempts_apart(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet, epoch: int | None, engine_id: str
) -> None:
    fleet["a"].automatic = lambda call: call.answer("x")
    decision = None
    if epoch is not None:
        decision = SchedulingDecision(request_id="r", epoch=epoch, instance_id="a")
    await coordinator.execute_request(REQUEST, fleet.instance("a"), decision)
    assert fleet["a"].calls[0].request_id == engine_id


async def test_the_engine_does_not_work_longer_than_the_request_has(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet
) -> None:
    fleet["a"].automatic = lambda call: call.answer("x")
    for timeout_s in (None, 2.5):
        await coordinator.execute_request(REQUEST, fleet.instance("a"), timeout_s=timeout_s)
    assert [call.timeouts.total_s for call in fleet["a"].calls] == [math.inf, 2.5]


async def test_a_continuation_is_what_earlier_attempts_left_out(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet
) -> None:
    fleet.texts.update({1000: "a", 1001: "b"})
    fleet["a"].automatic = lambda call: call.answer("c", "d")
    result = await coordinator.execute_request(
        REQUEST, fleet.instance("a"), continuation=Continuation((1, 2), (1000, 1001), "ab"), timeout_s=60
    )
    assert (result.text, result.token_ids) == ("cd", (1002, 1003))
    call = fleet["a"].calls[0]
    assert call.body["prompt"] == [1, 2, 1000, 1001]
    assert call.body["max_tokens"] == 8
    assert call.timeouts.total_s <= 60


@pytest.mark.parametrize(
    "request_",
    [
        RequestMetadata(request_id="r", prompt="x", sampling=SamplingParameters(n=2)),
        RequestMetadata(request_id="r", prompt="x", max_tokens=2),
    ],
    ids=["its shape", "nothing left"],
)
async def test_what_cannot_be_continued_does_not_reach_the_engine(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet, request_: RequestMetadata
) -> None:
    with pytest.raises(ValueError, match=r"cannot be continued|nothing to add"):
        await coordinator.execute_request(
            request_, fleet.instance("a"), continuation=Continuation((1,), (1000, 1001), "ab")
        )
    assert not fleet["a"].calls
    assert coordinator.get_metrics().running_count == 0
    assert coordinator.silent_since("a") is None


async def test_silence_counts_from_the_first_call_or_the_last_output(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet
) -> None:
    assert coordinator.silent_since("a") is None
    assert coordinator.silent_since("unknown") is None
    engine = fleet["a"]
    start_s = time.monotonic()
    first = asyncio.create_task(coordinator.execute_request(REQUEST, fleet.instance("a")))
    first_call = await engine.next_call()
    since_s = coordinator.silent_since("a")
    assert since_s is not None
    assert start_s <= since_s <= time.monotonic()
    # A second call is no sign of life.
    second = asyncio.create_task(coordinator.execute_request(REQUEST, fleet.instance("a")))
    second_call = await engine.next_call()
    assert coordinator.silent_since("a") == since_s
    engine.last_output_s = since_s + 5
    assert coordinator.silent_since("a") == since_s + 5
    first_call.answer("x")
    await asyncio.wait_for(first, WAIT_S)
    assert coordinator.silent_since("a") == since_s + 5
    second_call.answer("x")
    await asyncio.wait_for(second, WAIT_S)
    assert coordinator.silent_since("a") is None
    # What it produced before it was idle says nothing about a later call.
    engine.last_output_s = start_s - 100
    third = asyncio.create_task(coordinator.execute_request(REQUEST, fleet.instance("a")))
    third_call = await engine.next_call()
    third_since_s = coordinator.silent_since("a")
    assert third_since_s is not None
    assert third_since_s >= since_s
    third_call.answer("x")
    await asyncio.wait_for(third, WAIT_S)


async def test_a_probe_for_a_token_finds_a_hung_engine(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet
) -> None:
    assert (await coordinator.probe_generation("a")).healthy
    fleet["a"].hung = True
    assert (await coordinator.health_check("a")).healthy
    health = await coordinator.probe_generation("a", 0.5)
    assert not health.healthy
    assert "no token of tiny within 0.5 s" in health.detail
    with pytest.raises(InstanceNotFoundError):
        await coordinator.probe_generation("unknown")


async def test_a_probe_asks_for_the_model_that_is_served_now(
    coordinator: ExecutionCoordinator, fleet: ScriptedFleet
) -> None:
    coordinator.attach(fleet.instance("a", model_name="larger"))
    fleet["a"].hung = True
    assert "larger" in (await coordinator.probe_generation("a")).detail


def test_what_users_are_told() -> None:
    late = failure_of(EngineTimeoutError("the request's time was up", "total"), "a")
    assert late.reason is ErrorReason.DEADLINE_EXCEEDED
    silent = failure_of(EngineTimeoutError("no output within 5 s", "first_token"), "a")
    assert silent.reason is ErrorReason.ENGINE_TIMEOUT
    assert failure_of(EngineSpliceError("no"), "a").reason is ErrorReason.ENGINE_FAILED
