"""Who replays the past for the adaptive policy: something outside, behind a port of one method."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from sagecp.core.events import PoliciesEvaluated
from sagecp.core.policy_replay import PolicyReplay, PolicyScore
from sagecp.runtime.computation_process import ComputationError, ComputationProcess

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
    """Has each replay made by a process of its own.

    Args:
        command: Program and arguments.
        timeout_s: How long a replay may take; then the process is killed.
    """

    def __init__(self, command: Sequence[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._process = ComputationProcess(command, timeout_s, what="replay", result="scores")

    async def evaluate(self, replay: PolicyReplay) -> tuple[PolicyScore, ...]:
        """Return one score per candidate. Errors: as :meth:`PolicyEvaluator.evaluate`."""
        try:
            scores: tuple[PolicyScore, ...] = await self._process.run(replay)
        except ComputationError as error:
            raise EvaluationError(str(error)) from error
        return scores


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
