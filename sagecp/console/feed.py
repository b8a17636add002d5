"""What viewers are sent: the whole picture once, then what changed, made once for all of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from sagecp.console.rows import (
    decision_values,
    event_values,
    instance_row,
    metrics_values,
    status_values,
)
from sagecp.core.fleet_event import FleetEvent
from sagecp.runtime.event_log import EventFilter
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.monitor_keys import MetricsKey

logger = logging.getLogger(__name__)

METRICS_WINDOW_S = 60.0
HISTORY_INTERVAL_S = 5.0
MAX_HISTORY_COUNT = 360
"""Half an hour of figures, so that a page that is opened has a past to show."""
MAX_SHOWN_DECISIONS = 50
MAX_SHOWN_EVENTS = 100
# Updates that a viewer may be behind. One that is further behind gets the whole picture anew.
_MAX_BACKLOG = 8
# Instances whose rows are made before others get their turn.
_ROWS_PER_SLICE = 100

_ENCODER = msgspec.json.Encoder()


class TooManyViewersError(Exception):
    """As many look at it as may."""


class _Viewer:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(_MAX_BACKLOG)
        self.is_behind = False

    def offer(self, message: bytes) -> None:
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.is_behind = True


class ConsoleFeed:
    """Looks at a manager once per interval while anybody watches, and tells every viewer what changed.

    Args:
        manager: What is shown.
        interval_s: Between looks.
        max_viewer_count: Most that may watch at once.
    """

    def __init__(self, manager: ControlPlaneManager, interval_s: float, max_viewer_count: int) -> None:
        self._manager = manager
        self._interval_s = interval_s
        self._max_viewer_count = max_viewer_count
        self._viewers: set[_Viewer] = set()
        self._joining = asyncio.Lock()
        self._watched = asyncio.Event()
        self._history: deque[dict[str, Any]] = deque(maxlen=MAX_HISTORY_COUNT)
        # As the viewers know it.
        self._rows: dict[str, dict[str, Any]] = {}
        self._picture: dict[str, Any] = {}
        self._shown_event_sequence = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._look(), name="sagecp-console"),
            loop.create_task(self._remember(), name="sagecp-console-history"),
        ]

    async def stop(self) -> None:
        """End it."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def snapshot(self) -> dict[str, Any]:
        """Return the whole picture as it is now."""
        rows = await self._make_rows()
        return self._whole(rows, self._make_picture())

    async def watch(self) -> AsyncIterator[bytes]:
        """Yield the whole picture, then what changes, as JSON.

        Raises:
            TooManyViewersError: Too many watch already.
        """
        viewer = _Viewer()
        viewer.is_behind = True
        # One after the other: what the first one begins with, the next one goes on from.
        async with self._joining:
            if len(self._viewers) >= self._max_viewer_count:
                raise TooManyViewersError
            if not self._viewers:
                # What the last viewers knew is old.
                self._rows, self._picture = await self._make_rows(), self._make_picture()
                self._shown_event_sequence = self._manager.events.last_sequence
            self._viewers.add(viewer)
        self._watched.set()
        try:
            while True:
                if viewer.is_behind:
                    viewer.queue = asyncio.Queue(_MAX_BACKLOG)
                    viewer.is_behind = False
                    yield _ENCODER.encode(self._whole(self._rows, self._picture))
                yield await viewer.queue.get()
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._watched.clear()

    # -- looking ---------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            await self._watched.wait()
            await asyncio.sleep(self._interval_s)
            try:
                await self._tell()
            except Exception:
                logger.exception("the console cannot look")

    async def _tell(self) -> None:
        rows, picture = await self._make_rows(), self._make_picture()
        changes: dict[str, Any] = {
            name: value for name, value in picture.items() if self._picture.get(name) != value
        }
        changes["instances"] = [row for key, row in rows.items() if self._rows.get(key) != row]
        changes["removed"] = [key for key in self._rows if key not in rows]
        changes["time"] = time.time()
        changes["events"] = self._new_events()
        self._rows, self._picture = rows, picture
        message = _ENCODER.encode({"kind": "change", **changes})
        for viewer in self._viewers:
            viewer.offer(message)

    async def _make_rows(self) -> dict[str, dict[str, Any]]:
        wall_time, now = self._manager.wall_time, self._manager.now()
        rows: dict[str, dict[str, Any]] = {}
        for number, record in enumerate(self._manager.instances()):
            if number % _ROWS_PER_SLICE == _ROWS_PER_SLICE - 1:
                # Tokens must not wait for a page.
                await asyncio.sleep(0)
            rows[record.instance_id] = instance_row(record, wall_time, now)
        return dict(sorted(rows.items()))

    def _make_picture(self) -> dict[str, Any]:
        manager = self._manager
        decisions = list(manager.recent_decisions())[-MAX_SHOWN_DECISIONS:]
        return {
            "status": {
                **status_values(manager.get_status()),
                "policy_in_force": manager.scheduler.policy_in_force,
            },
            "metrics": metrics_values(manager.get_metrics(METRICS_WINDOW_S, MetricsKey())),
            "decisions": [decision_values(each, manager.wall_time) for each in reversed(decisions)],
        }

    def _whole(self, rows: dict[str, dict[str, Any]], picture: dict[str, Any]) -> dict[str, Any]:
        # The others have yet to be told of the latest: the page knows which ones it has.
        events = self._latest_events()
        return {
            "kind": "whole",
            "time": time.time(),
            "instances": list(rows.values()),
            "events": [event_values(each) for each in events],
            "history": list(self._history),
            **picture,
        }

    def _new_events(self) -> list[dict[str, Any]]:
        events = [each for each in self._latest_events() if each.sequence > self._shown_event_sequence]
        self._shown_event_sequence = self._manager.events.last_sequence
        return [event_values(each) for each in events]

    def _latest_events(self) -> list[FleetEvent]:
        return list(itertools.islice(self._manager.events.newest_first(EventFilter()), MAX_SHOWN_EVENTS))

    async def _remember(self) -> None:
        while True:
            try:
                status = self._manager.get_status()
                metrics = self._manager.get_metrics(METRICS_WINDOW_S, MetricsKey())
                self._history.append(
                    {
                        "time": time.time(),
                        "requests_per_second": metrics.requests_per_second,
                        "tokens_per_second": metrics.tokens_per_second,
                        "queued": status.queued_requests,
                        "active": status.active_requests,
                        "ttft_p50_s": metrics.ttft.p50_s if metrics.ttft.sample_count else None,
                        "ttft_p95_s": metrics.ttft.p95_s if metrics.ttft.sample_count else None,
                        "slo_compliance": metrics.slo_compliance_rate,
                    }
                )
            except Exception:
                logger.exception("the console cannot look")
            await asyncio.sleep(HISTORY_INTERVAL_S)
