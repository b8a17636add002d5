"""Looking, watching and acting from the command line: real processes, a real server, simulated engines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sagecp.cli.exit_codes import ExitCode
from tests.support.cli import Cli
from tests.support.completion import complete_in_bash
from tests.support.dev import dev_server
from tests.support.processes import SAGECP, Program, eventually

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(180)]

MODEL = "sim-8b"
WAIT_S = 60.0
STORY = ("Tell me a story", "--ignore-eos")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    options = "--endless-answers --inter-token-ms 10 --ttft-ms 20 --enable-lora --max-loras 4"
    with dev_server("--quiet", "--engines", "2", "--engine-options", options) as address:
        yield address


@pytest.fixture
def cli(address: str) -> Cli:
    return Cli(address)


@contextlib.contextmanager
def following(cli: Cli, *arguments: str) -> Iterator[Program]:
    """Run a command that goes on until it is interrupted, and see that it ends well then."""
    program = Program(f"sagecp {arguments[0]}", [SAGECP, *arguments], environment=cli.environment)
    try:
        yield program
        os.kill(program.process.pid, signal.SIGINT)
        assert program.wait(30) == ExitCode.INTERRUPTED, program.output
    finally:
        program.stop()
    assert "Traceback" not in program.output


# -- lists ------------------------------------------------------------------------------------------


def test_instances_in_every_format(cli: Cli) -> None:
    assert cli("instances", "-o", "name") == "engine-1\nengine-2\n"
    head, *rows = cli("instances", "-o", "wide").splitlines()
    assert head.split()[:6] == ["INSTANCE", "STATE", "ORDER", "MODEL", "HOST", "LOAD"]
    assert head.split()[-2:] == ["FAULTS", "REASON"]
    assert len(rows) == 2
    assert [line.split()[0] for line in cli("instances", "--no-headers").splitlines()] == [
        "engine-1", "engine-2",
    ]  # fmt: skip
    documents = list(yaml.safe_load_all(cli("instances", "-o", "yaml")))
    assert [each["spec"]["instance_id"] for each in documents] == ["engine-1", "engine-2"]
    assert (
        yaml.safe_load(cli("instances", "get", "engine-1", "-o", "yaml"))["state"] == "INSTANCE_STATE_READY"
    )


def test_instances_filtered_and_sorted(cli: Cli) -> None:
    backwards = cli("instances", "--sort-by", "instance", "--reverse", "-o", "name")
    assert backwards == "engine-2\nengine-1\n"
    assert [each["spec"]["instance_id"] for each in cli.json("instances", "--reverse")] == [
        "engine-2", "engine-1",
    ]  # fmt: skip
    host = cli.json("instances", "get", "engine-1")[0]["spec"]["host_id"]
    for none in (("--host", "nowhere"), ("--label", "a=b"), ("--faulty",), ("--state", "lost")):
        assert cli("instances", *none, "-o", "name") == ""
    assert len(cli.json("instances", "--host", host, "--model", MODEL, "--state", "ready")) == 2


def test_everything_about_one_instance(cli: Cli) -> None:
    cli("generate", *STORY, "-m", "4")
    shown = cli("instances", "get", "engine-1")
    for line in (
        r"^engine says +running",
        r"^agent +version",
        r"^its clock +agrees",
        r"^can +.*sleep",
        r"^GPUs +the engine is",
    ):
        assert re.search(line, shown, re.MULTILINE), shown


def test_requests_filtered_here_and_there(cli: Cli) -> None:
    for name, priority, label in (("f-1", "high", "a"), ("f-2", "low", "a"), ("f-3", "low", "b")):
        cli("submit", "hello", "-m", "1", "--request-id", name, "--session", "filters",
            "--priority", priority, "--label", f"team={label}", "--wait")  # fmt: skip

    def found(*options: str) -> list[str]:
        return cli("requests", "--session", "filters", *options, "-o", "name").split()

    assert found() == ["f-3", "f-2", "f-1"]
    assert found("--reverse") == ["f-1", "f-2", "f-3"]
    assert found("--priority", "low") == ["f-3", "f-2"]
    assert found("--priority", "low", "--priority", "HIGH") == ["f-3", "f-2", "f-1"]
    assert found("--label", "team=a") == ["f-2", "f-1"]
    assert found("--label", "team=a", "--limit", "1") == ["f-2"]
    assert found("--tenant", "nobody") == []
    assert found("--older-than", "1h") == []
    assert found("--newer-than", "1h") == ["f-3", "f-2", "f-1"]
    assert found("--active") == []
    assert found("--sort-by", "priority") == ["f-1", "f-3", "f-2"]
    limited = cli.run("requests", "--session", "filters", "--label", "team=a", "-n", "1")
    assert "there are more" in limited.stderr
    assert "there are more" not in cli.run("requests", "--session", "filters", "-n", "3").stderr
    wide = cli("requests", "--session", "filters", "-o", "wide", "--no-headers", "-n", "1").split()
    assert {"filters", "LOW", "length"} <= set(wide)


def test_what_does_not_fit_together(cli: Cli) -> None:
    for arguments, says in (
        (["requests", "--active", "--state", "queued"], "contradict"),
        (["requests", "watch", "x", "--active"], "nothing to filter"),
        (["instances", "watch", "x", "--faulty"], "nothing to filter"),
        (["instances", "--sort-by", "frob"], "there are: instance, state"),
        (["instances", "watch", "--interval", "1ms"], "too short; at least 0.1s"),
        (["lora", "engine-1", "a=b", "--clear"], "not several of them"),
        (["lora", "engine-1", "a=b", "a=c"], "given twice: a"),
        (["lora", "engine-1", "--wait"], "--wait goes with"),
        (["sleep", "engine-1", "--now", "--grace", "5s"], "not both"),
        (["sleep", "engine-1", "--wake", "--force"], "--wake goes with none"),
        (["events", "--kind", "frob"], "is not one of"),
    ):
        result = cli.run(*arguments)
        assert result.returncode == ExitCode.INVALID, result.stderr
        assert says in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["instances", "watch"], ["requests", "watch"], ["lora"], ["sleep"], ["wake"], ["drain"]],
    ids=" ".join,
)
def test_what_is_not_there(cli: Cli, arguments: list[str]) -> None:
    result = cli.run(*arguments, "nope")
    assert result.returncode == ExitCode.NOT_FOUND_OR_CONFLICT
    assert "'nope' is not" in result.stderr


# -- watching ---------------------------------------------------------------------------------------


def test_instances_are_watched_until_they_are_gone(cli: Cli) -> None:
    with following(cli, "instances", "watch", "--interval", "200ms") as program:
        program.wait_for_line(r"^\d\d:\d\d:\d\d +engine-2 +READY", WAIT_S)
        cli("instances", "register", "short-lived", "http://127.0.0.1:1", "--model", "other")
        program.wait_for_line("short-lived +(STARTING|UNHEALTHY)", WAIT_S)
        cli("instances", "deregister", "short-lived")
        program.wait_for_line("short-lived +GONE", WAIT_S)
        assert len(re.findall("engine-2", program.output)) == 1, "nothing about it has changed"


def test_one_instance_is_watched_as_json(cli: Cli) -> None:
    cli("instances", "register", "watched", "http://127.0.0.1:1", "--model", "other")
    program = Program(
        "sagecp instances watch",
        [SAGECP, "instances", "watch", "watched", "-o", "json", "--interval", "200ms"],
        environment=cli.environment,
    )
    try:
        program.wait_for_line("watched", WAIT_S)
        cli("instances", "deregister", "watched")
        assert program.wait(30) == 0, "nothing more will happen to it"
    finally:
        program.stop()
    states = [json.loads(line)["state"] for line in program.output.splitlines()]
    assert states[-1] == "INSTANCE_STATE_UNSPECIFIED"


def test_a_request_is_watched_to_its_end(cli: Cli) -> None:
    request_id = cli("submit", *STORY, "-m", "100").strip()
    rows = [line.split() for line in cli("requests", "watch", request_id, "--interval", "100ms").splitlines()]
    assert rows[0][:3] == ["TIME", "REQUEST", "STATE"]
    assert rows[-1][1:3] == [request_id, "SUCCEEDED"]


def test_requests_are_watched(cli: Cli) -> None:
    """Also to its end one that does not match any more."""
    with following(
        cli, "requests", "watch", "--active", "--session", "watched", "--interval", "100ms"
    ) as program:
        cli("submit", *STORY, "-m", "2000", "--session", "watched", "--request-id", "watched-1")
        program.wait_for_line("watched-1 +(DISPATCHED|RUNNING)", WAIT_S)
        cli("cancel", "watched-1")
        program.wait_for_line("watched-1 +CANCELLED", WAIT_S)


def test_metrics_are_watched(cli: Cli) -> None:
    with following(cli, "metrics", "--watch", "--interval", "200ms", "--by", "model") as program:
        program.wait_for_line(rf"^ +{MODEL} ", WAIT_S)
        eventually(lambda: program.output.count(f" {MODEL} "), lambda count: count >= 3, timeout_s=WAIT_S)
        assert program.output.count("TTFT50") == 1


# -- events -----------------------------------------------------------------------------------------


def test_events_are_listed_the_latest_last(cli: Cli) -> None:
    cli("policy", "set", "--set", "dispatch.patience=0.1", "--comment", "a reason for an event")
    events = cli.json("events", "-n", "0")
    sequences = [int(event["sequence"]) for event in events]
    assert sequences == sorted(sequences)
    kinds = {event["kind"] for event in events}
    assert {"EVENT_KIND_INSTANCE_REGISTERED", "EVENT_KIND_SCHEDULING_CONFIGURED"} <= kinds
    assert cli("events").splitlines()[0].split() == ["TIME", "SEVERITY", "KIND", "ABOUT", "MESSAGE"]
    last = cli.json("events", "-n", "1", "--kind", "scheduling_configured")
    assert len(last) == 1
    assert cli.json("events", "--after", str(sequences[-1]), "--kind", "instance_registered") == []
    of_one = cli.json("events", "--instance", "engine-2", "-n", "0")
    assert {event["instance_id"] for event in of_one} == {"engine-2"}
    assert len(cli.json("events", "--since", "1h", "-n", "0")) >= len(events)
    levels = {event["severity"] for event in cli.json("events", "--severity", "warning", "-n", "0")}
    assert "EVENT_SEVERITY_INFO" not in levels
    assert yaml.safe_load(cli("events", "-n", "1", "-o", "yaml"))["message"]


def test_events_are_followed(cli: Cli) -> None:
    with following(cli, "events", "-f", "-n", "1", "--instance", "followed") as program:
        program.wait_for_line("^TIME ", WAIT_S)
        cli("instances", "register", "followed", "http://127.0.0.1:1", "--model", "other")
        program.wait_for_line("instance_registered +followed", WAIT_S)
        cli("instances", "deregister", "followed")
        program.wait_for_line("instance_removed +followed", WAIT_S)


# -- acting -----------------------------------------------------------------------------------------


def test_an_engine_sleeps_and_wakes_up(cli: Cli) -> None:
    try:
        asleep = cli.run("sleep", "engine-1", "--wait", "--timeout", "50s")
        assert asleep.returncode == 0, asleep.stderr
        assert asleep.stdout == "engine-1 DRAINED: the engine sleeps, level 1\n"
        assert "not yet asleep" in asleep.stderr
        (instance,) = cli.json("instances", "get", "engine-1")
        assert instance["sleep"]["asleep"] is True
        details = cli("instances", "get", "engine-1")
        assert re.search(r"^sleep +asleep, ordered .* ago, level 1$", details, re.MULTILINE)
        assert "asleep" in cli("instances", "-o", "wide")
    finally:
        awake = cli("wake", "engine-1", "--wait", "--timeout", "50s")
    assert awake == "engine-1 READY: takes work\n"
    assert "sleep" not in cli.json("instances", "get", "engine-1")[0]


def test_adapters_are_loaded_and_unloaded(cli: Cli, tmp_path: Path) -> None:
    wanted = [f"sql={tmp_path}", f"law={tmp_path}"]
    assert cli("lora", "engine-2") == "engine-2 has no LoRA adapters\n"
    loaded = cli("lora", "engine-2", *wanted, "--wait", "--timeout", "50s")
    assert [line.split() for line in loaded.splitlines()] == [
        ["ADAPTER", "LOADED", "IN", "USE", "ORDERED", "PATH"],
        ["law", "yes", "no", "yes", str(tmp_path)],
        ["sql", "yes", "no", "yes", str(tmp_path)],
    ]
    cleared = cli("lora", "engine-2", "--clear")
    assert re.search(r"^sql +yes +no +- +-$", cleared, re.MULTILINE)
    gone = cli("lora", "engine-2", "--none", "--wait", "--timeout", "50s")
    assert gone == "engine-2 has no LoRA adapters, and should have none\n"
    cli("lora", "engine-2", "--clear")


def test_adapters_that_cannot_be_loaded(cli: Cli, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with following(cli, "lora", "engine-2", f"sql={missing}", "--wait") as program:
        program.wait_for_line(f"No adapter found for {missing}", WAIT_S)
    assert "the order stays: sagecp lora engine-2" in program.output
    assert re.search(r"^sql +not yet +no +yes", cli("lora", "engine-2"), re.MULTILINE)
    late = cli.run("lora", "engine-2", f"sql={missing}", "--wait", "--timeout", "100ms")
    assert late.returncode == ExitCode.DEADLINE
    assert "not there in time; the order stays" in late.stderr
    cli("lora", "engine-2", "--clear")


# -- for monitoring systems and shells --------------------------------------------------------------


def test_check(cli: Cli) -> None:
    eventually(
        lambda: cli.run("check", "--warn", "drift=", "--warn", "loop_lag=", "--crit", "loop_lag="),
        lambda result: result.returncode == 0,
        timeout_s=WAIT_S,
    )
    result = cli.run("check", "--crit", "ready=3:")
    assert result.returncode == 2
    assert re.fullmatch(r"SAGECP CRITICAL: 2 of 2 instances READY.* \| ready=2;;3: .*\n", result.stdout)
    assert cli.run("check", "--model", "nope").stdout.startswith("SAGECP CRITICAL: 0 READY for nope")
    report = json.loads(cli.run("check", "--crit", "ready=3:", "-o", "json").stdout)
    assert (report["status"], report["exit_code"]) == ("CRITICAL", 2)
    assert report["checks"][0] == {
        "name": "ready", "status": "CRITICAL", "value": 2, "unit": "", "warn": "", "crit": "3:",
        "text": "2 of 2 instances READY",
    }  # fmt: skip
    verbose = cli.run("check", "-v").stdout.splitlines()
    assert [line.split()[0] for line in verbose[1:3]] == ["ready", "unhealthy"]


def test_bash_completes_what_the_server_knows(cli: Cli) -> None:
    request_id = cli("submit", "hello", "-m", "1", "--request-id", "complete-me").strip()
    for words, offers in (
        (["drain", ""], ["engine-1", "engine-2"]),
        (["instances", "get", "engine-2"], ["engine-2"]),
        (["requests", "--instance", "eng"], ["engine-1", "engine-2"]),
        (["explain", "complete-"], [request_id]),
        (["stream", "complete-"], [request_id]),
        (["metrics", "--model", ""], [MODEL]),
        (["policy", "set", "slo"], ["slo_aware"]),
        (["policy", "set", "--routing", "aff"], ["affinity"]),
    ):
        assert complete_in_bash(words, server=cli.address) == offers
    elsewhere = complete_in_bash(["drain", "--server", cli.address, ""], server="127.0.0.1:1")
    assert elsewhere == ["engine-1", "engine-2"]


def test_status_says_how_the_server_itself_does(cli: Cli) -> None:
    shown = eventually(
        lambda: cli("status"),
        lambda text: re.search(r"^monitoring +\d.* ago +\d+$", text, re.MULTILINE) is not None,
        timeout_s=WAIT_S,
    )
    for line in (
        r"^process +.* of CPU \(.*\), \d+ MiB of memory$",
        r"^heartbeats +[\d,]+ taken, 0 refused; a lease is ",
        r"^LOOP +EVERY +LAST RUN +RUNS$",
        r"^heartbeat +\d",
    ):
        assert re.search(line, shown, re.MULTILINE), shown


def test_yaml_without_its_package() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None; from sagecp.cli.main import main; main(['status', '-oyaml'])"
    )
    result = subprocess.run(
        [SAGECP.with_name("python"), "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == ExitCode.INVALID
    assert "-o yaml needs the Python package PyYAML" in result.stderr
    assert "pip install 'sagecp[cli]', or -o json" in result.stderr


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit(cli: Cli, width: int) -> None:
    cli("generate", "hello", "-m", "2")
    for arguments in (
        ["instances", "-o", "wide"], ["instances", "get", "engine-1"], ["requests", "-o", "wide"], ["events"],
        ["events", "-o", "wide"], ["status"], ["cheat"],
    ):  # fmt: skip
        shown = subprocess.run(
            [SAGECP, *arguments], capture_output=True, text=True, timeout=60,
            env={**cli.environment, "COLUMNS": str(width)},
        )  # fmt: skip
        assert shown.returncode == 0
        assert max(map(len, shown.stdout.splitlines())) <= width, shown.stdout
