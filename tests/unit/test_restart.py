"""A control plane that is started again: what was accepted goes on, and what ended is known."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from sagecp.core.engine_state import EngineCapability, LoraAdapter
from sagecp.core.errors import ErrorReason, RequestIdConflictError, RequestNotFoundError
from sagecp.core.gpu import GpuDevice, GpuLink, GpuLinkKind
from sagecp.core.types import (
    Durability,
    ExecutionInstance,
    FailoverMode,
    InstanceState,
    RequestMetadata,
    RequestState,
    SamplingParameters,
)
from sagecp.runtime.engines.base import EngineFailedError
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.store.base import Store, StoreError, StoreStatus, Written
from sagecp.runtime.store.codec import decode_instance, decode_record, encode_record
from sagecp.runtime.store.memory import MemoryStore
from sagecp.runtime.store.records import InstanceKept, Record, RequestAccepted, RequestEnded
from tests.support.scripted_client import WAIT_S, ScriptedCall, ScriptedFleet
from tests.support.waiting import other_tasks, turns, until

PROMPT_IDS = (11, 12, 13)


@contextlib.asynccontextmanager
async def running(store: Store | None, fleet: ScriptedFleet) -> AsyncIterator[ControlPlaneManager]:
    manager = ControlPlaneManager(client_factory=fleet, store=store)
    await manager.start()
    try:
        yield manager
    finally:
        await manager.stop()
        await turns(3)
        assert other_tasks() == set()


async def add(manager: ControlPlaneManager, fleet: ScriptedFleet, instance_id: str = "a") -> None:
    manager.register_instance(fleet.instance(instance_id))
    await ready(manager, instance_id)


async def ready(manager: ControlPlaneManager, instance_id: str = "a") -> None:
    await until(lambda: manager.instance(instance_id).state is InstanceState.READY)


def asked(request_id: str = "r", **more: object) -> RequestMetadata:
    more.setdefault("prompt", "hello")
    more.setdefault("max_tokens", 10)
    return RequestMetadata(request_id=request_id, **more)  # type: ignore[arg-type]


def begin(call: ScriptedCall, *texts: str) -> None:
    """Produce output as an engine does that tells the prompt's ids."""
    call.tell_prompt(PROMPT_IDS)
    call.send(*texts)


async def text_of(manager: ControlPlaneManager, request_id: str = "r", from_token_index: int = 0) -> str:
    texts = [delta.text async for delta in manager.stream_request(request_id, from_token_index)]
    return "".join(texts)


async def seen(manager: ControlPlaneManager, token_count: int, request_id: str = "r") -> None:
    output = (await manager.find_request("", request_id)).output
    await until(lambda: output.token_count >= token_count)


async def test_what_waits_goes_on_in_order_with_the_instances_that_were_registered() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        blocked = fleet["a"]
        blocked.healthy = False
        manager.instance("a").concurrency_limit = 1
        await manager.submit_request(asked("first"))
        for number in range(3):
            await manager.submit_request(asked(f"waits-{number}"))
        await blocked.next_call()
    assert [call.cancelled for call in blocked.calls] == [True]
    blocked.healthy = True
    async with running(store, fleet) as manager:
        # Without any registration: the journal knows the instance.
        await ready(manager)
        for request_id in ("first", "waits-0", "waits-1", "waits-2"):
            call = await fleet["a"].next_call()
            call.answer("x")
            assert call.body["prompt"] == "hello"
            status = await asyncio.wait_for(manager.wait_request(request_id), WAIT_S)
            assert status.state is RequestState.SUCCEEDED


async def test_a_stream_resumes_by_index_without_gap_or_repetition() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        await manager.submit_request(asked())
        call = await fleet["a"].next_call()
        begin(call, "a", "b", "c")
        await seen(manager, 3)
    async with running(store, fleet) as manager:
        assert (await manager.get_request_status("r")).state is RequestState.QUEUED
        reading = asyncio.create_task(text_of(manager, from_token_index=2))
        await ready(manager)
        call = await fleet["a"].next_call()
        assert call.body["prompt"] == [*PROMPT_IDS, 1000, 1001, 1002]
        assert call.body["max_tokens"] == 7
        call.send("d", "e")
        call.finish("stop", prompt_token_count=6)
        assert await asyncio.wait_for(reading, WAIT_S) == "cde"
        assert await text_of(manager) == "abcde"
        status = await manager.get_request_status("r")
        assert status.usage.completion_token_count == 5
        assert status.usage.prompt_token_count == 3
        assert [attempt.epoch for attempt in status.attempts] == [1, 2]
        failure = status.attempts[0].failure
        assert failure is not None
        assert failure.reason is ErrorReason.SHUTTING_DOWN


