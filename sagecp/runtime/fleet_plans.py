"""Keeps up to date what the planner thinks of the fleet's plans."""

from __future__ import annotations

import asyncio
import logging

from sagecp.core.errors import SageError
from sagecp.core.parallelism.fleet_advice import (
    FleetAdvice,
    FleetGroup,
    advice_from,
    groups_of,
    question_for,
)
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.plan_query import PlanQuery
from sagecp.core.prediction.forecast import BUCKETS_PER_HOUR
from sagecp.core.prediction.load_history import LoadHistory
from sagecp.core.scheduler import Scheduler
from sagecp.runtime.computation_process import ComputationError
from sagecp.runtime.planner import Planner

logger = logging.getLogger(__name__)

REPLAN_INTERVAL_S = 300.0
"""How often traffic is looked at anew; changes of the fleet are noticed sooner."""
_LOOK_INTERVAL_S = 10.0
_MAX_GROUP_COUNT = 16


class FleetPlans:
    """Asks the planner about each group of the fleet when it changed, and every few minutes.

    Args:
        scheduler: The core.
        history: What load there was.
        knowledge: Finds models.
        planner: Searches, outside the event loop.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        history: LoadHistory,
        knowledge: ModelKnowledge,
        planner: Planner,
    ) -> None:
        self._scheduler = scheduler
        self._history = history
        self._knowledge = knowledge
        self._planner = planner
        self._advice: dict[FleetGroup, FleetAdvice] = {}
        self._asked_s: dict[FleetGroup, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look at the fleet."""
        self._task = asyncio.create_task(self._run(), name="sagecp-fleet-plans")

    async def stop(self) -> None:
        """End a search under way, and the loop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def advice(self) -> tuple[FleetAdvice, ...]:
        """Return what is thought of each group that there is; those not looked at yet say so."""
        return tuple(
            self._advice.get(group) or FleetAdvice(group=group, message="not looked at yet")
            for group in groups_of(self._scheduler.fleet)[:_MAX_GROUP_COUNT]
        )

    async def look(self) -> None:
        """Ask about the groups that are new, or whose answer is old."""
        groups = groups_of(self._scheduler.fleet)[:_MAX_GROUP_COUNT]
        for gone in self._advice.keys() - set(groups):
            del self._advice[gone]
            self._asked_s.pop(gone, None)
        now_s = asyncio.get_running_loop().time()
        for group in groups:
            asked_s = self._asked_s.get(group)
            if asked_s is None or now_s - asked_s >= REPLAN_INTERVAL_S or self._was_idle(group):
                self._advice[group] = await self._ask(group)
                self._asked_s[group] = now_s

    def _was_idle(self, group: FleetGroup) -> bool:
        """Whether only traffic was missing when it was asked, and there is some now."""
        before = self._advice.get(group)
        return before is not None and before.query is None and isinstance(self._question(group), PlanQuery)

    def _question(self, group: FleetGroup) -> PlanQuery | FleetAdvice:
        recent = self._history.recent(group.model, BUCKETS_PER_HOUR)
        count = recent["requests"]
        return question_for(
            group,
            self._knowledge,
            recent["prompt_tokens"] / count if count else 0.0,
            recent["output_tokens"] / count if count else 0.0,
            self._scheduler.settings.current.values,
        )

    async def _ask(self, group: FleetGroup) -> FleetAdvice:
        question = self._question(group)
        if isinstance(question, FleetAdvice):
            return question
        try:
            return advice_from(group, question, await self._planner.plan(question))
        except (SageError, ComputationError) as error:
            logger.warning("no plan was found for a part of the fleet", extra={"reason": str(error)})
            return FleetAdvice(group=group, query=question, message=f"no recommendation: {error}")

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # Advice is no reason to stop anything.
                logger.exception("looking at the fleet's plans crashed")
            await asyncio.sleep(_LOOK_INTERVAL_S)
