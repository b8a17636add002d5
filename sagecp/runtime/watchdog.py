"""Watches for silence: of engines that have work, and of the control plane itself."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable

from sagecp.core.events import ClockSkipped, EngineSilent
from sagecp.runtime.executor import ExecutionCoordinator

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""How often the engines that have work are looked at."""
TICK_S = 0.25
"""How often the time is looked at."""
SKIP_S = 1.0
"""An event loop that is later than this heard nobody meanwhile: it was stopped, paused or blocked."""


class Watchdog:
    """Tells the core what no message tells: that nothing comes.

    A frozen engine keeps its connections open, and its agent may well call it
    healthy; what gives it away is that it has requests and produces nothing. And
    a control plane that was stopped itself must not take its own absence for that
    of others.

    Args:
        coordinator: Knows when output last came.
        busy_ids: Returns the ids of the instances that have requests.
        report: Takes what was found.
        silence_s: Shorter silences are not reported.
        clock: Monotonic seconds, as the coordinator's.
    """

    def __init__(
        self,
        coordinator: ExecutionCoordinator,
        busy_ids: Callable[[], Iterable[str]],
        report: Callable[[EngineSilent | ClockSkipped], None],
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._busy_ids = busy_ids
        self._report = report
        self._silence_s = silence_s
        self._clock = clock
        # When the time was last looked at; infinite while nobody does so regularly.
        self._seen_s = math.inf
        # Silence from before this time may be our own.
        self._resume_s = -math.inf

    async def run(self) -> None:
        """Watch for ever."""
        self._seen_s = self._clock()
        look_s = self._seen_s + LOOK_INTERVAL_S
        try:
            while True:
                await asyncio.sleep(TICK_S)
                try:
                    self.check_clock()
                    if self._seen_s >= look_s:
                        look_s = self._seen_s + LOOK_INTERVAL_S
                        self.look()
                except Exception:
                    # The others are still worth watching.
                    logger.exception("watchdog pass crashed")
        finally:
            self._seen_s = math.inf

    def check_clock(self) -> None:
        """Tell the core if the control plane stood still.

        To be called before anything is decided by the time: after a pause, every
        timer is due at once, in no useful order.
        """
        now = self._clock()
        gap_s = now - self._seen_s
        if self._seen_s < math.inf:
            self._seen_s = now
        if gap_s > SKIP_S + TICK_S:
            self._resume_s = now
            logger.warning("the control plane stood still", extra={"gap_s": round(gap_s, 3)})
            self._report(ClockSkipped(gap_s))

    def look(self) -> None:
        """Report every engine that has had work and been silent for too long."""
        now = self._clock()
        for instance_id in list(self._busy_ids()):
            since_s = self._coordinator.silent_since(instance_id)
            if since_s is None:
                continue
            silent_s = now - max(since_s, self._resume_s)
            if silent_s >= self._silence_s:
                self._report(EngineSilent(instance_id, silent_s))
