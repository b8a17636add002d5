"""The command line as people and scripts use it: real processes."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from tests.support.processes import ROOT, SAGECP


class Cli:
    """Runs commands against the server."""

    def __init__(self, address: str) -> None:
        self.address = address

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SAGECP_SERVER": self.address, "NO_COLOR": "1"}

    def run(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command and see that it never shows a traceback."""
        result = subprocess.run(
            [SAGECP, *arguments],
            capture_output=True, text=True, input=text, cwd=ROOT, env=self.environment, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in result.stderr
        return result

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Run a command that is to succeed and return its output."""
        result = self.run(*arguments, text=text)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> list[Any]:
        """Run a command with JSON output and return its objects."""
        return [json.loads(line) for line in self(*arguments, "-o", "json").splitlines()]
