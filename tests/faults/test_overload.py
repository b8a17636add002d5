"""Rows 31 and 32 of the fault matrix: more than the engines can do, and clients that repeat without end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from sagecp.client import NO_RETRY, ClientError, OverloadedError, RetryPolicy, SageClient
from sagecp.core.config import SchedulerConfig
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from sagecp.v1 import request_pb2
from tests.support.rpc_rig import MODEL, Rig, detail_of, reason_of, remaining, running_rig
from tests.support.waiting import until

QUEUE_LIMIT = 40
PER_ENGINE = 2
TOKEN_COUNT = 4
CLASSES = ("CRITICAL", "HIGH", "NORMAL", "LOW", "BACKGROUND")


@dataclass
class Site:
    """A server with a small queue, and two simulated engines."""

    rig: Rig
    engines: list[EngineServer]
    # Calls that were accepted or refused.
    decided_count: int = 0

    def stall(self, stalled: bool) -> None:
        """Stop the engines, or let them go on."""
        for engine in self.engines:
            engine.misbehave({"stalled": stalled})

    @property
    def attempt_count(self) -> int:
        """Generations that the control plane started on engines."""
        return self.rig.manager.coordinator.get_metrics().started_count


@contextlib.asynccontextmanager
async def site() -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                EngineServer(
                    EngineServerConfig(
                        model_names=(MODEL,),
                        profile="fixed",
                        time_to_first_token_s=0.005,
                        inter_token_s=0.005,
                        max_model_len=400,
                    )
                )
            )
            for _ in range(2)
        ]
        rig = await stack.enter_async_context(
            running_rig(scripted=False, scheduler=SchedulerConfig(max_queued_request_count=QUEUE_LIMIT))
        )
        for number, engine in enumerate(engines):
            await rig.add_engine(f"e{number}", limit=PER_ENGINE, url=engine.base_url)
        yield Site(rig, engines)


def options(**more: Any) -> dict[str, Any]:
    more.setdefault("sampling", request_pb2.SamplingParameters(max_tokens=TOKEN_COUNT, ignore_eos=True))
    return more


async def refused_or(running: Site, name: str, number: int) -> tuple[str, str, float]:
    """Return the class, how it ended, and what a refusal said of when to come back."""
    priority = request_pb2.RequestPriority.Value(f"REQUEST_PRIORITY_{name}")
    call = running.rig.generate(
        f"{name}-{number}", timeout=60, **options(priority=priority, user_id=f"user-{number % 4}")
    )
    first = await asyncio.gather(call.read(), return_exceptions=True)
    running.decided_count += 1
    if isinstance(first[0], grpc.aio.AioRpcError):
        assert reason_of(first[0]) == "QUEUE_FULL"
        delay = detail_of(first[0], error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() / 1000.0
        return name, "REFUSED", delay
    state = request_pb2.RequestState.Name((await remaining(call))[-1].terminal.state)
    return name, state.removeprefix("REQUEST_STATE_"), 0.0


async def test_row_31_what_is_accepted_succeeds_and_the_least_important_are_refused() -> None:
    """Ten times what fits arrives at once, the least important first."""
    room = QUEUE_LIMIT + 2 * PER_ENGINE
    async with site() as running:
        calls = []
        # Nothing ends before all have arrived, however slowly that goes.
        running.stall(True)
        for name in reversed(CLASSES):
            # As many as there is room for that no other class may fill.
            count = 2 if name == "CRITICAL" else 100
            calls += [asyncio.create_task(refused_or(running, name, number)) for number in range(count)]
            # Each class finds what those before it left.
            await until(lambda: running.rig.manager.scheduler.live_count >= 1)
        await until(lambda: running.decided_count == len(calls))
        running.stall(False)
        ended = await asyncio.gather(*calls)
        by_class: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
        for name, how, _ in ended:
            by_class[name][how] += 1
        accepted = sum(counts["SUCCEEDED"] for counts in by_class.values())
        assert {how for _, how, _ in ended} == {"SUCCEEDED", "REFUSED"}, by_class
        assert by_class["CRITICAL"] == {"SUCCEEDED": 2}
        assert accepted >= QUEUE_LIMIT // 2, "the queue was used"
        assert sum(counts["REFUSED"] for counts in by_class.values()) >= len(calls) - room
        assert all(0.1 <= delay <= 60.0 for _, how, delay in ended if how == "REFUSED")
        # Nothing that was refused reached an engine, and nothing accepted was lost.
        assert running.attempt_count == accepted
        assert running.rig.manager.scheduler.live_count == 0


class NaiveClient:
    """Repeats a refused call at once, three times over, with the same id."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.refused_count = 0

    async def _once(self, request_id: str) -> bool:
        try:
            await self._rig.submit(request_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            self.refused_count += 1
            return False
        return True

    async def submit(self, request_id: str) -> None:
        while not any(await asyncio.gather(*(self._once(request_id) for _ in range(3)))):
            pass


async def test_row_32_a_storm_of_repetitions_reaches_no_engine() -> None:
    """Whatever clients do, an accepted request runs once."""
    async with running_rig(scheduler=SchedulerConfig(max_queued_request_count=QUEUE_LIMIT)) as rig:
        engine = await rig.add_engine(limit=2 * PER_ENGINE)
        naive = NaiveClient(rig)
        ids = [f"request-{number}" for number in range(120)]
        storm = asyncio.gather(*(naive.submit(request_id) for request_id in ids))
        # The engine answers nothing before the storm is there.
        await until(lambda: naive.refused_count > 2 * len(ids), "there is a storm", 60)
        engine.automatic = lambda call: call.answer("x")
        for call in engine.running:
            call.answer("x")
        await storm
        await until(lambda: rig.manager.scheduler.live_count == 0, "all have ended", 60)
        assert {await rig.state_of(request_id) for request_id in ids} == {"SUCCEEDED"}
        assert len(engine.calls) <= 1.1 * len(ids)


async def test_row_32_clients_that_repeat_under_faults_make_no_more_work() -> None:
    """Attempts that engines break are repeated by the control plane, and by nobody on top of it."""
    async with site() as running:
        for engine in running.engines:
            engine.misbehave({"reject_rate": 0.05})
        patient = RetryPolicy(base_s=0.01, max_s=0.05, max_attempt_count=50)
        async with SageClient(running.rig.server.address, retry=patient) as client:
            client.connection._budget._capacity = client.connection._budget._tokens = 1e9

            async def one(number: int) -> str:
                while True:
                    try:
                        done = await client.complete(
                            "hello", request_id=f"r-{number}", max_tokens=TOKEN_COUNT, ignore_eos=True
                        )
                    except OverloadedError:
                        await asyncio.sleep(0.05)
                    except ClientError as error:
                        return str(error.reason)
                    else:
                        return done.finish_reason

            ended = Counter(await asyncio.gather(*(one(number) for number in range(120))))
        assert ended["length"] >= 110, ended
        assert running.attempt_count <= 1.1 * 120 + 6


async def test_row_32_our_client_sends_little_of_what_a_naive_one_would() -> None:
    """While nothing gets through, calls are kept back before they are sent."""
    async with running_rig(scheduler=SchedulerConfig(max_queued_request_count=1)) as rig:
        await rig.add_engine(limit=1)
        await rig.submit("runs", **options())
        await rig.submit("waits", **options())
        seen = Counter[str]()
        async with SageClient(rig.server.address, retry=NO_RETRY) as client:
            for _ in range(400):
                try:
                    await client.submit("hello", model=MODEL)
                except OverloadedError as error:
                    seen["kept back" if error.message.startswith("not sent") else "refused"] += 1
        assert seen["kept back"] + seen["refused"] == 400
        assert seen["refused"] < 60
        for request_id in ("runs", "waits"):
            await rig.manager.cancel_request(request_id)


@pytest.mark.parametrize("priority", ["CRITICAL", "BACKGROUND"])
async def test_row_31_a_refusal_says_which_bound_and_when(priority: str) -> None:
    async with running_rig(scheduler=SchedulerConfig(max_queued_request_count=2)) as rig:
        await rig.add_engine(limit=1)
        for number in range(3):
            await rig.submit(f"r{number}", **options(priority=request_pb2.REQUEST_PRIORITY_CRITICAL))
        number = request_pb2.RequestPriority.Value(f"REQUEST_PRIORITY_{priority}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.submit("one-more", **options(priority=number))
        limit = 2 if priority == "CRITICAL" else 1
        assert f"holds 2 requests, and {limit} is the limit for {priority}" in (caught.value.details() or "")
        assert detail_of(caught.value, error_details_pb2.ErrorInfo).metadata["bound"] == "requests"
        assert detail_of(caught.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() >= 100
        for number in range(3):
            await rig.manager.cancel_request(f"r{number}")
