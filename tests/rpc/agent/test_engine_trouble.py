"""Engines that are not ready, die, hang, answer with errors, or come back as others."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sagecp.agent import watch
from sagecp.v1 import fleet_service_pb2 as pb
from tests.rpc.agent.peers import ControlPlane, Engine, Log, Start


async def test_a_dead_engine_is_news_at_once_and_so_is_its_return(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    control_plane.interval_s = 30.0
    control_plane.lease_s = 100.0
    start()
    await control_plane.until(lambda: control_plane.beats)
    await engine.until(lambda: engine.health_count >= 4)  # It looks more often than it beats.
    assert len(control_plane.beats) == 1
    died_s = time.monotonic()
    await engine.stop()
    beat = await control_plane.until(lambda: len(control_plane.beats) > 1 and control_plane.beats[1])
    assert time.monotonic() - died_s < 5
    assert beat.engine_condition == pb.ENGINE_CONDITION_UNHEALTHY
    assert "connection refused" in beat.condition_reason
    assert not beat.HasField("engine")
    await engine.start()
    beat = await control_plane.until(lambda: len(control_plane.beats) > 2 and control_plane.beats[2])
    assert beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY
    assert beat.condition_reason == ""
    assert beat.engine.running_request_count == 6
    assert len(control_plane.registrations) == 1, "it is what it was"


async def test_the_end_of_an_engine_is_noticed_without_a_look(
    start: Start,
    engine: Engine,
    control_plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sagecp.agent.daemon.MAX_LOOK_S", 60.0)
    control_plane.interval_s = 30.0
    control_plane.lease_s = 100.0
    start()
    await control_plane.until(lambda: control_plane.beats)
    await engine.until(lambda: engine.health_count >= 2)
    await engine.stop()
    # Well before the next look: its connection closed.
    beat = await control_plane.until(lambda: len(control_plane.beats) > 1 and control_plane.beats[1], 10)
    assert beat.engine_condition == pb.ENGINE_CONDITION_UNHEALTHY


async def test_an_engine_that_answers_with_an_error_is_unhealthy(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    start()
    await control_plane.until(lambda: control_plane.beats)
    engine.health_status = 503
    beat = await control_plane.until(
        lambda: (
            control_plane.beats[-1].engine_condition == pb.ENGINE_CONDITION_UNHEALTHY
            and control_plane.beats[-1]
        )
    )
    assert beat.condition_reason == "GET /health answered 503"


async def test_an_engine_that_hangs_is_unhealthy_after_the_third_late_check(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    start()
    await control_plane.until(lambda: control_plane.beats)
    engine.health_delay_s = 60.0
    first_late = len(control_plane.beats)
    beat = await control_plane.until(
        lambda: (
            control_plane.beats[-1].engine_condition == pb.ENGINE_CONDITION_UNHEALTHY
            and control_plane.beats[-1]
        )
    )
    assert "no answer within" in beat.condition_reason
    # The beats went on meanwhile: one late check alone is no news.
    late = control_plane.beats[first_late:]
    assert len(late) >= 2
    assert all(beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY for beat in late[:-1])
    engine.health_delay_s = 0.0
    await control_plane.until(lambda: control_plane.beats[-1].engine_condition == pb.ENGINE_CONDITION_HEALTHY)


async def test_an_engine_that_comes_back_as_another_is_registered_anew(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    start()
    await control_plane.until(lambda: control_plane.beats)
    await engine.stop()
    await control_plane.until(
        lambda: control_plane.beats[-1].engine_condition == pb.ENGINE_CONDITION_UNHEALTHY
    )
    engine.models = [{"id": "large", "parent": None, "owned_by": "vllm", "max_model_len": 4096}]
    await engine.start()
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    spec = control_plane.registrations[1].spec
    assert (spec.model_name, list(spec.model_aliases), spec.max_context_token_count) == ("large", [], 4096)
    assert control_plane.registrations[1].incarnation == control_plane.registrations[0].incarnation
    assert control_plane.peers[1] == control_plane.peers[0], "over the same connection"


async def test_an_adapter_loaded_later_becomes_an_alias(
    start: Start,
    engine: Engine,
    control_plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_MODELS_CHECK_S", 0.1)
    start()
    await control_plane.until(lambda: control_plane.beats)
    engine.models = [*engine.models, {"id": "adapter-2", "parent": "tiny", "owned_by": "vllm"}]
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    assert list(control_plane.registrations[1].spec.model_aliases) == ["adapter", "adapter-2"]


async def test_it_waits_for_the_engine_and_says_so_once(
    start: Start, engine: Engine, control_plane: ControlPlane, log: Log
) -> None:
    engine.health_status = 503
    start()
    await engine.until(lambda: engine.health_count >= 4)
    assert not control_plane.registrations
    engine.health_status = 200
    await control_plane.until(lambda: control_plane.registrations)
    waiting = [event for event in log if event["event"] == "waiting for the engine"]
    assert len(waiting) == 1
    assert waiting[0]["reason"] == "GET /health answered 503"
    assert waiting[0]["instance_id"] == "engine-1"


@pytest.mark.parametrize(
    ("models", "settings", "reason"),
    [
        ([], {}, "lists no model"),
        ([{"name": "x"}], {}, "lists no model"),
        ([{"id": "a"}, {"id": "b"}], {"model_name": "c"}, "--model 'c' is not served; the engine has a, b"),
    ],
)
async def test_an_engine_that_cannot_be_used_is_given_up(
    start: Start,
    engine: Engine,
    control_plane: ControlPlane,
    log: Log,
    models: list[dict[str, Any]],
    settings: dict[str, Any],
    reason: str,
) -> None:
    engine.models = models
    agent = start(engine_timeout_s=0.5, **settings)
    assert await agent.exit_code() == 3
    assert reason in log[-1]["event"]
    assert "--engine-timeout" in log[-1]["event"]
    assert not control_plane.registrations
