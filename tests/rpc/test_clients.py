"""The example clients, run as a reader of their README would run them: apart from the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.support.dev import dev_server
from tests.support.processes import ROOT, require

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(240)]

Client = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dev_server() as address:
        yield address


@pytest.fixture(scope="module")
def python_client(tmp_path_factory: pytest.TempPathFactory, address: str) -> Client:
    """The Python program with stubs generated here, by an interpreter that has never seen sagecp."""
    python = require("python-grpc-tools-protoc", "make setup brings it").with_name("python")
    assert subprocess.run([python, "-c", "import sagecp"], capture_output=True, cwd="/").returncode != 0
    folder = tmp_path_factory.mktemp("python-client")
    shutil.copytree(ROOT / "protos" / "sagecp", folder / "protos" / "sagecp")
    shutil.copy(ROOT / "clients" / "python" / "sagecp_example.py", folder)
    generated = folder / "generated"
    generated.mkdir()
    protos = sorted(str(path.relative_to(folder / "protos")) for path in folder.glob("protos/**/*.proto"))
    subprocess.run(
        [
            python, "-m", "grpc_tools.protoc", "-I", "protos",
            "--python_out=generated", "--grpc_python_out=generated", *protos,
        ],
        cwd=folder,
        check=True,
    )  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "sagecp_example.py", "--address", address, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(generated)},
            capture_output=True,
            text=True,
            timeout=90,
        )

    return run


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory, address: str) -> Client:
    """The Node program beside packages that npm installed, and a copy of the protos."""
    node = require("node", "the Node.js example client runs on it")
    npm = require("npm", "it installs the packages of the Node.js example client")
    source = ROOT / "clients" / "node"
    folder = tmp_path_factory.mktemp("node-client")
    for name in ("sagecp_example.js", "error_details.proto", "package.json"):
        shutil.copy(source / name, folder)
    shutil.copytree(ROOT / "protos" / "sagecp", folder / "protos" / "sagecp")
    installed = subprocess.run(
        [
            npm,
            "install",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--loglevel=error",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [node, "sagecp_example.js", "--address", address, *arguments],
            cwd=folder,
            env={**os.environ, "SAGECP_PROTOS": str(folder / "protos")},
            capture_output=True,
            text=True,
            timeout=90,
        )

    return run


@pytest.fixture(params=["python", "node"])
def client(request: pytest.FixtureRequest) -> Client:
    chosen: Client = request.getfixturevalue(f"{request.param}_client")
    return chosen


def succeeded(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, result.stderr
    return result


def test_lists_the_fleet(client: Client) -> None:
    lines = [line.split("\t") for line in succeeded(client("instances")).stdout.splitlines()]
    assert len(lines) == 3
    assert {state for _, _, state in lines} == {"READY"}


def test_generates(client: Client) -> None:
    result = succeeded(client("generate", "Tell me a story", "--max-tokens", "12"))
    assert result.stdout.strip()
    assert re.search(r"SUCCEEDED on \S+: \d+ tokens in, \d+ out, finish reason (length|stop)", result.stderr)


def test_generates_from_chat(client: Client) -> None:
    result = succeeded(client("generate", "Hello", "--chat", "--max-tokens", "5"))
    assert "SUCCEEDED" in result.stderr


def test_submits_then_streams(client: Client) -> None:
    request_id = succeeded(client("submit", "Tell me a story", "--max-tokens", "20")).stdout.strip()
    whole = succeeded(client("stream", request_id))
    rest = succeeded(client("stream", request_id, "--from-token-index", "1"))
    assert "SUCCEEDED" in whole.stderr
    assert 0 < len(rest.stdout) < len(whole.stdout)
    assert whole.stdout.endswith(rest.stdout)


def test_explains_an_unknown_model(client: Client) -> None:
    result = client("generate", "Hello", "--model", "no-such-model")
    assert result.returncode == 1
    assert "NOT_FOUND: " in result.stderr
    assert "reason MODEL_NOT_FOUND" in result.stderr
    assert "available_models" in result.stderr


def test_explains_every_bad_field(client: Client) -> None:
    result = client("generate", "Hello", "--max-tokens", "0", "--temperature", "7")
    assert result.returncode == 1
    assert "INVALID_ARGUMENT: " in result.stderr
    assert "sampling.max_tokens: " in result.stderr
    assert "sampling.temperature: " in result.stderr


def test_reports_a_deadline(client: Client) -> None:
    # Shorter than the simulated engine's time to a first token.
    result = client("--timeout", "0.005", "generate", "Hello")
    assert result.returncode == 1
    assert "DEADLINE_EXCEEDED" in result.stderr
