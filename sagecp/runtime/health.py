"""Probes the engines that no agent watches, and those that a call could not reach."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from sagecp.core.errors import InstanceNotFoundError
from sagecp.core.events import HealthProbed
from sagecp.core.types import EngineCondition
from sagecp.runtime.executor import ExecutionCoordinator


class HealthLoop:
    """Asks ``/health`` of engines, at once when there is a reason and then at an interval.

    An instance that is not healthy is asked again sooner, so that it comes
    back within about a second.

    Args:
        coordinator: Knows how to reach engines.
        targets: Returns the ids to probe.
        report: Takes what was found.
        interval_s: Between probes of healthy instances.
        concurrency: Most probes at once.
    """

    def __init__(
        self,
        coordinator: ExecutionCoordinator,
        targets: Callable[[], Iterable[str]],
        report: Callable[[HealthProbed], None],
        interval_s: float,
        concurrency: int = 64,
    ) -> None:
        self._coordinator = coordinator
        self._targets = targets
        self._report = report
        self._interval_s = interval_s
        self._slots = asyncio.Semaphore(concurrency)
        self._soon = asyncio.Event()
        self._unhealthy: set[str] = set()

    def probe_soon(self) -> None:
        """Probe at once: an instance joined, or a call found one dead."""
        self._soon.set()

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            self._soon.clear()
            ids = list(self._targets())
            self._unhealthy.intersection_update(ids)
            await asyncio.gather(*(self._probe(instance_id) for instance_id in ids))
            wait_s = min(self._interval_s, 1.0) if self._unhealthy else self._interval_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), wait_s)

    async def _probe(self, instance_id: str) -> None:
        async with self._slots:
            try:
                health = await self._coordinator.health_check(instance_id)
            except InstanceNotFoundError:
                return  # It left meanwhile.
        if health.healthy:
            self._unhealthy.discard(instance_id)
            self._report(HealthProbed(instance_id, EngineCondition.HEALTHY))
        else:
            self._unhealthy.add(instance_id)
            self._report(HealthProbed(instance_id, EngineCondition.UNHEALTHY, health.detail))
