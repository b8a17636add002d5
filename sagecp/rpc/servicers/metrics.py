"""Snapshots of metrics: once, or again and again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from sagecp.core.errors import ShuttingDownError, TooManyStreamsError
from sagecp.rpc.convert.metrics import SHORTEST_INTERVAL_S, MetricsQuery, metrics_to_proto
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import metrics_pb2
from sagecp.wire.times import duration, timestamp

MAX_WATCH_COUNT = 100
"""Most watchers at once."""
# Groups made into messages before others run: about half a millisecond.
_GROUPS_AT_ONCE = 100


class MetricsSnapshots:
    """Makes snapshots of a control plane's metrics."""

    def __init__(self, manager: ControlPlaneManager) -> None:
        self._manager = manager
        self._watch_count = 0
        self._closed = asyncio.Event()
        # What several watchers ask for is made once for those that ask about the same time.
        self._recent: dict[MetricsQuery, tuple[float, metrics_pb2.MetricsSnapshot]] = {}

    async def fill(self, query: MetricsQuery, snapshot: metrics_pb2.MetricsSnapshot) -> None:
        """Fill an empty message with the metrics of now: a copy of a thousand groups takes a millisecond."""
        overall, table = self._manager.metrics_tables(query.window_s, query.match, query.dimension)
        snapshot.snapshot_time.CopyFrom(timestamp(time.time()))
        snapshot.window.CopyFrom(duration(overall.window_s))
        metrics_to_proto(overall, 0, snapshot.overall)
        if table is None:
            return
        for place, value in enumerate(table.values):
            if place % _GROUPS_AT_ONCE == 0:
                # A thousand groups take a while, and tokens must not wait for them.
                await asyncio.sleep(0)
            group = snapshot.groups.add(value=value)
            metrics_to_proto(table, place, group.metrics)

    async def watch(
        self, query: MetricsQuery, interval_s: float
    ) -> AsyncGenerator[metrics_pb2.MetricsSnapshot]:
        """Yield a snapshot now and one per interval; for who takes longer, none is made meanwhile.

        Raises:
            TooManyStreamsError: Too many watch already.
            ShuttingDownError: The control plane stops.
        """
        if self._watch_count >= MAX_WATCH_COUNT:
            raise TooManyStreamsError(
                f"{MAX_WATCH_COUNT} streams watch metrics already, the limit; end some, or poll GetMetrics",
                retry_after_s=1.0,
            )
        self._watch_count += 1
        try:
            due_s = time.monotonic()
            while not self._closed.is_set():
                yield await self._recent_snapshot(query)
                now = time.monotonic()
                due_s = max(due_s + interval_s, now)
                with contextlib.suppress(TimeoutError):
                    # Also for who has fallen behind: others must have their turn.
                    await asyncio.wait_for(self._closed.wait(), max(due_s - now, 0.001))
        finally:
            self._watch_count -= 1
        raise ShuttingDownError("the control plane is shutting down; connect again")

    async def _recent_snapshot(self, query: MetricsQuery) -> metrics_pb2.MetricsSnapshot:
        now = time.monotonic()
        # Half of the shortest interval, so that nobody gets the same one twice.
        oldest_s = now - 0.5 * SHORTEST_INTERVAL_S
        self._recent = {key: made for key, made in self._recent.items() if made[0] > oldest_s}
        found = self._recent.get(query)
        if found is not None:
            return found[1]
        snapshot = metrics_pb2.MetricsSnapshot()
        await self.fill(query, snapshot)
        self._recent[query] = now, snapshot
        return snapshot

    def close(self) -> None:
        """End every watch."""
        self._closed.set()
