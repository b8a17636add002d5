"""A simulated engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig

_EXIT_CODE_OF_DEATH = 1


def exit_process() -> None:
    """Leave the process at once, without telling anyone."""
    os._exit(_EXIT_CODE_OF_DEATH)


async def run_engine_server(
    config: EngineServerConfig,
    *,
    stop: asyncio.Event,
    shutdown_timeout_s: float = 0.0,
    on_listening: Callable[[EngineServer], None] | None = None,
) -> None:
    """Serve in a process of its own, until told to stop.

    Args:
        config: What to simulate.
        stop: Set it to stop.
        shutdown_timeout_s: How long running requests may go on after that.
        on_listening: Called once requests are accepted.

    Raises:
        OSError: The address is in use or not this machine's.
    """
    server = EngineServer(config, die=exit_process)
    await server.start()
    try:
        if on_listening is not None:
            on_listening(server)
        await stop.wait()
    finally:
        await server.stop(shutdown_timeout_s)
