"""Engines that hang or fail are found and come back; the control plane's own absence is nobody's fault."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagecp.config import RuntimeConfig
from sagecp.core.config import SchedulerConfig
from sagecp.core.events import ClockSkipped, EngineProbed, EngineSilent, HeartbeatReceived
from sagecp.core.health_limits import HealthLimits
from sagecp.core.types import EngineCondition, ExecutionInstance, RequestMetadata, RequestState
from sagecp.runtime.engines.base import EngineHealth
from sagecp.runtime.health import EngineProber
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.watchdog import SKIP_S, TICK_S, Watchdog
from tests.support.scripted_client import WAIT_S, ScriptedFleet
from tests.support.scripted_engine import Request, scripted_engine, token
from tests.support.waiting import other_tasks, turns, until

QUICK = HealthLimits(
    base_ejection_s=0.05,
    max_ejection_s=0.5,
    probe_interval_s=0.02,
    max_probe_interval_s=0.1,
    stall_timeout_s=0.5,
    base_hold_down_s=0.01,
    max_hold_down_s=0.02,
)


# -- what it reports -----------------------------------------------------------------


class Silences:
    """A coordinator that knows since when engines are silent, and a clock that only tests move."""

    def __init__(self) -> None:
        self.since_s: dict[str, float | None] = {}
        self.now = 100.0
        self.reports: list[Any] = []
        self.watchdog = Watchdog(
            self,  # type: ignore[arg-type]
            lambda: self.since_s,
            self.reports.append,
            silence_s=10.0,
            clock=lambda: self.now,
        )

    def silent_since(self, instance_id: str) -> float | None:
        return self.since_s[instance_id]

    def take(self) -> list[Any]:
        taken, self.reports[:] = list(self.reports), []
        return taken


def test_long_silences_are_reported() -> None:
    world = Silences()
    world.since_s = {"idle": None, "talking": 99.9, "pausing": 90.1, "silent": 90.0, "frozen": 40.0}
    world.watchdog.look()
    assert world.take() == [EngineSilent("silent", 10.0), EngineSilent("frozen", 60.0)]


async def test_a_pause_of_our_own_is_reported_once_and_is_no_silence_of_others() -> None:
    world = Silences()
    running = asyncio.create_task(world.watchdog.run())
    await turns(2)
    world.now += SKIP_S + TICK_S
    world.watchdog.check_clock()
    assert world.take() == []
    world.now += 30.0
    world.since_s = {"a": 95.0}
    world.watchdog.check_clock()
    world.watchdog.check_clock()
    world.watchdog.look()
    assert world.take() == [ClockSkipped(30.0)]
    world.now += 9.0
    world.watchdog.look()
    assert world.take() == []
    world.now += 1.0
    world.watchdog.look()
    assert world.take() == [EngineSilent("a", 10.0)]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_who_does_not_watch_misses_nothing() -> None:
    """Before the start and after the end nobody looks at the time regularly."""
    world = Silences()
    world.watchdog.check_clock()
    world.now += 1000.0
    world.watchdog.check_clock()
    running = asyncio.create_task(world.watchdog.run())
    await turns(2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    world.now += 1000.0
    world.watchdog.check_clock()
    assert world.take() == []


async def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Silences):
        def silent_since(self, instance_id: str) -> float | None:
            if not caplog.text:
                raise RuntimeError("a defect")
            return -100.0

    world = Failing()
    world.since_s = {"a": None}
    watchdog = Watchdog(world, lambda: world.since_s, world.reports.append, silence_s=10.0)  # type: ignore[arg-type]
    running = asyncio.create_task(watchdog.run())
    await until(lambda: bool(world.reports))
    assert "watchdog pass crashed" in caplog.text
    assert world.reports[0].instance_id == "a"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


class Probes:
    """A coordinator whose engines answer probes when a test says so."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.answers: dict[str, asyncio.Future[EngineHealth]] = {}

    async def probe_generation(self, instance_id: str) -> EngineHealth:
        self.started.append(instance_id)
        self.answers[instance_id] = asyncio.get_running_loop().create_future()
        return await self.answers[instance_id]


