"""All metrics of a control plane as one text, made on its event loop without stopping it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from sagecp.rpc.interceptors.metrics import RpcMetrics
from sagecp.rpc.telemetry.control_plane import control_plane_pieces, queue_pieces
from sagecp.rpc.telemetry.families import head, label_text, number_text
from sagecp.rpc.telemetry.instances import instance_pieces
from sagecp.rpc.telemetry.requests import RequestTelemetry
from sagecp.runtime.manager import ControlPlaneManager

# How long one turn of the event loop may go on with this.
_TURN_S = 0.003


class MetricsExporter:
    """Writes the metrics of a control plane in Prometheus's text format.

    Args:
        manager: The control plane; is given an observer that counts its requests.

    Attributes:
        calls: Observer that counts RPCs, for the server.
    """

    def __init__(self, manager: ControlPlaneManager) -> None:
        self._manager = manager
        # Of the process, which the library knows how to look at.
        self._registry = CollectorRegistry()
        self.calls = RpcMetrics()
        self._requests = RequestTelemetry()
        self._one_at_a_time = asyncio.Lock()
        ProcessCollector(registry=self._registry)
        manager.observe_requests(self._requests)

    async def render(self) -> bytes:
        """Return the present metrics. Must be called on the event loop of the control plane.

        Others on the loop wait a few milliseconds at a time, however large the fleet is;
        so the text is no snapshot of one moment.
        """
        # Two at once would take twice the memory, and neither be done earlier.
        async with self._one_at_a_time:
            return await self._render()

    async def _render(self) -> bytes:
        parts: list[bytes] = []
        begin_s = time.perf_counter()
        for piece in self._pieces():
            parts.append(piece.encode())
            if time.perf_counter() - begin_s > _TURN_S:
                await asyncio.sleep(0)
                begin_s = time.perf_counter()
        return b"".join(parts)

    def _pieces(self) -> Iterator[str]:
        manager = self._manager
        now = manager.now()
        yield from _registry_pieces(self._registry)
        yield from self.calls.pieces()
        yield from control_plane_pieces(manager, now)
        yield from self._requests.pieces()
        yield from queue_pieces(manager.scheduler, now)
        yield from instance_pieces(manager.instances(), now)


def _registry_pieces(registry: CollectorRegistry) -> Iterator[str]:
    """Return the counters, gauges and histograms of a registry as text, without when each series began."""
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines = [head(name, family.type, family.documentation)]
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                names = sorted(sample.labels)
                labels = label_text(names, [sample.labels[each] for each in names])
                braced = f"{{{labels}}}" if labels else ""
                lines.append(f"{sample.name}{braced} {number_text(sample.value)}\n")
        yield "".join(lines)
