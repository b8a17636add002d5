"""Two real vLLM servers, an agent beside each, and a control plane: all real programs.

The tests speak to the control plane through generated stubs, as a program in any
language would. Everything is started once; `test_lifecycle.py`, which breaks
things, runs last.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from sagecp.v1 import (
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2_grpc,
    instance_pb2,
)
from tests.support.processes import SAGECP, Program, eventually, free_ports

RECIPE = Path(__file__).parent / "engine"
MODEL = "tiny"
CONTEXT_TOKEN_COUNT = 8192
# A server alone needs 17 to 35 s; on busy cores, two at once took more than a minute.
ENGINE_START_S = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.e2e)
        # The first test also waits for the engines.
        item.add_marker(pytest.mark.timeout(ENGINE_START_S + 120))
    items.sort(key=lambda item: item.path.name == "test_lifecycle.py")


@dataclass
class Engine:
    """A vLLM server."""

    instance_id: str
    port: int
    program: Program

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            body: bytes = response.read()
            return body

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.get("/metrics").decode().splitlines()
        values = [
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))
        ]
        assert values, f"the engine has no metric {name}"
        return sum(values)

    @property
    def running_count(self) -> int:
        return int(self.metric("vllm:num_requests_running"))

    def is_healthy(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def wait_until_healthy(self) -> None:
        def answers_or_ended() -> bool:
            assert self.program.process.poll() is None, f"vLLM ended:\n{self.program.tail()}"
            return self.is_healthy()

        eventually(answers_or_ended, bool, timeout_s=ENGINE_START_S, interval_s=0.25)


def start_engine(instance_id: str, port: int, logs: Path) -> Engine:
    program = Program(
        f"vLLM {instance_id}",
        [
            RECIPE / "serve.sh", str(port),
            "--max-num-seqs", "16",
            # A model of random weights would fill JSON with spaces without end.
            "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
        ],
        log_file=logs / f"{instance_id}-{port}-{time.monotonic_ns()}.log",
    )  # fmt: skip
    return Engine(instance_id, port, program)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def engines(logs: Path) -> Iterator[dict[str, Engine]]:
    subprocess.run([RECIPE / "install.sh"], check=True, stdout=subprocess.DEVNULL)
    names = ("engine-a", "engine-b")
    ports = free_ports(len(names))
    started = {name: start_engine(name, port, logs) for name, port in zip(names, ports, strict=True)}
    try:
        for engine in started.values():
            engine.wait_until_healthy()
        yield started
    finally:
        for engine in started.values():
            engine.program.stop(timeout_s=5)


@pytest.fixture(scope="session")
def control_plane(logs: Path) -> Iterator[Program]:
    program = Program(
        "sagecp serve",
        [SAGECP, "serve", "--listen", "127.0.0.1:0"],
        log_file=logs / "control-plane.log",
    )
    try:
        yield program
    finally:
        program.stop()


@pytest.fixture(scope="session")
def address(control_plane: Program) -> str:
    return control_plane.wait_for_line(r"(127\.0\.0\.1:[1-9]\d*)", 30)[1]


@pytest.fixture(scope="session")
def agents(engines: dict[str, Engine], address: str, logs: Path) -> Iterator[dict[str, Program]]:
    started = {
        name: Program(
            f"agent of {name}",
            [
                SAGECP, "agent",
                "--engine", engine.url,
                "--control-plane", address,
                "--instance-id", name,
            ],
            log_file=logs / f"agent-{name}.log",
        )
        for name, engine in engines.items()
    }  # fmt: skip
    try:
        yield started
    finally:
        for agent in started.values():
            agent.stop()


@pytest.fixture(scope="session")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(30)
        yield channel


@pytest.fixture(scope="session")
def fleet(channel: grpc.Channel) -> fleet_service_pb2_grpc.FleetServiceStub:
    return fleet_service_pb2_grpc.FleetServiceStub(channel)


@pytest.fixture(scope="session")
def admin(channel: grpc.Channel) -> admin_service_pb2_grpc.AdminServiceStub:
    return admin_service_pb2_grpc.AdminServiceStub(channel)


def instance_states(fleet: fleet_service_pb2_grpc.FleetServiceStub) -> dict[str, str]:
    """State of every instance by its id, without the prefix."""
    response = fleet.ListInstances(fleet_service_pb2.ListInstancesRequest(), timeout=10)
    return {
        instance.spec.instance_id: instance_pb2.InstanceState.Name(instance.state).removeprefix(
            "INSTANCE_STATE_"
        )
        for instance in response.instances
    }


@pytest.fixture(scope="session")
def inference(
    channel: grpc.Channel,
    agents: dict[str, Program],
    fleet: fleet_service_pb2_grpc.FleetServiceStub,
) -> inference_service_pb2_grpc.InferenceServiceStub:
    """The service users speak to, once both instances take work."""
    eventually(
        lambda: instance_states(fleet), lambda states: list(states.values()) == ["READY"] * 2, timeout_s=30
    )
    return inference_service_pb2_grpc.InferenceServiceStub(channel)
