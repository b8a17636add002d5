"""Rows 6 to 12: engines die, hang, refuse, slow down and talk nonsense; callers get good answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections import Counter
from typing import Any

import pytest

from sagecp.v1 import error_pb2
from tests.faults.harness.ledger import Entry, Ledger
from tests.faults.harness.programs import SimEngine
from tests.faults.harness.site import Site, merged, running_site
from tests.faults.harness.waiting import becomes, note


async def start_streams(ledger: Ledger, count: int, token_count: int) -> tuple[list[Entry], list[Any]]:
    """Submit so many requests and read them; return once each has output."""
    entries = [ledger.entry(f"r{number}", token_count=token_count) for number in range(count)]
    gate = asyncio.Semaphore(128)

    async def hand_in(entry: Entry) -> None:
        async with gate:
            await ledger.hand_in(entry)

    await asyncio.gather(*(hand_in(entry) for entry in entries))
    reading = [asyncio.create_task(ledger.read(entry, timeout_s=120)) for entry in entries]

    async def shortest() -> int:
        return min((len(entry.token_ids) for entry in entries), default=3)

    await becomes(shortest, lambda tokens: tokens >= 3, "every request has delivered output")
    return entries, reading


def changes(site: Site, instance_id: str, state: str) -> list[dict[str, Any]]:
    """Return when an instance became something, from the log."""
    events = site.control_plane.events("instance changed")
    return [event for event in events if (event["instance_id"], event["state"]) == (instance_id, state)]


def wall_time_s(event: dict[str, Any]) -> float:
    """Return the time of an entry of the log, in Unix seconds."""
    return dt.datetime.fromisoformat(event["time"]).timestamp()


async def kill_an_engine(stream_count: int) -> None:
    """Kill one of two engines while streams run on both; all of them go on."""
    engines = [
        SimEngine(f"e{number}", inter_token_ms=500 if stream_count > 100 else 20) for number in range(2)
    ]
    async with running_site(engines, limit=2048) as site:
        entries, reading = await start_streams(site.ledger, stream_count, 60)
        looks = await asyncio.gather(*(site.ledger.look(entry.request_id) for entry in entries))
        there = [entry for entry, known in zip(entries, looks, strict=True) if known.instance_id == "e0"]
        assert there
        killed_wall_s, killed_s = time.time(), time.monotonic()
        engines[0].kill()
        await asyncio.gather(*reading)
        await site.ledger.settle([engines[1]])
        assert site.ledger.states() == {"SUCCEEDED": stream_count}
        moved = [entry for entry in there if entry.epochs[-1] > 1]
        assert moved
        assert all(entry.failovers for entry in moved)
        detected_s = wall_time_s(changes(site, "e0", "UNHEALTHY")[0]) - killed_wall_s
        # Tokens that were on their way belong to the first attempt.
        gaps = [entry.token_times_s[entry.epochs.index(2)] - killed_s for entry in moved if 2 in entry.epochs]
        note(
            f"row 6: {len(moved)} of {stream_count} streams moved; noticed after {detected_s:.3f} s, "
            f"next token after {min(gaps):.2f} to {max(gaps):.2f} s"
        )


async def test_row_06_an_engine_dies_in_mid_stream() -> None:
    """It is noticed at once, and its streams go on elsewhere as if nothing had been."""
    await kill_an_engine(40)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_row_06_an_engine_dies_with_a_thousand_streams() -> None:
    """1,000 of 1,000 streams survive, with no token lost and none twice."""
    await kill_an_engine(1_000)


# Sooner than by default, so that nobody has to wait for it.
IMPATIENT = {"scheduler.health": {"stall_timeout_s": 3.0, "base_ejection_s": 2.0}}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_row_07_a_frozen_engine() -> None:
    """No token for so long: the engine is quarantined, and its requests go on elsewhere."""
    engines = [SimEngine(f"e{number}", inter_token_ms=20) for number in range(2)]
    async with running_site(engines, settings=IMPATIENT) as site:
        entries, reading = await start_streams(site.ledger, 10, 100)
        engines[0].freeze()
        await site.reaches("e0", "UNHEALTHY")
        await asyncio.gather(*reading)
        assert Counter(entry.epochs[-1] for entry in entries)[2] > 0
        engines[0].thaw()
        await site.reaches("e0", "READY", timeout_s=90)
        await site.ledger.settle(engines)
        assert site.ledger.states() == {"SUCCEEDED": 10}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_row_07_an_engine_that_is_wedged_while_its_health_is_good() -> None:
    """`/health` says 200 and no token comes: quarantined all the same, until it generates again."""
    engines = [SimEngine(f"e{number}", inter_token_ms=20) for number in range(2)]
    async with running_site(engines, settings=IMPATIENT) as site:
        entries, reading = await start_streams(site.ledger, 10, 100)
        await engines[0].misbehave(stalled=True)
        await site.reaches("e0", "UNHEALTHY")
        await asyncio.gather(*reading)
        assert Counter(entry.epochs[-1] for entry in entries)[2] > 0
        assert await site.state_of("e0") == "UNHEALTHY"
        await engines[0].misbehave(stalled=False)
        await site.reaches("e0", "READY", timeout_s=90)
        await site.ledger.settle(engines)
        assert site.ledger.states() == {"SUCCEEDED": 10}


async def run_some(ledger: Ledger, name: str, count: int) -> list[Entry]:
    """Run requests one after another; return them."""
    entries = []
    for number in range(count):
        entry = await ledger.submit(f"{name}-{number}", token_count=3)
        entries.append(await ledger.read(entry))
    return entries


@pytest.mark.timeout(180)
async def test_row_08_an_engine_that_answers_5xx() -> None:
    """After five in a row it is ejected; nobody's request fails; a probe brings it back."""
    # Others would not try an engine again that has failed once.
    in_turn = merged(IMPATIENT, {"scheduler": {"routing_strategy": "round_robin"}})
    async with running_site(2, settings=in_turn) as site:
        bad = site.engines[0]
        await bad.misbehave(reject_rate=1.0, reject_status=500)
        entries = await run_some(site.ledger, "r", 30)
        tried = sum(
            attempt.instance_id == "e0"
            for entry in entries
            for attempt in entry.terminal.request.attempts  # type: ignore[union-attr]
        )
        note(f"row 8: {tried} attempts on the failing engine before and after its ejection")
        assert tried >= 5, "it was tried"
        assert await site.state_of("e0") == "UNHEALTHY"
        await bad.misbehave(reject_rate=0.0)
        await site.reaches("e0", "READY", timeout_s=90)
        await site.ledger.settle(site.engines)
        assert site.ledger.states() == {"SUCCEEDED": 30}


