"""``engine-sim`` as a process: what it prints, how it stops, and its exit codes."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from click.testing import CliRunner

from sagecp.sim.engine_cli import engine_sim
from tests.sim.engine_client import completion, open_exchange, send

PROGRAM = (sys.executable, "-c", "from sagecp.sim.engine_cli import engine_sim; engine_sim()")


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Start the program; yield it and its port."""
    running = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *("--port", "0", "--model", "tiny", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert running.stdout is not None
        async with asyncio.timeout(20):
            line = (await running.stdout.readline()).decode()
        assert line.startswith("sagecp engine-sim: model tiny"), line
        yield running, int(line.split("127.0.0.1:")[1].split()[0])
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def test_it_serves_and_sigterm_ends_streams_with_abort() -> None:
    async with process("--inter-token-ms", "20") as (running, port):
        stream = await open_exchange(port, "/v1/completions", completion(max_tokens=999, stream=True))
        await stream.head()
        await stream.chunk()
        running.send_signal(signal.SIGTERM)
        answer = await stream.rest()
        assert answer.finish_reason == "abort"
        assert answer.complete
        async with asyncio.timeout(5):
            assert await running.wait() == 0
        assert running.stderr is not None
        assert await running.stderr.read() == b""


async def test_a_shutdown_timeout_lets_streams_finish() -> None:
    async with process("--inter-token-ms", "20", "--shutdown-timeout", "10") as (running, port):
        stream = await open_exchange(port, "/v1/completions", completion(max_tokens=20, stream=True))
        await stream.head()
        await stream.chunk()
        running.send_signal(signal.SIGINT)
        assert (await stream.rest()).finish_reason == "length"
        async with asyncio.timeout(5):
            assert await running.wait() == 0


async def test_it_dies_in_the_middle_of_a_stream() -> None:
    async with process("--profile", "instant", "--die-after-tokens", "5") as (running, port):
        answer = await send(port, "/v1/completions", completion(stream=True, return_token_ids=True))
        assert not answer.complete
        assert answer.finish_reason is None
        assert len(answer.token_ids) == 5
        async with asyncio.timeout(5):
            assert await running.wait() == 1


async def test_options_reach_the_engine() -> None:
    options = (
        "--max-model-len",
        "500",
        "--model",
        "alias",
        "--kv-tokens",
        "1600",
        "--tensor-parallel-size",
        "2",
    )
    async with process(*options, "--profile", "instant", "--seed", "9", "--reject-first", "1") as (_, port):
        models = (await send(port, "/v1/models", method="GET")).json["data"]
        assert [(card["id"], card["max_model_len"]) for card in models] == [("tiny", 500), ("alias", 500)]
        assert b'num_gpu_blocks="100"' in (await send(port, "/metrics", method="GET")).body
        assert (await send(port, "/v1/completions", completion())).status == 500
        assert (await send(port, "/v1/completions", completion())).status == 200


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(engine_sim, ["--model", "m", "--port", str(port)])
    assert result.exit_code == 3
    assert result.output == (
        f"Error: 127.0.0.1:{port} is already in use; choose another --port, or 0 for a free one\n"
    )


def test_an_address_of_another_machine_is_told_in_one_line() -> None:
    result = CliRunner().invoke(engine_sim, ["--model", "m", "--port", "0", "--host", "192.0.2.1"])
    assert result.exit_code == 3
    assert result.output.startswith("Error: cannot listen on 192.0.2.1:0: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "Missing option '--model'"),
        (["--model", "m", "--port", "99999"], "99999 is not in the range"),
        (["--model", "m", "--profile", "h200"], "'h200' is not one of"),
        (["--model", "m", "--profile", "instant", "--ttft-ms", "5"], "needs profile 'fixed'"),
        (["--model", "m", "--speed", "0"], "speed must be a positive number"),
        (["--model", "m", "--kv-tokens", "100"], "does not fit in a KV cache of 96 tokens"),
        (["--model", "m", "--slow-factor", "-1"], "slow_factor must be a number"),
        (["--model", "m", "--reject-status", "200"], "is not in the range"),
    ],
)
def test_bad_options_are_usage_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(engine_sim, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_help_has_an_example() -> None:
    result = CliRunner().invoke(engine_sim, ["--help"])
    assert result.exit_code == 0
    assert "sagecp engine-sim --port 8000 --model llama-3-8b --reject-first 3" in result.output
    assert "/sim/misbehave" in result.output
