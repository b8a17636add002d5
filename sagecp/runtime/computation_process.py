"""Has something computed by a process of its own, so that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any


class ComputationError(Exception):
    """A computation could not be made; says why."""


class ComputationProcess:
    """Has each computation made by a process of its own, which ends with it.

    A start costs a few tenths of a second, and buys that nothing is left
    behind or kept in memory between computations. The process finds the
    question, pickled, on its standard input, answers on its standard output,
    likewise, and should yield the CPU to others.

    Args:
        command: Program and arguments.
        timeout_s: How long it may take; then the process is killed.
        what: What it makes, in messages: "replay".
        result: What it answers with, in messages: "scores".
    """

    def __init__(
        self, command: Sequence[str], timeout_s: float, *, what: str = "computation", result: str = "answer"
    ) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._what = what
        self._result = result

    async def run(self, question: object) -> Any:  # noqa: ANN401 - whatever the process answers with
        """Return the answer to a question. Cancelling ends the process.

        Raises:
            ComputationError: There is none.
        """
        process = self._start(question)
        work = asyncio.ensure_future(asyncio.to_thread(_finish, process, self._timeout_s))
        try:
            answer, complaint = await asyncio.shield(work)
        except subprocess.TimeoutExpired:
            raise ComputationError(f"the {self._what} took longer than {self._timeout_s:g} s") from None
        finally:
            # Where this was cancelled; otherwise it has ended.
            process.kill()
            await asyncio.wait({work})
        if process.returncode != 0:
            lines = complaint.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise ComputationError(
                f"the {self._what} ended with exit status {process.returncode}: {lines[-1]}"
            )
        try:
            return pickle.loads(answer)  # noqa: S301 - of the process started above
        except (EOFError, pickle.UnpicklingError) as error:
            raise ComputationError(f"the {self._what} wrote no {self._result}") from error

    def _start(self, question: object) -> subprocess.Popen[bytes]:
        # A file: a pipe would have to be fed, and breaks where the process ends before it has read.
        with tempfile.TemporaryFile() as file:
            pickle.dump(question, file)
            file.seek(0)
            try:
                # Not by the event loop: uvloop forks, which runs the fork handlers of gRPC's threads
                # in the child, and those crash it now and then. This starts it without a fork.
                return subprocess.Popen(  # noqa: S603 - a command of ours
                    self._command,
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    # Ctrl-C on the terminal is for the server, which ends this.
                    start_new_session=True,
                )
            except OSError as error:
                raise ComputationError(f"{self._command[0]} cannot be started: {error.strerror}") from error


def _finish(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, bytes]:
    """Wait for a process; return what it wrote to its standard output and error."""
    with process:
        try:
            return process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
