"""`WatchMetrics` over the wire: one snapshot after the other, until either side has enough."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from sagecp import client
from sagecp.client import RetryPolicy, SageClient
from sagecp.core.errors import ShuttingDownError
from sagecp.core.types import RequestPriority
from sagecp.rpc.convert.metrics import MetricsQuery
from sagecp.rpc.servicers import metrics as servicer
from sagecp.runtime.metrics_table import MetricsTable
from sagecp.runtime.monitor_keys import MetricsDimension, MetricsKey
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.v1 import metrics_pb2, request_pb2
from tests.support.rpc_rig import WAIT_S, Rig, failure_of, fields_of, reason_of
from tests.support.waiting import other_tasks, until

Code = grpc.StatusCode
FAST = Duration(nanos=100_000_000)


def watch(rig: Rig, interval: Duration = FAST, **query: Any) -> Any:
    request = pb.WatchMetricsRequest(query=pb.GetMetricsRequest(**query), interval=interval)
    return rig.admin.WatchMetrics(request, timeout=WAIT_S)


async def next_snapshot(call: Any) -> metrics_pb2.MetricsSnapshot:
    response = await asyncio.wait_for(call.read(), WAIT_S)
    assert response is not grpc.aio.EOF, "the stream ended"
    snapshot: metrics_pb2.MetricsSnapshot = response.snapshot
    return snapshot


async def test_what_happens_shows_in_a_snapshot_soon(rig: Rig) -> None:
    (await rig.add_engine("e1", model="one")).automatic = lambda call: call.answer("a", "b")
    call = watch(rig, group_by=metrics_pb2.METRICS_DIMENSION_MODEL, window=Duration(seconds=60))
    first = await next_snapshot(call)
    assert first.overall.completed_request_count == 0
    assert first.window.seconds == 60
    await rig.submit("r1", model="one")
    while (latest := await next_snapshot(call)).overall.completed_request_count == 0:
        pass
    assert latest.snapshot_time.ToNanoseconds() > first.snapshot_time.ToNanoseconds()
    assert {group.value: group.metrics.completed_request_count for group in latest.groups} == {"one": 1}
    assert latest.overall.ttft.sample_count == 1
    call.cancel()


async def test_the_first_one_comes_at_once_whatever_the_interval(rig: Rig) -> None:
    call = watch(rig, Duration(seconds=3600))
    await next_snapshot(call)
    call.cancel()
    call = rig.admin.WatchMetrics(pb.WatchMetricsRequest(), timeout=WAIT_S)
    await next_snapshot(call)
    call.cancel()


async def test_a_bad_question_names_every_bad_field(rig: Rig) -> None:
    call = watch(
        rig,
        Duration(nanos=99_000_000),
        window=Duration(seconds=7200),
        group_by=77,
        priority=88,
    )
    error = await failure_of(call)
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"interval", "query.window", "query.group_by", "query.priority"}
    assert fields_of(await failure_of(watch(rig, Duration(seconds=3601)))) == {"interval"}


async def test_a_stopping_server_ends_watches_and_says_why(rig: Rig) -> None:
    calls = [watch(rig, Duration(seconds=3600)) for _ in range(3)]
    for call in calls:
        await next_snapshot(call)
    await rig.server.stop(0.0)
    for call in calls:
        error = await failure_of(call)
        assert error.code() is Code.UNAVAILABLE
        assert reason_of(error) == "SHUTTING_DOWN"


async def test_for_who_does_not_read_nothing_is_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    tables_of = rig.manager.metrics_tables

    def counted(
        window_s: float, match: MetricsKey, dimension: MetricsDimension | None
    ) -> tuple[MetricsTable, MetricsTable | None]:
        made.append(match.model)
        return tables_of(window_s, match, dimension)

    monkeypatch.setattr(rig.manager, "metrics_tables", counted)
    snapshots = servicer.MetricsSnapshots(rig.manager)
    slow = snapshots.watch(MetricsQuery(60.0, MetricsKey(model="slow"), None), 0.01)
    quick = snapshots.watch(MetricsQuery(60.0, MetricsKey(model="quick"), None), 0.1)
    first = await anext(slow)
    # While it does something else, many of its intervals pass.
    for _ in range(5):
        await anext(quick)
    assert made.count("slow") == 1
    late = await anext(slow)
    # It gets the latest, not what it has missed.
    assert made.count("slow") == 2
    assert late.snapshot_time.ToNanoseconds() > first.snapshot_time.ToNanoseconds()
    await slow.aclose()
    await quick.aclose()


async def test_those_that_ask_the_same_at_one_time_share_the_answer(rig: Rig) -> None:
    snapshots = servicer.MetricsSnapshots(rig.manager)
    query = MetricsQuery(60.0, MetricsKey(), MetricsDimension.MODEL)
    watches = [snapshots.watch(query, 60.0) for _ in range(3)]
    first, *others = [await anext(each) for each in watches]
    assert all(each is first for each in others)
    snapshots.close()
    for each in watches:
        with pytest.raises(ShuttingDownError):
            await anext(each)


async def test_who_leaves_leaves_nothing_behind(rig: Rig) -> None:
    before = len(other_tasks())
    for _ in range(20):
        call = watch(rig, Duration(seconds=3600))
        await next_snapshot(call)
        call.cancel()
    await until(lambda: len(other_tasks()) <= before)


async def test_watchers_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "MAX_WATCH_COUNT", 2)
    calls = [watch(rig, Duration(seconds=3600)) for _ in range(2)]
    for call in calls:
        await next_snapshot(call)
    error = await failure_of(watch(rig))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert reason_of(error) == "TOO_MANY_STREAMS"
    calls[0].cancel()

    async def admitted() -> bool:
        call = watch(rig)
        try:
            await next_snapshot(call)
        except grpc.aio.AioRpcError:
            return False
        call.cancel()
        return True

    async with asyncio.timeout(WAIT_S):
        while not await admitted():
            pass


async def test_the_client_yields_values(rig: Rig) -> None:
    engine = await rig.add_engine("e1", model="one")
    engine.automatic = lambda call: call.answer("a")
    await rig.submit("r1", model="one", priority=request_pb2.REQUEST_PRIORITY_HIGH)
    await until(lambda: rig.manager.scheduler.live_count == 0)
    async with SageClient(rig.server.address) as sage:
        snapshots = sage.watch_metrics(
            interval_s=0.1, window_s=60, group_by="priority", priority=RequestPriority.HIGH
        )
        first, second = await anext(snapshots), await anext(snapshots)
        assert first.overall.completed_requests == second.overall.completed_requests == 1
        assert set(first.groups) == {"HIGH"}
        assert second.time_s > first.time_s
        await snapshots.aclose()
        with pytest.raises(client.InvalidArgumentError, match="interval"):
            await anext(sage.watch_metrics(interval_s=0.01))
        with pytest.raises(client.InvalidArgumentError, match="group_by"):
            sage.watch_metrics(group_by="colour")


async def test_the_client_gives_up_on_a_server_that_stays_away(rig: Rig) -> None:
    async with SageClient(rig.server.address, retry=RetryPolicy(resume_s=0.0)) as sage:
        snapshots = sage.watch_metrics(interval_s=3600.0)
        await anext(snapshots)
        await rig.server.stop(0.0)
        with pytest.raises(client.UnavailableError):
            await asyncio.wait_for(anext(snapshots), WAIT_S)
