"""Reads a control plane again and again into a picture, and comes back when it was away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from sagecp.cli import render
from sagecp.cli.failures import from_client_error
from sagecp.cli.top.model import EventRow, Picture
from sagecp.cli.top.rows import event_row, instance_row, metrics_view, status_view
from sagecp.client import ClientError, NotFoundError, SageClient, UnsupportedError
from sagecp.client.errors import from_rpc_error
from sagecp.v1 import admin_service_pb2 as admin_pb
from sagecp.v1 import fleet_service_pb2 as fleet_pb

CALL_TIMEOUT_S = 5.0
# Figures are of the last minute: an operator wants to see what is, not what was.
_METRICS_WINDOW_S = 60
# Instances read at every tick. A fleet of up to this many is read whole each time, a larger one
# page by page, in at most `_TICKS_PER_SWEEP` ticks.
_PAGE_SIZE = 100
_MOST_PER_PAGE = 1000
_TICKS_PER_SWEEP = 30
# Rows on the screen that are older than so many ticks are read for themselves.
_VISIBLE_TICKS = 2
_MOST_SINGLE_READS = 60
_SINGLE_READS_AT_ONCE = 8
# Instances that events named and that are still to be read; beyond that the pages bring them.
_MOST_NAMED = 1000
# Events from before the start that are shown.
_EARLIER_EVENTS = 200
_SHORTEST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 8.0


class Watcher:
    """Keeps a picture up to date.

    Args:
        client: To the control plane; one that does not retry by itself.
        picture: What to keep.
        on_change: Called after every change of it.
        visible_ids: Returns the instances on the screen, which are read first.
        interval_s: Between two reads.
        backoff_s: Bounds of the pause after a loss; doubled from try to try.
    """

    def __init__(
        self,
        client: SageClient,
        picture: Picture,
        *,
        on_change: Callable[[], None],
        visible_ids: Callable[[], Sequence[str]] = tuple,
        interval_s: float = 1.0,
        backoff_s: tuple[float, float] = (_SHORTEST_BACKOFF_S, _LONGEST_BACKOFF_S),
    ) -> None:
        self._client = client
        self._picture = picture
        self._on_change = on_change
        self._visible_ids = visible_ids
        self._interval_s = interval_s
        self._shortest_s, self._longest_s = backoff_s
        self._random = random.Random()
        self._answers = asyncio.Event()
        self._polls_metrics = False
        self._tick = 0
        self._page_token = ""
        self._swept: set[str] = set()
        self._named: set[str] = set()

    async def run(self) -> None:
        """Read until cancelled. A control plane that does not answer is tried again and again."""
        self._tick, self._page_token = 0, ""
        self._swept.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._poll())
            group.create_task(self._follow(self._follow_metrics))
            group.create_task(self._follow(self._follow_events))

    # Polling

    async def _poll(self) -> None:
        failures = 0
        while True:
            begin_s = time.monotonic()
            try:
                await self._read()
            except ClientError as error:
                failures += 1
                self._answers.clear()
                await self._lose(error, failures)
                continue
            failures = 0
            self._tick += 1
            self._answers.set()
            self._on_change()
            # At least half the interval of rest: a slow server is not asked without pause.
            rest_s = self._interval_s - (time.monotonic() - begin_s)
            await asyncio.sleep(max(self._interval_s / 2, rest_s))

    async def _lose(self, error: ClientError, failures: int) -> None:
        """Say that the control plane does not answer, and wait before the next try."""
        longest_s = min(self._longest_s, self._shortest_s * 2 ** min(failures - 1, 10))
        wait_s = longest_s * self._random.uniform(0.75, 1.0)
        now_s = time.monotonic()
        reason = from_client_error(error, server=self._client.connection.target).message
        self._picture.note_loss(reason, now_s, time.time(), now_s + wait_s)
        self._page_token = ""
        self._swept.clear()
        self._on_change()
        await asyncio.sleep(wait_s)

    async def _read(self) -> None:
        """Read what is due at this tick."""
        calls: list[Coroutine[Any, Any, None]] = []
        if self._tick % 2 == 0 or self._picture.is_stale:
            calls.append(self._read_status())
            if self._polls_metrics:
                calls.append(self._read_metrics())
        calls.append(self._read_page() if self._tick else self._read_fleet())
        await _all_of(calls)
        await self._read_visible()

    async def _read_status(self) -> None:
        connection = self._client.connection
        response = await connection.unary(connection.admin.GetStatus, admin_pb.GetStatusRequest())
        self._picture.put_status(status_view(response), time.monotonic(), time.time())

    async def _read_metrics(self) -> None:
        connection = self._client.connection
        response = await connection.unary(connection.admin.GetMetrics, _metrics_query())
        self._picture.put_metrics(metrics_view(response.snapshot), time.monotonic())

    async def _read_fleet(self) -> None:
        """Read every instance once."""
        await self._read_page()
        while self._page_token:
            self._on_change()
            await self._read_page()

    async def _read_page(self) -> None:
        """Read the next page of the fleet; after the last one, instances that were on none are forgotten."""
        connection = self._client.connection
        size = max(_PAGE_SIZE, min(_MOST_PER_PAGE, len(self._picture.instances) // _TICKS_PER_SWEEP))
        response = await connection.unary(
            connection.fleet.ListInstances,
            fleet_pb.ListInstancesRequest(page_size=size, page_token=self._page_token),
        )
        now_s, unix_s = time.monotonic(), time.time()
        rows = [instance_row(message, now_s) for message in response.instances]
        self._picture.put_instances(rows, unix_s)
        self._swept.update(row.instance_id for row in rows)
        self._page_token = response.next_page_token
        if not self._page_token:
            self._picture.keep_only(self._swept, unix_s)
            self._swept.clear()

    async def _read_visible(self) -> None:
        """Read what events named, and the instances on the screen that the pages have not brought of late."""
        too_old_s = time.monotonic() - _VISIBLE_TICKS * self._interval_s
        instances = self._picture.instances
        due = [*self._named][:_MOST_SINGLE_READS]
        self._named.difference_update(due)
        due += [
            instance_id
            for instance_id in self._visible_ids()
            if instance_id in instances and instances[instance_id].read_s < too_old_s
        ][: _MOST_SINGLE_READS - len(due)]
        for start in range(0, len(due), _SINGLE_READS_AT_ONCE):
            await _all_of([self.read_instance(each) for each in due[start : start + _SINGLE_READS_AT_ONCE]])

    async def read_instance(self, instance_id: str) -> None:
        """Read one instance now."""
        connection = self._client.connection
        try:
            response = await connection.unary(
                connection.fleet.GetInstance, fleet_pb.GetInstanceRequest(instance_id=instance_id)
            )
        except NotFoundError:
            self._picture.forget(instance_id, time.time())
            return
        self._picture.put_instances([instance_row(response.instance, time.monotonic())], time.time())

    # Streams

    async def _follow(self, follow: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Read a stream again and again, until the server says that it has no such stream."""
        while True:
            await self._answers.wait()
            try:
                await follow()
            except (grpc.aio.AioRpcError, ClientError) as failure:
                error = failure if isinstance(failure, ClientError) else from_rpc_error(failure)
                if isinstance(error, UnsupportedError):
                    self._do_without(follow)
                    return
            # The polling notices and tells a loss; here a pause is enough.
            await asyncio.sleep(self._shortest_s)

    def _do_without(self, follow: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if follow == self._follow_metrics:
            self._polls_metrics = True
        else:
            self._picture.server_events = False
        self._on_change()

    async def _follow_metrics(self) -> None:
        connection = self._client.connection
        interval = Duration()
        interval.FromMilliseconds(max(100, round(2 * self._interval_s * 1000)))
        query = admin_pb.WatchMetricsRequest(query=_metrics_query(), interval=interval)
        stream = connection.admin.WatchMetrics(query, metadata=connection.metadata)
        try:
            async for response in stream:
                self._picture.put_metrics(metrics_view(response.snapshot), time.monotonic())
        finally:
            stream.cancel()

    async def _follow_events(self) -> None:
        picture, connection = self._picture, self._client.connection
        # Another run of the server counts its events from 1 again.
        await self._read_status()
        after = picture.last_sequence
        if not after and picture.status is not None:
            after = max(0, picture.status.last_event_sequence - _EARLIER_EVENTS)
        stream = connection.admin.WatchEvents(
            admin_pb.WatchEventsRequest(after_sequence=after), metadata=connection.metadata
        )
        try:
            async for response in stream:
                picture.server_events = True
                event = event_row(response.event)
                if response.skipped_count:
                    text = (
                        f"{render.plural(response.skipped_count, 'event')} before the next one are not shown"
                    )
                    picture.add_event(EventRow(time_s=event.time_s, severity=1, message=text))
                picture.add_event(event)
                self._on_change()
                if event.instance_id and len(self._named) < _MOST_NAMED:
                    # What the event tells of is shown at the next tick, not when its page has its turn.
                    self._named.add(event.instance_id)
        finally:
            stream.cancel()


def _metrics_query() -> admin_pb.GetMetricsRequest:
    return admin_pb.GetMetricsRequest(window=Duration(seconds=_METRICS_WINDOW_S))


async def _all_of(calls: Collection[Coroutine[Any, Any, None]]) -> None:
    """Make calls at the same time; when one fails, raise that once all have ended."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