async def test_output_that_was_complete_is_not_produced_again() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        await manager.submit_request(asked("all", max_tokens=2))
        begin(await fleet["a"].next_call(), "a", "b")
        await seen(manager, 2, "all")
    async with running(store, fleet) as manager:
        await ready(manager)
        status = await asyncio.wait_for(manager.wait_request("all"), WAIT_S)
        assert (status.state, status.finish_reason) == (RequestState.SUCCEEDED, "length")
        assert await text_of(manager, "all") == "ab"
        assert not fleet["a"].running


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": SamplingParameters(n=2)},
        {"failover_mode": FailoverMode.RESTART},
        {"failover_mode": FailoverMode.FAIL},
    ],
)
async def test_what_cannot_go_on_after_its_output_says_so(fields: dict[str, Any]) -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        await manager.submit_request(asked(**fields))
        begin(await fleet["a"].next_call(), "a")
        await seen(manager, 1)
    async with running(store, fleet) as manager:
        status = await asyncio.wait_for(manager.wait_request("r"), WAIT_S)
        assert status.state is RequestState.FAILED
        assert status.failure is not None
        assert "restarted" in status.failure.message


async def test_ended_requests_are_known_and_their_ids_taken() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        await manager.submit_request(asked(labels={"team": "x"}))
        (await fleet["a"].next_call()).answer("a", "b")
        before = await manager.wait_request("r")
    async with running(store, fleet) as manager:
        after = await manager.get_request_status("r")
        assert after.state is RequestState.SUCCEEDED
        assert (after.usage, after.labels, after.finish_reason) == (
            before.usage,
            before.labels,
            before.finish_reason,
        )
        assert await text_of(manager, from_token_index=1) == "b"
        assert (await manager.submit_request(asked(labels={"team": "x"}))).state is RequestState.SUCCEEDED
        with pytest.raises(RequestIdConflictError):
            await manager.submit_request(asked(max_tokens=11))
        assert (await manager.cancel_request("r"))[1] is False


async def test_ephemeral_requests_are_not_written() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        await manager.submit_request(asked(durability=Durability.EPHEMERAL))
        begin(await fleet["a"].next_call(), "a")
    async with running(store, fleet) as manager:
        with pytest.raises(RequestNotFoundError):
            await manager.get_request_status("r")


async def test_durability_needs_a_journal() -> None:
    async with running(None, ScriptedFleet()) as manager:
        with pytest.raises(StoreError, match="journal"):
            await manager.submit_request(asked(durability=Durability.DURABLE))


async def test_a_drain_outlasts_a_restart() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet, "a")
        await add(manager, fleet, "b")
        manager.drain_instance("a")
    async with running(store, fleet) as manager:
        await ready(manager, "b")
        await until(lambda: manager.instance("a").state is InstanceState.DRAINED)
        manager.deregister_instance("a")
    async with running(store, fleet) as manager:
        assert [record.instance_id for record in manager.instances()] == ["b"]


async def test_orders_to_sleep_and_adapters_outlast_a_restart_with_what_the_instance_is() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    instance = dataclasses.replace(
        fleet.instance("a"),
        gpu_devices=(GpuDevice(index=0, uuid="GPU-a", links=(GpuLink("GPU-b", GpuLinkKind.NVLINK, 4),)),),
        engine_configuration={"block_size": "16"},
        engine_capabilities=frozenset({EngineCapability.SLEEP, EngineCapability.LORA}),
    )
    adapters = (LoraAdapter("l", "/l"),)
    async with running(store, fleet) as manager:
        manager.register_instance(instance, 1)
        manager.sleep_instance("a", 2, force=True)
        manager.set_lora_adapters("a", adapters)
    async with running(store, fleet) as manager:
        record = manager.instance("a")
        assert record.spec == instance
        assert record.drain is not None
        assert record.drain.sleep_level == 2
        assert record.desired_lora_adapters == adapters


def test_what_an_earlier_version_wrote_of_an_instance_is_read() -> None:
    old = msgspec.msgpack.encode([7, "a", 4, True, b"specification"])
    assert decode_record(old) == InstanceKept("a", 4, True, b"specification")
    new = InstanceKept("a", 4, True, b"specification", 2, (("l", "/l"),))
    assert decode_record(encode_record(new)) == new
    earlier = {"instance_id": "a", "host": "h", "port": 1, "model_name": "m", "model_aliases": ["x"]}
    instance = decode_instance(msgspec.msgpack.encode({**earlier, "step_time": None}))
    assert instance == ExecutionInstance(
        instance_id="a", host="h", port=1, model_name="m", model_aliases=("x",)
    )


