"""The agent as a program: signals, exit codes, what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator

import pytest

from tests.rpc.agent.peers import ROOT, TIMEOUT_S, ControlPlane, Engine


async def launch(*arguments: str) -> asyncio.subprocess.Process:
    """Start the agent as a program."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from sagecp.cli.main import main; main()",
        "agent",
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@contextlib.asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await launch(*arguments)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_leaves_on_a_signal(
    engine: Engine, control_plane: ControlPlane, number: signal.Signals
) -> None:
    async with program(
        "--engine", engine.url, "--control-plane", control_plane.address, "--label", "a=b"
    ) as process:  # fmt: skip
        await control_plane.until(lambda: len(control_plane.beats) >= 2)
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0, errors.decode()
    assert control_plane.beats[-1].goodbye
    assert len(control_plane.deregistrations) == 1
    assert control_plane.registrations[0].spec.instance_id == f"{socket.gethostname()}-{engine.port}"
    events = [json.loads(line) for line in errors.splitlines()]
    assert [event["event"] for event in events] == ["engine found", "registered", "deregistered"]
    for event in events:
        assert list(event)[:4] == ["time", "level", "logger", "event"]
        assert event["time"].endswith("Z")
        assert event["instance_id"] == f"{socket.gethostname()}-{engine.port}"


async def test_the_program_stops_while_it_waits(control_plane: ControlPlane) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # Nobody listens there, and nobody else will.
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        async with program("--engine", url, "--control-plane", control_plane.address) as process:
            assert process.stderr is not None
            line = await asyncio.wait_for(process.stderr.readline(), TIMEOUT_S)
            assert b"waiting for the engine" in line
            process.terminate()
            await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0
    assert not control_plane.registrations
    assert not control_plane.deregistrations


async def test_bad_usage_names_every_flag() -> None:
    async with program(
        "--engine", "http://127.0.0.1:8000/v1",
        "--control-plane", "cp.example",
        "--cert", "/nowhere/cert.pem",
        "--interval", "1000",
    ) as process:  # fmt: skip
        _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    text = errors.decode()
    assert process.returncode == 2
    for flag in ("--engine", "--control-plane", "--cert", "--interval"):
        assert flag in text
    assert "Traceback" not in text