async def test_each_engine_is_probed_once_at_a_time() -> None:
    probes, reports = Probes(), list[EngineProbed]()
    prober = EngineProber(probes, reports.append)  # type: ignore[arg-type]
    for instance_id in ("a", "b", "a"):
        prober.probe(instance_id)
    await turns(2)
    assert probes.started == ["a", "b"]
    probes.answers["a"].set_result(EngineHealth(False, 5.0, "no token " * 1000))
    await until(lambda: bool(reports))
    assert (reports[0].instance_id, reports[0].answered, len(reports[0].detail)) == ("a", False, 256)
    prober.probe("a")
    await turns(2)
    assert probes.started == ["a", "b", "a"]
    await prober.stop()
    assert other_tasks() == set()
    assert len(reports) == 1


# -- the whole control plane, with scripted engines ----------------------------------


@contextlib.asynccontextmanager
async def control_plane(
    fleet: ScriptedFleet | None = None, **scheduler: Any
) -> AsyncIterator[ControlPlaneManager]:
    scheduler.setdefault("health", QUICK)
    manager = ControlPlaneManager(
        load_balancer="least_connections",
        scheduler=SchedulerConfig(**scheduler),
        runtime=RuntimeConfig(health_interval_s=0.02),
        client_factory=fleet,
    )
    await manager.start()
    try:
        yield manager
    finally:
        await manager.stop()
        await turns(3)
        assert other_tasks() - {asyncio.current_task()} == set()


async def becomes(manager: ControlPlaneManager, instance_id: str, state: str) -> None:
    await until(lambda: manager.instance(instance_id).state.name == state, f"{instance_id} is {state}")


async def join(manager: ControlPlaneManager, *instances: ExecutionInstance) -> None:
    for instance in instances:
        manager.register_instance(instance)
        await becomes(manager, instance.instance_id, "READY")


async def submit(manager: ControlPlaneManager, request_id: str, **more: Any) -> None:
    await manager.submit_request(RequestMetadata(request_id=request_id, prompt="hello", **more))


async def end_of(manager: ControlPlaneManager, request_id: str) -> RequestState:
    return (await asyncio.wait_for(manager.wait_request(request_id), WAIT_S)).state


async def test_an_engine_that_hangs_while_its_health_is_well_is_quarantined() -> None:
    fleet = ScriptedFleet()
    async with control_plane(fleet) as manager:
        await join(manager, fleet.instance("a"), fleet.instance("b"))
        fleet["a"].hung = True
        await submit(manager, "r")
        hanging = await fleet["a"].next_call()
        await becomes(manager, "a", "UNHEALTHY")
        assert "stalled: " in manager.instance("a").state_reason
        (await fleet["b"].next_call()).answer("x")
        assert await end_of(manager, "r") is RequestState.SUCCEEDED
        assert hanging.cancelled
        # Its health is asked for all the time, and is well.
        seen = fleet["a"].probe_count
        await until(lambda: fleet["a"].probe_count > seen + 3)
        assert manager.instance("a").state.name == "UNHEALTHY"
        fleet["a"].hung = False
        await becomes(manager, "a", "READY")


async def test_an_engine_that_talks_is_left_alone() -> None:
    fleet = ScriptedFleet()
    # Longer than a pause of this process that does not count.
    limits = dataclasses.replace(QUICK, stall_timeout_s=SKIP_S + 2 * TICK_S)
    async with control_plane(fleet, health=limits) as manager:
        await join(manager, fleet.instance("a"), fleet.instance("b"))
        await submit(manager, "talks")
        await submit(manager, "hangs")
        talking, hanging = await fleet["a"].next_call(), await fleet["b"].next_call()

        def quarantined() -> bool:
            talking.send("x")
            fleet["a"].last_output_s = time.monotonic()
            return manager.instance("b").state.name == "UNHEALTHY"

        await until(quarantined)
        assert hanging.ended
        assert manager.instance("a").state.name == "READY"


