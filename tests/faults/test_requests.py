"""Rows 24 to 27: callers repeat, contradict and leave; each request runs once and ends once."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import grpc
import pytest

from sagecp.v1 import request_pb2
from tests.faults.harness.ledger import Entry
from tests.faults.harness.programs import MODEL, SimEngine
from tests.faults.harness.site import Site, running_site
from tests.faults.harness.waiting import becomes, note
from tests.support.processes import SAGECP, Program
from tests.support.rpc_rig import reason_of


async def test_row_24_a_request_that_is_submitted_a_hundred_times_at_once() -> None:
    """One run, one charge; each caller gets the same request. Also after a restart."""
    async with running_site(1) as site:
        (engine,) = site.engines
        entry = site.ledger.entry("same", token_count=30)
        answers = await asyncio.gather(*(site.ledger.hand_in(entry) for _ in range(100)))
        assert sum(answer.created for answer in answers) == 1
        assert {answer.request.request_id for answer in answers} == {"same"}
        await site.ledger.read(entry)
        site.control_plane.kill()
        site.control_plane.spawn()
        await site.control_plane.serving()
        again = await asyncio.gather(*(site.ledger.hand_in(entry, insist_s=30) for _ in range(100)))
        assert not any(answer.created for answer in again)
        assert {answer.request.state for answer in again} == {request_pb2.REQUEST_STATE_SUCCEEDED}
        await site.ledger.settle(site.engines)
        assert await engine.gauge("vllm:generation_tokens_total") == 30
        assert await engine.gauge("vllm:request_success_total") == 1


async def test_row_25_the_same_id_for_something_else() -> None:
    """ALREADY_EXISTS: while it runs, after its end, and after a restart."""
    async with running_site(1) as site:
        entry = await site.ledger.submit("id", token_count=50)
        other = Entry(request_pb2.RequestSpec())
        other.spec.CopyFrom(entry.spec)
        other.spec.prompt.text = "something else"

        async def refused() -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await site.ledger.hand_in(other, insist_s=30)
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            assert reason_of(caught.value) == "REQUEST_ID_CONFLICT"

        await refused()
        await site.ledger.read(entry)
        await refused()
        site.control_plane.kill()
        site.control_plane.spawn()
        await site.control_plane.serving()
        await refused()
        await site.ledger.settle(site.engines)


async def cancel_and_finish(site: Site, number: int, delay_s: float, canceller_count: int) -> str:
    """Cancel a request about when it finishes; return its end, on which everybody agrees."""
    entry = await site.ledger.submit(f"r{number}", token_count=8)
    reading = asyncio.create_task(site.ledger.read(entry))
    await asyncio.sleep(delay_s)
    replies = await asyncio.gather(*(site.ledger.cancel(entry) for _ in range(canceller_count)))
    await reading
    states = {reply.request.state for reply in replies}
    assert entry.terminal is not None
    assert states == {entry.terminal.state}, "I2: replies agree"
    ended_by_us = sum(reply.cancelled for reply in replies)
    assert (ended_by_us > 0) == (entry.state == "CANCELLED")
    return entry.state


async def test_row_26_cancel_races_finish() -> None:
    """One terminal state, whoever wins, and every reply says the same."""
    async with running_site([SimEngine("e0", inter_token_ms=3)]) as site:
        generator = random.Random(26)
        cases = [(generator.uniform(0.0, 0.06), generator.randint(1, 3)) for _ in range(60)]
        outcomes = await asyncio.gather(
            *(
                cancel_and_finish(site, number, delay_s, count)
                for number, (delay_s, count) in enumerate(cases)
            )
        )
        note(f"row 26: {outcomes.count('CANCELLED')} cancelled, {outcomes.count('SUCCEEDED')} finished first")
        assert set(outcomes) <= {"CANCELLED", "SUCCEEDED"}
        await site.ledger.settle(site.engines)


async def test_row_27_a_caller_is_killed() -> None:
    """The engine stops working for it, unless it said that the request shall run on."""
    engines = [SimEngine("e0", inter_token_ms=50)]
    async with running_site(engines) as site:
        (engine,) = engines
        await leave(site, engine, "gone")
        killed_s = time.monotonic()
        await becomes(engine.work_count, lambda count: count == 0, "the engine is idle", timeout_s=10)
        note(f"row 27: engine idle {time.monotonic() - killed_s:.3f} s after the caller was killed")
        assert (await site.ledger.look("gone")).state == request_pb2.REQUEST_STATE_CANCELLED
        await leave(site, engine, "kept", "--detach")
        assert (await site.ledger.look("kept")).state == request_pb2.REQUEST_STATE_RUNNING

        async def state() -> int:
            return (await site.ledger.look("kept")).state

        await becomes(state, lambda found: found == request_pb2.REQUEST_STATE_SUCCEEDED, "it runs to its end")
        assert (await site.ledger.look("kept")).usage.completion_token_count == 100
        await site.ledger.settle(engines)


async def leave(site: Site, engine: SimEngine, request_id: str, *options: str) -> None:
    """Start a request with the command line, and kill that once it reads output."""
    command: list[str | Path] = [SAGECP, "generate", "a long story", "--model", MODEL, *options]
    command += ["--max-tokens", "100", "--ignore-eos", "--request-id", request_id]
    command += ["--server", site.control_plane.address, "--output", "json"]
    caller = Program("caller", command)
    try:
        await asyncio.to_thread(caller.wait_for_line, "token|text", 30)
        assert await engine.work_count() == 1
        caller.signal_group(signal.SIGKILL)
    finally:
        caller.stop()
