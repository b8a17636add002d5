"""The entry point: what it imports, how it fails, and what it exits with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import click
import pytest

from sagecp.cli import main as cli
from sagecp.cli.exit_codes import MEANINGS, ExitCode
from sagecp.version import __version__
from tests.support.processes import ROOT

HEAVY = (
    "grpc",
    "google.protobuf",
    "numpy",
    "aiohttp",
    "structlog",
    "uvloop",
    "rich",
    "asyncio",
    "sagecp.client",
)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; ``code`` before it."""
    program = f"{code}\nfrom sagecp.cli.main import main\nmain({list(arguments)!r})"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["help", "exit-codes"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    shown = run(
        *arguments,
        code=f"import atexit, sys; atexit.register(lambda: print('LOADED', "
        f"[name for name in {HEAVY!r} if name in sys.modules]))",
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "LOADED []"


def test_help_lists_every_command_and_exit_code() -> None:
    text = run("--help").stdout
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name}  ", text, re.MULTILINE), name
    for code, meaning in MEANINGS.items():
        assert f"{code.value}  {meaning}" in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_imports_and_explains_itself(name: str) -> None:
    context = click.Context(cli.main, info_name="sagecp")
    command = cli.main.get_command(context, name)
    assert command is not None
    own = click.Context(command, info_name=name, parent=context)
    assert "Usage: sagecp " in command.get_help(own)
    if isinstance(command, click.Group):
        for below in command.list_commands(own):
            assert command.commands[below].help, f"{name} {below} has no help"


def test_every_option_is_explained() -> None:
    """An option without a word of help may only be one whose name says it all."""
    context = click.Context(cli.main, info_name="sagecp")
    unexplained = []
    for name in set(cli.COMMANDS) - {"agent", "engine-sim"}:
        command = cli.main.get_command(context, name)
        assert command is not None
        below = command.commands.values() if isinstance(command, click.Group) else [command]
        unexplained += [
            f"{name} {option.opts[0]}"
            for each in below
            for option in each.params
            if isinstance(option, click.Option) and not option.help and not option.hidden
        ]
    plain = {"--presence-penalty", "--frequency-penalty", "--repetition-penalty", "--tensor-parallel-size",
             "--pipeline-parallel-size", "--data-parallel-size", "--usd-per-gpu-hour"}  # fmt: skip
    assert {entry.split()[-1] for entry in unexplained} <= plain


def test_versions() -> None:
    assert run("version").stdout == f"sagecp {__version__}\n"
    assert run("--version").stdout == f"sagecp {__version__}\n"
    everything = json.loads(run("version", "--all", "-o", "json").stdout)
    assert everything["sagecp"] == __version__
    assert everything["grpcio"][0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["instnces"], "did you mean instances?"),
        (["frobnicate"], "sagecp --help"),
        (["generate", "--frob"], "sagecp generate --help"),
        (["instances", "frob"], "sagecp instances --help"),
        (["status", "--timeout", "soon"], "sagecp status --help"),
        (["generate"], "PROMPT"),
        (["generate", "hi", "--token-ids", "1"], "PROMPT"),
        (["generate", "--token-ids", "1,x"], "--token-ids 1,15043"),
        (["help", "frob"], "sagecp --help"),
        (["status", "-s", "http://localhost:1"], ""),
        (["generate", "--openai-json", "/does/not/exist"], ""),
        (["serve", "--config", "/does/not/exist"], "sagecp serve --help"),
    ],
)
def test_wrong_usage_is_two_lines_and_exit_code_2(arguments: list[str], hint: str) -> None:
    result = run(*arguments)
    assert result.returncode == ExitCode.INVALID, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert hint in result.stderr
    assert ("hint: " in result.stderr) is bool(hint)
    assert "Traceback" not in result.stderr


def add_command(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Make `sagecp version` do something else."""
    monkeypatch.setattr("sagecp.cli.version.version", click.command("version")(action))


def fail(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_defect_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    add_command(monkeypatch, fail(RuntimeError("boom")))
    assert exit_code(["version"]) == ExitCode.UNEXPECTED
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected failure: RuntimeError: boom\nhint: ")
    assert "Traceback" not in shown
    assert exit_code(["--debug", "version"]) == ExitCode.UNEXPECTED
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    add_command(monkeypatch, fail(error))
    assert exit_code(["version"]) == ExitCode.INTERRUPTED


def test_a_missing_package_names_the_extra() -> None:
    block = "import sys; sys.modules['grpc_reflection'] = None; sys.modules['grpc_reflection.v1alpha'] = None"
    result = run("serve", code=block)
    assert result.returncode == ExitCode.INVALID, result.stderr
    assert "sagecp serve needs the Python package grpc_reflection" in result.stderr
    assert "pip install 'sagecp[server]'" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    program = "import sys; from sagecp.cli.main import main; main(['help', 'generate'])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == ExitCode.OK


def test_python_m_sagecp() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sagecp", "version"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"sagecp {__version__}\n")
