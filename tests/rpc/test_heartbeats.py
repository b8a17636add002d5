"""Heartbeats that are wrong, orders that heartbeats carry, and agents that are not who they say they are."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagecp.client import ConflictError, InvalidArgumentError, SageClient
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.errors import ErrorReason, SageError
from sagecp.core.fleet_event import EventKind
from sagecp.core.types import ExecutionInstance, InstanceState
from sagecp.rpc.servicers.fleet import FleetServicer
from sagecp.runtime.event_log import EventFilter
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import admin_service_pb2, fleet_service_pb2, instance_pb2, metrics_pb2
from tests.rpc.test_fleet import beat, exchange, get
from tests.support.rpc_rig import Rig, failure_of, reason_of

pb = fleet_service_pb2
Code = grpc.StatusCode
READY = instance_pb2.INSTANCE_STATE_READY
CAPABLE = [instance_pb2.ENGINE_CAPABILITY_SLEEP, instance_pb2.ENGINE_CAPABILITY_LORA]


async def register(
    rig: Rig, instance_id: str = "e1", incarnation: int = 5, **more: Any
) -> pb.RegisterInstanceResponse:
    spec = rig.spec(instance_id)
    spec.engine_capabilities.extend(more.pop("capabilities", ()))
    spec.host_id = more.pop("host_id", "")
    spec.labels.update(more.pop("labels", {}))
    response = await rig.instances.RegisterInstance(
        pb.RegisterInstanceRequest(spec=spec, incarnation=incarnation, **more)
    )
    assert isinstance(response, pb.RegisterInstanceResponse)
    return response


async def status_of(rig: Rig) -> admin_service_pb2.GetStatusResponse:
    status = await rig.admin.GetStatus(admin_service_pb2.GetStatusRequest())
    assert isinstance(status, admin_service_pb2.GetStatusResponse)
    return status


def events_of(rig: Rig, kind: EventKind) -> list[Any]:
    return list(rig.manager.events.newest_first(EventFilter(kinds=frozenset({kind}))))


# -- figures that cannot be ------------------------------------------------------------------


async def test_a_broken_gauge_costs_nobody_the_lease(rig: Rig) -> None:
    await register(rig, agent_version="1.2.3")
    stream = rig.instances.Heartbeat()
    bad = instance_pb2.EngineGauges(running_request_count=1, key_value_cache_usage=math.nan)
    for sequence in range(1, 4):
        response = await exchange(stream, beat(sequence=sequence, engine=bad))
        assert response.acknowledged_sequence == sequence
    instance = await get(rig)
    assert instance.state == READY
    assert instance.HasField("lease_expire_time")
    assert instance.engine.running_request_count == 1
    assert not instance.engine.HasField("key_value_cache_usage")
    assert instance.refused_heartbeat_count == 3
    assert "engine.key_value_cache_usage is nan" in instance.heartbeat_refusal
    assert instance.agent_version == "1.2.3"
    await exchange(stream, beat(sequence=4))
    assert (await get(rig)).refused_heartbeat_count == 3
    status = await status_of(rig)
    assert dict(status.refused_heartbeat_count_by_reason) == {"BAD_FIGURE": 3}
    assert status.heartbeat_count == 4
    # Told once, and counted.
    (event,) = events_of(rig, EventKind.HEARTBEAT_REFUSED)
    assert (event.instance_id, event.attributes["reason"]) == ("e1", "BAD_FIGURE")


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (beat("nobody"), Code.NOT_FOUND, "INSTANCE_NOT_FOUND"),
        (beat(incarnation=4), Code.ABORTED, "STALE_INCARNATION"),
        (beat(incarnation=0), Code.ABORTED, "STALE_INCARNATION"),
        (beat(incarnation=6), Code.NOT_FOUND, "INSTANCE_NOT_FOUND"),
        (beat("no id"), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (beat(active_request_ids=["x" * 70_000]), Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"),
        (beat(lease_token=b"stolen"), Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_beat_that_is_refused_as_a_whole_is_counted_and_told(
    rig: Rig, request_: pb.HeartbeatRequest, code: grpc.StatusCode, reason: str
) -> None:
    await register(rig)
    for _ in range(2):
        stream = rig.instances.Heartbeat()
        await stream.write(request_)
        error = await failure_of(stream)
        assert (error.code(), reason_of(error)) == (code, reason)
    assert dict((await status_of(rig)).refused_heartbeat_count_by_reason) == {reason: 2}
    (event,) = events_of(rig, EventKind.HEARTBEAT_REFUSED)
    assert event.attributes["reason"] == reason
    instance = await get(rig)
    known = request_.instance_id == "e1"
    assert instance.refused_heartbeat_count == (2 if known else 0)
    assert bool(instance.heartbeat_refusal) is known
    assert event.instance_id == ("e1" if known else "")


async def test_strangers_do_not_flood_the_events(rig: Rig) -> None:
    for number in range(20):
        stream = rig.instances.Heartbeat()
        await stream.write(beat(f"stranger-{number}"))
        await failure_of(stream)
    (event,) = events_of(rig, EventKind.HEARTBEAT_REFUSED)
    assert "stranger-0" in event.message
    assert dict((await status_of(rig)).refused_heartbeat_count_by_reason) == {"INSTANCE_NOT_FOUND": 20}


# -- tokens ----------------------------------------------------------------------------------


async def test_who_has_not_the_token_cannot_speak_for_an_instance(rig: Rig) -> None:
    token = (await register(rig)).lease_token
    assert len(token) == 16
    assert not (await register(rig, "unattended", incarnation=0)).lease_token
    mine = rig.instances.Heartbeat()
    await exchange(mine, beat(lease_token=token))
    for offered in (b"", b"guessed", token + b"x"):
        liar = rig.instances.Heartbeat()
        await liar.write(beat(lease_token=offered, engine_condition=pb.ENGINE_CONDITION_UNHEALTHY))
        error = await failure_of(liar)
        assert error.code() is Code.PERMISSION_DENIED
        assert token.hex() not in str(error.details())
    assert (await get(rig)).state == READY
    await exchange(mine, beat(sequence=2, lease_token=token))
    assert (await get(rig)).refused_heartbeat_count == 3
    newer = (await register(rig, incarnation=6)).lease_token
    await exchange(mine, beat(incarnation=6, lease_token=newer))
    assert token.hex() not in str(await status_of(rig))


# -- clocks ----------------------------------------------------------------------------------


async def test_clocks_that_are_far_apart_are_told_once(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    ahead_s = 100
    for _ in range(3):
        now = Timestamp(seconds=int(time.time()) + ahead_s)
        failed = Timestamp(seconds=now.seconds - 60)
        reading = instance_pb2.GpuReading(
            uuid="g", xid_errors=[instance_pb2.XidError(code=13, error_time=failed)]
        )
        await exchange(stream, beat(agent_time=now, gpus=[reading]))
    instance = await get(rig)
    assert instance.state == READY
    assert abs(instance.clock_offset.ToMilliseconds() - ahead_s * 1000) < 30_000
    # By our clock: about a minute ago.
    shown_s = instance.gpus[0].xid_errors[0].error_time.seconds
    assert abs(shown_s - (time.time() - 60)) < 30
    (event,) = events_of(rig, EventKind.CLOCK_SKEW)
    assert "ahead of ours" in event.message
    assert not instance.refused_heartbeat_count


# -- orders ----------------------------------------------------------------------------------


async def test_an_engine_sleeps_when_it_is_drained_and_wakes_up(rig: Rig) -> None:
    await register(rig, capabilities=CAPABLE)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat())
    async with SageClient(rig.server.address) as client:
        with pytest.raises(ConflictError) as refused:
            await client.sleep_instance("e1")
        assert refused.value.reason is ErrorReason.DRAIN_REFUSED
        await rig.submit("r")
        call = await rig.fleet["e1"].next_call()
        instance = await client.sleep_instance("e1", level=2, force=True, cause="night")
        assert instance.state is InstanceState.DRAINING
        assert instance.sleep is not None
        assert (instance.sleep.level, instance.sleep.asleep) == (2, False)
        response = await exchange(stream, beat(sequence=2))
        assert response.desired_state == pb.DESIRED_STATE_DRAINED
        call.answer("x")
        assert (await client.get_request("r")).state.name in {"RUNNING", "SUCCEEDED"}
        await rig.manager.wait_request("r")
        response = await exchange(stream, beat(sequence=3))
        assert (response.desired_state, response.sleep_level) == (pb.DESIRED_STATE_ASLEEP, 2)
        asleep = instance_pb2.EngineGauges(sleeping=True)
        await exchange(stream, beat(sequence=4, engine=asleep))
        instance = await client.get_instance("e1")
        assert instance.sleep is not None
        assert instance.sleep.asleep
        assert "its engine sleeps at level 2" in instance.state_reason
        instance = await client.sleep_instance("e1", wake=True)
        assert (instance.state, instance.sleep, instance.drain) == (InstanceState.STARTING, None, None)
        response = await exchange(stream, beat(sequence=5, engine=asleep))
        assert (response.desired_state, response.sleep_level) == (pb.DESIRED_STATE_SERVING, 0)
        assert (await client.get_instance("e1")).state is InstanceState.STARTING
        await exchange(stream, beat(sequence=6, engine=instance_pb2.EngineGauges(sleeping=False)))
        assert (await client.get_instance("e1")).state is InstanceState.READY
    orders = [event.attributes["order"] for event in reversed(events_of(rig, EventKind.INSTANCE_ORDERED))]
    assert orders == ["sleep at level 1", "sleep at level 2", "waking up"]


async def test_adapters_are_told_to_the_agent_until_they_are_loaded(rig: Rig) -> None:
    await register(rig, capabilities=CAPABLE)
    stream = rig.instances.Heartbeat()
    assert not (await exchange(stream, beat())).HasField("desired_lora_adapters")
    adapters = [LoraAdapter("b", "/b"), LoraAdapter("a", "/a")]
    async with SageClient(rig.server.address) as client:
        instance = await client.set_lora_adapters("e1", adapters)
        assert instance.desired_lora_adapters == tuple(reversed(adapters))
        response = await exchange(stream, beat(sequence=2))
        assert [each.name for each in response.desired_lora_adapters.adapters] == ["a", "b"]
        # An agent that restarts is told again; what it cannot do is shown.
        await register(rig, incarnation=6, capabilities=CAPABLE)
        trouble = "the engine does not find /b"
        for sequence in (3, 4):
            response = await exchange(stream, beat(incarnation=6, sequence=sequence, order_trouble=trouble))
            assert [each.path for each in response.desired_lora_adapters.adapters] == ["/a", "/b"]
        assert trouble in (await client.get_instance("e1")).state_reason
        (event, _) = events_of(rig, EventKind.INSTANCE_ORDERED)
        assert trouble in event.message
        await client.set_lora_adapters("e1", [])
        response = await exchange(stream, beat(incarnation=6, sequence=5))
        assert response.HasField("desired_lora_adapters")
        assert not response.desired_lora_adapters.adapters
        instance = await client.set_lora_adapters("e1", None)
        assert instance.desired_lora_adapters is None
        assert not (await exchange(stream, beat(incarnation=6, sequence=6))).HasField("desired_lora_adapters")


async def test_an_engine_that_cannot_is_not_told_to(rig: Rig) -> None:
    await register(rig, capabilities=[instance_pb2.ENGINE_CAPABILITY_ABORT])
    await rig.add_engine("unattended")
    async with SageClient(rig.server.address) as client:
        for name, part in (("e1", "cannot"), ("unattended", "has no agent")):
            for order in (
                client.sleep_instance(name, force=True),
                client.set_lora_adapters(name, [LoraAdapter("a", "/a")]),
            ):
                with pytest.raises(ConflictError) as refused:
                    await order
                assert refused.value.reason is ErrorReason.ILLEGAL_STATE
                assert part in refused.value.message
            # To take an order back is always possible.
            await client.sleep_instance(name, wake=True)
            await client.set_lora_adapters(name, None)
        assert [each.drain async for each in client.list_instances()] == [None, None]


@pytest.mark.parametrize(
    ("adapters", "field"),
    [
        ([LoraAdapter("", "/a")], "adapters.adapters[0].name"),
        ([LoraAdapter("a", "")], "adapters.adapters[0].path"),
        ([LoraAdapter("a\n", "/a")], "adapters.adapters[0].name"),
        ([LoraAdapter("a", "/a"), LoraAdapter("a", "/b")], "adapters.adapters[1].name"),
        ([LoraAdapter(f"a{n}", "/a") for n in range(129)], "adapters"),
    ],
)
async def test_bad_adapters_are_refused(rig: Rig, adapters: list[LoraAdapter], field: str) -> None:
    await register(rig, capabilities=CAPABLE)
    async with SageClient(rig.server.address) as client:
        with pytest.raises(InvalidArgumentError) as refused:
            await client.set_lora_adapters("e1", adapters)
    assert [each.field for each in refused.value.violations] == [field]


async def test_bad_orders_to_sleep_are_refused(rig: Rig) -> None:
    await register(rig, capabilities=CAPABLE)
    async with SageClient(rig.server.address) as client:
        with pytest.raises(InvalidArgumentError) as refused:
            await client.sleep_instance("e1", level=3)
        assert [each.field for each in refused.value.violations] == ["level"]
        with pytest.raises(InvalidArgumentError) as refused:
            await client.sleep_instance("e1", wake=True, force=True, grace_s=1.0)
        assert [each.field for each in refused.value.violations] == ["grace_period", "force"]


# -- what is shown ---------------------------------------------------------------------------


async def test_processes_and_gpu_faults_are_shown_and_told(rig: Rig) -> None:
    await register(rig)
    await rig.add_engine("other")
    stream = rig.instances.Heartbeat()
    now = Timestamp(seconds=int(time.time()))
    broken = instance_pb2.GpuReading(
        index=3, uuid="GPU-1234", xid_errors=[instance_pb2.XidError(code=79, error_time=now)]
    )
    process = instance_pb2.EngineProcess(
        state=instance_pb2.ENGINE_PROCESS_STATE_BACKING_OFF,
        restart_count=2,
        last_exit_code=-9,
        last_log_lines=["canary: the prompt was ..."],
    )
    await exchange(stream, beat(agent_time=now, gpus=[broken], engine_process=process))
    instance = await get(rig)
    assert instance.state == instance_pb2.INSTANCE_STATE_UNHEALTHY
    assert instance.state_reason.startswith("GPU 3 (GPU-1234): Xid 79, the GPU has fallen off the bus")
    (fault,) = instance.gpu_faults
    assert (fault.kind, fault.quarantines) == (instance_pb2.GPU_FAULT_KIND_XID, True)
    assert abs(fault.begin_time.seconds - now.seconds) < 30
    assert instance.engine_process.last_exit_code == -9
    (told,) = events_of(rig, EventKind.GPU_FAULT)
    assert "out of the rotation" in told.message
    (told,) = events_of(rig, EventKind.ENGINE_PROCESS_CHANGED)
    assert "signal 9" in told.message
    assert "canary" not in str(list(rig.manager.events.newest_first(EventFilter())))


async def test_instances_are_listed_by_host_and_labels(rig: Rig) -> None:
    await register(rig, "a", host_id="h1", labels={"zone": "x", "tier": "1"})
    await register(rig, "b", host_id="h1", labels={"zone": "y"})
    await register(rig, "c", host_id="h2", labels={"zone": "x"})

    async with SageClient(rig.server.address) as client:

        async def ids(**wanted: Any) -> list[str]:
            return [each.instance_id async for each in client.list_instances(**wanted)]

        assert await ids(host_id="h1") == ["a", "b"]
        assert await ids(labels={"zone": "x"}) == ["a", "c"]
        assert await ids(labels={"zone": "x", "tier": "1"}) == ["a"]
        assert await ids(host_id="h2", labels={"zone": "x"}) == ["c"]
        assert await ids(host_id="h3") == []


async def test_the_state_of_the_loops_is_shown(rig: Rig) -> None:
    await register(rig)
    await exchange(rig.instances.Heartbeat(), beat())
    status = await status_of(rig)
    loops = {loop.name: loop for loop in status.loops}
    assert set(loops) == {"scheduling", "engine_health", "monitoring", "heartbeat"}
    assert loops["heartbeat"].run_count == 1
    assert loops["heartbeat"].HasField("last_run_time")
    assert loops["engine_health"].interval.ToMilliseconds() == 10_000
    assert loops["monitoring"].interval.ToMilliseconds() == 5_000
    assert status.cpu_seconds > 0
    assert status.resident_memory_bytes > 1 << 20
    assert status.last_event_sequence == rig.manager.events.last_sequence
    assert status.lease_duration.ToMilliseconds() > 0


# -- anything at all -------------------------------------------------------------------------


FLOATS = st.one_of(st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e300, 0.5]))
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_FLOAT: FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 12),
}
_TEXTS = st.one_of(st.sampled_from(["", "e1", "GPU-1", "HwThermalSlowdown"]), st.text(max_size=300))


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """Draw any message of a type: every field may be absent, and have any value that it can have."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        count = draw(st.integers(0, 4)) if field.is_repeated else 1
        for _ in range(count):
            if field.message_type is not None:
                target = getattr(message, field.name)
                inner = draw(messages(type(target.add()) if field.is_repeated else type(target)))
                (target[-1] if field.is_repeated else target).CopyFrom(inner)
                continue
            if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                is_text = field.type == FieldDescriptor.TYPE_STRING
                value: Any = draw(_TEXTS if is_text else st.binary(max_size=40))
            else:
                value = draw(_SCALARS[field.cpp_type])
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


