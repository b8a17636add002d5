"""`sagecp dev` and `sagecp engine-sim` as a test sees them: as programs."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import SAGECP, Program, eventually


@contextlib.contextmanager
def dev_server(*options: str) -> Iterator[str]:
    """Run `sagecp dev` and yield the address of its control plane once everything is ready."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder, "ready.json")
        # An answer that happens to end at once would fail what is written for longer ones.
        command: list[str | Path] = [SAGECP, "dev", "--port", "0", "--ready-file", ready_file, *options]
        if "--engine-options" not in options:
            command += ["--engine-options", "--endless-answers"]
        program = Program("sagecp dev", command)

        def is_ready() -> bool:
            assert program.process.poll() is None, f"sagecp dev ended:\n{program.tail()}"
            return ready_file.exists()

        try:
            eventually(is_ready, bool, timeout_s=90)
            yield str(json.loads(ready_file.read_text())["control_plane"])
        finally:
            status = program.stop()
    assert status == 0, f"sagecp dev ended with {status}:\n{program.tail()}"
    assert_no_stack_trace(program)


@contextlib.contextmanager
def simulated_engine(model: str, *options: str) -> Iterator[int]:
    """Run `sagecp engine-sim` and yield its port once it answers."""
    program = Program(
        "sagecp engine-sim",
        [SAGECP, "engine-sim", "--port", "0", "--model", model, "--endless-answers", *options],
    )
    try:
        yield int(program.wait_for_line(r"127\.0\.0\.1:([1-9]\d*)", 30)[1])
    finally:
        program.stop()
    assert_no_stack_trace(program)


def assert_no_stack_trace(program: Program) -> None:
    """Fail when a program printed what no user should see."""
    printed, found, trace = program.output.partition("Traceback")
    assert not found, f"a stack trace was logged:\n{printed[-500:]}{found}{trace[:5000]}"
