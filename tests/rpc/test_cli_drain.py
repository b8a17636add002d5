"""`sagecp drain` as people and scripts use it: real processes, exit codes, and what a terminal shows."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sagecp.cli.exit_codes import ExitCode
from tests.support.dev import dev_server
from tests.support.processes import ROOT, SAGECP, eventually

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(180)]

WAIT_S = 60.0
# Long enough to be there when it is looked at, on any machine.
LONG = ("-m", "4000")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    options = "--endless-answers --inter-token-ms 10 --ttft-ms 20"
    with dev_server("--quiet", "--engines", "2", "--engine-options", options) as address:
        yield address


class Cli:
    """Runs commands against the server."""

    def __init__(self, address: str) -> None:
        self.environment = {**os.environ, "SAGECP_SERVER": address, "NO_COLOR": "1"}
        self.request_ids: list[str] = []

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command and see that it never shows a traceback."""
        result = subprocess.run(
            [SAGECP, *arguments],
            capture_output=True, text=True, cwd=ROOT, env=self.environment, timeout=WAIT_S,
        )  # fmt: skip
        assert "Traceback" not in result.stderr
        return result

    def __call__(self, *arguments: str) -> str:
        """Run a command that is to succeed and return its output."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run a command and return the one object that it prints."""
        return json.loads(self(*arguments, "-o", "json"))

    def start(self, *arguments: str, error: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SAGECP, *arguments],
            stdout=subprocess.PIPE, stderr=error, text=True, cwd=ROOT, env=self.environment,
        )  # fmt: skip

    def submit(self, *arguments: str) -> str:
        self.request_ids.append(self("submit", "Tell me a story", "--ignore-eos", *arguments).strip())
        return self.request_ids[-1]

    def busy_instance(self, request_id: str) -> str:
        """Return where a request runs, once it has output."""
        message = eventually(
            lambda: self.json("requests", "get", request_id),
            lambda found: found["state"] == "REQUEST_STATE_RUNNING",
            timeout_s=WAIT_S,
        )
        return str(message["instance_id"])


@pytest.fixture
def cli(address: str) -> Iterator[Cli]:
    """Commands; what they left behind is gone afterwards."""
    cli = Cli(address)
    yield cli
    if cli.request_ids:
        cli("cancel", *cli.request_ids)
    for instance_id in re.findall(r"^(\S+) +DRAIN", cli("instances"), re.MULTILINE):
        cli("drain", instance_id, "--undo")


def test_an_idle_engine_is_drained_at_once_and_comes_back(cli: Cli) -> None:
    assert cli("drain", "engine-1") == "engine-1 DRAINED: nothing is in flight\n"
    table = cli("instances")
    assert re.search(r"^engine-1 +DRAINED ", table, re.MULTILINE)
    assert re.search(r"^engine-1 DRAINED: no request is left on it \(for \d+ s\)$", table, re.MULTILINE)
    assert cli("drain", "engine-1", "--wait") == "engine-1 DRAINED: nothing is in flight\n"
    assert cli("drain", "engine-1", "--undo") == "engine-1 READY: takes work\n"
    assert "DRAINED" not in cli("instances")


def test_the_last_engine_is_refused_and_says_what_to_do(cli: Cli) -> None:
    cli("drain", "engine-1")
    refused = cli.run("drain", "engine-2")
    assert refused.returncode == ExitCode.NOT_FOUND_OR_CONFLICT
    assert refused.stdout == ""
    assert "no other READY instance serves 'sim-8b'" in refused.stderr
    assert "hint: sagecp drain engine-2 --force" in refused.stderr
    assert cli("drain", "engine-2", "--force", "--cause", "power cut").startswith("engine-2 DRAINED")
    assert re.search(
        r"^drain +for \d+ s, forced, power cut$", cli("instances", "get", "engine-2"), re.MULTILINE
    )


def test_waiting_shows_what_is_left_and_moves_it_without_a_gap(cli: Cli) -> None:
    request_id = cli.submit("-m", "300")
    instance_id = cli.busy_instance(request_id)
    waited = cli.run("drain", instance_id, "--grace", "500ms", "--wait")
    assert waited.returncode == 0, waited.stderr
    assert waited.stdout == f"{instance_id} DRAINED: nothing is in flight; 1 request moved\n"
    assert waited.stderr.startswith(f"{instance_id} DRAINING: 1 request in flight\n")
    assert "\x1b" not in waited.stderr
    assert len(cli("stream", request_id).split()) == 300
    message = cli.json("requests", "get", request_id)
    assert message["state"] == "REQUEST_STATE_SUCCEEDED"
    assert message["instance_id"] != instance_id


