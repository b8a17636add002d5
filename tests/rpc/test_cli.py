"""The command line as people and scripts use it: real processes, a real server, exit codes, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagecp.cli.exit_codes import ExitCode
from tests.support.cli import Cli
from tests.support.dev import dev_server
from tests.support.processes import SAGECP, Program, eventually

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(180)]

MODEL = "sim-8b"
STORY = ("Tell me a story", "--ignore-eos")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dev_server("--quiet", "--engines", "2") as address:
        yield address


@pytest.fixture
def cli(address: str) -> Cli:
    return Cli(address)


def test_generate_prints_the_answer_and_nothing_else(cli: Cli) -> None:
    result = cli.run("generate", *STORY, "-m", "12", "--stats")
    assert result.returncode == 0
    assert len(result.stdout.split()) == 12
    assert result.stdout.endswith("\n")
    assert re.search(r"12 tokens in .*: first after .*, then .* each \(\d+ tokens/s\)", result.stderr)
    assert re.search(r"\d+ in, 12 out; finish reason length; on engine-\d; request req-", result.stderr)


def test_generate_from_every_kind_of_prompt(cli: Cli, tmp_path: Path) -> None:
    limits = ("-m", "4", "--ignore-eos")
    for arguments, text in (
        (("-", *limits), "from a pipe"),
        (("hello", "--chat", *limits), None),
        (("hello", "--system", "be brief", *limits), None),
        (("--token-ids", "17,18,19", *limits), None),
    ):
        assert len(cli("generate", *arguments, text=text).split()) == 4
    body = tmp_path / "body.json"
    body.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True})
    )
    assert len(cli("generate", "--openai-json", str(body)).split()) == 3
    two = cli("generate", "hello", "-n", "2", *limits)
    assert re.match(r"--- choice 0 ---\n(?: ?\S+){4}\n--- choice 1 ---\n(?: ?\S+){4}\n$", two)


def test_generate_as_json_is_the_contract(cli: Cli) -> None:
    events = cli.json("generate", *STORY, "-m", "5")
    assert [next(iter(event)) for event in (events[0], events[-1])] == ["opened", "terminal"]
    chunks = [event["chunk"] for event in events[1:-1]]
    assert sum(chunk["token_count"] for chunk in chunks) == 5
    assert events[-1]["terminal"]["state"] == "REQUEST_STATE_SUCCEEDED"
    assert events[-1]["terminal"]["usage"]["completion_token_count"] == 5


def test_submit_prints_an_id_that_everything_else_takes(cli: Cli) -> None:
    request_id = cli("submit", *STORY, "-m", "20", "--priority", "high", "--label", "k=v").strip()
    assert re.fullmatch(r"req-[0-9a-f]{16}", request_id)
    whole = cli("stream", request_id)
    rest = cli("stream", request_id, "--from", "15")
    assert len(whole.split()) == 20
    assert whole.endswith(rest)
    assert len(rest.split()) == 5
    shown = cli("requests", "get", request_id)
    for line in (r"state +SUCCEEDED", r"priority +HIGH", r"tokens +\d+ in, 20 out", r"labels +k=v"):
        assert re.search(line, shown), shown
    assert cli.json("requests", "get", request_id)[0]["request_id"] == request_id
    explained = cli("explain", request_id)
    assert re.search(r"attempt 1 +on engine-\d", explained)
    assert re.search(r"^\* engine-\d", explained, re.MULTILINE)
    assert cli.json("explain", request_id)[0]["decisions"][0]["epoch"] == 1
    assert cli("cancel", request_id) == f"{request_id} had ended before: SUCCEEDED\n"


def test_submit_and_wait(cli: Cli) -> None:
    result = cli.run("submit", *STORY, "-m", "3", "--wait")
    assert result.returncode == 0
    assert re.match(r"SUCCEEDED after .*: \d+ in, 3 out; finish reason length; on engine-\d", result.stderr)
    (request,) = cli.json("submit", *STORY, "-m", "3", "--wait")
    assert request["state"] == "REQUEST_STATE_SUCCEEDED"
    # By now the engines' speed is known, and what cannot be done in time would be refused.
    cli("policy", "set", "--set", "admission.refuse_infeasible=0")
    try:
        expired = cli.run("submit", *STORY, "-m", "5000", "--wait", "--deadline", "200ms")
    finally:
        cli("policy", "set", "--set", "admission.refuse_infeasible=1")
    assert expired.returncode == ExitCode.DEADLINE
    assert "EXPIRED" in expired.stderr


def test_a_repeated_id_is_recognised(cli: Cli) -> None:
    again = ("submit", "hello", "-m", "1", "--request-id", "cli-twice")
    assert cli(*again) == cli(*again) == "cli-twice\n"
    conflict = cli.run("submit", "something else", "--request-id", "cli-twice")
    assert conflict.returncode == ExitCode.NOT_FOUND_OR_CONFLICT
    assert conflict.stderr.startswith("error: ")


def test_the_fleet(cli: Cli) -> None:
    table = cli("instances").splitlines()
    assert table[0].split()[:3] == ["INSTANCE", "STATE", "MODEL"]
    assert [line.split()[:3] for line in table[1:3]] == [[f"engine-{n}", "READY", MODEL] for n in (1, 2)]
    assert cli("instances", "list", "--state", "lost") == ""
    assert [each["spec"]["instance_id"] for each in cli.json("instances")] == ["engine-1", "engine-2"]
    assert re.search(r"model +sim-8b", cli("instances", "get", "engine-1"))
    assert cli.json("instances", "get", "engine-1")[0]["state"] == "INSTANCE_STATE_READY"


def test_register_and_deregister(cli: Cli) -> None:
    register = ("instances", "register", "mine", "http://127.0.0.1:1", "--model", "other", "--label", "a=b")
    assert cli(*register).startswith("registered mine, ")
    assert re.search(r"^labels +a=b$", cli("instances", "get", "mine"), re.MULTILINE)
    assert cli("instances", "deregister", "mine", "--cause", "test") == "deregistered mine\n"
    gone = cli.run("instances", "get", "mine")
    assert gone.returncode == ExitCode.NOT_FOUND_OR_CONFLICT
    bad = cli.run("instances", "register", "mine", "ftp://x", "--model", "m")
    assert bad.returncode == ExitCode.INVALID


def test_requests_metrics_and_status(cli: Cli) -> None:
    for _ in range(3):
        cli("generate", "hello", "-m", "2", "--session", "cli-list")
    rows = cli("requests", "--session", "cli-list").splitlines()
    assert len(rows) == 4
    assert len(cli.json("requests", "--session", "cli-list", "--state", "succeeded")) == 3
    limited = cli.run("requests", "--session", "cli-list", "--limit", "2")
    assert len(limited.stdout.splitlines()) == 3
    assert "there are more" in limited.stderr
    metrics = cli("metrics", "--by", "instance", "--window", "1m")
    assert re.search(r"^time to first token +\d+ ", metrics, re.MULTILINE)
    assert re.search(r"^engine-\d +\d+ ", metrics, re.MULTILINE)
    assert int(cli.json("metrics")[0]["overall"]["total_request_count"]) >= 3
    status = cli("status")
    for line in (r"control plane +127.0.0.1:\d+ SERVING", r"instances +2 READY", rf"models +{MODEL}"):
        assert re.search(line, status), status
    assert cli.json("status")[0]["accepting"] is True


def test_everything_fits_eighty_columns(cli: Cli) -> None:
    environment = {**cli.environment, "COLUMNS": "80"}
    cli("generate", "hello", "-m", "2")
    for arguments in (["instances"], ["requests"], ["metrics", "--by", "instance"], ["status"]):
        shown = subprocess.run(
            [SAGECP, *arguments], capture_output=True, text=True, env=environment, timeout=60
        )
        assert shown.returncode == 0
        assert max(map(len, shown.stdout.splitlines())) <= 80, shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "hi", "--model", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, f"served now: {MODEL}"),
        (["generate", ""], ExitCode.INVALID, "prompt.text"),
        (["generate", "hi", "-t", "9", "--top-p", "3", "-m", "0"], ExitCode.INVALID, "sampling.top_p"),
        (["generate", "word " * 9000, "-m", "1"], ExitCode.INVALID, "8192"),
        (["generate", *STORY, "-m", "5000", "--timeout", "300ms"], ExitCode.DEADLINE, "--timeout"),
        (["stream", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, "'nope' is not known"),
        (["requests", "get", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, "'nope' is not known"),
        (["cancel", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, "'nope' is not known"),
        (["explain", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, "'nope' is not known"),
        (["instances", "get", "nope"], ExitCode.NOT_FOUND_OR_CONFLICT, "'nope' is not registered"),
        (["metrics", "--window", "2h"], ExitCode.INVALID, "window"),
        (["status", "--tls"], ExitCode.UNREACHABLE, "--tls"),
        (["status", "--server", "127.0.0.1:1"], ExitCode.UNREACHABLE, "cannot reach the control plane"),
        (["status", "--server", "no-such-host.invalid:1"], ExitCode.UNREACHABLE, "check --server"),
        (["status", "--ca-cert", "/does/not/exist"], ExitCode.INVALID, "/does/not/exist"),
        (["status", "--token", "x", "--server", "10.255.255.1:1"], ExitCode.INVALID, "plaintext"),
        (["serve", "--listen", "0.0.0.0:0"], ExitCode.INVALID, "--insecure-listen"),
        (["serve", "--listen", "nonsense"], ExitCode.INVALID, "HOST:PORT"),
        (["serve", "--load-balancer", "nope"], ExitCode.INVALID, "predicted_latency"),
        (["serve", "--set", "dispatch.patience=much"], ExitCode.INVALID, "NAME=NUMBER"),
        (["serve", "--set", "dispatch.patienc=1"], ExitCode.INVALID, "dispatch.patience"),
        (["demo", "--trace", "/does/not/exist"], ExitCode.INVALID, "cannot read the trace"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_failures(cli: Cli, arguments: list[str], code: ExitCode, says: str) -> None:
    result = cli.run(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


def test_a_deadline_that_passes() -> None:
    # Admission would refuse what it takes to be hopeless.
    accept = ("--serve-options", "--set admission.refuse_infeasible=0")
    with dev_server("--quiet", "--engines", "1", *accept) as address:
        result = Cli(address).run("generate", *STORY, "-m", "5000", "--deadline", "300ms")
    assert result.returncode == ExitCode.DEADLINE
    assert "EXPIRED" in result.stderr


def test_a_body_over_the_limit_is_refused(cli: Cli) -> None:
    result = cli.run("generate", "-", text="word " * 1_000_000)
    assert result.returncode == ExitCode.INVALID
    assert "larger than max" in result.stderr
    assert cli("generate", "hello", "-m", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--listen", "{}"],
        ["dev", "--quiet", "--port", "{port}"],
        ["engine-sim", "--model", "m", "--port", "{port}"],
    ],
    ids=lambda value: str(value[0]),
)
def test_a_port_in_use(cli: Cli, arguments: list[str]) -> None:
    port = cli.address.rpartition(":")[2]
    result = cli.run(*(each.format(cli.address, port=port) for each in arguments))
    assert result.returncode == ExitCode.UNREACHABLE, result.stderr
    assert "in use" in result.stderr


def test_interrupting_generate_cancels_the_request(cli: Cli) -> None:
    command = [str(SAGECP), "generate", *STORY, "-m", "5000", "--request-id", "cli-interrupted"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cli.environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert complaint.strip() == "request cli-interrupted CANCELLED"
    assert cli.json("requests", "get", "cli-interrupted")[0]["state"] == "REQUEST_STATE_CANCELLED"


def test_interrupting_stream_leaves_the_request_running(cli: Cli) -> None:
    request_id = cli("submit", *STORY, "-m", "2000").strip()
    with subprocess.Popen(
        [SAGECP, "stream", request_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert re.search(rf"goes on: sagecp stream {request_id} --from \d+", complaint)
    assert cli.json("requests", "get", request_id)[0]["state"] == "REQUEST_STATE_RUNNING"
    assert cli("cancel", request_id, "--cause", "test") == f"{request_id} cancelled\n"


def test_a_closed_pipe_ends_generate_and_the_request(cli: Cli) -> None:
    generate = f"{SAGECP} generate 'Tell me a story' --ignore-eos -m 5000 --request-id cli-pipe"
    result = subprocess.run(
        ["bash", "-c", f"{generate} | head -c 20; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=cli.environment, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout) == 20
    eventually(
        lambda: cli.json("requests", "get", "cli-pipe")[0]["state"],
        lambda state: state == "REQUEST_STATE_CANCELLED",
        timeout_s=10,
    )


def on_a_terminal(cli: Cli, *arguments: str, **variables: str) -> str:
    """Run a command whose output is a terminal of 80 columns."""
    environment = {**cli.environment, "TERM": "xterm", "COLUMNS": "80", **variables}
    if "NO_COLOR" not in variables:
        del environment["NO_COLOR"]
    leader, follower = pty.openpty()
    with subprocess.Popen([SAGECP, *arguments], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # How Linux says that nobody writes any more.
                break
            if not data:
                break
            output += data
        process.wait(30)
    os.close(leader)
    return output.decode()


def test_states_have_colours_on_a_terminal_only(cli: Cli) -> None:
    assert "\x1b[32mREADY\x1b[0m" in on_a_terminal(cli, "instances")
    assert "\x1b[" not in on_a_terminal(cli, "instances", NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(cli, "instances", "--no-color")
    assert "\x1b[" not in cli("instances")


def test_dev_reports_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    program = Program(
        "sagecp dev", [SAGECP, "dev", "--port", "0", "--engines", "1", "--ready-file", ready_file]
    )
    try:
        program.wait_for_line("Ctrl-C stops everything", 60)
        eventually(ready_file.exists, bool, timeout_s=5)
        content = json.loads(ready_file.read_text())
        engine = content["engines"][0]
        pids = [content["control_plane_pid"], engine["pid"], engine["agent_pid"]]
        assert all(alive(pid) for pid in pids)
        assert re.search(rf"kill -9 {engine['pid']}", program.output)
        os.kill(engine["pid"], signal.SIGKILL)
        program.wait_for_line(rf"engine-1 \(pid {engine['pid']}\) ended with status -9", 10)
        cli = Cli(content["control_plane"])
        eventually(
            lambda: cli.json("instances")[0]["state"],
            lambda state: state != "INSTANCE_STATE_READY",
            timeout_s=15,
        )
        os.kill(program.process.pid, signal.SIGINT)
        assert program.wait(20) == 0
    finally:
        program.stop()
    assert not any(alive(pid) for pid in pids)
    assert not ready_file.exists()
    assert "Traceback" not in program.output


def test_dev_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    program = Program(
        "sagecp dev", [SAGECP, "dev", "--quiet", "--port", "0", "--engines", "1", "--ready-file", ready_file]
    )
    try:
        eventually(ready_file.exists, bool, timeout_s=60)
        content = json.loads(ready_file.read_text())
        pids = [
            content["control_plane_pid"],
            content["engines"][0]["pid"],
            content["engines"][0]["agent_pid"],
        ]
        os.kill(program.process.pid, signal.SIGKILL)
        program.process.wait(10)
        eventually(lambda: [pid for pid in pids if alive(pid)], lambda left: not left, timeout_s=10)
    finally:
        program.stop()


def test_dev_says_why_it_could_not_start() -> None:
    start = time.monotonic()
    result = subprocess.run(
        [SAGECP, "dev", "--quiet", "--port", "0", "--profile", "no-such-profile"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == ExitCode.UNREACHABLE
    assert "ended with status 2" in result.stderr
    assert "no-such-profile" in result.stderr
    assert time.monotonic() - start < 30


def alive(pid: int) -> bool:
    """Whether a process exists and is not only waiting to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(number: signal.Signals) -> None:
    mark = f"SAGECP_TEST_MARK={os.urandom(8).hex()}"
    program = Program("sagecp demo", [SAGECP, "demo"], environment=dict([mark.split("=")]))
    try:
        program.wait_for_line("^replaying 300 requests", 60)
        assert len(marked(mark)) >= 8
        os.kill(program.process.pid, number)
        assert program.wait(20) == ExitCode.INTERRUPTED
        assert marked(mark) == []
    finally:
        program.stop()
    assert "Traceback" not in program.output


def marked(mark: str) -> list[int]:
    """Return the processes that have a variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_demo(cli: Cli) -> None:
    command = ("demo", "--server", cli.address, "--requests", "12", "--speed", "20")
    result = cli.run(*command)
    assert result.returncode == 0, result.stderr
    assert "12 requests succeeded, 0 failed" in result.stdout
    for line in (r"time to first token +\d", r"engine-\d +\d", r"Submit, then Stream in two parts +4 "):
        assert re.search(line, result.stdout), result.stdout
    report = json.loads(cli.run(*command, "-o", "json").stdout)
    assert sum(report["request_count_by_instance"].values()) == 12
    assert set(report["request_count_by_way"].values()) == {4}
