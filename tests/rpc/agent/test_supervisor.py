"""Agents that own their engine: it starts, comes back, is given up, and never outlives them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sagecp.agent.config import Supervision
from sagecp.config import ServerConfig
from sagecp.core.types import InstanceState
from sagecp.rpc.server import ControlPlaneServer
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2
from tests.rpc.agent.peers import TIMEOUT_S, ControlPlane, Engine, Log, RunningAgent, Start
from tests.rpc.agent.test_program import program
from tests.support.processes import free_ports

RUNNING = instance_pb2.ENGINE_PROCESS_STATE_RUNNING
BACKING_OFF = instance_pb2.ENGINE_PROCESS_STATE_BACKING_OFF
STOPPED = instance_pb2.ENGINE_PROCESS_STATE_STOPPED


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


def simulated(port: int) -> list[str]:
    """The command of a simulated engine."""
    return [sys.executable, "-m", "sagecp", "engine-sim", "--port", str(port), "--model", "tiny"]


def exists(process_id: int) -> bool:
    """Whether there is a process, and it is more than its entry."""
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{process_id}/stat").read_text()
    return False


def parent_of(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])


async def becomes(check: Callable[[], Any]) -> Any:
    """Wait for what tells nobody."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (found := check()):  # noqa: ASYNC110 - another process has no event here
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
def own(start: Start, port: int) -> Callable[..., RunningAgent]:
    """Start an agent that owns an engine, impatiently."""

    def own(command: list[str] | None = None, **settings: Any) -> RunningAgent:
        supervision = Supervision(
            command=tuple(command or simulated(port)),
            **{"restart_base_s": 0.2, "restart_cap_s": 0.4, "stop_timeout_s": 10.0, **settings},
        )
        return start(engine_url=f"http://127.0.0.1:{port}", supervision=supervision)

    return own


def is_running(beat: pb.HeartbeatRequest) -> bool:
    return beat.engine_process.state == RUNNING and beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY


async def test_it_starts_its_engine_and_ends_it_last(
    own: Callable[..., RunningAgent], control_plane: ControlPlane, log: Log, tmp_path: Path
) -> None:
    agent = own(log_file=tmp_path / "engine.log")
    beat = await control_plane.until_beat(is_running)
    process = beat.engine_process
    assert exists(process.process_id)
    assert process.restart_count == 0
    assert process.HasField("start_time")
    assert not process.HasField("last_exit_code")
    spec = control_plane.registrations[0].spec
    assert instance_pb2.ENGINE_CAPABILITY_SUPERVISED in spec.engine_capabilities
    assert spec.model_name == "tiny"
    assert await agent.end() == 0
    assert not exists(process.process_id)
    events = [event["event"] for event in log]
    assert events.index("deregistered") < events.index("stopping the engine") < events.index("engine stopped")
    assert "model tiny on http" in (tmp_path / "engine.log").read_text()


async def test_an_engine_that_is_killed_comes_back(
    own: Callable[..., RunningAgent], control_plane: ControlPlane
) -> None:
    own()
    first = (await control_plane.until_beat(is_running)).engine_process
    os.kill(first.process_id, signal.SIGKILL)
    beat = await control_plane.until_beat(lambda beat: beat.engine_process.state == BACKING_OFF)
    assert beat.engine_condition == pb.ENGINE_CONDITION_UNHEALTHY
    assert beat.condition_reason == "the engine was ended by SIGKILL"
    process = beat.engine_process
    assert (process.process_id, process.last_exit_code) == (0, -9)
    assert process.HasField("next_start_time")
    assert any("model tiny on http" in line for line in process.last_log_lines)
    beat = await control_plane.until_beat(is_running)
    assert beat.engine_process.restart_count == 1
    assert beat.engine_process.process_id not in {0, first.process_id}
    assert not beat.engine_process.HasField("next_start_time")
    assert beat.engine_process.last_exit_code == -9, "what it was is not forgotten"
    starting = [
        beat
        for beat in control_plane.beats
        if beat.engine_process.state == instance_pb2.ENGINE_PROCESS_STATE_STARTING
    ]
    assert all(beat.engine_condition == pb.ENGINE_CONDITION_STARTING for beat in starting)
    assert len(control_plane.registrations) == 1, "it is what it was"


