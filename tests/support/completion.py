"""What a real bash offers for words of the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from tests.support.processes import SAGECP


def complete_in_bash(words: Sequence[str], *, server: str) -> list[str]:
    """Return what bash offers for the last word after ``sagecp``, and see that nothing complains."""
    quoted = " ".join(map(shlex.quote, ["sagecp", *words]))
    script = f"""
        source <(sagecp completion bash)
        complete -p sagecp > /dev/null || exit 1
        COMP_WORDS=({quoted}) COMP_CWORD={len(words)}
        _sagecp_completion sagecp
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {
        **os.environ,
        "PATH": f"{SAGECP.parent}{os.pathsep}{os.environ['PATH']}",
        "SAGECP_SERVER": server,
    }
    result = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()
