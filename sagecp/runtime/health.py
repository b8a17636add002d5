"""Probes engines: those that no agent watches or a call could not reach, and those that failed or hung."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterable

from sagecp.core.errors import InstanceNotFoundError
from sagecp.core.events import EngineProbed, HealthProbed
from sagecp.core.types import EngineCondition
from sagecp.runtime.executor import ExecutionCoordinator

logger = logging.getLogger(__name__)

UNHEALTHY_INTERVAL_S = 1.0
_MAX_DETAIL_LENGTH = 256
TARGETS_INTERVAL_S = 1.0
"""How often to look who is to be probed."""


class HealthLoop:
    """Asks ``/health`` of engines, at once when there is a reason and then at an interval.

    Every instance has its own rhythm, so that one that does not answer delays
    nobody else. An instance that is not healthy is asked again sooner, so that
    it comes back within about a second.

    Args:
        coordinator: Knows how to reach engines.
        targets: Returns the ids to probe.
        report: Takes what was found.
        interval_s: Between probes of healthy instances.
        concurrency: Most probes at once.
        note: Called whenever it was looked who is to be probed.
    """

    def __init__(
        self,
        coordinator: ExecutionCoordinator,
        targets: Callable[[], Iterable[str]],
        report: Callable[[HealthProbed], None],
        interval_s: float,
        concurrency: int = 256,
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self._note = note
        self._coordinator = coordinator
        self._targets = targets
        self._report = report
        self._interval_s = interval_s
        self._slots = asyncio.Semaphore(concurrency)
        self._wake = asyncio.Event()
        self._wake_s = 0.0
        # When to probe next, on the event loop's clock; infinite while a probe is in progress.
        self._due_s: dict[str, float] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    def probe_soon(self, instance_id: str) -> None:
        """Probe at once: the instance joined, or a call found it dead."""
        self._due_s[instance_id] = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Probe for ever."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                self._wake_s = self._start_due(loop.time())
                self._note()
                # Not wait_for: in Python 3.11 it loses a cancellation that meets the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._wake_s):
                        await self._wake.wait()
        finally:
            probes = list(self._probes.values())
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
            # A task that is cancelled before its first step takes itself out of nothing.
            self._probes.clear()
            self._due_s.clear()

    def _start_due(self, now: float) -> float:
        """Start every probe that is due; return when to look again."""
        targets = dict.fromkeys(self._targets())
        for instance_id in [known for known in self._due_s if known not in targets]:
            del self._due_s[instance_id]
        next_s = now + min(self._interval_s, TARGETS_INTERVAL_S)
        for instance_id in targets:
            if instance_id in self._probes:
                continue
            due_s = self._due_s.get(instance_id, 0.0)
            if due_s <= now:
                self._due_s[instance_id] = math.inf
                self._probes[instance_id] = asyncio.get_running_loop().create_task(self._probe(instance_id))
            else:
                next_s = min(next_s, due_s)
        return next_s

    async def _probe(self, instance_id: str) -> None:
        interval_s = self._interval_s
        try:
            async with self._slots:
                health = await self._coordinator.health_check(instance_id)
            if health.healthy:
                self._report(HealthProbed(instance_id, EngineCondition.HEALTHY))
            else:
                interval_s = min(interval_s, UNHEALTHY_INTERVAL_S)
                self._report(HealthProbed(instance_id, EngineCondition.UNHEALTHY, health.detail))
        except InstanceNotFoundError:
            pass  # It left meanwhile.
        except Exception:
            logger.exception("health probe crashed", extra={"instance_id": instance_id})
        finally:
            self._probes.pop(instance_id, None)
            # Unless somebody asked for another probe meanwhile, which may know less than we found.
            if self._due_s.get(instance_id) == math.inf:
                self._due_s[instance_id] = asyncio.get_running_loop().time() + interval_s
            if self._due_s.get(instance_id, math.inf) < self._wake_s:
                self._wake.set()


class EngineProber:
    """Has engines generate a token when the core wants to know whether they work. One probe each at a time.

    Args:
        coordinator: Knows how to reach engines.
        report: Takes what was found.
        concurrency: Most probes at once.
    """

    def __init__(
        self,
        coordinator: ExecutionCoordinator,
        report: Callable[[EngineProbed], None],
        concurrency: int = 64,
    ) -> None:
        self._coordinator = coordinator
        self._report = report
        self._slots = asyncio.Semaphore(concurrency)
        self._probes: dict[str, asyncio.Task[None]] = {}

    def probe(self, instance_id: str) -> None:
        """Start a probe, unless one is on its way."""
        if instance_id not in self._probes:
            self._probes[instance_id] = asyncio.get_running_loop().create_task(self._probe(instance_id))

    async def stop(self) -> None:
        """End every probe."""
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        # A task that is cancelled before its first step takes itself out of nothing.
        self._probes.clear()

    async def _probe(self, instance_id: str) -> None:
        try:
            try:
                async with self._slots:
                    health = await self._coordinator.probe_generation(instance_id)
            finally:
                # Before the report: it may ask for the next one.
                del self._probes[instance_id]
            self._report(EngineProbed(instance_id, health.healthy, health.detail[:_MAX_DETAIL_LENGTH]))
        except InstanceNotFoundError:
            pass  # It left meanwhile.
        except Exception:
            # Without an answer the core asks again.
            logger.exception("engine probe crashed", extra={"instance_id": instance_id})
