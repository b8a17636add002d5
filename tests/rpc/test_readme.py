"""Runs what the README tells people to run, against a real `sagecp dev` and a real simulated engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from tests.support.dev import dev_server, simulated_engine
from tests.support.documents import Block, blocks_of
from tests.support.processes import ROOT, SAGECP, require

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(180)]

# What the README writes for the reader's own server and engine.
README_ADDRESS = "127.0.0.1:50051"
README_ENGINE = 'host="localhost", port=8000'
README_MODEL = "llama-3-70b"

BLOCKS = [block for block in blocks_of(ROOT / "README.md") if block.tested]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dev_server() as address:
        yield address


def run(command: list[str], address: str) -> subprocess.CompletedProcess[str]:
    path = [SAGECP.parent, ROOT / ".venv-proto" / "bin"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "SAGECP_SERVER": address,
            "PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def of_language(language: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: f"line {block.line}")


@of_language("sh")
def test_commands(block: Block, address: str) -> None:
    if "buf " in block.text:
        require("buf", "make setup brings it")
    result = run(["bash", "-euo", "pipefail", "-c", block.text.replace(README_ADDRESS, address)], address)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Traceback" not in result.stderr


@of_language("python")
def test_programs(block: Block, address: str) -> None:
    if README_ENGINE in block.text:
        with simulated_engine(README_MODEL) as port:
            code = block.text.replace(README_ENGINE, f'host="localhost", port={port}')
            result = run([sys.executable, "-c", code], address)
    else:
        result = run([sys.executable, "-c", block.text.replace(README_ADDRESS, address)], address)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 5, "a story was asked for"
    if README_ENGINE in block.text:
        assert "SUCCEEDED" in result.stdout


SERVICES = (
    (inference_service_pb2, inference_service_pb2_grpc.InferenceServiceStub, "InferenceService"),
    (fleet_service_pb2, fleet_service_pb2_grpc.FleetServiceStub, "FleetService"),
    (admin_service_pb2, admin_service_pb2_grpc.AdminServiceStub, "AdminService"),
)


def test_the_unimplemented_calls_are_the_ones_named(address: str) -> None:
    """Every call of the contract is made once, empty: those that answer UNIMPLEMENTED are in the README."""
    missing: set[str] = set()
    with grpc.insecure_channel(address) as channel:
        for module, stub_type, name in SERVICES:
            stub = stub_type(channel)
            for method in module.DESCRIPTOR.services_by_name[name].methods:
                request = GetMessageClass(method.input_type)()
                call = getattr(stub, method.name)
                try:
                    answer = call(iter([request]) if method.client_streaming else request, timeout=3)
                    if method.server_streaming:
                        next(iter(answer), None)
                        answer.cancel()
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)  # noqa: PT017 - for the type checker
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        missing.add(method.name)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^\* ([^*]*) answer `UNIMPLEMENTED`", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", match[1] if match else "")) == missing
