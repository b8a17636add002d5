"""An agent brings its engine to what the control plane wants: asleep, awake, with these adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from sagecp.agent import orders
from sagecp.config import ServerConfig
from sagecp.rpc.server import ControlPlaneServer
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2
from tests.rpc.agent.peers import TIMEOUT_S, ControlPlane, Engine, Log, RunningAgent, Start
from tests.sim.engine_client import completion, open_exchange, send


@pytest.fixture
async def simulated() -> AsyncIterator[EngineServer]:
    config = EngineServerConfig(
        model_names=("tiny",),
        profile="fixed",
        time_to_first_token_s=0.0,
        inter_token_s=0.01,
        enable_lora=True,
        max_loras=2,
    )
    async with EngineServer(config) as server:
        yield server


@pytest.fixture
def agent(start: Start, simulated: EngineServer, monkeypatch: pytest.MonkeyPatch) -> RunningAgent:
    monkeypatch.setattr(orders, "_RETRY_BASE_S", 0.05)
    return start(engine_url=simulated.base_url)


def adapters(**paths: Path | str) -> instance_pb2.LoraAdapters:
    return instance_pb2.LoraAdapters(
        adapters=[instance_pb2.LoraAdapter(name=name, path=str(path)) for name, path in paths.items()]
    )


async def test_it_says_what_its_engine_can_be_told(agent: RunningAgent, control_plane: ControlPlane) -> None:
    await control_plane.until(lambda: control_plane.registrations)
    spec = control_plane.registrations[0].spec
    assert set(spec.engine_capabilities) == {
        instance_pb2.ENGINE_CAPABILITY_SLEEP,
        instance_pb2.ENGINE_CAPABILITY_LORA,
        instance_pb2.ENGINE_CAPABILITY_ABORT,
    }
    configuration = dict(spec.engine_configuration)
    assert configuration["block_size"] == "16"
    assert configuration["max_num_batched_tokens"] == "2048"
    assert configuration["max_loras"] == "2"
    assert "num_gpu_blocks_override" not in configuration
    assert len(configuration) <= 30


async def test_an_engine_that_can_be_told_nothing_says_nothing(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    start()
    await control_plane.until(lambda: control_plane.registrations)
    spec = control_plane.registrations[0].spec
    assert list(spec.engine_capabilities) == [instance_pb2.ENGINE_CAPABILITY_ABORT]
    assert engine.aborted == [], "to ask is not to use"


async def test_every_beat_carries_the_secret_of_its_registration(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane
) -> None:
    await control_plane.until_beats(2)
    assert {beat.lease_token for beat in control_plane.beats} == {b"token 1"}
    control_plane.adapters = adapters(red="org/red")
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    await control_plane.until_beat(lambda beat: beat.lease_token == b"token 2")


async def test_it_falls_asleep_once_idle_and_wakes_up(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane
) -> None:
    await control_plane.until_beats(1)
    exchange = await open_exchange(simulated.port, "/v1/completions", completion(max_tokens=60, stream=True))
    await exchange.head()
    await control_plane.until_beat(lambda beat: beat.engine.running_request_count == 1)
    control_plane.desired_state, control_plane.sleep_level = pb.DESIRED_STATE_ASLEEP, 1
    answer = await exchange.rest()
    assert answer.finish_reason == "length", "what runs is not cut off"
    await control_plane.until_beat(lambda beat: beat.engine.sleeping)
    assert simulated.control.sleep_level == 1
    await control_plane.until_beats(len(control_plane.beats) + 2)
    control_plane.desired_state = pb.DESIRED_STATE_DRAINED
    await control_plane.until_beats(len(control_plane.beats) + 3)
    assert simulated.control.is_asleep, "only SERVING is a reason to wake it up"
    control_plane.desired_state = pb.DESIRED_STATE_SERVING
    beat = await control_plane.until_beat(lambda beat: beat.engine.sleeping is False)
    assert not beat.order_trouble


async def test_weights_that_were_dropped_are_loaded_again_before_it_serves(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane
) -> None:
    control_plane.desired_state, control_plane.sleep_level = pb.DESIRED_STATE_ASLEEP, 2
    await control_plane.until_beat(lambda beat: beat.engine.sleeping)
    assert simulated.control.weights_are_missing
    control_plane.desired_state, control_plane.sleep_level = pb.DESIRED_STATE_SERVING, 0
    await control_plane.until_beat(lambda beat: beat.engine.HasField("sleeping") and not beat.engine.sleeping)
    assert not simulated.control.weights_are_missing


async def test_an_engine_that_somebody_else_put_to_sleep_is_left_alone(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane
) -> None:
    await control_plane.until_beats(1)
    await send(simulated.port, "/sleep")
    await control_plane.until_beat(lambda beat: beat.engine.sleeping)
    await control_plane.until_beats(len(control_plane.beats) + 4)
    assert simulated.control.is_asleep


async def test_adapters_are_loaded_and_unloaded_until_they_are_those_wanted(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane, tmp_path: Path
) -> None:
    simulated.control.adapters["old"] = "org/old"
    await control_plane.until_beat(lambda beat: list(beat.engine.loaded_lora_adapters) == ["old"])
    await control_plane.until_beats(len(control_plane.beats) + 3)
    assert set(simulated.control.adapters) == {"old"}, "without an order they stay as they are"
    control_plane.adapters = adapters(red=tmp_path, blue="org/blue")
    await control_plane.until_beat(lambda beat: list(beat.engine.loaded_lora_adapters) == ["blue", "red"])
    assert simulated.control.adapters == {"red": str(tmp_path), "blue": "org/blue"}
    await control_plane.until(
        lambda: set(control_plane.registrations[-1].spec.model_aliases) == {"red", "blue"}
    )
    # Another path under the same name is another adapter.
    control_plane.adapters = adapters(red="org/red")
    await control_plane.until_beat(lambda beat: list(beat.engine.loaded_lora_adapters) == ["red"])
    await control_plane.until(lambda: simulated.control.adapters == {"red": "org/red"})
    control_plane.adapters = adapters()
    await control_plane.until_beat(lambda beat: not beat.engine.loaded_lora_adapters)
    await control_plane.until(lambda: not control_plane.registrations[-1].spec.model_aliases)


async def test_an_adapter_that_is_not_found_is_told_and_does_not_hold_up_the_others(
    agent: RunningAgent, simulated: EngineServer, control_plane: ControlPlane, log: Log, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    control_plane.adapters = adapters(lost=missing, red="org/red")
    beat = await control_plane.until_beat(
        lambda beat: beat.order_trouble and list(beat.engine.loaded_lora_adapters) == ["red"]
    )
    assert beat.order_trouble == (
        "cannot load the LoRA adapter 'lost': POST /v1/load_lora_adapter answered 404: "
        f"Loading lora lost failed: No adapter found for {missing}"
    )
    await control_plane.until_beats(len(control_plane.beats) + 5)
    said = [event for event in log if "does not work" in event["event"]]
    assert len(said) == 1, "once, however often it is tried"
    missing.mkdir()
    beat = await control_plane.until_beat(lambda beat: len(beat.engine.loaded_lora_adapters) == 2)
    assert beat.order_trouble == ""


async def test_trouble_ends_with_the_order(
    agent: RunningAgent, control_plane: ControlPlane, tmp_path: Path
) -> None:
    control_plane.adapters = adapters(lost=tmp_path / "missing")
    await control_plane.until_beat(lambda beat: beat.order_trouble)
    control_plane.adapters = adapters()
    await control_plane.until_beat(lambda beat: not beat.order_trouble)


async def test_an_engine_without_such_pages_says_how_it_gets_them(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    engine.metrics = (engine.metrics or "").replace("num_requests_running{", "x{")
    engine.metrics = engine.metrics.replace("num_requests_waiting{", "y{")
    engine.metrics += "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
    control_plane.adapters = adapters(adapter="", red="org/red")
    control_plane.desired_state = pb.DESIRED_STATE_ASLEEP
    start()
    beat = await control_plane.until_beat(
        lambda beat: "DEV_MODE" in beat.order_trouble and "LORA" in beat.order_trouble
    )
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in beat.order_trouble
    assert "VLLM_SERVER_DEV_MODE=1" in beat.order_trouble


async def test_an_engine_that_does_not_say_whether_it_sleeps_is_not_told_to(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    engine.metrics = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
    control_plane.desired_state = pb.DESIRED_STATE_ASLEEP
    start()
    beat = await control_plane.until_beat(lambda beat: beat.order_trouble)
    assert "does not say whether it sleeps" in beat.order_trouble


async def test_with_the_real_control_plane(start: Start, simulated: EngineServer) -> None:
    """From an operator's call to the engine and back to what the fleet shows."""
    config = ServerConfig(listen="127.0.0.1:0")
    config = replace(config, runtime=replace(config.runtime, heartbeat_interval_s=0.1))
    server = ControlPlaneServer(config.validate())
    await server.start()
    try:
        start(engine_url=simulated.base_url, control_plane=server.address)
        async with grpc.aio.insecure_channel(server.address) as channel:
            fleet: Any = fleet_service_pb2_grpc.FleetServiceStub(channel)

            async def becomes(accept: Callable[[instance_pb2.Instance], bool]) -> None:
                async with asyncio.timeout(TIMEOUT_S):
                    while True:
                        listed = await fleet.ListInstances(pb.ListInstancesRequest())
                        if listed.instances and accept(listed.instances[0]):
                            return
                        await asyncio.sleep(0.02)

            await becomes(lambda instance: instance.state == instance_pb2.INSTANCE_STATE_READY)
            wanted = adapters(red="org/red")
            await fleet.SetLoraAdapters(pb.SetLoraAdaptersRequest(instance_id="engine-1", adapters=wanted))
            await becomes(lambda instance: list(instance.spec.model_aliases) == ["red"])
            assert simulated.control.adapters == {"red": "org/red"}
            sleep = pb.SleepInstanceRequest(instance_id="engine-1", level=2, force=True)
            await fleet.SleepInstance(sleep)
            await becomes(lambda instance: instance.sleep.asleep)
            assert simulated.control.sleep_level == 2
            await fleet.SleepInstance(pb.SleepInstanceRequest(instance_id="engine-1", wake=True))
            await becomes(lambda instance: instance.state == instance_pb2.INSTANCE_STATE_READY)
            assert not simulated.control.is_asleep
            assert not simulated.control.weights_are_missing
    finally:
        await server.stop(0.0)