async def test_a_crash_loop_is_seen_and_given_up(
    own: Callable[..., RunningAgent], control_plane: ControlPlane, log: Log, port: int, tmp_path: Path
) -> None:
    flag = tmp_path / "was here"
    engine = " ".join(simulated(port))
    script = f"[ -e '{flag}' ] && echo out of memory && exit 3; touch '{flag}'; exec {engine}"
    agent = own(["sh", "-c", script], max_restart_count=2)
    first = (await control_plane.until_beat(is_running)).engine_process
    os.kill(first.process_id, signal.SIGKILL)
    beat = await control_plane.until_beat(
        lambda beat: beat.engine_process.state == BACKING_OFF and beat.engine_process.last_exit_code == 3
    )
    assert list(beat.engine_process.last_log_lines) == ["out of memory"]
    assert await agent.exit_code() == 1
    assert "ended 3 times in a row, more than --max-restarts 2 allows" in log[-1]["event"]
    assert "exit code 3" in log[-1]["event"]
    last = control_plane.beats[-1]
    assert last.goodbye
    assert last.engine_process.state == STOPPED
    assert last.engine_process.restart_count == 2
    assert "ended with exit code 3" in control_plane.deregistrations[0].cause


async def test_an_engine_that_never_comes_up_is_given_up_too(
    own: Callable[..., RunningAgent], control_plane: ControlPlane, log: Log
) -> None:
    assert await own(["sh", "-c", "exit 5"], max_restart_count=1).exit_code() == 1
    assert not control_plane.registrations
    assert sum(event["event"] == "engine started" for event in log) == 2


async def test_an_engine_that_was_well_for_long_starts_the_count_anew(
    own: Callable[..., RunningAgent], control_plane: ControlPlane
) -> None:
    own(max_restart_count=1, stable_s=0.0)

    def runs_as(count: int) -> Callable[[pb.HeartbeatRequest], bool]:
        return lambda beat: is_running(beat) and beat.engine_process.restart_count == count

    for count in range(3):
        process = (await control_plane.until_beat(runs_as(count))).engine_process
        os.kill(process.process_id, signal.SIGKILL)
    await control_plane.until_beat(runs_as(3))


async def test_a_program_that_cannot_be_run_is_no_mystery(
    own: Callable[..., RunningAgent], log: Log, tmp_path: Path
) -> None:
    broken = tmp_path / "vllm"
    broken.write_text("no program")
    broken.chmod(0o755)
    assert await own([str(broken)], max_restart_count=1).exit_code() == 1
    assert any(event["event"] == "the engine cannot be started" for event in log)


async def test_another_program_on_the_port_is_not_taken_for_the_engine(
    start: Start, engine: Engine, control_plane: ControlPlane, log: Log
) -> None:
    supervision = Supervision(command=("sleep", "1000"), max_restart_count=1, restart_base_s=0.1)
    agent = start(engine_url=engine.url, supervision=supervision)
    assert await agent.exit_code() == 1
    assert not control_plane.registrations
    assert any(f"another program listens on {engine.url}" in event.get("reason", "") for event in log)


async def test_what_an_engine_leaves_behind_goes_with_it(
    own: Callable[..., RunningAgent], log: Log, tmp_path: Path
) -> None:
    """As a killed vLLM leaves its engine core, and with it the GPU's memory."""
    note = tmp_path / "children"
    # One in its group, and one that has left it.
    script = f"trap '' TERM; sleep 1000 & echo $! > '{note}'; setsid sh -c 'echo $$ >> {note}; sleep 1000' & "
    own(["sh", "-c", script + f"while [ $(wc -l < '{note}') != 2 ]; do sleep 0.05; done; exit 1"])
    await becomes(lambda: note.exists() and len(note.read_text().split()) == 2)
    children = [int(word) for word in note.read_text().split()]
    await becomes(lambda: not any(map(exists, children)))


async def test_an_engine_that_does_not_end_is_ended(
    own: Callable[..., RunningAgent], log: Log, tmp_path: Path
) -> None:
    note = tmp_path / "ready"
    agent = own(
        ["sh", "-c", f"trap '' TERM; touch '{note}'; while :; do sleep 0.1; done"], stop_timeout_s=0.5
    )
    await becomes(note.exists)
    process_id = next(event["process_id"] for event in log if event["event"] == "engine started")
    assert await agent.end() == 0
    assert not exists(process_id)


