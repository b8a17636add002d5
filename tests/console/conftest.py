"""A control plane with a fleet of every state, and its console."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

import aiohttp
import pytest

from sagecp.config import ConsoleConfig
from sagecp.console.app import ConsoleServer
from tests.support.rpc_rig import Rig, running_rig


@dataclasses.dataclass
class Console:
    """A console, the control plane that it shows, and somebody who looks."""

    rig: Rig
    server: ConsoleServer
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server.port}"


async def render_nothing() -> bytes:
    """Stand in for the metrics, which have tests of their own."""
    return b"sagecp_nothing 0\n"


@contextlib.asynccontextmanager
async def running_console(**settings: object) -> AsyncIterator[Console]:
    """Run a console for a control plane without instances."""
    config = ConsoleConfig(**{"interval_s": 0.05, **settings})  # type: ignore[arg-type]
    async with running_rig() as rig, aiohttp.ClientSession() as http:
        server = ConsoleServer(rig.manager, config, render_nothing)
        await server.start("127.0.0.1", 0)
        try:
            yield Console(rig, server, http)
        finally:
            await server.stop()


@pytest.fixture
async def console() -> AsyncIterator[Console]:
    """A console that only shows."""
    async with running_console() as running:
        yield running


@pytest.fixture
async def acting_console() -> AsyncIterator[Console]:
    """A console from which one may act."""
    async with running_console(actions=True) as running:
        yield running