async def test_row_09_an_engine_that_answers_4xx() -> None:
    """That is the caller's mistake: the engine stays in the rotation."""
    async with running_site(1) as site:
        (engine,) = site.engines
        await engine.misbehave(reject_rate=1.0, reject_status=400)
        entries = await run_some(site.ledger, "bad", 10)
        assert {entry.state for entry in entries} == {"FAILED"}
        assert {len(entry.terminal.request.attempts) for entry in entries} == {1}  # type: ignore[union-attr]
        assert await site.state_of("e0") == "READY"
        await engine.misbehave(reject_rate=0.0)
        assert {entry.state for entry in await run_some(site.ledger, "good", 3)} == {"SUCCEEDED"}
        await site.ledger.settle(site.engines)


@pytest.mark.slow
async def test_row_10_an_engine_that_becomes_slow() -> None:
    """Ten times slower: its share of what is dispatched at least halves."""
    engines = [SimEngine(f"e{number}", inter_token_ms=5) for number in range(2)]
    async with running_site(engines, limit=8) as site:
        stop = asyncio.Event()
        ended: list[Entry] = []

        async def caller(number: int) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                entry = await site.ledger.submit(f"c{number}-{turn}", token_count=10)
                ended.append(await site.ledger.read(entry))

        def share(entries: list[Entry]) -> float:
            places = Counter(entry.terminal.request.attempts[0].instance_id for entry in entries)  # type: ignore[union-attr]
            return places["e0"] / max(1, sum(places.values()))

        calling = [asyncio.create_task(caller(number)) for number in range(8)]
        await asyncio.sleep(4)
        before = share(ended)
        await engines[0].misbehave(slow_factor=10.0)
        await asyncio.sleep(5)
        position = len(ended)
        await asyncio.sleep(4)
        after = share(ended[position:])
        stop.set()
        await asyncio.gather(*calling)
        note(f"row 10: share {before:.2f} before, {after:.2f} from 5 s after on")
        assert after <= before / 2
        await site.ledger.settle(engines)


NONSENSE = ["eof", "cut", "done", "error", "abort", "garbage", "bad_json"]


async def test_row_11_streams_that_end_or_speak_wrongly() -> None:
    """The attempt fails, the request goes on elsewhere, and the control plane lives."""
    async with running_site(3) as site:
        for fault in NONSENSE:
            for engine in site.engines[:2]:
                # Both may hit the same request: it has three attempts.
                await engine.misbehave(**{f"{fault}_after_tokens": 3, "stream_fault_limit": 1})
            entries = [await site.ledger.submit(f"{fault}-{number}") for number in range(8)]
            await asyncio.gather(*(site.ledger.read(entry) for entry in entries))
            assert {entry.state for entry in entries} == {"SUCCEEDED"}, fault
            assert any(len(entry.terminal.request.attempts) > 1 for entry in entries), fault  # type: ignore[union-attr]
            for engine in site.engines[:2]:
                await engine.misbehave(**{f"{fault}_after_tokens": None, "stream_fault_limit": None})
        await site.ledger.settle(site.engines)


@pytest.mark.parametrize(
    ("tokens_before", "others"), [(0, 9), (2, 0)], ids=["at once, beside others", "after output, alone"]
)
async def test_row_12_a_request_that_kills_engines(tokens_before: int, others: int) -> None:
    """After two it is FAILED as poison; the third engine lives, and so does everybody else's request."""
    marker = "poison"
    options = ("--die-after-tokens", str(tokens_before), "--stream-fault-marker", marker)
    engines = [SimEngine(f"e{number}", inter_token_ms=20, options=options) for number in range(3)]
    async with running_site(engines) as site:
        _, reading = await start_streams(site.ledger, others, 60)
        poison = await site.ledger.submit("p", prompt=f"this is {marker}", token_count=30)
        await site.ledger.read(poison)
        assert poison.state == "FAILED"
        assert poison.terminal is not None
        assert poison.terminal.failure.reason == error_pb2.ERROR_REASON_POISON_REQUEST

        async def alive_engines() -> list[SimEngine]:
            return [engine for engine in engines if engine.running]

        # The second may still be on its way out.
        alive = await becomes(alive_engines, lambda left: len(left) == 1, "two engines have died")
        await asyncio.gather(*reading)
        await site.ledger.settle(alive)
        assert site.ledger.states()["SUCCEEDED"] == others