def stubborn(note: Path) -> list[str]:
    """The command of an engine, with a child, that cares for no signal; it writes their ids to a file."""
    body = "while :; do sleep 0.1; done"
    script = (
        f"trap '' TERM INT; sh -c '{body}' & echo $$ $! > '{note}.part'; mv '{note}.part' '{note}'; {body}"
    )
    return ["sh", "-c", script]


async def test_no_engine_outlives_a_killed_agent(
    control_plane: ControlPlane, tmp_path: Path, port: int
) -> None:
    note = tmp_path / "ids"
    async with program(
        "--control-plane", control_plane.address, "--engine", f"http://127.0.0.1:{port}",
        "--stop-timeout", "500ms", "--supervise", "--", *stubborn(note),
    ) as process:  # fmt: skip
        await becomes(note.exists)
        ids = [int(word) for word in note.read_text().split()]
        assert all(map(exists, ids))
        process.kill()
        await becomes(lambda: not any(map(exists, ids)))


async def test_told_twice_to_stop_it_waits_for_nothing(
    control_plane: ControlPlane, tmp_path: Path, port: int
) -> None:
    note = tmp_path / "ids"
    async with program(
        "--control-plane", control_plane.address, "--engine", f"http://127.0.0.1:{port}",
        "--stop-timeout", "1h", "--supervise", "--", *stubborn(note),
    ) as process:  # fmt: skip
        await becomes(note.exists)
        ids = [int(word) for word in note.read_text().split()]
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while b"stopping the engine" not in await asyncio.wait_for(process.stderr.readline(), TIMEOUT_S):
            pass
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 130
    await becomes(lambda: not any(map(exists, ids)))


async def test_the_program_finds_its_engine_by_the_command_and_passes_its_output_on(
    control_plane: ControlPlane, port: int
) -> None:
    async with program(
        "--control-plane", control_plane.address, "--instance-id", "owned",
        "--supervise", "--", *simulated(port),
    ) as process:  # fmt: skip
        beat = await control_plane.until_beat(is_running, "owned")
        assert control_plane.registrations[0].spec.engine_url == f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0, errors.decode()
    assert b"model tiny on http" in output
    assert not exists(beat.engine_process.process_id)


async def test_without_its_guard_an_engine_ends_and_comes_back(
    own: Callable[..., RunningAgent], control_plane: ControlPlane
) -> None:
    own()
    first = (await control_plane.until_beat(is_running)).engine_process.process_id
    guard = parent_of(first)
    assert guard != os.getpid()
    os.kill(guard, signal.SIGKILL)
    await control_plane.until_beat(lambda beat: beat.engine_process.state == BACKING_OFF)
    await becomes(lambda: not exists(first))
    await control_plane.until_beat(lambda beat: is_running(beat) and beat.engine_process.restart_count == 1)


async def test_the_real_control_plane_sees_it_go_and_come_back(start: Start, port: int) -> None:
    config = ServerConfig(listen="127.0.0.1:0")
    config = replace(config, runtime=replace(config.runtime, heartbeat_interval_s=0.1))
    server = ControlPlaneServer(config.validate())
    await server.start()

    def state() -> InstanceState | None:
        records = server.manager.instances()
        return records[0].state if records else None

    try:
        supervision = Supervision(command=tuple(simulated(port)), restart_base_s=0.2)
        agent = start(
            engine_url=f"http://127.0.0.1:{port}", control_plane=server.address, supervision=supervision
        )
        await becomes(lambda: state() is InstanceState.READY)
        process = server.manager.instances()[0].engine_process
        assert process is not None
        os.kill(process.process_id, signal.SIGKILL)
        await becomes(lambda: state() is InstanceState.UNHEALTHY)
        await becomes(lambda: state() is InstanceState.READY)
        process = server.manager.instances()[0].engine_process
        assert process is not None
        assert (process.restart_count, process.last_exit_code) == (1, -9)
        assert await agent.end() == 0
        assert state() is None
    finally:
        await server.stop(0.0)
