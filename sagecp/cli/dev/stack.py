"""A control plane, simulated engines and their agents, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from sagecp.cli.dev.children import Child, ChildEndedError
from sagecp.client import ClientError, SageClient
from sagecp.core.types import InstanceState

DEFAULT_PORT = 50051
_HOST = "127.0.0.1"
_POLL_INTERVAL_S = 0.1
_STOP_TIMEOUT_S = 4.0
_DRAIN_TIMEOUT = "2s"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """What to start.

    Attributes:
        port: Of the control plane; ``None``: the default port where it is
            free, else any; 0: any.
        engine_options: More options for every engine.
        serve_options: More options for the control plane.
    """

    engine_count: int = 3
    model: str = "sim-8b"
    port: int | None = None
    profile: str = ""
    engine_options: tuple[str, ...] = ()
    serve_options: tuple[str, ...] = ()


@dataclass(slots=True)
class Engine:
    """An engine and its agent."""

    instance_id: str
    process: Child
    agent: Child | None = None
    url: str = ""


@dataclass(slots=True)
class Stack:
    """Everything that was started.

    Attributes:
        address: Host and port of the control plane.
    """

    plan: StackPlan
    on_line: Callable[[str, str], None]
    address: str = ""
    control_plane: Child | None = None
    engines: list[Engine] = field(default_factory=list)
    _asking: bool = False

    def _show(self, name: str, line: str) -> None:
        # The control plane logs every call; those made here while waiting say nothing.
        if not (self._asking and "/ListInstances" in line):
            self.on_line(name, line)

    async def start(self, ready_timeout_s: float) -> None:
        """Start everything and return when every instance takes work.

        Raises:
            TimeoutError: Not everything was ready in time.
            ChildEndedError: A process ended before it was of any use.
        """
        plan = self.plan
        port = _choose_port() if plan.port is None else plan.port
        self.control_plane = Child(
            "control-plane",
            ["serve", "--listen", f"{_HOST}:{port}", "--drain-timeout", _DRAIN_TIMEOUT,
             "--log-format", "console", "--journal", "off", *plan.serve_options],
            self._show,
        )  # fmt: skip
        profile = ["--profile", plan.profile] if plan.profile else []
        for number in range(1, plan.engine_count + 1):
            name = f"engine-{number}"
            arguments = ["engine-sim", "--host", _HOST, "--port", "0", "--model", plan.model]
            arguments += [*profile, *plan.engine_options]
            self.engines.append(Engine(name, Child(name, arguments, self._show)))
        async with asyncio.timeout(ready_timeout_s):
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._start_control_plane())
                    for engine in self.engines:
                        group.create_task(self._start_engine(engine))
                async with asyncio.TaskGroup() as group:
                    for engine in self.engines:
                        group.create_task(self._start_agent(engine))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            await self._until_ready()

    async def _start_control_plane(self) -> None:
        child = self.control_plane
        assert child is not None  # noqa: S101 - made above
        address = asyncio.ensure_future(child.says(r"\bserving\b.*?(127\.0\.0\.1:\d+)"))
        await child.start()
        self.address = await address

    async def _start_engine(self, engine: Engine) -> None:
        url = asyncio.ensure_future(engine.process.says(r"(http://127\.0\.0\.1:[1-9]\d*)"))
        await engine.process.start()
        engine.url = await url

    async def _start_agent(self, engine: Engine) -> None:
        engine.agent = Child(
            f"agent-{engine.instance_id.rpartition('-')[2]}",
            ["agent", "--engine", engine.url, "--control-plane", self.address,
             "--instance-id", engine.instance_id, "--log-format", "console"],
            self._show,
        )  # fmt: skip
        await engine.agent.start()

    async def _until_ready(self) -> None:
        """Ask the control plane until every instance takes work."""
        self._asking = True
        wanted = {engine.instance_id for engine in self.engines}
        async with SageClient(self.address) as client:
            while True:
                for child in self.children():
                    if child.returncode is not None:
                        raise ChildEndedError(child)
                with contextlib.suppress(ClientError):
                    states = {each.instance_id: each.state async for each in client.list_instances()}
                    if all(states.get(name) is InstanceState.READY for name in wanted):
                        break
                await asyncio.sleep(_POLL_INTERVAL_S)
        self._asking = False

    def children(self) -> list[Child]:
        """Return every process, in the order in which they are to be stopped.

        Agents first, so that they can say goodbye; the control plane before
        its engines, so that running requests end well.
        """
        agents = [engine.agent for engine in self.engines if engine.agent is not None]
        control_plane = [self.control_plane] if self.control_plane is not None else []
        return [*agents, *control_plane, *(engine.process for engine in self.engines)]

    async def stop(self) -> None:
        """Stop everything, in order, for certain."""
        agents = [engine.agent for engine in self.engines if engine.agent is not None]
        engines = [engine.process for engine in self.engines]
        for batch in (agents, [self.control_plane] if self.control_plane else [], engines):
            await asyncio.gather(*(child.stop(_STOP_TIMEOUT_S) for child in batch))

    def kill(self) -> None:
        """End everything at once."""
        for child in self.children():
            child.kill()


def _choose_port() -> int:
    """Return the default port if nobody listens there, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, DEFAULT_PORT))
        except OSError:
            return 0
        return DEFAULT_PORT
