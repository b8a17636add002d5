"""Who replays the past for the adaptive policy: something outside, behind a port of one method."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

from sagecp.core.events import PoliciesEvaluated
from sagecp.core.policy_replay import PolicyReplay, PolicyScore

logger = logging.getLogger(__name__)

# A replay takes about a second; one that takes this long would come too late.
DEFAULT_TIMEOUT_S = 45.0


class EvaluationError(Exception):
    """A replay could not be made; says why."""


class PolicyEvaluator(Protocol):
    """Replays a stretch of the past under several policies."""

    async def evaluate(self, replay: PolicyReplay) -> tuple[PolicyScore, ...]:
        """Return one score per candidate. Cancelling ends the work for it.

        Raises:
            EvaluationError: It could not be made.
        """


class EvaluationProcess:
    """Has each replay made by a process of its own, which ends with it.

    A start costs a few tenths of a second of the replay's second, and buys
    that nothing is left behind or kept in memory between replays. The process
    finds the replay, pickled, on its standard input, answers with the scores on
    its standard output, and yields the CPU to others.

    Args:
        command: Program and arguments.
        timeout_s: How long a replay may take; then the process is killed.
    """

    def __init__(self, command: Sequence[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s

    async def evaluate(self, replay: PolicyReplay) -> tuple[PolicyScore, ...]:
        """Return one score per candidate. Errors: as :meth:`PolicyEvaluator.evaluate`."""
        process = self._start(replay)
        work = asyncio.ensure_future(asyncio.to_thread(_finish, process, self._timeout_s))
        try:
            answer, complaint = await asyncio.shield(work)
        except subprocess.TimeoutExpired:
            raise EvaluationError(f"the replay took longer than {self._timeout_s:g} s") from None
        finally:
            # Where this was cancelled; otherwise it has ended.
            process.kill()
            await asyncio.wait({work})
        if process.returncode != 0:
            lines = complaint.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise EvaluationError(f"the replay ended with exit status {process.returncode}: {lines[-1]}")
        try:
            scores: tuple[PolicyScore, ...] = pickle.loads(answer)  # noqa: S301 - of the process started above
        except (EOFError, pickle.UnpicklingError) as error:
            raise EvaluationError("the replay wrote no scores") from error
        return scores

    def _start(self, replay: PolicyReplay) -> subprocess.Popen[bytes]:
        # A file: a pipe would have to be fed, and breaks where the process ends before it has read.
        with tempfile.TemporaryFile() as question:
            pickle.dump(replay, question)
            question.seek(0)
            try:
                # Not by the event loop: uvloop forks, which runs the fork handlers of gRPC's threads
                # in the child, and those crash it now and then. This starts it without a fork.
                return subprocess.Popen(  # noqa: S603 - a command of ours
                    self._command,
                    stdin=question,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    # Ctrl-C on the terminal is for the server, which ends this.
                    start_new_session=True,
                )
            except OSError as error:
                raise EvaluationError(f"{self._command[0]} cannot be started: {error.strerror}") from error


def _finish(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, bytes]:
    """Wait for a process; return what it wrote to its standard output and error."""
    with process:
        try:
            return process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


class PolicyEvaluations:
    """Has replays made for the core, one at a time, and tells it what came out.

    Args:
        evaluator: Makes them; ``None``: nobody does.
        feed: Takes the answers.
    """

    def __init__(self, evaluator: PolicyEvaluator | None, feed: Callable[[PoliciesEvaluated], None]) -> None:
        self._evaluator = evaluator
        self._feed = feed
        self._task: asyncio.Task[None] | None = None
        # What the last one failed with, so that a lasting fault is logged once.
        self._fault = ""

    def start(self, replay: PolicyReplay) -> None:
        """Have a replay made, instead of the one before: the core has given that up."""
        if self._evaluator is None:
            return
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(
            self._evaluate(self._evaluator, replay), name="sagecp-policy-evaluation"
        )

    async def stop(self) -> None:
        """End the work."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _evaluate(self, evaluator: PolicyEvaluator, replay: PolicyReplay) -> None:
        scores: tuple[PolicyScore, ...] = ()
        try:
            scores = await evaluator.evaluate(replay)
        except EvaluationError as error:
            self._note_fault(str(error))
        except Exception:
            logger.exception("policy evaluation crashed")
        else:
            self._fault = ""
        self._feed(PoliciesEvaluated(replay.evaluation_id, scores))

    def _note_fault(self, message: str) -> None:
        if message != self._fault:
            self._fault = message
            logger.warning(
                "policies could not be evaluated; the one in force stays", extra={"reason": message}
            )
