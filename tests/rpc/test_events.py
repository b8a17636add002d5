"""`ListEvents` and `WatchEvents` over the wire, and through the client."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest

from sagecp.client import ConflictError, SageClient, UnavailableError, WatchedEvent
from sagecp.client.retry import NO_RETRY, RetryPolicy
from sagecp.config import JournalConfig, ServerConfig
from sagecp.core.errors import ErrorReason
from sagecp.core.fleet_event import EventKind, EventSeverity
from sagecp.rpc.server import ControlPlaneServer
from sagecp.v1 import admin_service_pb2, event_pb2, fleet_service_pb2
from tests.support.rpc_rig import WAIT_S, Rig, failure_of, fields_of, reason_of, running_rig
from tests.support.samples import samples_of
from tests.support.waiting import until

pb = admin_service_pb2
Code = grpc.StatusCode


async def events_of(rig: Rig, **wanted: Any) -> list[event_pb2.FleetEvent]:
    response = await rig.admin.ListEvents(pb.ListEventsRequest(filter=pb.EventFilter(**wanted)))
    return list(response.events)


async def test_what_happened_is_listed_newest_first(rig: Rig) -> None:
    await rig.add_engine("e1")
    await rig.add_engine("e2")
    await rig.instances.DrainInstance(
        fleet_service_pb2.DrainInstanceRequest(instance_id="e1", cause="a new driver")
    )
    await rig.instances.DeregisterInstance(fleet_service_pb2.DeregisterInstanceRequest(instance_id="e2"))
    events = await events_of(rig)
    assert [event.sequence for event in events] == list(range(len(events), 0, -1))
    assert events[-1].kind == event_pb2.EVENT_KIND_CONTROL_PLANE_STATE_CHANGED
    kinds = [event_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_") for event in events]
    assert kinds[:4] == [
        "INSTANCE_REMOVED",
        "INSTANCE_ORDERED",
        "INSTANCE_STATE_CHANGED",
        "INSTANCE_STATE_CHANGED",
    ]
    assert "a new driver" in events[1].message
    assert dict(events[2].attributes)["to"] == "DRAINED"
    assert all(event.HasField("event_time") for event in events)


async def test_pages_and_filters(rig: Rig) -> None:
    for name in ("e1", "e2", "e3"):
        await rig.add_engine(name)
    everything = await events_of(rig)
    query = pb.ListEventsRequest(page_size=2)
    found = []
    while True:
        page = await rig.admin.ListEvents(query)
        assert len(page.events) <= 2
        found += page.events
        if not page.next_page_token:
            break
        query.page_token = page.next_page_token
    assert found == everything
    (registered,) = await events_of(rig, instance_id="e2", kinds=[event_pb2.EVENT_KIND_INSTANCE_REGISTERED])
    assert registered.instance_id == "e2"
    assert not await events_of(rig, min_severity=event_pb2.EVENT_SEVERITY_WARNING)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (pb.ListEventsRequest(page_size=1001), "page_size"),
        (pb.ListEventsRequest(page_token="x"), "page_token"),
        (pb.ListEventsRequest(page_token="aW5zdGFuY2U6YQ=="), "page_token"),
        (pb.ListEventsRequest(page_token="ZXZlbnQ6eA=="), "page_token"),
        (pb.ListEventsRequest(filter=pb.EventFilter(min_severity=9)), "filter.min_severity"),  # type: ignore[arg-type]
        (pb.ListEventsRequest(filter=pb.EventFilter(kinds=[99])), "filter.kinds"),  # type: ignore[list-item]
    ],
)
async def test_bad_queries_are_refused_with_the_field(
    rig: Rig, query: pb.ListEventsRequest, field: str
) -> None:
    error = await failure_of(rig.admin.ListEvents(query))
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {field}


async def test_a_watch_sends_what_happened_and_what_happens(rig: Rig) -> None:
    stream = rig.admin.WatchEvents(pb.WatchEventsRequest(after_sequence=0), timeout=WAIT_S)
    first = await stream.read()
    assert first.event.sequence == 1
    assert first.event.kind == event_pb2.EVENT_KIND_CONTROL_PLANE_STATE_CHANGED
    live = rig.admin.WatchEvents(
        pb.WatchEventsRequest(filter=pb.EventFilter(kinds=[event_pb2.EVENT_KIND_INSTANCE_REGISTERED])),
        timeout=WAIT_S,
    )
    await live.initial_metadata()
    await rig.add_engine("e1")
    for watch in (stream, live):
        response = await watch.read()
        assert response.event.kind == event_pb2.EVENT_KIND_INSTANCE_REGISTERED
        assert response.event.instance_id == "e1"
        watch.cancel()
    await until(lambda: not rig.manager.events._watches, "nobody is left to be told")


async def test_a_watch_ends_with_the_server() -> None:
    async with running_rig() as rig:
        stream = rig.admin.WatchEvents(pb.WatchEventsRequest(), timeout=WAIT_S)
        await stream.initial_metadata()
        await rig.server.stop(0.0)
        first, last = await stream.read(), await stream.read()
        assert "takes no new requests" in first.event.message
        assert last.event.message == "the control plane stopped"
        error = await failure_of(stream.read())
        assert error.code() is Code.UNAVAILABLE
        assert reason_of(error) == "SHUTTING_DOWN"


async def test_a_refused_drain_is_told(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with SageClient(rig.server.address) as client:
        with pytest.raises(ConflictError):
            await client.drain_instance("e1")
        (event,) = [each async for each in client.list_events(min_severity=EventSeverity.WARNING)]
    assert event.kind is EventKind.INSTANCE_ORDERED
    assert event.attributes["result"] == "refused"
    assert "no other READY instance" in event.message


async def test_the_client_lists_page_by_page_and_watches(rig: Rig) -> None:
    async with SageClient(rig.server.address) as client:
        for name in ("e1", "e2", "e3"):
            await rig.add_engine(name)
        listed = [
            each async for each in client.list_events(kinds=[EventKind.INSTANCE_REGISTERED], page_size=2)
        ]
        assert [each.instance_id for each in listed] == ["e3", "e2", "e1"]
        watch = client.watch_events(after_sequence=listed[-1].sequence, instance_id="e3")
        first = await asyncio.wait_for(anext(watch), WAIT_S)
        assert isinstance(first, WatchedEvent)
        assert (first.event, first.skipped_count) == (listed[0], 0)
        await watch.aclose()


async def test_a_watch_goes_on_over_a_restart_of_the_control_plane() -> None:
    config = ServerConfig(listen="127.0.0.1:0", journal=JournalConfig(enabled=False))
    first = ControlPlaneServer(config)
    await first.start()
    config = dataclasses.replace(config, listen=first.address)
    async with SageClient(first.address, retry=RetryPolicy(base_s=0.05, max_s=0.1)) as client:
        watch = client.watch_events(after_sequence=0, kinds=[EventKind.CONTROL_PLANE_STATE_CHANGED])
        seen = [(await asyncio.wait_for(anext(watch), WAIT_S)).event]
        await first.stop(0.0)
        second = ControlPlaneServer(config)
        await second.start()
        seen += [(await asyncio.wait_for(anext(watch), WAIT_S)).event for _ in range(3)]
        await watch.aclose()
        await second.stop(0.0)
    # The last ones of the first process, and the first one of the next, which counts anew.
    assert [each.message.partition(",")[0] for each in seen] == [
        "the control plane started",
        "the control plane takes no new requests",
        "the control plane stopped",
        "the control plane started",
    ]
    assert seen[-1].sequence == 1


async def test_the_client_says_why_a_watch_failed() -> None:
    async with running_rig() as rig:
        address = rig.server.address
    async with SageClient(address, retry=NO_RETRY) as client:
        with pytest.raises(UnavailableError) as caught:
            await anext(client.watch_events())
    assert caught.value.reason in {None, ErrorReason.SHUTTING_DOWN}


async def test_steps_slower_than_planned_are_told_and_so_is_their_end(rig: Rig) -> None:
    spec = rig.spec("e1", model="llama-3.1-8b")
    spec.gpu_name = "NVIDIA H100 80GB HBM3"
    await rig.instances.RegisterInstance(fleet_service_pb2.RegisterInstanceRequest(spec=spec))
    load = rig.manager.instance("e1").load
    planned = load.kind.accuracy.planned
    assert "planned: meta-llama/Llama-3.1-8B as TP1 on H100" in planned.source

    def steps(factor: float, count: int) -> None:
        for _ in range(count):
            step_s = factor * planned.step_times.step_s(8, 8000)
            load.kind.accuracy.observe_decode(step_s, 8, 8000, load.planned_ratio)
        rig.manager._loop._look_at_step_times()

    steps(2.0, 30)
    status = await rig.admin.GetStatus(admin_service_pb2.GetStatusRequest())
    (accuracy,) = status.step_time_accuracy
    assert accuracy.drifting
    assert accuracy.observed_ratio == pytest.approx(2.0)
    kind = ("gpu", spec.gpu_name), ("model", "llama-3.1-8b"), ("plan", "TP1")
    samples = await samples_of(rig)
    assert samples["sagecp_step_time_drifting", *kind] == 1
    assert samples["sagecp_step_time_ratio", *sorted((*kind, ("phase", "decode")))] == pytest.approx(2.0)
    steps(1.0, 2000)
    assert (await samples_of(rig))["sagecp_step_time_drifting", *kind] == 0
    async with SageClient(rig.server.address) as client:
        told = [each async for each in client.list_events(kinds=[EventKind.PREDICTION_DRIFT])]
    over, begun = told
    assert begun.severity is EventSeverity.WARNING
    assert "steps take 2.00 times as long as planned" in begun.message
    assert begun.attributes["direction"] == "slower"
    assert "about as long as planned again" in over.message
    assert over.attributes["direction"] == "over"
