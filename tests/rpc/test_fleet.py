"""`FleetService` over the wire: registration, heartbeats, leases, lists."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.rpc import error_details_pb2

from sagecp.config import RuntimeConfig
from sagecp.core.config import SchedulerConfig
from sagecp.v1 import fleet_service_pb2, instance_pb2
from tests.support.rpc_rig import (
    WAIT_S,
    Rig,
    detail_of,
    failure_of,
    fields_of,
    reason_of,
    running_rig,
)
from tests.support.waiting import until

pb = fleet_service_pb2
Code = grpc.StatusCode
READY = instance_pb2.INSTANCE_STATE_READY


def beat(
    instance_id: str = "e1", incarnation: int = 5, sequence: int = 1, **more: Any
) -> pb.HeartbeatRequest:
    more.setdefault("engine_condition", pb.ENGINE_CONDITION_HEALTHY)
    return pb.HeartbeatRequest(instance_id=instance_id, incarnation=incarnation, sequence=sequence, **more)


async def exchange(stream: Any, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
    """Send a beat and return its acknowledgement."""
    await stream.write(request)
    response = await asyncio.wait_for(stream.read(), WAIT_S)
    assert response is not grpc.aio.EOF
    assert isinstance(response, pb.HeartbeatResponse)
    return response


async def get(rig: Rig, instance_id: str = "e1") -> instance_pb2.Instance:
    response = await rig.instances.GetInstance(pb.GetInstanceRequest(instance_id=instance_id))
    instance: instance_pb2.Instance = response.instance
    return instance


async def register(rig: Rig, instance_id: str = "e1", incarnation: int = 5) -> pb.RegisterInstanceResponse:
    response = await rig.instances.RegisterInstance(
        pb.RegisterInstanceRequest(spec=rig.spec(instance_id), incarnation=incarnation)
    )
    assert isinstance(response, pb.RegisterInstanceResponse)
    return response


# -- registration -----------------------------------------------------------------------------


async def test_registering_tells_an_agent_how_to_live() -> None:
    async with running_rig(
        scheduler=SchedulerConfig(lease_duration_s=7.5), runtime=RuntimeConfig(heartbeat_interval_s=2.5)
    ) as rig:
        response = await register(rig)
        assert response.lease_duration.ToMilliseconds() == 7500
        assert response.heartbeat_interval.ToMilliseconds() == 2500
        assert response.instance.state == instance_pb2.INSTANCE_STATE_STARTING
        assert response.instance.incarnation == 5
        assert response.instance.spec.instance_id == "e1"
        assert response.instance.spec.engine_url == rig.spec().engine_url
        assert response.instance.spec.parallel_sizes.tensor_parallel_size == 1
        assert response.instance.HasField("lease_expire_time")
        assert not response.instance.HasField("heartbeat_time")


async def test_an_instance_without_an_agent_is_probed_and_has_no_lease(rig: Rig) -> None:
    engine = await rig.add_engine(limit=3)
    instance = await get(rig)
    assert instance.state == READY
    assert instance.state_reason == "the engine answers"
    assert instance.incarnation == 0
    assert instance.max_concurrent_request_count == 3
    assert not instance.HasField("lease_expire_time")
    assert engine.probe_count >= 1


async def test_everything_wrong_with_an_instance_is_named_at_once(rig: Rig) -> None:
    error = await failure_of(
        rig.instances.RegisterInstance(
            pb.RegisterInstanceRequest(
                spec=instance_pb2.InstanceSpec(
                    instance_id="no id",
                    engine_url="http://h:1/path",
                    engine_kind=77,  # type: ignore[arg-type]
                    gpu_count=100_000,
                )
            )
        )
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {
        "spec.instance_id",
        "spec.engine_url",
        "spec.engine_kind",
        "spec.model_name",
        "spec.gpu_count",
    }


async def test_the_higher_incarnation_wins(rig: Rig) -> None:
    await register(rig, incarnation=5)
    await register(rig, incarnation=5)
    await register(rig, incarnation=6)
    error = await failure_of(
        rig.instances.RegisterInstance(pb.RegisterInstanceRequest(spec=rig.spec(), incarnation=5))
    )
    assert error.code() is Code.ABORTED
    assert reason_of(error) == "STALE_INCARNATION"
    assert "another agent owns this id" in (error.details() or "")
    error = await failure_of(
        rig.instances.DeregisterInstance(pb.DeregisterInstanceRequest(instance_id="e1", incarnation=5))
    )
    assert error.code() is Code.ABORTED
    assert (await get(rig)).incarnation == 6


async def test_the_fleet_is_bounded() -> None:
    async with running_rig(scheduler=SchedulerConfig(max_instance_count=1)) as rig:
        await register(rig)
        error = await failure_of(
            rig.instances.RegisterInstance(pb.RegisterInstanceRequest(spec=rig.spec("e2"), incarnation=1))
        )
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert reason_of(error) == "FLEET_FULL"


async def test_leaving_says_how_much_still_runs(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    response = await rig.instances.DeregisterInstance(
        pb.DeregisterInstanceRequest(instance_id="e1", cause="done")
    )
    assert response.in_flight_request_count == 1
    assert reason_of(await failure_of(get(rig))) == "INSTANCE_NOT_FOUND"
    call.answer("x")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    assert await rig.state_of("r") == "SUCCEEDED"


async def test_an_instance_that_nobody_knows(rig: Rig) -> None:
    for call in (
        rig.instances.GetInstance(pb.GetInstanceRequest(instance_id="nobody")),
        rig.instances.DeregisterInstance(pb.DeregisterInstanceRequest(instance_id="nobody")),
    ):
        error = await failure_of(call)
        assert error.code() is Code.NOT_FOUND
        assert reason_of(error) == "INSTANCE_NOT_FOUND"
        assert detail_of(error, error_details_pb2.ErrorInfo).metadata["instance_id"] == "nobody"


# -- heartbeats ---------------------------------------------------------------------------------


async def test_a_beat_is_acknowledged_and_what_it_says_is_shown(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    response = await exchange(
        stream,
        beat(
            sequence=9,
            engine=instance_pb2.EngineGauges(running_request_count=0, key_value_cache_usage=0.25),
            gpus=[instance_pb2.GpuReading(index=0, uuid="GPU-1", utilization=0.5)],
        ),
    )
    assert response.instance_id == "e1"
    assert response.acknowledged_sequence == 9
    assert response.desired_state == pb.DESIRED_STATE_SERVING
    assert response.next_interval.ToMilliseconds() == 1000
    instance = await get(rig)
    assert instance.state == READY
    assert instance.engine.HasField("running_request_count")
    assert not instance.engine.HasField("waiting_request_count")
    assert instance.engine.key_value_cache_usage == 0.25
    assert instance.gpus[0].uuid == "GPU-1"
    assert instance.HasField("heartbeat_time")
    # Level-triggered: the next beat says everything anew.
    await exchange(stream, beat(sequence=10, gpu_absent_reason="no driver"))
    instance = await get(rig)
    assert not instance.HasField("engine")
    assert not instance.gpus
    assert instance.gpu_absent_reason == "no driver"
    await stream.done_writing()


async def test_one_stream_carries_many_instances(rig: Rig) -> None:
    stream = rig.instances.Heartbeat()
    for number in range(3):
        await register(rig, f"e{number}")
        response = await exchange(stream, beat(f"e{number}"))
        assert response.instance_id == f"e{number}"
    assert len(rig.manager.instances()) == 3
    assert {instance.state.name for instance in rig.manager.instances()} == {"READY"}


async def test_the_engines_condition_decides_what_it_gets(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat(engine_condition=pb.ENGINE_CONDITION_STARTING, condition_reason="loading"))
    assert (await get(rig)).state == instance_pb2.INSTANCE_STATE_STARTING
    await rig.submit("r")
    assert await rig.state_of("r") == "QUEUED"
    await exchange(stream, beat(sequence=2))
    call = await rig.fleet["e1"].next_call()
    await exchange(
        stream, beat(sequence=3, engine_condition=pb.ENGINE_CONDITION_UNHEALTHY, condition_reason="HTTP 500")
    )
    instance = await get(rig)
    assert instance.state == instance_pb2.INSTANCE_STATE_UNHEALTHY
    assert instance.state_reason == "HTTP 500"
    call.answer("x")
    await until(lambda: rig.manager.scheduler.live_count == 0)


async def test_without_beats_an_instance_is_lost_and_a_reconnect_brings_it_back() -> None:
    async with running_rig(scheduler=SchedulerConfig(lease_duration_s=0.15)) as rig:
        await register(rig)
        stream = rig.instances.Heartbeat()
        await exchange(stream, beat())
        assert (await get(rig)).state == READY
        # The connection is fine, the agent is frozen: the lease decides.
        await until(lambda: rig.manager.instance("e1").state.name == "LOST")
        instance = await get(rig)
        assert "no heartbeat for 0.15 s" in instance.state_reason
        assert not instance.HasField("lease_expire_time")
        await rig.submit("r")
        assert await rig.state_of("r") == "QUEUED"
        stream.cancel()
        again = rig.instances.Heartbeat()
        await exchange(again, beat())
        (await rig.fleet["e1"].next_call()).answer("x")
        await until(lambda: rig.manager.scheduler.live_count == 0)
        assert await rig.state_of("r") == "SUCCEEDED"


async def test_the_end_of_a_stream_is_no_news(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat())
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is Code.OK
    assert (await get(rig)).state == READY


async def test_goodbye_ends_the_stream(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat())
    await stream.write(beat(sequence=2, goodbye=True))
    assert await asyncio.wait_for(stream.read(), WAIT_S) is grpc.aio.EOF
    assert await stream.code() is Code.OK


async def test_a_stranger_is_told_to_register(rig: Rig) -> None:
    stream = rig.instances.Heartbeat()
    await stream.write(beat("nobody"))
    error = await failure_of(stream)
    assert reason_of(error) == "INSTANCE_NOT_FOUND"
    assert "register it first" in (error.details() or "")


async def test_an_instance_that_was_removed_is_told_to_register(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat())
    await rig.instances.DeregisterInstance(pb.DeregisterInstanceRequest(instance_id="e1"))
    await stream.write(beat(sequence=2))
    assert reason_of(await failure_of(stream)) == "INSTANCE_NOT_FOUND"


async def test_an_older_agent_is_shown_out(rig: Rig) -> None:
    await register(rig, incarnation=5)
    old = rig.instances.Heartbeat()
    await exchange(old, beat())
    await register(rig, incarnation=6)
    await old.write(beat(sequence=2))
    error = await failure_of(old)
    assert error.code() is Code.ABORTED
    assert reason_of(error) == "STALE_INCARNATION"
    new = rig.instances.Heartbeat()
    await exchange(new, beat(incarnation=6))


async def test_an_oversize_beat_is_refused(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat(active_request_ids=["x" * 60_000]))
    await stream.write(beat(sequence=2, active_request_ids=["x" * 70_000]))
    error = await failure_of(stream)
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert reason_of(error) == "MESSAGE_TOO_LARGE"
    assert "65536" in (error.details() or "")


async def test_a_hundred_agents_beat_at_once(rig: Rig) -> None:
    streams = []
    for number in range(100):
        await register(rig, f"e{number}")
        streams.append(rig.instances.Heartbeat())
    responses = await asyncio.gather(
        *(exchange(stream, beat(f"e{number}")) for number, stream in enumerate(streams))
    )
    assert [response.instance_id for response in responses] == [f"e{number}" for number in range(100)]
    assert {instance.state.name for instance in rig.manager.instances()} == {"READY"}


# -- lists --------------------------------------------------------------------------------------


async def test_the_fleet_comes_in_pages_by_id(rig: Rig) -> None:
    for number in (3, 1, 4, 0, 2):
        await register(rig, f"e{number}")
    found: list[str] = []
    token = ""
    while True:
        response = await rig.instances.ListInstances(pb.ListInstancesRequest(page_size=2, page_token=token))
        assert len(response.instances) <= 2
        found += [instance.spec.instance_id for instance in response.instances]
        if token := response.next_page_token:
            # One that was on the page before leaves: the next page is not moved by it.
            await rig.instances.DeregisterInstance(pb.DeregisterInstanceRequest(instance_id=found[-1]))
            continue
        break
    assert found == ["e0", "e1", "e2", "e3", "e4"]


async def test_the_fleet_can_be_filtered(rig: Rig) -> None:
    await rig.add_engine("ready", model="one")
    await register(rig, "starting")

    async def listed(**filters: Any) -> list[str]:
        response = await rig.instances.ListInstances(pb.ListInstancesRequest(**filters))
        return [instance.spec.instance_id for instance in response.instances]

    assert await listed() == ["ready", "starting"]
    assert await listed(states=[READY]) == ["ready"]
    assert await listed(states=[READY, instance_pb2.INSTANCE_STATE_STARTING]) == ["ready", "starting"]
    assert await listed(model="one") == ["ready"]
    assert await listed(model="none") == []


async def test_a_bad_question_names_every_bad_field(rig: Rig) -> None:
    error = await failure_of(
        rig.instances.ListInstances(
            pb.ListInstancesRequest(page_size=1001, page_token="e1", states=[99])  # type: ignore[list-item]
        )
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"page_size", "page_token", "states"}


async def test_an_agent_is_told_that_its_instance_should_drain(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat())
    rig.manager.drain_instance("e1", force=True)
    response = await exchange(stream, beat(sequence=2))
    assert response.desired_state == pb.DESIRED_STATE_DRAINED
    # Healthy or not: a drain is the operator's word.
    assert (await get(rig)).state == instance_pb2.INSTANCE_STATE_DRAINED


async def test_an_engines_work_that_nobody_has_there_is_to_be_aborted(rig: Rig) -> None:
    engine = await rig.add_engine("e1", incarnation=5)
    stream = rig.instances.Heartbeat()
    assert not (await exchange(stream, beat())).abort_request_ids
    await rig.submit("known")
    await engine.next_call()
    running = ["known", "known.2", "unknown"]
    answer = await exchange(stream, beat(sequence=2, active_request_ids=running))
    assert list(answer.abort_request_ids) == ["known.2", "unknown"]
    stream.cancel()
