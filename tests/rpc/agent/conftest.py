"""An engine, a control plane, and agents between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog

from sagecp.agent.config import AgentConfig
from tests.rpc.agent.peers import ControlPlane, Engine, Log, RunningAgent, Start


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    control_plane = ControlPlane()  # type: ignore[abstract]  # agents call nothing else
    await control_plane.start()
    yield control_plane
    await control_plane.stop()


@pytest.fixture
def log() -> Iterator[Log]:
    with structlog.testing.capture_logs() as events:
        yield events


@pytest.fixture
async def start(engine: Engine, control_plane: ControlPlane, log: Log) -> AsyncIterator[Start]:
    agents: list[RunningAgent] = []

    def start(**settings: Any) -> RunningAgent:
        values = {
            "engine_url": engine.url,
            "control_plane": control_plane.address,
            "instance_id": "engine-1",
            **settings,
        }
        agents.append(RunningAgent(AgentConfig(**values).validate()))
        return agents[-1]

    yield start
    for agent in agents:
        agent.stop.set()
        agent.task.cancel()
    await asyncio.gather(*(agent.task for agent in agents), return_exceptions=True)