async def test_leases_outlast_a_blocked_event_loop() -> None:
    fleet = ScriptedFleet()
    # A shorter lease could end in a pause that is too short to count.
    async with control_plane(fleet, lease_duration_s=SKIP_S + 2 * TICK_S) as manager:
        manager.register_instance(fleet.instance("a"), incarnation=1)
        beat = HeartbeatReceived("a", 1, EngineCondition.HEALTHY)
        manager.heartbeat(beat)
        await asyncio.sleep(0)
        # This is the fault: nothing else can run, as in a process that was stopped.
        time.sleep(SKIP_S + 3 * TICK_S)  # noqa: ASYNC251
        await turns(50)
        assert manager.instance("a").state.name == "READY"
        await becomes(manager, "a", "LOST")


async def test_when_all_agents_fall_silent_engines_are_asked_themselves() -> None:
    fleet = ScriptedFleet()
    async with control_plane(fleet, lease_duration_s=0.3) as manager:
        for name in "abc":
            manager.register_instance(fleet.instance(name), incarnation=1)
            manager.heartbeat(HeartbeatReceived(name, 1, EngineCondition.HEALTHY))
        fleet["c"].healthy = False
        await becomes(manager, "c", "LOST")
        assert [state.name for state in manager.instance("c").machine.history[-2:]] == ["UNHEALTHY", "LOST"]
        assert {manager.instance(name).state.name for name in "ab"} == {"READY"}
        assert await fleet["a"].next_probe()
        faults = [fault.message for fault in manager.get_status().recent_faults]
        assert any(message.startswith("fail static: heartbeats of 3 of 3 instances") for message in faults)
        await submit(manager, "r")
        (await fleet["a"].next_call()).answer("x")
        assert await end_of(manager, "r") is RequestState.SUCCEEDED


# -- over real sockets ---------------------------------------------------------------


class FailingEngine:
    """An engine that answers requests with a status of a test's choice, and ``/health`` with 200."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.generation_count = 0

    async def script(self, request: Request) -> None:
        if request.path == "/health":
            await request.answer("200 OK", b"")
            return
        self.generation_count += 1
        if self.status != "200 OK":
            await request.answer(self.status, b'{"error": {"message": "no", "code": 500}}')
        elif b'"stream":true' in request.body.replace(b" ", b""):
            await request.stream(token("x"), token("", "stop"), b"data: [DONE]\n\n")
        else:
            choice = b'{"index": 0, "text": "x", "finish_reason": "length"}'
            await request.answer("200 OK", b'{"choices": [%b], "usage": {"completion_tokens": 1}}' % choice)


def at(name: str, port: int) -> ExecutionInstance:
    return ExecutionInstance(instance_id=name, host="127.0.0.1", port=port, model_name="tiny")


@contextlib.asynccontextmanager
async def two_engines(status: str) -> AsyncIterator[tuple[ControlPlaneManager, FailingEngine]]:
    failing, well = FailingEngine(status), FailingEngine("200 OK")
    async with (
        scripted_engine(failing.script) as bad,
        scripted_engine(well.script) as good,
        control_plane(None) as manager,
    ):
        await join(manager, at("bad", bad.port), at("good", good.port))
        yield manager, failing


async def test_an_engine_that_answers_5xx_is_ejected_and_comes_back_when_it_works() -> None:
    async with two_engines("500 Internal Server Error") as (manager, failing):
        number = 0
        while manager.instance("bad").state.name == "READY":
            number += 1
            await submit(manager, f"r{number}")
            assert await end_of(manager, f"r{number}") is RequestState.SUCCEEDED
        assert failing.generation_count == 5
        reason = manager.instance("bad").state_reason
        assert reason.startswith("ejected: 5 attempts in a row failed, the last with ENGINE_FAILED")
        # A probe is a real request: it fails as well.
        await until(lambda: "a probe failed" in manager.instance("bad").state_reason)
        assert failing.generation_count > 5
        failing.status = "200 OK"
        await becomes(manager, "bad", "READY")


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "422 Unprocessable Entity"])
async def test_an_engine_that_answers_4xx_is_not(status: str) -> None:
    async with two_engines(status) as (manager, failing):
        for number in range(30):
            await submit(manager, f"r{number}")
            await end_of(manager, f"r{number}")
        assert failing.generation_count > 10
        assert manager.instance("bad").state.name == "READY"
        assert manager.instance("bad").health.failure_count == 0
