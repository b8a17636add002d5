"""Completion in real shells, without a server: quick, and silent about what cannot be asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from sagecp.cli.main import COMMANDS
from tests.support.completion import complete_in_bash
from tests.support.processes import SAGECP

NO_SERVER = "127.0.0.1:1"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["ins"], ["instances"]),
        (["instances", ""], ["deregister", "get", "list", "register", "watch"]),
        (["instances", "w"], ["watch"]),
        (["instances", "--sta"], ["--state"]),
        (["instances", "--state", "un"], ["unhealthy"]),
        (["events", "--kind", "gpu"], ["gpu_fault", "gpu_fault_cleared"]),
        (["requests", "-o", ""], ["table", "wide", "json", "yaml", "name"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["plan", "--objective", "low"], ["lowest_ttft"]),
        (["plan", "--gpus", "8xh100"], ["8xH100-PCIe-80GB", "8xH100-NVL-94GB", "8xH100-SXM-80GB"]),
        (["plan", "--workload", "lo"], ["long-chat"]),
        (["plan", "--model", "PHI"], ["phi-4"]),
        (["--ver"], ["--version"]),
        # What only a server knows:
        (["drain", ""], []),
        (["requests", "get", "req-"], []),
        (["policy", "set", ""], []),
        (["metrics", "--model", ""], []),
    ],
    ids=" ".join,
)
def test_bash(words: list[str], offers: list[str]) -> None:
    assert complete_in_bash(words, server=NO_SERVER) == offers


def test_every_command_is_offered() -> None:
    assert complete_in_bash([""], server=NO_SERVER) == list(COMMANDS)


def test_commands_are_offered_without_importing_them() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print([name for name in sys.modules if name.startswith('sagecp.cli.')]))\n"
        "from sagecp.cli.main import main\n"
        "main()"
    )
    environment = {
        **os.environ, "_SAGECP_COMPLETE": "bash_complete", "COMP_WORDS": "sagecp ins", "COMP_CWORD": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code.replace("main()", "main(prog_name='sagecp')")],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    first, *_, loaded = result.stdout.splitlines()
    assert first == "plain,instances"
    assert "sagecp.cli.instances" not in loaded


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("bash", "complete -o nosort -F"),
        ("zsh", "#compdef sagecp"),
        ("fish", "complete --no-files --command sagecp"),
    ],
)
def test_scripts(shell: str, says: str) -> None:
    result = subprocess.run([SAGECP, "completion", shell], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert says in result.stdout
    if shutil.which(shell):
        check = subprocess.run([shell, "-n"], input=result.stdout, capture_output=True, text=True, timeout=60)
        assert (check.returncode, check.stderr) == (0, "")


def test_an_unknown_shell() -> None:
    result = subprocess.run([SAGECP, "completion", "tcsh"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "'tcsh' is not one of" in result.stderr
