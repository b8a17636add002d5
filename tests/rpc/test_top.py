"""`sagecp top` against a real server: what it shows, and that its keys do what they say."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from sagecp.core.errors import NotImplementedYetError
from sagecp.rpc.servicers.admin import AdminServicer
from sagecp.v1 import admin_service_pb2, fleet_service_pb2, instance_pb2
from tests.support.console import running_console
from tests.support.cutting_proxy import cutting_proxy
from tests.support.rpc_rig import Rig, running_rig
from tests.support.waiting import turns, until


async def beat(rig: Rig, instance_id: str, incarnation: int = 7, **fields: Any) -> Any:
    """Register an instance with an agent, and report once; returns the stream, to be cancelled."""
    answer = await rig.instances.RegisterInstance(
        fleet_service_pb2.RegisterInstanceRequest(
            spec=rig.spec(instance_id, limit=64), incarnation=incarnation
        )
    )
    stream = rig.instances.Heartbeat()
    await stream.write(
        fleet_service_pb2.HeartbeatRequest(
            instance_id=instance_id,
            incarnation=incarnation,
            sequence=1,
            lease_token=answer.lease_token,
            engine_condition=fleet_service_pb2.ENGINE_CONDITION_HEALTHY,
            **fields,
        )
    )
    await stream.read()
    return stream


def state_of(rig: Rig, instance_id: str) -> str:
    return str(rig.manager.instance(instance_id).state.name)


async def test_it_shows_the_control_plane_and_its_instances_in_80x24(rig: Rig) -> None:
    await rig.add_engine("e1")
    stream = await beat(
        rig,
        "e2",
        engine=instance_pb2.EngineGauges(
            running_request_count=3, waiting_request_count=0, key_value_cache_usage=0.42
        ),
        gpus=[
            instance_pb2.GpuReading(
                index=index,
                utilization=0.5 + index / 4,
                used_memory_bytes=60 << 30,
                total_memory_bytes=80 << 30,
                temperature_celsius=70 + index,
            )
            for index in range(2)
        ],
    )
    async with running_console(rig.server.address) as console:
        await console.until("e1", "e2", "42%", "● connected")
        assert len(console.lines) == 24
        assert {len(line) for line in console.lines} == {80}
        assert "Instances 2" in console.text
        row = console.line_with(" e2 ").split()
        assert row[row.index("e2") :] == ["e2", "READY", "0/64", "3/0", "42%", "-", "62%", "75%", "71"]
        assert rig.server.address in console.lines[0]
        assert "policy adaptive > slo_aware" in console.lines[1]
        assert "SLO" in console.lines[2]
        assert "req/s" in console.lines[2]
        assert "TTFT p50" in console.lines[2]
        assert console.lines[-1].startswith(" ? help q quit")
        assert "CRITICAL" in console.text
        assert "BACKGROUND" in console.text
    stream.cancel()


async def test_what_waits_is_counted_by_class_and_tenant(rig: Rig) -> None:
    engine = await rig.add_engine("e1", limit=1)
    await rig.submit("first")
    call = await engine.next_call()
    for number in range(3):
        await rig.submit(f"more-{number}")
    async with running_console(rig.server.address) as console:
        await console.until("Waiting 3", "wait 3", "run 1")
        assert console.line_with("NORMAL").split()[1] == "3"
        await until(lambda: "1/1" in console.line_with(" e1 "))
    call.finish()
    for _ in range(3):
        (await engine.next_call()).finish()


async def test_events_show_as_they_happen(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with running_console(rig.server.address, size=(120, 30)) as console:
        await console.until("Events", "e1")
        await rig.add_engine("e2")
        await console.until("e2 ")
        await rig.instances.DrainInstance(
            fleet_service_pb2.DrainInstanceRequest(instance_id="e2", cause="new fan")
        )
        await console.until("DRAINED", "new fan")


async def test_an_older_server_without_streams_is_watched_by_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def missing(*_: Any) -> None:
        raise NotImplementedYetError("not in this version")

    monkeypatch.setattr(AdminServicer, "WatchEvents", missing)
    monkeypatch.setattr(AdminServicer, "WatchMetrics", missing)
    async with running_rig() as rig:
        engine = await rig.add_engine("e1")
        await rig.submit("one")
        (await engine.next_call()).answer("a", "b")
        async with running_console(rig.server.address, size=(120, 30)) as console:
            await console.until("Changes seen from here")
            await until(lambda: console.app.picture.metrics is not None, "metrics were read")
            await console.until("req/s")
            await rig.instances.DrainInstance(
                fleet_service_pb2.DrainInstanceRequest(instance_id="e1", force=True)
            )
            await console.until("READY -> DRAIN")
            await rig.instances.DeregisterInstance(
                fleet_service_pb2.DeregisterInstanceRequest(instance_id="e1")
            )
            await console.until("left the fleet", "no instance is registered")


async def test_drain_asks_and_drains_and_resume_takes_it_back(rig: Rig) -> None:
    await rig.add_engine("e1")
    await rig.add_engine("e2")
    async with running_console(rig.server.address) as console:
        await console.until(" e1 ", " e2 ")
        console.press("d")
        await console.until("Drain e1?", "0 requests in flight")
        console.press("escape")
        await console.until("Instances 2", absent="Drain e1?")
        assert state_of(rig, "e1") == "READY"
        console.press("down", "d")
        await console.until("Drain e2?")
        console.press("enter")
        await console.until("drain: e2 is DRAINED", "○ e2")
        assert state_of(rig, "e2") == "DRAINED"
        assert state_of(rig, "e1") == "READY"
        console.press("r")
        await console.until("● e2")
        assert state_of(rig, "e2") == "READY"


async def test_a_refused_drain_says_why_and_can_be_forced(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with running_console(rig.server.address) as console:
        await console.until(" e1 ", "load  ")
        console.press("d")
        await console.until("Drain e1?")
        console.press("y")
        await console.until("refuses to drain e1", "no other READY instance serves 'tiny'")
        console.press("enter")
        await console.until(" e1 ", absent="refuses to drain")
        assert state_of(rig, "e1") == "READY"
        console.press("d")
        await console.until("Drain e1?")
        console.press("y")
        await console.until("refuses to drain e1")
        console.press("f")
        await until(lambda: state_of(rig, "e1") == "DRAINED", "it was forced")
        await console.until("○ e1")


async def test_policy_lists_what_there_is_and_changes_it(rig: Rig) -> None:
    async with running_console(rig.server.address, size=(100, 40)) as console:
        await console.until("policy adaptive")
        console.press("P")
        shown = await console.until("version 1", "● adaptive", "● load_balanced", "● predicted_latency")
        assert all(name in shown for name in ("cost_optimized", "round_robin", "power_of_two"))
        console.press("down", "down", "enter")
        await console.until("from adaptive to fifo?", "sagecp policy revert 1")
        console.press("y")
        await console.until("version 2 is in force", "policy fifo")
        assert rig.manager.scheduling_settings().scheduling_policy == "fifo"


async def test_a_policy_that_somebody_else_changed_meanwhile_is_not_overwritten(rig: Rig) -> None:
    async with running_console(rig.server.address, size=(100, 40)) as console:
        await console.until("policy adaptive")
        console.press("P")
        await console.until("version 1")
        console.press("down", "down", "enter")
        await console.until("from adaptive to fifo?")
        update = admin_service_pb2.UpdateSchedulingConfigRequest()
        update.config.scheduling_policy = "priority"
        await rig.admin.UpdateSchedulingConfig(update)
        console.press("y")
        await console.until("that did not work", "policy priority")
        assert rig.manager.scheduling_settings().scheduling_policy == "priority"


async def test_explain_shows_the_receipt_of_a_request(rig: Rig) -> None:
    engine = await rig.add_engine("e1")
    await rig.submit("one-request")
    (await engine.next_call()).answer("a", "b")
    async with running_console(rig.server.address, size=(100, 30)) as console:
        await console.until(" e1 ", "load  ")
        console.press("e")
        await console.until("Recent requests of e1", "one-request")
        console.press("enter")
        shown = await console.until("Request one-request", "attempt 1", "because", "candidates", "SCORE")
        assert "* e1" in shown
        console.press("escape")
        await console.until("Recent requests of e1")
        console.press("escape")
        await console.until("Instances 1")


async def test_without_requests_explain_says_so(rig: Rig) -> None:
    async with running_console(rig.server.address) as console:
        await console.until("no instance is registered")
        console.press("E")
        await console.until("no requests are known")
        console.press("d")
        await console.until("no instance is chosen")


async def test_details_show_everything_of_an_instance(rig: Rig) -> None:
    stream = await beat(rig, "e1", gpu_absent_reason="no NVML here")
    async with running_console(rig.server.address, size=(100, 40)) as console:
        await console.until(" e1 ", "load  ")
        console.press("i")
        await console.until("Instance e1", "engine says", "0 of at most 64", "no NVML here")
        console.press("q")
        await console.until("Instances 1", absent="engine says")
    stream.cancel()


async def test_sleep_is_ordered_or_refused_with_a_reason(rig: Rig) -> None:
    await rig.add_engine("e1")
    await rig.add_engine("e2")
    async with running_console(rig.server.address, size=(100, 30)) as console:
        await console.until(" e1 ", "load  ")
        console.press("w")
        await console.until("Have e1 sleep?")
        console.press("1")
        # An instance without an agent cannot be told to; a server without sleep has not heard of it.
        await console.until("sleep did not work")
        assert state_of(rig, "e1") == "READY"


@pytest.mark.parametrize("key", ["d", "r", "w", "P"])
async def test_read_only_changes_nothing(rig: Rig, key: str) -> None:
    await rig.add_engine("e1")
    async with running_console(rig.server.address, read_only=True) as console:
        shown = await console.until(" e1 ", "READ-ONLY")
        assert "drain" not in shown
        console.press(key)
        await console.until("nothing was changed")
        assert len(console.app.screen_stack) == 1
        assert state_of(rig, "e1") == "READY"


async def test_a_lost_connection_is_said_and_regained(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with cutting_proxy(rig.server.address) as proxy, running_console(proxy.address) as console:
        await console.until(" e1 ", "● connected")
        assert not console.app.fleet.is_dimmed
        proxy.refuse()
        await console.until("CONNECTION LOST", "picture of", " e1 ")
        assert console.app.fleet.is_dimmed
        console.press("d")
        await console.until("Drain e1?")
        console.press("y")
        await console.until("drain did not work")
        await rig.add_engine("e2")
        proxy.accept()
        await console.until("● connected", " e2 ", absent="CONNECTION LOST")
        assert not console.app.fleet.is_dimmed
        await console.until("the connection is back")


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_typed_it_goes_on(rig: Rig, seed: int) -> None:
    """Keys come faster than screens come and go, and the terminal changes its size meanwhile."""
    generator = random.Random(seed)
    for number in range(3):
        await rig.add_engine(f"e{number}")
    await rig.submit("one")
    keys = [*"idrwPeEsSzp?hjkgG/1fyn", "up", "down", "tab", "escape", "enter", "pageup", "end", "backspace"]
    async with running_console(rig.server.address) as console:
        await console.until("e0")
        for step in range(200):
            console.press(generator.choice(keys))
            if step % 25 == 0:
                await console.resize(generator.choice([10, 40, 120]), generator.choice([3, 10, 40]))
            await turns(generator.choice([0, 1, 5]))
            assert console.app.failure is None
        await console.resize(80, 24)
        for _ in range(20):
            console.press("escape")
        await console.until("Instances 3", "Waiting", "Events")
    for engine in rig.fleet.engines.values():
        for call in engine.running:
            call.answer("done")


async def test_pause_holds_the_picture(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with running_console(rig.server.address) as console:
        await console.until(" e1 ", "load  ")
        console.press("p")
        await console.until("PAUSED")
        read_s = console.app.picture.read_s
        await rig.add_engine("e2")
        assert console.app.picture.read_s == read_s
        assert " e2 " not in console.text
        console.press("p")
        await console.until(" e2 ", absent="PAUSED")


async def test_sort_filter_and_zoom(rig: Rig) -> None:
    await rig.add_engine("alpha")
    await rig.add_engine("beta")
    async with running_console(rig.server.address) as console:
        await console.until("alpha", "beta", "by id")
        console.press("slash")
        await console.until("words of an id")
        console.press(*"bet")
        await console.until("Instances 1 of 2 with 'bet'", absent="● alpha")
        console.press("enter")
        await console.until("▶ Instances 1 of 2")
        console.press("z")
        await console.until("Instances 1 of 2", absent="CRITICAL")
        console.press("escape")
        await console.until("alpha", "beta")
        console.press("escape")
        await console.until("CRITICAL")
        console.press("s")
        await console.until("by state")
        console.press("tab", "z")
        await console.until("CRITICAL", absent="Instances 2")
        console.press("z")
        await console.until("Instances 2", "Events")


async def test_it_grows_with_the_terminal(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with running_console(rig.server.address) as console:
        await console.until(" e1 ", "load  ")
        assert "MODEL" not in console.text
        await console.resize(160, 48)
        await console.until("MODEL", "Tab panel")
        assert {len(line) for line in console.lines} == {160}
        await console.resize(40, 10)
        await console.until(" e1 ", absent="MODEL")
        assert {len(line) for line in console.lines} == {40}


async def test_help_explains_the_keys(rig: Rig) -> None:
    async with running_console(rig.server.address) as console:
        await console.until("connected")
        console.press("question_mark")
        await console.until("Help", "choose an instance", "everything about the chosen instance")
        console.press("escape")
        await console.until("Instances 0")


async def test_a_large_fleet_is_read_in_pages_and_the_chosen_row_stays(rig: Rig) -> None:
    count = 230
    await asyncio.gather(
        *(
            rig.instances.RegisterInstance(
                fleet_service_pb2.RegisterInstanceRequest(spec=rig.spec(f"e{number:03d}"), incarnation=1)
            )
            for number in range(count)
        )
    )
    async with running_console(rig.server.address) as console:
        await console.until(f"Instances {count}", "e000")
        console.press("end")
        await console.until("▶ ◌ e229")
        await rig.instances.DeregisterInstance(
            fleet_service_pb2.DeregisterInstanceRequest(instance_id="e100", incarnation=1)
        )
        await console.until(f"Instances {count - 1}", "▶ ◌ e229")
        assert len(console.app.picture.trends) == count - 1
        # Neither on the screen nor on the page of the next tick: an event names it.
        await rig.instances.DrainInstance(
            fleet_service_pb2.DrainInstanceRequest(instance_id="e005", force=True)
        )
        await until(lambda: console.app.picture.instances["e005"].drained, "the drain was read")
