"""`sagecp dev` as a test sees it: a whole control plane on this machine, with simulated engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.support.processes import SAGECP, Program


@contextlib.contextmanager
def dev_server(*options: str) -> Iterator[str]:
    """Run `sagecp dev` and yield the address of its control plane once it is ready for requests."""
    program = Program("sagecp dev", [SAGECP, "dev", "--port", "0", *options])
    try:
        yield program.wait_for_line(r"ready.*?(127\.0\.0\.1:[1-9]\d*)", 60)[1]
    finally:
        status = program.stop()
    assert status == 0, f"sagecp dev ended with {status}:\n{program.tail()}"
    assert "Traceback" not in program.output


@contextlib.contextmanager
def simulated_engine(model: str, *options: str) -> Iterator[int]:
    """Run `sagecp engine-sim` and yield its port once it answers."""
    program = Program("sagecp engine-sim", [SAGECP, "engine-sim", "--port", "0", "--model", model, *options])
    try:
        yield int(program.wait_for_line(r"127\.0\.0\.1:([1-9]\d*)", 30)[1])
    finally:
        program.stop()