async def test_a_deadline_keeps_running_while_the_control_plane_does_not() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        fleet["a"].healthy = False
        manager.instance("a").concurrency_limit = 1
        await manager.submit_request(asked("busy"))
        await manager.submit_request(asked("soon", slo_deadline_ms=60_000.0))
        deadline_s = (await manager.get_request_status("soon")).deadline_time_s
    async with running(store, fleet) as manager:
        again_s = (await manager.get_request_status("soon")).deadline_time_s
        assert deadline_s is not None
        assert again_s == pytest.approx(deadline_s, abs=0.05)


async def test_output_that_is_not_written_when_a_request_ends_is_never_shown() -> None:
    store, fleet = SlowStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        submitting = asyncio.create_task(manager.submit_request(asked()))
        await turns(5)
        store.let(object)
        await submitting
        await turns(5)
        store.let(object)
        begin(await fleet["a"].next_call(), "a", "b")
        await turns(5)
        store.let(object)
        (handle,) = manager.requests.live()
        assert handle.output.token_count == 2
        fleet["a"].calls[0].send("c")
        await turns(5)
        cancelling = asyncio.create_task(manager.cancel_request("r"))
        await turns(5)
        store.let(object)
        status, _ = await cancelling
        assert (status.state, status.usage.completion_token_count) == (RequestState.CANCELLED, 2)
        assert handle.output.token_count == 2
    async with running(store, fleet) as manager:
        after = await manager.get_request_status("r")
        assert after.usage == status.usage
        assert [delta.text for delta in (await manager.find_request("", "r")).output.deltas] == ["a", "b"]


class RefusingStore(MemoryStore):
    """A medium that takes no new requests."""

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        if isinstance(record, RequestAccepted):
            assert then is not None
            error = StoreError("the disk is full", retry_after_s=1.0)
            asyncio.get_running_loop().call_soon(then, error)
            return
        super().append(record, sync=sync, then=then)


async def test_a_request_that_cannot_be_written_was_never_accepted() -> None:
    store, fleet = RefusingStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet)
        with pytest.raises(StoreError, match="the disk is full"):
            await manager.submit_request(asked())
        with pytest.raises(RequestNotFoundError):
            await manager.get_request_status("r")
        assert manager.scheduler.live_count == 0
        assert not fleet["a"].running
        # The same id may be used for something else: nobody was promised anything.
        await manager.submit_request(asked(max_tokens=3, durability=Durability.EPHEMERAL))


class SlowStore(MemoryStore):
    """A medium that is done when the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[Record, Written]] = []

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        super().append(record, sync=sync)
        if then is not None:
            self.held.append((record, then))

    def let(self, kind: type) -> None:
        held, self.held = self.held, []
        for record, then in held:
            if isinstance(record, kind):
                then(None)
            else:
                self.held.append((record, then))


async def test_nothing_is_told_before_it_is_certain() -> None:
    store, fleet = SlowStore(), ScriptedFleet()
    manager = ControlPlaneManager(client_factory=fleet, store=store)
    await manager.start()
    await add(manager, fleet)
    submitting = asyncio.create_task(manager.submit_request(asked()))
    await turns(5)
    assert not submitting.done()
    assert not fleet["a"].calls, "the dispatch is not written yet"
    store.let(RequestAccepted)
    await submitting
    assert not fleet["a"].calls
    store.let(object)
    call = await fleet["a"].next_call()
    begin(call, "a")
    output = (await manager.find_request("", "r")).output
    await turns(5)
    assert output.token_count == 0, "a reader could have what a restart would not know"
    store.let(object)
    assert output.token_count == 1
    call.finish()
    await turns(5)
    store.let(object)
    await turns(5)
    assert not output.closed, "the end is not written yet"
    store.let(RequestEnded)
    assert output.closed
    await manager.stop()


async def test_an_attempt_that_is_lost_continues_elsewhere_with_what_there_is() -> None:
    store, fleet = MemoryStore(), ScriptedFleet()
    async with running(store, fleet) as manager:
        await add(manager, fleet, "a")
        await add(manager, fleet, "b")
        status = await manager.submit_request(asked())
        first = status.instance_id
        other = "b" if first == "a" else "a"
        call = await fleet[first].next_call()
        begin(call, "a", "b")
        call.fail(EngineFailedError("it broke", 500))
        call = await fleet[other].next_call()
        assert call.body["prompt"] == [*PROMPT_IDS, 1000, 1001]
        call.answer("c")
        await manager.wait_request("r")
        assert await text_of(manager) == "abc"


class TroubledStore(MemoryStore):
    """A medium that is in trouble when the test says."""

    trouble = ""

    def status(self) -> StoreStatus:
        return StoreStatus(accepting=not self.trouble, trouble=self.trouble)


async def test_operators_hear_of_a_journal_in_trouble() -> None:
    store = TroubledStore()
    async with running(store, ScriptedFleet()) as manager:
        store.trouble = "the disk is full"
        await until(lambda: any("disk is full" in f.message for f in manager.get_status().recent_faults))