class Wire:
    """A call's context that beats come from and answers go to."""

    def __init__(self, beats: list[pb.HeartbeatRequest]) -> None:
        self.beats = beats
        self.answers: list[pb.HeartbeatResponse] = []

    async def read(self) -> Any:
        return self.beats.pop(0) if self.beats else grpc.aio.EOF

    async def write(self, answer: pb.HeartbeatResponse) -> None:
        self.answers.append(answer)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(messages(pb.HeartbeatRequest), min_size=1, max_size=6), st.booleans())
def test_whatever_comes_is_taken_or_refused_and_can_be_shown(
    beats: list[pb.HeartbeatRequest], mine: bool
) -> None:
    async def scenario() -> None:
        manager = ControlPlaneManager()
        servicer = FleetServicer(manager)
        instance = ExecutionInstance(instance_id="e1", host="h", port=1, model_name="m")
        manager.register_instance(instance, 5)
        for beat_ in beats:
            if mine:
                beat_.instance_id, beat_.incarnation, beat_.lease_token = "e1", 5, b""
            wire: Any = Wire([beat_])
            try:
                await servicer.Heartbeat(None, wire)
                refused = False
            except SageError:
                refused = True
            assert refused or len(wire.answers) == (0 if beat_.goodbye else 1)
            # Whatever was taken can be shown, as a message and as JSON.
            shown = await servicer.GetInstance(pb.GetInstanceRequest(instance_id="e1"), wire)
            assert len(MessageToJson(shown)) < 1 << 20
        status = manager.get_status()
        assert status.heartbeat_count + sum(status.refused_heartbeat_count_by_reason.values()) >= len(beats)
        await manager.stop()

    asyncio.run(scenario())


def test_the_drawn_messages_reach_every_field() -> None:
    kinds: list[type[Message]] = [
        pb.HeartbeatRequest,
        instance_pb2.GpuReading,
        metrics_pb2.DurationQuantiles,
    ]
    for kind in kinds:
        for field in kind.DESCRIPTOR.fields:
            text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
            assert field.message_type is not None or text or field.cpp_type in _SCALARS