def test_a_wait_that_takes_too_long_has_its_own_exit_code(cli: Cli) -> None:
    instance_id = cli.busy_instance(cli.submit(*LONG))
    late = cli.run("drain", instance_id, "--wait", "--timeout", "700ms")
    assert late.returncode == ExitCode.DEADLINE
    assert "1 request in flight; the drain goes on" in late.stderr
    assert f"hint: sagecp drain {instance_id} --now --wait" in late.stderr
    assert re.search(
        rf"^{instance_id} DRAINING: drain requested \(for \d+ s\)$", cli("instances"), re.MULTILINE
    )
    moved = cli.json("drain", instance_id, "--now", "--wait")
    assert moved["state"] == "INSTANCE_STATE_DRAINED"
    assert moved["in_flight_request_count"] == 0
    assert moved["drain"]["moved_request_count"] == "1"


def test_without_a_wait_it_says_what_will_be(cli: Cli) -> None:
    instance_id = cli.busy_instance(cli.submit(*LONG))
    assert cli("drain", instance_id) == f"{instance_id} DRAINING: 1 request in flight finishes there\n"
    assert re.fullmatch(
        rf"{instance_id} DRAINING: 1 request in flight finishes there or is moved in 1\dm \d\ds\n",
        cli("drain", instance_id, "--grace", "15m"),
    )
    assert "moved in" in cli("instances")


def test_ctrl_c_ends_the_wait_and_not_the_drain(cli: Cli) -> None:
    instance_id = cli.busy_instance(cli.submit(*LONG))
    with cli.start("drain", instance_id, "--wait") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"{instance_id} DRAINING: 1 request in flight\n"
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"the drain goes on: sagecp drain {instance_id} --wait, or --undo" in rest
    assert cli.json("instances", "get", instance_id)["state"] == "INSTANCE_STATE_DRAINING"


def test_a_drain_that_somebody_takes_back_ends_the_wait(cli: Cli) -> None:
    instance_id = cli.busy_instance(cli.submit(*LONG))
    with cli.start("drain", instance_id, "--wait") as process:
        assert process.stderr is not None
        process.stderr.readline()
        cli("drain", instance_id, "--undo")
        _, rest = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.NOT_FOUND_OR_CONFLICT
    assert "somebody took the drain back" in rest


def test_on_a_terminal_a_line_changes_and_leaves_no_trace(cli: Cli) -> None:
    instance_id = cli.busy_instance(cli.submit(*LONG))
    leader, follower = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        # Linux says with an error that nobody writes any more.
        with contextlib.suppress(OSError):
            while data := os.read(leader, 65536):
                pieces.append(data)

    with cli.start("drain", instance_id, "--grace", "2s", "--wait", error=follower) as process:
        os.close(follower)
        reader = threading.Thread(target=read)
        reader.start()
        output, _ = process.communicate(timeout=WAIT_S)
        reader.join(WAIT_S)
    os.close(leader)
    assert output == f"{instance_id} DRAINED: nothing is in flight; 1 request moved\n"
    shown = b"".join(pieces).decode()
    assert re.search(rf"\r{instance_id} DRAINING: 1 request in flight, for \d s; moved in \d s\x1b\[K", shown)
    assert shown.endswith("\r\x1b[K"), "the line is cleared"
    assert "\n" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nobody"], ExitCode.NOT_FOUND_OR_CONFLICT, "sagecp instances lists those that exist"),
        (
            ["engine-1", "--incarnation", "1"],
            ExitCode.NOT_FOUND_OR_CONFLICT,
            "is registered with incarnation",
        ),
        (["engine-1", "--now", "--grace", "1s"], ExitCode.INVALID, "--now is a grace time of 0 s"),
        (["engine-1", "--undo", "--force"], ExitCode.INVALID, "--undo goes with none of"),
        (["engine-1", "--grace", "soon"], ExitCode.INVALID, "is not a duration"),
        (["engine-1", "--grace", "60d"], ExitCode.INVALID, "grace_period"),
        ([], ExitCode.INVALID, "INSTANCE_ID"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(
    cli: Cli, arguments: list[str], code: ExitCode, says: str
) -> None:
    result = cli.run("drain", *arguments)
    assert result.returncode == code
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
