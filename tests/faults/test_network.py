"""Rows 16 to 20: partitions, both ways and one way, resets and slow lines."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import pytest

from sagecp.v1 import inference_service_pb2_grpc, request_pb2
from tests.faults.harness.fault_proxy import DOWN, UP, fault_proxy
from tests.faults.harness.ledger import Ledger
from tests.faults.harness.programs import CHANNEL_OPTIONS, Agent, SimEngine
from tests.faults.harness.site import running_site
from tests.faults.harness.waiting import becomes, note


@pytest.mark.parametrize(
    "directions",
    [
        pytest.param((UP, DOWN), id="16-both", marks=pytest.mark.slow),
        pytest.param((UP,), id="18-up"),
        pytest.param((DOWN,), id="18-down", marks=pytest.mark.slow),
    ],
)
async def test_row_16_and_18_an_agent_and_its_control_plane_are_cut_off(directions: tuple[str, ...]) -> None:
    """As if the agent were dead: nothing new, streams go on; healed, it is back with what runs there."""
    engine = SimEngine("e0", inter_token_ms=20)
    async with running_site([]) as site, fault_proxy(site.control_plane.address) as proxy:
        site.engines.append(engine)
        engine.spawn()
        await engine.ready()
        agent = Agent(engine, proxy.address)
        site.agents.append(agent)
        agent.spawn()
        await site.reaches(engine, "READY")
        entry = await site.ledger.submit("r", token_count=300)
        reading = asyncio.create_task(site.ledger.read(entry))
        proxy.swallow(*directions)
        cut_s = time.monotonic()
        if directions == (DOWN,):
            # Beats arrive, and their acknowledgements do not: the agent has to notice.
            await agent.line("no connection to the control plane|acknowledged no heartbeat")
        else:
            await site.reaches(engine, "LOST")
        note(f"rows 16, 18: {'+'.join(directions)} noticed after {time.monotonic() - cut_s:.2f} s")
        await reading
        assert entry.epochs[-1] == 1
        proxy.reset()
        proxy.heal()
        await site.reaches(engine, "READY")
        await site.ledger.submit("later")
        await site.ledger.settle(site.engines)


async def test_row_17_the_control_plane_cannot_reach_an_engine() -> None:
    """Its agent is well and keeps the lease; the path is what is broken, and work goes elsewhere."""
    engines = [SimEngine(f"e{number}", inter_token_ms=20) for number in range(2)]
    async with running_site([]) as site:
        for engine in engines:
            site.engines.append(engine)
            engine.spawn()
        for engine in engines:
            await engine.ready()
        async with fault_proxy(f"127.0.0.1:{engines[0].port}") as proxy:
            for engine, url in zip(engines, (f"http://{proxy.address}", ""), strict=True):
                agent = Agent(engine, site.control_plane.address, advertise=url)
                site.agents.append(agent)
                agent.spawn()
            for engine in engines:
                await site.reaches(engine, "READY")
            entries = [await site.ledger.submit(f"r{number}", token_count=100) for number in range(10)]
            reading = [asyncio.create_task(site.ledger.read(entry)) for entry in entries]

            async def begun() -> int:
                return min(len(entry.token_ids) for entry in entries)

            await becomes(begun, lambda count: count > 0, "all run")
            proxy.refusing = True
            proxy.reset()
            await site.reaches("e0", "UNHEALTHY")
            await asyncio.gather(*reading)
            known = await site.instance("e0")
            assert known.lease_expire_time.ToSeconds() > time.time() - 1, "its lease is kept"
            proxy.heal()
            await site.reaches("e0", "READY")
            await site.ledger.settle(engines)
            assert site.ledger.states() == {"SUCCEEDED": 10}


async def test_row_19_every_connection_is_reset_again_and_again() -> None:
    """Streams go on where they were, without a gap and without a repetition."""
    generator = random.Random(19)
    engines = [SimEngine("e0", inter_token_ms=20)]
    async with running_site(engines) as site, fault_proxy(site.control_plane.address) as proxy:
        ledger = site.ledger
        for number in range(20):
            await ledger.submit(f"r{number}", token_count=100)
        within = Ledger(proxy.address)
        try:
            reading = [
                asyncio.create_task(ledger.read(entry, within=within.stub)) for entry in ledger.acknowledged()
            ]
            for _ in range(12):
                await asyncio.sleep(generator.uniform(0.05, 0.3))
                proxy.reset()
            await asyncio.gather(*reading)
        finally:
            await within.close()
        assert max(entry.connection_count for entry in ledger.acknowledged()) > 3
        await ledger.settle(engines)
        assert ledger.states() == {"SUCCEEDED": 20}


async def test_row_20_a_slow_line_to_the_caller() -> None:
    """Deadlines are kept by who made the promise, however slow the line is."""
    engines = [SimEngine("e0", inter_token_ms=20)]
    async with running_site(engines) as site, fault_proxy(site.control_plane.address) as proxy:
        ledger = site.ledger
        objectives = request_pb2.Objectives()
        objectives.end_to_end_deadline.FromMilliseconds(1_500)
        slow = await ledger.submit("slow", token_count=1_000, objectives=objectives)
        prompt = await ledger.submit("prompt", token_count=5)
        proxy.latency_s, proxy.bytes_per_s = 0.2, 200.0
        channel = grpc.aio.insecure_channel(proxy.address, options=CHANNEL_OPTIONS)
        async with channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            reading = asyncio.create_task(ledger.read(slow, within=stub))

            async def ended() -> request_pb2.Request:
                return await ledger.look("slow")

            known = await becomes(ended, lambda request: request.HasField("end_time"), "it ends")
            assert known.state == request_pb2.REQUEST_STATE_EXPIRED
            late_ms = known.end_time.ToMilliseconds() - known.deadline_time.ToMilliseconds()
            note(f"row 20: ended {late_ms} ms after its deadline, over a line of 200 bytes per second")
            assert late_ms >= 0, "not early"
            proxy.heal()
            await reading
        await ledger.read(prompt)
        await ledger.settle(engines)


@pytest.mark.timeout(180)
async def test_row_20_a_slow_line_to_an_engine() -> None:
    """An engine behind a bad line: the request ends at its deadline, and the engine stops."""
    engine = SimEngine("e0", inter_token_ms=5)
    async with running_site([]) as site:
        site.engines.append(engine)
        engine.spawn()
        await engine.ready()
        async with fault_proxy(f"127.0.0.1:{engine.port}") as proxy:
            await site.register(engine, url=f"http://{proxy.address}")
            proxy.bytes_per_s = 1_000.0
            objectives = request_pb2.Objectives()
            objectives.end_to_end_deadline.FromMilliseconds(1_500)
            entry = await site.ledger.submit("r", token_count=2_000, objectives=objectives)
            await site.ledger.read(entry)
            assert entry.state == "EXPIRED"
            await becomes(engine.work_count, lambda count: count == 0, "the engine is idle", timeout_s=5)
            proxy.heal()
            await site.reaches(engine, "READY")
            await site.ledger.submit("later")
            await site.ledger.settle([engine])
