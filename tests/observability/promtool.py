"""Prometheus's own checker."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.processes import ROOT, require

DEPLOY = ROOT / "deploy"
RULE_FILES = (DEPLOY / "prometheus" / "recording_rules.yml", DEPLOY / "prometheus" / "alerts.yml")


def promtool(*arguments: str | Path, text: str = "") -> str:
    """Run promtool and return what it prints.

    Raises:
        AssertionError: It finds something wrong; shows what.
    """
    tool = require("promtool", "it comes with Debian's package prometheus")
    done = subprocess.run(
        [str(tool), *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"promtool {' '.join(map(str, arguments[:2]))}:\n{output}"
    return output
