"""Rows 1 to 3 and 5: the control plane is killed, at any point, or frozen; nothing accepted is lost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from sagecp.client import SageClient
from sagecp.runtime import failpoints
from tests.faults.harness.ledger import Entry
from tests.faults.harness.programs import ControlPlane, SimEngine
from tests.faults.harness.site import QUICK, Site, merged, running_site
from tests.faults.harness.waiting import becomes, note

QUICK_STEPS = {"journal.before_commit": 5, "journal.before_ack": 5}
"""Steps of the journal that are always tried, and at which pass."""

READY_WITHIN_S = 30.0
"""On a machine that does a lot else; the promise is 5 s on one that does not."""


async def some_output(entries: list[Entry], count: int = 3) -> None:
    """Wait until each request has delivered something."""

    async def shortest() -> int:
        return min(len(entry.token_ids) for entry in entries)

    await becomes(shortest, lambda tokens: tokens >= count, "every request has delivered output")


@pytest.mark.parametrize("queued_count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
async def test_row_01_a_crash_with_much_queued(queued_count: int) -> None:
    """After kill -9 with so much queued the control plane is ready again soon, and knows all of it."""
    # A class of requests may fill a part of the queue.
    room = {"scheduler": {"max_queued_request_count": 2 * queued_count}}
    async with running_site(1, limit=1, settings=room) as site:
        (engine,) = site.engines
        await engine.misbehave(hang_after_tokens=0)
        gate = asyncio.Semaphore(256)

        async def hand_in(number: int) -> Entry:
            async with gate:
                return await site.ledger.submit(f"q{number}", token_count=1)

        entries = await asyncio.gather(*(hand_in(number) for number in range(queued_count)))
        site.control_plane.kill()
        site.control_plane.spawn()
        ready_s = await site.control_plane.serving(READY_WITHIN_S)
        note(f"row 1: {queued_count} queued, ready {ready_s:.2f} s after the start of the process")
        sample = entries[:: max(1, queued_count // 200)]
        for entry in sample:
            assert (await site.ledger.look(entry.request_id)).request_id == entry.request_id
        if queued_count > 10_000:
            # Running so many takes longer than anybody waits; each is known, and that was the promise.
            return
        await engine.misbehave(hang_after_tokens=None)
        engine.kill()
        engine.spawn()
        await engine.ready()
        await site.register(engine, limit=256)
        await site.ledger.settle(site.engines, timeout_s=120)
        assert site.ledger.states() == {"SUCCEEDED": queued_count}


async def crash_in_mid_stream(stream_count: int) -> Site:
    """Kill the control plane with so many streams running, start it again, and read on."""
    many = stream_count > 100
    engines = [SimEngine(f"e{number}", inter_token_ms=500 if many else 50) for number in range(2)]
    async with running_site(engines, limit=1024) as site:
        token_count = 60 if many else 40
        entries = [site.ledger.entry(f"r{number}", token_count=token_count) for number in range(stream_count)]
        await asyncio.gather(*(site.ledger.hand_in(entry) for entry in entries))
        reading = [asyncio.create_task(site.ledger.read(entry)) for entry in entries]
        await some_output(entries)
        site.control_plane.kill()
        killed_s = time.monotonic()
        counts = [len(entry.token_ids) for entry in entries]
        site.control_plane.spawn()
        ready_s = await site.control_plane.serving(READY_WITHIN_S)
        await asyncio.gather(*reading)
        await site.ledger.settle(site.engines)
        assert site.ledger.states() == {"SUCCEEDED": stream_count}
        assert min(entry.connection_count for entry in entries) >= 2
        assert max(entry.epochs[-1] for entry in entries) == 2
        gaps = [
            entry.token_times_s[count] - killed_s
            for entry, count in zip(entries, counts, strict=True)
            if count < len(entry.token_ids)
        ]
        note(f"row 2: {stream_count} streams, ready {ready_s:.2f} s, next token after {max(gaps):.2f} s")
        return site


async def test_row_02_a_crash_in_mid_stream() -> None:
    """Streams resume by index: no token is lost, none comes twice, as in an unbroken run."""
    await crash_in_mid_stream(20)


async def test_row_02_the_client_library_reads_on_by_itself() -> None:
    """Its streams see nothing of a crash but a pause, with the settings that it has by default."""
    engines = [SimEngine("e0", inter_token_ms=50)]
    async with running_site(engines) as site, SageClient(site.control_plane.address) as client:

        async def use() -> tuple[str, int]:
            submitted = await client.submit("a story", max_tokens=40, ignore_eos=True, temperature=0.0)
            stream = client.stream(submitted.request_id)
            text = (await anext(stream)).text
            begun.append(submitted.request_id)
            text += "".join([chunk.text async for chunk in stream])
            return text, stream.next_token_index

        begun: list[str] = []
        using = [asyncio.create_task(use()) for _ in range(30)]

        async def begun_count() -> int:
            return len(begun)

        await becomes(begun_count, lambda count: count == 30, "all streams flow")
        site.control_plane.kill()
        site.control_plane.spawn()
        answers = set(await asyncio.gather(*using))
        assert len(answers) == 1, "all are the same, for they asked the same"
        ((text, token_count),) = answers
        assert text
        assert token_count == 40


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_row_02_a_crash_in_mid_stream_with_a_thousand_streams() -> None:
    """The same with 1,000 streams."""
    await crash_in_mid_stream(1_000)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        pytest.param(name, passes, marks=() if passes == QUICK_STEPS.get(name) else pytest.mark.slow)
        for name in failpoints.NAMES
        for passes in (2, 5, 23)
    ],
)
async def test_row_03_a_crash_at_each_step_of_the_journal(name: str, passes: int) -> None:
    """Wherever the journal is when the process ends: what was acknowledged goes on, once."""
    async with running_site(1) as site:
        site.control_plane.kill()
        site.control_plane.spawn({failpoints.VARIABLE: f"{name}:{passes}"})
        # It may reach the step before it serves.
        crashed = asyncio.Event()

        async def call(caller: int) -> None:
            turn = 0
            while not crashed.is_set():
                turn += 1
                entry = site.ledger.entry(f"r{caller}-{turn}", token_count=5)
                await site.ledger.hand_in(entry, insist_s=60)
                await site.ledger.read(entry)

        calling = [asyncio.create_task(call(caller)) for caller in range(8)]
        assert await site.control_plane.ended() == failpoints.EXIT_STATUS
        crashed.set()
        site.control_plane.spawn()
        await site.control_plane.serving()
        await asyncio.gather(*calling)
        await site.ledger.settle(site.engines)
        assert set(site.ledger.states()) == {"SUCCEEDED"}


@pytest.mark.slow
async def test_row_05_a_frozen_control_plane_takes_nobody_for_dead() -> None:
    """Three leases long it is frozen; its agents are there, and no lease ends because of that."""
    async with running_site(2, agents=True) as site:
        entries = [await site.ledger.submit(f"r{number}", token_count=200) for number in range(10)]
        reading = [asyncio.create_task(site.ledger.read(entry)) for entry in entries]
        await some_output(entries)
        site.control_plane.freeze()
        await asyncio.sleep(6.0)
        site.control_plane.thaw()
        await asyncio.gather(*reading)
        for engine in site.engines:
            await site.reaches(engine, "READY")
        await site.ledger.settle(site.engines)
        assert site.ledger.states() == {"SUCCEEDED": len(entries)}
        lost = [event for event in site.control_plane.events("instance changed") if event["state"] == "LOST"]
        assert not lost
        assert max(len(set(entry.epochs)) for entry in entries) == 1, "no attempt was given up"


async def test_row_05_nobody_else_writes_to_the_journal_of_a_frozen_control_plane(tmp_path: Path) -> None:
    """A second control plane does not start on the journal of one that may come back."""
    async with running_site(1) as site:
        site.control_plane.freeze()
        second = ControlPlane(site.folder, merged(QUICK), name="second")
        second.spawn()
        assert await second.ended() == 1 or second.program.process.returncode != 0  # type: ignore[union-attr]
        assert str(site.control_plane.journal) in second.output
        site.control_plane.thaw()
        await site.ledger.submit("r")
        await site.ledger.settle(site.engines)
