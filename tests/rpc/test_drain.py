"""Drains over the wire: orders, refusals, progress, and requests that move without a gap."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from sagecp.client import Drain, SageClient
from sagecp.core.types import InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2, request_pb2
from tests.support.rpc_rig import Rig, detail_of, failure_of, fields_of, reason_of
from tests.support.scripted_client import ScriptedCall
from tests.support.waiting import until

pb = fleet_service_pb2
Code = grpc.StatusCode
State = instance_pb2.InstanceState
NOW = Duration()


async def drain(rig: Rig, instance_id: str = "e1", **order: Any) -> instance_pb2.Instance:
    response = await rig.instances.DrainInstance(pb.DrainInstanceRequest(instance_id=instance_id, **order))
    instance: instance_pb2.Instance = response.instance
    return instance


async def refusal(rig: Rig, instance_id: str = "e1", **order: Any) -> grpc.aio.AioRpcError:
    return await failure_of(
        rig.instances.DrainInstance(pb.DrainInstanceRequest(instance_id=instance_id, **order))
    )


async def get(rig: Rig, instance_id: str = "e1") -> instance_pb2.Instance:
    response = await rig.instances.GetInstance(pb.GetInstanceRequest(instance_id=instance_id))
    instance: instance_pb2.Instance = response.instance
    return instance


async def running(rig: Rig, request_id: str = "r1", **more: Any) -> ScriptedCall:
    """Return the call of a request that runs on ``e1``; ``e2`` has nothing to do."""
    engine = await rig.add_engine("e1")
    await rig.submit(request_id, **more)
    call = await engine.next_call()
    await rig.add_engine("e2")
    return call


async def test_an_instance_finishes_its_work_and_is_drained(rig: Rig) -> None:
    call = await running(rig)
    instance = await drain(rig, cause="new driver")
    assert instance.state == State.INSTANCE_STATE_DRAINING
    assert instance.state_reason == "drain requested: new driver"
    assert instance.in_flight_request_count == 1
    assert instance.drain.cause == "new driver"
    assert instance.drain.HasField("begin_time")
    assert not instance.drain.HasField("grace_end_time")
    assert not instance.drain.forced
    await rig.submit("r2")
    other = await rig.fleet["e2"].next_call()
    assert other.request_id == "r2"
    other.answer("x")
    call.answer("x")
    await until(lambda: rig.manager.instance("e1").state is InstanceState.DRAINED, "it is drained")
    assert await rig.state_of("r1") == "SUCCEEDED"
    drained = await get(rig)
    assert (drained.in_flight_request_count, drained.drain.moved_request_count) == (0, 0)
    back = await drain(rig, undo=True)
    assert back.state == State.INSTANCE_STATE_READY
    assert not back.HasField("drain")


async def test_the_last_instance_is_drained_by_force_only(rig: Rig) -> None:
    await rig.add_engine("e1")
    error = await refusal(rig)
    assert error.code() is Code.FAILED_PRECONDITION
    assert reason_of(error) == "DRAIN_REFUSED"
    assert detail_of(error, error_details_pb2.ErrorInfo).metadata["instance_id"] == "e1"
    assert "no other READY instance serves 'tiny'" in (error.details() or "")
    assert "force" in (error.details() or "")
    assert (await get(rig)).state == State.INSTANCE_STATE_READY
    instance = await drain(rig, force=True)
    assert instance.state == State.INSTANCE_STATE_DRAINED
    assert instance.drain.forced


@pytest.mark.parametrize(
    ("order", "fields"),
    [
        ({"grace_period": Duration(seconds=-1)}, {"grace_period"}),
        ({"grace_period": Duration(seconds=10**9)}, {"grace_period"}),
        ({"undo": True, "grace_period": NOW, "force": True}, {"grace_period", "force"}),
    ],
)
async def test_an_order_that_makes_no_sense_names_its_fields(
    rig: Rig, order: dict[str, Any], fields: set[str]
) -> None:
    await rig.add_engine("e1")
    error = await refusal(rig, **order)
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == fields


@pytest.mark.parametrize(
    ("instance_id", "incarnation", "code", "reason"),
    [
        ("nobody", 0, Code.NOT_FOUND, "INSTANCE_NOT_FOUND"),
        ("e1", 4, Code.ABORTED, "STALE_INCARNATION"),
        ("e1", 6, Code.NOT_FOUND, "INSTANCE_NOT_FOUND"),
    ],
)
@pytest.mark.parametrize("undo", [False, True])
async def test_an_order_for_somebody_else_is_refused(
    rig: Rig, instance_id: str, incarnation: int, code: grpc.StatusCode, reason: str, undo: bool
) -> None:
    await rig.add_engine("e1", incarnation=5)
    error = await refusal(rig, instance_id, incarnation=incarnation, undo=undo)
    assert (error.code(), reason_of(error)) == (code, reason)


async def test_an_order_for_the_present_incarnation_is_carried_out(rig: Rig) -> None:
    await rig.add_engine("e1", incarnation=5)
    assert (await drain(rig, incarnation=5, force=True)).state == State.INSTANCE_STATE_DRAINED


async def test_what_has_no_output_starts_anew_elsewhere_at_once(rig: Rig) -> None:
    call = await running(rig)
    instance = await drain(rig, grace_period=NOW)
    assert instance.drain.HasField("grace_end_time")
    await call.wait_ended()
    assert call.cancelled
    other = await rig.fleet["e2"].next_call()
    assert other.request_id == "r1.2"
    drained = await get(rig)
    assert drained.state == State.INSTANCE_STATE_DRAINED
    assert drained.drain.moved_request_count == 1
    assert drained.failed_attempt_count == 0, "it is not the engine's fault"
    other.answer("x")
    await until(lambda: rig.manager.instance("e2").in_flight_count == 0, "it ended")
    assert await rig.state_of("r1") == "SUCCEEDED"


async def test_a_stream_goes_on_elsewhere_after_what_was_delivered(rig: Rig) -> None:
    engine = await rig.add_engine("e1")
    stream = rig.generate(
        "r1",
        prompt=request_pb2.Prompt(token_ids=request_pb2.TokenIdsPrompt(ids=[5, 6, 7])),
        sampling=request_pb2.SamplingParameters(max_tokens=4),
    )
    call = await engine.next_call()
    await rig.add_engine("e2")
    call.send("a", "b")
    await until(lambda: rig.manager.requests.get("r1").output.token_count == 2, "two tokens are there")
    await drain(rig, grace_period=NOW)
    other = await rig.fleet["e2"].next_call()
    assert (await get(rig)).drain.moved_request_count == 1
    other.answer("c", "d")
    chunks = [event.chunk async for event in stream if event.WhichOneof("event") == "chunk"]
    assert "".join(chunk.text for chunk in chunks) == "abcd"
    indices = [
        index
        for chunk in chunks
        for index in range(chunk.first_token_index, chunk.first_token_index + chunk.token_count)
    ]
    assert indices == [0, 1, 2, 3]
    assert await rig.state_of("r1") == "SUCCEEDED"


async def test_what_cannot_go_on_elsewhere_finishes_where_it_is(rig: Rig) -> None:
    """Two choices that were begun are never continued."""
    call = await running(rig, sampling=request_pb2.SamplingParameters(n=2))
    call.send("a")
    await until(lambda: rig.manager.requests.get("r1").output.token_count == 1, "a token is there")
    instance = await drain(rig, grace_period=NOW)
    assert instance.in_flight_request_count == 1
    call.finish()
    await until(lambda: rig.manager.instance("e1").state is InstanceState.DRAINED, "it is drained")
    assert not call.cancelled
    assert await rig.state_of("r1") == "SUCCEEDED"
    assert not rig.fleet["e2"].calls


async def test_what_runs_is_moved_when_the_grace_period_is_over(rig: Rig) -> None:
    call = await running(rig)
    await drain(rig, grace_period=Duration(nanos=50_000_000))
    other = await rig.fleet["e2"].next_call()
    assert call.cancelled
    other.answer("x")
    assert (await get(rig)).state == State.INSTANCE_STATE_DRAINED


async def test_the_client_drains_and_sees_how_far_it_is(rig: Rig) -> None:
    call = await running(rig)
    async with SageClient(rig.server.address) as client:
        instance = await client.drain_instance("e1", grace_s=3600.0, cause="kernel")
        assert instance.state is InstanceState.DRAINING
        assert instance.drain is not None
        assert instance.drain.cause == "kernel"
        assert instance.drain.grace_end_time_s == pytest.approx(instance.drain.begin_time_s + 3600.0)
        # No grace period any more.
        changed = (await client.drain_instance("e1")).drain
        assert changed == Drain(begin_time_s=instance.drain.begin_time_s, cause="kernel")
        call.answer("x")
        await until(lambda: rig.manager.instance("e1").state is InstanceState.DRAINED, "it is drained")
        [listed] = [each async for each in client.list_instances(states=[InstanceState.DRAINED])]
        assert listed.instance_id == "e1"
        assert listed.drain is not None
        assert (await client.drain_instance("e1", undo=True)).drain is None
