"""What an agent finds out without asking the engine, and which settings it refuses."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from sagecp.agent.config import AgentConfig, EngineAddress, is_loopback, split_address
from sagecp.agent.local_engine import EngineArguments, find_local_engine, is_local_host, parse_command_line
from sagecp.core.errors import InvalidRequestError
from sagecp.log import configure_logging, get_logger

ENGINE = "http://127.0.0.1:8000"
PLAIN = EngineArguments(
    tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, expert_parallel=False
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vllm serve m", PLAIN),
        ("/opt/venv/bin/python /opt/venv/bin/vllm serve m", PLAIN),
        ("python3 -m vllm.entrypoints.openai.api_server --model m", PLAIN),
        (
            "vllm serve m --tensor-parallel-size 4 -pp=2 --data_parallel_size=3 -ep --max-num-seqs 16",
            EngineArguments(
                tensor_parallel_size=4,
                pipeline_parallel_size=2,
                data_parallel_size=3,
                max_sequence_count=16,
                expert_parallel=True,
            ),
        ),
        (
            # The last one wins, as in vLLM.
            "vllm serve m -tp 2 -tp 8 --enable-expert-parallel --no-enable-expert-parallel",
            EngineArguments(
                tensor_parallel_size=8,
                pipeline_parallel_size=1,
                data_parallel_size=1,
                expert_parallel=False,
            ),
        ),
        (
            # What the file says is not known.
            "vllm serve m --config x.yaml -tp 2",
            EngineArguments(tensor_parallel_size=2),
        ),
        ("vllm serve m --tensor-parallel-size", PLAIN),
        ("vllm serve m --tensor-parallel-size two", PLAIN),
        ("VLLM::EngineCore", None),
        ("docker-proxy -host-port 8000", None),
        ("python server.py --model vllm-like --tensor-parallel-size 4", None),
        ("", None),
    ],
)
def test_command_lines(line: str, expected: EngineArguments | None) -> None:
    assert parse_command_line(line.split()) == expected


def test_the_process_behind_a_port_is_found(tmp_path: Path) -> None:
    # A program that listens, and whose command line is that of an engine.
    script = tmp_path / "vllm"
    script.write_text(
        "import socket, sys\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, script, "serve", "m", "-tp", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "2,3"},
    )
    try:
        assert process.stdout is not None
        found = find_local_engine(int(process.stdout.readline()))
    finally:
        process.communicate()
    assert found is not None
    assert found.process_id == process.pid
    assert found.arguments.tensor_parallel_size == 2
    assert found.visible_devices == "2,3"


def test_another_program_on_the_port_is_not_taken_for_an_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert find_local_engine(listener.getsockname()[1]) is None


def test_a_host_without_proc_shows_nothing(tmp_path: Path) -> None:
    assert find_local_engine(8000, proc=tmp_path) is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no-such-host.invalid", False)],
)
def test_own_addresses(host: str, expected: bool) -> None:
    assert is_local_host(host) is expected


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"engine_url": "127.0.0.1:8000"}, ["--engine"]),
        ({"engine_url": "http://127.0.0.1:8000/v1"}, ["--engine"]),
        ({"engine_url": "http://user@127.0.0.1:8000"}, ["--engine"]),
        ({"engine_url": "http://127.0.0.1:99999"}, ["--engine"]),
        ({"engine_url": "http://[::1"}, ["--engine"]),
        ({"advertised_url": "ftp://h:1"}, ["--advertise"]),
        ({"control_plane": "cp"}, ["--control-plane"]),
        ({"control_plane": "http://cp:50051"}, ["--control-plane"]),
        ({"control_plane": "::1:50051"}, ["--control-plane"]),
        ({"control_plane": "cp:0"}, ["--control-plane"]),
        # An engine that the control plane could not reach.
        ({"control_plane": "cp.example:50051"}, ["--advertise"]),
        ({"certificate_file": __file__}, ["--cert"]),
        ({"insecure": True, "ca_file": __file__}, ["--insecure"]),
        ({"ca_file": "/nowhere"}, ["--ca-cert"]),
        ({"tensor_parallel_size": 0, "max_concurrent_request_count": -1},
         ["--tensor-parallel-size", "--max-concurrency"]),
        ({"interval_s": 0.0}, ["--interval"]),
        ({"engine_timeout_s": -1.0, "connect_timeout_s": float("nan")},
         ["--engine-timeout", "--connect-timeout"]),
        ({"usd_per_gpu_hour": float("inf")}, ["--usd-per-gpu-hour"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(settings: dict[str, object], flags: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AgentConfig(**{"engine_url": ENGINE, **settings}).validate()  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == flags


def test_a_loopback_engine_needs_another_address_for_others() -> None:
    with pytest.raises(
        InvalidRequestError, match=re.escape("cannot reach the engine at http://127.0.0.1:8000")
    ):
        AgentConfig(engine_url=ENGINE, control_plane="10.0.0.9:50051").validate()
    config = AgentConfig(
        engine_url=ENGINE, control_plane="10.0.0.9:50051", advertised_url="http://10.0.0.7:8000/"
    ).validate()
    assert config.advertised.url == "http://10.0.0.7:8000"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"control_plane": "[::1]:1"}, False),
        ({"control_plane": "cp:1"}, True),
        ({"control_plane": "cp:1", "insecure": True}, False),
        ({"ca_file": "ca.pem"}, True),
    ],
)
def test_plaintext_stays_on_this_machine(settings: dict[str, object], expected: bool) -> None:
    assert AgentConfig(engine_url=ENGINE, **settings).uses_tls is expected  # type: ignore[arg-type]


def test_addresses() -> None:
    assert split_address("[::1]:50051") == ("::1", 50051)
    assert EngineAddress.parse("https://gpu7") == EngineAddress("https", "gpu7", 443)
    assert EngineAddress.parse("http://[fd00::7]:8000").url == "http://[fd00::7]:8000"
    assert is_loopback("127.9.9.9")
    assert not is_loopback("10.0.0.1")


def test_the_default_id_is_one_that_the_control_plane_takes() -> None:
    name = AgentConfig(engine_url=ENGINE).effective_instance_id
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", name)
    assert name.endswith("-8000")


def test_the_key_of_an_engine_is_not_shown() -> None:
    assert "geheim" not in repr(AgentConfig(engine_url=ENGINE, engine_api_key="geheim"))


# -- the log -----------------------------------------------------------------------


@pytest.fixture
def fresh_logging() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("fresh_logging")
def test_both_kinds_of_loggers_write_the_same_lines() -> None:
    stream = io.StringIO()
    configure_logging("info", "auto", stream)
    get_logger("sagecp.agent", instance_id="e-1").info("registered", lease_s=6.0)
    logging.getLogger("sagecp.rpc").info("serving %s", "now", extra={"instance_id": "e-1"})
    get_logger("x").debug("too quiet")
    logging.getLogger("x").debug("too quiet")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("sagecp.rpc").exception("crashed")
        get_logger("sagecp.agent").exception("crashed")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert lines[0] == {
        "level": "info",
        "logger": "sagecp.agent",
        "event": "registered",
        "instance_id": "e-1",
        "lease_s": 6.0,
    }
    assert lines[1] == {
        "level": "info",
        "logger": "sagecp.rpc",
        "event": "serving now",
        "instance_id": "e-1",
    }
    for line in lines[2:]:
        assert (line["level"], line["event"]) == ("error", "crashed")
        assert line["exception"].endswith("ValueError: bad")


@pytest.mark.usefixtures("fresh_logging")
def test_lines_for_people() -> None:
    stream = io.StringIO()
    configure_logging("warning", "console", stream)
    get_logger("sagecp.agent").info("too quiet")
    get_logger("sagecp.agent").warning("engine is unhealthy", reason="refused")
    logging.getLogger("sagecp.rpc").warning("draining", extra={"requests": 3})
    first, second = stream.getvalue().splitlines()
    assert "engine is unhealthy" in first
    assert "reason=refused" in first
    assert "draining" in second
    assert "requests=3" in second


@pytest.mark.parametrize(("level", "log_format"), [("loud", "json"), ("info", "xml")])
def test_unknown_names_are_refused(level: str, log_format: str) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        configure_logging(level, log_format)
