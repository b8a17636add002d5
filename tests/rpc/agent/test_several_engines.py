"""One agent, several engines of its host: one connection, one stream, and troubles of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from sagecp.agent.daemon import run_agents
from sagecp.agent.settings import agent_configs
from sagecp.agent.watch import EngineWatch
from sagecp.config import ServerConfig
from sagecp.core.types import InstanceState
from sagecp.rpc.server import ControlPlaneServer
from sagecp.v1 import fleet_service_pb2 as pb
from tests.rpc.agent.peers import TIMEOUT_S, ControlPlane, Engine, Log
from tests.support.waiting import until

LEFT, RIGHT = "left", "right"


@dataclass
class RunningAgents:
    """An agent with two engines."""

    stop: asyncio.Event
    task: asyncio.Task[int]

    async def end(self) -> int:
        self.stop.set()
        async with asyncio.timeout(TIMEOUT_S):
            return await self.task


@pytest.fixture
async def right() -> AsyncIterator[Engine]:
    engine = Engine()
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def agents(
    engine: Engine, right: Engine, control_plane: ControlPlane, log: Log
) -> AsyncIterator[RunningAgents]:
    configs = agent_configs(
        [f"{LEFT}={engine.url}", f"{RIGHT}={right.url}"], common={"control_plane": control_plane.address}
    )
    stop = asyncio.Event()
    running = RunningAgents(stop, asyncio.ensure_future(run_agents(configs, stop)))
    yield running
    running.stop.set()
    running.task.cancel()
    await asyncio.gather(running.task, return_exceptions=True)


async def both_beat(control_plane: ControlPlane, more: int = 3) -> None:
    """Wait until each engine has had so many more beats."""
    start = len(control_plane.beats)

    def enough() -> bool:
        ids = [beat.instance_id for beat in control_plane.beats[start:]]
        return min(ids.count(LEFT), ids.count(RIGHT)) >= more

    await control_plane.until(enough)


def is_healthy(beat: pb.HeartbeatRequest) -> bool:
    return beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY


async def test_their_beats_go_over_one_stream_of_one_connection(
    agents: RunningAgents, control_plane: ControlPlane, engine: Engine, right: Engine
) -> None:
    await both_beat(control_plane)
    assert control_plane.stream_count == 1
    assert len(set(control_plane.peers)) == 1
    specs = {request.spec.instance_id: request.spec for request in control_plane.registrations}
    assert {name: spec.engine_url for name, spec in specs.items()} == {LEFT: engine.url, RIGHT: right.url}
    for name in (LEFT, RIGHT):
        beats = [beat for beat in control_plane.beats if beat.instance_id == name]
        assert [beat.sequence for beat in beats] == list(range(1, len(beats) + 1)), "each counts its own"
        assert len({beat.lease_token for beat in beats}) == 1
    tokens = {beat.instance_id: beat.lease_token for beat in control_plane.beats}
    assert tokens[LEFT] != tokens[RIGHT]


async def test_one_dead_engine_is_no_matter_of_the_other(
    agents: RunningAgents, control_plane: ControlPlane, right: Engine
) -> None:
    await both_beat(control_plane)
    await right.stop()
    await control_plane.until_beat(lambda beat: not is_healthy(beat), RIGHT)
    await both_beat(control_plane)
    left = control_plane.last_beat(LEFT)
    assert left is not None
    assert is_healthy(left)
    await right.start()
    await control_plane.until_beat(is_healthy, RIGHT)
    assert control_plane.stream_count == 1


async def test_one_that_is_not_ready_does_not_hold_up_the_other(
    engine: Engine, right: Engine, control_plane: ControlPlane, agents: RunningAgents
) -> None:
    # Fixtures are made in order: the agent has not had its first turn of the loop.
    right.health_status = 503
    await control_plane.until_beat(lambda beat: beat.sequence > 3, LEFT)
    assert control_plane.last_beat(RIGHT) is None
    right.health_status = 200
    await both_beat(control_plane)
    assert control_plane.stream_count == 1


async def test_what_is_asked_of_one_is_done_by_that_one(
    agents: RunningAgents, control_plane: ControlPlane, engine: Engine, right: Engine
) -> None:
    await both_beat(control_plane)
    control_plane.only_instance_id, control_plane.abort_request_ids = RIGHT, ["r-1"]
    await right.until(lambda: right.aborted)
    await both_beat(control_plane)
    assert engine.aborted == []


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.NOT_FOUND, "instance 'left' is not registered", "INSTANCE_NOT_FOUND"),
        (grpc.StatusCode.PERMISSION_DENIED, "another secret", "PERMISSION_DENIED"),
        (grpc.StatusCode.ABORTED, "registered with incarnation 9", "STALE_INCARNATION"),
    ],
)
async def test_when_the_stream_ends_over_one_all_register_again(
    agents: RunningAgents, control_plane: ControlPlane, log: Log, failure: tuple[Any, ...]
) -> None:
    await both_beat(control_plane)
    control_plane.beat_failures = [failure]
    await control_plane.until(lambda: len(control_plane.registrations) == 4)
    await both_beat(control_plane)
    assert len(control_plane.registrations) == 4
    assert len(set(control_plane.peers)) == 1, log
    assert not agents.task.done()


async def test_one_that_is_refused_ends_alone_and_its_exit_code_is_kept(
    engine: Engine, right: Engine, control_plane: ControlPlane, agents: RunningAgents, log: Log
) -> None:
    control_plane.refused_instance_ids[LEFT] = (
        grpc.StatusCode.ABORTED,
        "registered with incarnation 9",
        "STALE_INCARNATION",
    )
    await control_plane.until_beat(lambda beat: beat.sequence > 3, RIGHT)
    assert any("another agent owns the instance id 'left'" in event["event"] for event in log)
    assert control_plane.stream_count == 1
    assert await agents.end() == 5
    assert [request.instance_id for request in control_plane.deregistrations] == [RIGHT]


async def test_one_that_is_taken_over_later_leaves_the_other_its_stream_back(
    agents: RunningAgents, control_plane: ControlPlane, log: Log
) -> None:
    await both_beat(control_plane)
    stale = (grpc.StatusCode.ABORTED, "registered with incarnation 9", "STALE_INCARNATION")
    control_plane.refused_instance_ids[LEFT] = stale
    control_plane.beat_failures = [stale]
    beat_count = len(control_plane.beats)
    await control_plane.until(
        lambda: sum(beat.instance_id == RIGHT for beat in control_plane.beats[beat_count + 2 :]) > 3
    )
    assert any("another agent owns the instance id 'left'" in event["event"] for event in log)
    assert await agents.end() == 5


async def test_a_restarted_control_plane_gets_both_back_over_one_connection(
    agents: RunningAgents, control_plane: ControlPlane
) -> None:
    await both_beat(control_plane)
    await control_plane.stop()
    registered, streams = len(control_plane.registrations), control_plane.stream_count
    await control_plane.start()
    await both_beat(control_plane)
    assert {request.spec.instance_id for request in control_plane.registrations[registered:]} == {LEFT, RIGHT}
    assert control_plane.stream_count >= streams + 1


async def test_they_leave_together(agents: RunningAgents, control_plane: ControlPlane) -> None:
    await both_beat(control_plane)
    assert await agents.end() == 0
    assert {request.instance_id for request in control_plane.deregistrations} == {LEFT, RIGHT}


async def test_another_adapter_of_one_is_registered_without_another_stream(
    agents: RunningAgents, control_plane: ControlPlane, right: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await both_beat(control_plane)
    monkeypatch.setattr("sagecp.agent.watch._MODELS_CHECK_S", 0.1)
    right.models = [*right.models, {"id": "more", "parent": "tiny", "owned_by": "vllm"}]
    await control_plane.until(lambda: "more" in control_plane.registrations[-1].spec.model_aliases)
    await both_beat(control_plane)
    assert control_plane.stream_count == 1
    beats = [beat for beat in control_plane.beats if beat.instance_id == RIGHT]
    assert [beat.sequence for beat in beats] == list(range(1, len(beats) + 1)), "numbered on"


async def test_with_the_real_control_plane(engine: Engine, right: Engine, log: Log) -> None:
    config = ServerConfig(listen="127.0.0.1:0")
    config = replace(config, runtime=replace(config.runtime, heartbeat_interval_s=0.1))
    server = ControlPlaneServer(config.validate())
    await server.start()

    def states() -> dict[str, InstanceState]:
        return {record.instance_id: record.state for record in server.manager.instances()}

    stop = asyncio.Event()
    configs = agent_configs(
        [f"{LEFT}={engine.url}", f"{RIGHT}={right.url}"], common={"control_plane": server.address}
    )
    task = asyncio.ensure_future(run_agents(configs, stop))
    try:
        await until(lambda: states() == {LEFT: InstanceState.READY, RIGHT: InstanceState.READY})
        await right.stop()
        await until(lambda: states() == {LEFT: InstanceState.READY, RIGHT: InstanceState.UNHEALTHY})
        await right.start()
        await until(lambda: states() == {LEFT: InstanceState.READY, RIGHT: InstanceState.READY})
        server.manager.deregister_instance(LEFT, 0, "by an operator")
        await until(lambda: states() == {LEFT: InstanceState.READY, RIGHT: InstanceState.READY})
        stop.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await task == 0
        assert states() == {}
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0.0)
    assert not [event for event in log if "Traceback" in str(event)]


async def test_a_defect_met_by_one_is_no_matter_of_the_other(
    control_plane: ControlPlane, agents: RunningAgents, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = EngineWatch.look

    async def fail_for_one(watch: EngineWatch, *arguments: Any, **options: Any) -> bool:
        if watch.spec.instance_id == LEFT:
            raise RuntimeError("a defect")
        return await look(watch, *arguments, **options)

    await both_beat(control_plane)
    monkeypatch.setattr(EngineWatch, "look", fail_for_one)
    beat_count = len(control_plane.beats)
    await control_plane.until(
        lambda: sum(beat.instance_id == RIGHT for beat in control_plane.beats[beat_count:]) > 3
    )
    assert await agents.end() == 1
    assert any(event["event"] == "the agent of this engine failed" for event in log)
