"""A whole site on this machine: control plane, engines, callers; and that it all ends."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from sagecp.v1 import fleet_service_pb2, fleet_service_pb2_grpc, instance_pb2
from tests.faults.harness.ledger import Ledger
from tests.faults.harness.programs import (
    CHANNEL_OPTIONS,
    MODEL,
    Agent,
    ControlPlane,
    Part,
    Settings,
    SimEngine,
)
from tests.faults.harness.waiting import becomes

# What makes faults show within seconds; the promises are proportional to it.
QUICK: Settings = {
    "": {"log_level": "info"},
    "scheduler": {"lease_duration_s": 2.0, "scheduling_policy": "priority"},
    "runtime": {"health_interval_s": 0.5, "heartbeat_interval_s": 0.2, "drain_timeout_s": 10.0},
}


class Site:
    """The parts of a site.

    Attributes:
        folder: For files of this site alone.
        control_plane: The control plane.
        engines: The engines.
        agents: The agents.
        ledger: What callers were promised and got.
    """

    def __init__(self, folder: Path, control_plane: ControlPlane, engines: Sequence[SimEngine]) -> None:
        self.folder = folder
        self.control_plane = control_plane
        self.engines = list(engines)
        self.agents: list[Agent] = []
        self.ledger = Ledger(control_plane.address)
        self._channel: grpc.aio.Channel | None = None

    @property
    def fleet(self) -> Any:
        """Stub of the fleet service."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.control_plane.address, options=CHANNEL_OPTIONS)
        return fleet_service_pb2_grpc.FleetServiceStub(self._channel)

    async def register(
        self, engine: SimEngine, *, url: str = "", incarnation: int = 0, limit: int | None = None
    ) -> None:
        """Register an engine; one without an agent must then be found well."""
        spec = instance_pb2.InstanceSpec(
            instance_id=engine.instance_id,
            engine_url=url or engine.url,
            model_name=MODEL,
            max_concurrent_request_count=limit,
        )
        request = fleet_service_pb2.RegisterInstanceRequest(spec=spec, incarnation=incarnation)
        await self.fleet.RegisterInstance(request, timeout=10)
        if incarnation == 0:
            await self.reaches(engine, "READY")

    async def instance(self, engine: SimEngine | str) -> instance_pb2.Instance:
        """Return what the control plane knows of an engine."""
        name = engine if isinstance(engine, str) else engine.instance_id
        query = fleet_service_pb2.GetInstanceRequest(instance_id=name)
        answer = await self.fleet.GetInstance(query, timeout=5)
        found: instance_pb2.Instance = answer.instance
        return found

    async def state_of(self, engine: SimEngine | str) -> str:
        """Return the state of an instance by name."""
        state = (await self.instance(engine)).state
        return instance_pb2.InstanceState.Name(state).removeprefix("INSTANCE_STATE_")

    async def reaches(self, engine: SimEngine | str, *states: str, timeout_s: float = 60.0) -> str:
        """Wait until an instance is in one of these states."""
        return await becomes(
            lambda: self.state_of(engine),
            lambda state: state in states,
            f"{engine} is {states}",
            timeout_s=timeout_s,
        )

    def parts(self) -> list[Part]:
        """Return every program."""
        return [*self.agents, *self.engines, self.control_plane]

    async def close(self) -> None:
        """Close the channels."""
        await self.ledger.close()
        if self._channel is not None:
            await self._channel.close()


def merged(*layers: Settings) -> dict[str, dict[str, Any]]:
    """Return settings, later ones winning."""
    result: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            result.setdefault(section, {}).update(values)
    return result


@contextlib.asynccontextmanager
async def running_site(
    engines: Sequence[SimEngine] | int = 1,
    *,
    settings: Settings | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    agents: bool = False,
    limit: int | None = None,
    folder: Path | None = None,
) -> AsyncIterator[Site]:
    """Run a control plane and engines, registered and well; end everything, and look for stack traces.

    Args:
        engines: The engines, or their number.
        settings: Tables of the control plane's configuration that differ from `QUICK`.
        environment: Variables of the control plane.
        prefix: A command that starts the control plane.
        agents: Whether agents register the engines.
        limit: Most requests on an engine at once, where there are no agents.
        folder: Where the control plane keeps its files; default: a temporary folder.
    """
    if isinstance(engines, int):
        engines = [SimEngine(f"e{number}") for number in range(engines)]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        site = Site(place, ControlPlane(place, merged(QUICK, settings or {})), engines)
        try:
            site.control_plane.spawn(environment, prefix)
            for engine in engines:
                engine.spawn()
            await site.control_plane.serving()
            for engine in engines:
                await engine.ready()
            for engine in engines:
                if agents:
                    agent = Agent(engine, site.control_plane.address)
                    site.agents.append(agent)
                    agent.spawn()
                else:
                    await site.register(engine, limit=limit)
            for engine in engines:
                await site.reaches(engine, "READY")
            yield site
        finally:
            await site.close()
            for part in site.parts():
                part.stop()
        traces = []
        for part in site.parts():
            part.note_stack_trace()
            traces += part.stack_traces
        assert not traces, f"{len(traces)} stack traces were logged, such as:\n{traces[0]}"
