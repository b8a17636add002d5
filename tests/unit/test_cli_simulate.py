"""`sagecp simulate` as people use it: what it prints, writes, refuses, and leaves behind when interrupted."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.main import main
from tests.support.processes import ROOT, eventually
from tests.support.sim_traces import mixed_requests, write_trace

FLEET = "2x8b-h100"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.jsonl", mixed_requests(60))


def simulate(*arguments: str | Path) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as exited:
        main(["simulate", *map(str, arguments)])
    return int(exited.value.code or 0)


def run_apart(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sagecp", "simulate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )


def test_a_run_prints_a_line_for_each_load(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", trace, "--fleet", FLEET, "--scale", "1,2", "--jobs", "1", "--bounds") == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split()[:4] == ["SCALE", "PER", "S", "ATTAINMENT"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert lines[4].split()[:2] == ["SCALE", "BOUND"]
    assert not shown.err


def test_a_report_and_a_log_are_written(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    arguments = (
        "--trace", trace, "--fleet", FLEET, "--policy", "fifo", "--routing", "locality",
        "--load-balancer", "power_of_two", "--set", "locality.load_ratio=2", "--seeds", "2", "--jobs", "1",
        "--stale", "200ms", "--event-delay", "20ms", "--model-error", "0.2", "--slow", "0@1s=3",
        "--event-log", "--out", out, "-o", "json",
    )  # fmt: skip
    assert simulate(*arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["out"] == str(out)
    assert {path.name for path in out.iterdir()} == {
        "report.html", "report.json", "events-0.jsonl.gz", "events-1.jsonl.gz"
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["summary"] == summary["summary"]
    assert report["contenders"][0]["parameters"] == {"locality.load_ratio": 2.0}
    assert report["world"]["gauge_delay_s"] == 0.2
    assert str(trace) in report["command"]
    assert simulate("replay", out / "events-1.jsonl.gz") == 0
    assert "all the same" in capsys.readouterr().out


def test_a_comparison_of_policies_baselines_and_settings(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "compare", "--trace", trace, "--fleet", FLEET, "--scales", "1,4", "--seeds", "2", "--jobs", "1",
        "--policies", "slo_aware,edf:slo_aware/locality?slo_aware.work_weight=0",
        "--baselines", "min_ttft,heavy:llmd_default?queue_weight=9", "--out", tmp_path,
    )  # fmt: skip
    assert simulate(*arguments) == 0
    shown = capsys.readouterr().out
    assert "GOODPUT@90" in shown
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [each["label"] for each in report["contenders"]] == ["slo_aware", "edf", "min_ttft", "heavy"]
    assert len(report["runs"]) == 4 * 2 * 2
    for each in report["summary"]:
        assert each["label"] in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "absent.csv"], "absent.csv"),
        (["--fleet", "3xnothing"], "'3xnothing' is not COUNTxPROFILE"),
        (["--fleet", "absent.toml"], "absent.toml: cannot be read"),
        (["--policy", "x"], "scheduling policy 'x' is unknown; choose one of"),
        (["--routing", "x"], "routing strategy 'x' is unknown"),
        (["--load-balancer", "x"], "load balancer 'x' is unknown"),
        (["--baseline", "x"], "baseline 'x' is unknown"),
        (["--set", "x=1"], "is not a parameter"),
        (["--set", "x"], "is not PARAMETER=NUMBER"),
        (["--scale", "0"], "scales must be above 0"),
        (["--scale", "nan"], "scales must be above 0"),
        (["--scale", "1,x"], "is not a list of numbers"),
        (["--seeds", "0"], "0 is not in the range"),
        (["--duration", "0s"], "is not above 0"),
        (["--start", "9h"], "has nothing after 32400 s"),
        (["--tpot", "nan"], "is not a finite number"),
        (["--ttft-base", "inf"], "is not a finite number"),
        (["--model-error", "nan"], "is not a finite number"),
        (["--slow", "7@1s=2"], "there is no instance '7'"),
        (["--slow", "0"], "is not INSTANCE@TIME=FACTOR"),
        (["--event-log"], "--event-log needs --out DIR"),
        (["--sessions-per-s", "1"], "has arrivals, not sessions"),
        (["--out", "/dev/null"], "/dev/null"),
        (["--out", "/dev/null/x"], "cannot make the folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    # Of an option that is given twice, the last counts.
    assert simulate("--trace", trace, "--fleet", FLEET, *arguments) == ExitCode.INVALID
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns"),
        (b"a,b\n1,2\n", "lacks the columns t_s, prompt_tokens, output_tokens (found: a, b)"),
        (b"t_s,prompt_tokens,output_tokens\n", "has no requests"),
        (b"t_s,prompt_tokens,output_tokens\nnan,1,1\n", "line 2: t_s must be a number from 0"),
        (b'{"t_s": 0, "prompt_tokens": 1, "output_tokens": NaN}\n', "line 1: output_tokens must be"),
        (b'{"t_s": 0, "prompt_tokens": 1}\n', "output_tokens"),
        (b'{"t_s": 0,\n', "line 1: is not JSON"),
        (b"\x1f\x8b\x08\x00cut", "is damaged gzip"),
        (b"\xff\xfe\xfa\x00", "is not UTF-8 text"),
    ],
)
def test_what_is_no_trace_is_said_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert simulate("--trace", path, "--fleet", FLEET) == ExitCode.INVALID
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "none", "--baselines", "none"], "there is nothing to compare"),
        (["--policies", "fifo,fifo"], "two contenders are called 'fifo'"),
        (["--policies", "fifo?x"], "'x' is not PARAMETER=NUMBER"),
        (["--policies", "a/b/c/d"], "is no policy"),
        (["--baselines", "min_ttft/locality"], "is no baseline"),
    ],
)
def test_what_cannot_be_compared(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert simulate("compare", "--trace", trace, "--fleet", FLEET, *arguments) == ExitCode.INVALID
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_found_before_the_runs(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs the tests may write everywhere.
    monkeypatch.setattr(os, "access", lambda _path, mode, **_more: mode != os.W_OK)
    assert simulate("--trace", trace, "--fleet", FLEET, "--out", tmp_path) == ExitCode.INVALID
    assert "cannot be written to" in capsys.readouterr().err


def test_a_changed_decision_is_shown(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--trace", trace, "--fleet", FLEET, "--limit", "20", "--event-log", "--out", tmp_path)
    assert simulate(*arguments, "--jobs", "1") == 0
    text = gzip.decompress((tmp_path / "events-0.jsonl.gz").read_bytes()).decode()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace('"queue_wait_s":', '"queue_wait_s":1', 1), encoding="utf-8")
    capsys.readouterr()
    assert simulate("replay", changed) == ExitCode.UNEXPECTED
    shown = capsys.readouterr().out
    assert "is decided otherwise" in shown
    assert "queue_wait_s: " in shown
    assert simulate("replay", changed, "-o", "json") == ExitCode.UNEXPECTED
    assert json.loads(capsys.readouterr().out)["is_same"] is False
    assert simulate("replay", trace) == ExitCode.INVALID


def test_the_same_seeds_write_the_same_bytes_whatever_the_hash_seed(trace: Path, tmp_path: Path) -> None:
    written = []
    for hash_seed, jobs in (("0", "1"), ("1", "2"), ("random", "2")):
        folder = tmp_path / f"{hash_seed}-{jobs}"
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = run_apart(
            "--trace", trace, "--fleet", FLEET, "--scale", "2", "--seeds", "2", "--stale", "100ms",
            "--routing", "locality", "--jobs", jobs, "--event-log", "--out", "out",
            cwd=folder, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
        assert len(files) == 4
        # The command line is in the report, and names the processes.
        for name in ("report.json", "report.html"):
            files[name] = files[name].replace(f"--jobs {jobs}".encode(), b"")
        written.append(files)
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_workers_too(tmp_path: Path, number: signal.Signals) -> None:
    long_trace = write_trace(tmp_path / "long.jsonl", mixed_requests(20_000))
    process = subprocess.Popen(
        [
            sys.executable, "-m", "sagecp", "simulate", "compare", "--trace", str(long_trace),
            "--fleet", FLEET, "--seeds", "8", "--jobs", "2", "--out", str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        # The command, two workers, and what keeps account of their shared memory.
        eventually(lambda: len(processes_of(process.pid)), lambda count: count >= 4, timeout_s=30.0)
        # Ctrl-C is for the whole group, a stop for the command alone.
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == ExitCode.INTERRUPTED
        assert not out
        assert "Traceback" not in err
        assert "Error" not in err
        eventually(lambda: processes_of(process.pid), lambda found: not found, timeout_s=30.0)
    finally:
        if processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "report.json").exists()


def processes_of(group: int) -> list[int]:
    """Return the processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # After the name, which may hold anything, come state, parent and group.
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found
