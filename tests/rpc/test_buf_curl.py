"""The server as an operator's generic tool sees it: by reflection, with no stub and no proto file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.dev import dev_server
from tests.support.processes import require

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def buf() -> Path:
    return require("buf", "make setup brings it")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dev_server() as address:
        yield address


def curl(buf: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, url],
        capture_output=True,
        text=True,
        timeout=60,
    )


def answer(buf: Path, url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Call a method and return its messages."""
    result = curl(buf, url, "-d", json.dumps(request))
    assert result.returncode == 0, result.stderr
    decoder, rest, messages = json.JSONDecoder(), result.stdout.strip(), []
    while rest:
        message, end = decoder.raw_decode(rest)
        messages.append(message)
        rest = rest[end:].strip()
    return messages


def test_methods_are_listed(buf: Path, address: str) -> None:
    listed = curl(buf, f"http://{address}", "--list-methods")
    assert listed.returncode == 0, listed.stderr
    methods = set(listed.stdout.split())
    assert "sagecp.v1.InferenceService/Generate" in methods
    assert "sagecp.v1.FleetService/Heartbeat" in methods
    assert "sagecp.v1.AdminService/GetStatus" in methods
    assert "grpc.channelz.v1.Channelz/GetServers" in methods


@pytest.mark.parametrize(
    "service",
    ["", "sagecp.v1.InferenceService", "sagecp.v1.FleetService", "sagecp.v1.AdminService"],
)
def test_health_is_known_by_service(buf: Path, address: str, service: str) -> None:
    (health,) = answer(buf, f"http://{address}/grpc.health.v1.Health/Check", {"service": service})
    assert health == {"status": "SERVING"}


def test_fleet_status_and_channelz_answer(buf: Path, address: str) -> None:
    (fleet,) = answer(buf, f"http://{address}/sagecp.v1.FleetService/ListInstances", {"pageSize": 10})
    assert len(fleet["instances"]) == 3
    (status,) = answer(buf, f"http://{address}/sagecp.v1.AdminService/GetStatus", {})
    assert status["accepting"] is True
    (servers,) = answer(buf, f"http://{address}/grpc.channelz.v1.Channelz/GetServers", {})
    assert servers["server"]


def test_generate_streams_to_its_terminal(buf: Path, address: str) -> None:
    request = {"spec": {"prompt": {"text": "Hello"}, "sampling": {"maxTokens": 4}}}
    events = answer(buf, f"http://{address}/sagecp.v1.InferenceService/Generate", request)
    assert "opened" in events[0]
    assert events[-1]["terminal"]["state"] == "REQUEST_STATE_SUCCEEDED"
    assert events[-1]["terminal"]["tokenCount"] == "4"


def test_an_error_carries_its_details(buf: Path, address: str) -> None:
    result = curl(
        buf,
        f"http://{address}/sagecp.v1.InferenceService/Submit",
        "-d",
        json.dumps({"spec": {"model": "nobody", "prompt": {"text": "Hello"}}}),
    )
    assert result.returncode == 8 * 5, "buf's exit status is eight times the gRPC code"
    error = json.loads(result.stderr)
    assert error["code"] == "not_found"
    kinds = {detail["type"] for detail in error["details"]}
    assert "google.rpc.ErrorInfo" in kinds
