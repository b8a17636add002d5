"""Plans parallelism for callers, beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from sagecp.core.errors import SageError
from sagecp.rpc.convert.plan_request import plan_query_from_proto
from sagecp.rpc.convert.plan_response import plans_to_proto
from sagecp.runtime.computation_process import ComputationError
from sagecp.runtime.planner import Planner
from sagecp.v1 import admin_service_pb2 as pb

logger = logging.getLogger(__name__)


class PlanningFailedError(SageError):
    """The search for plans failed, for a reason that the caller can do nothing about."""


class PlanAnswers:
    """Answers `PlanParallelism`.

    Args:
        planner: Searches.
        prices: Rent of one GPU for an hour, by the short name of its kind.
    """

    def __init__(self, planner: Planner, prices: Mapping[str, float] | None = None) -> None:
        self._planner = planner
        self._prices = dict(prices or {})

    async def answer(self, request: pb.PlanParallelismRequest) -> pb.PlanParallelismResponse:
        """Say how to spread a model over GPUs.

        Raises:
            InvalidRequestError: Names every bad field.
            QueueFullError: Too many are asking.
            PlanningFailedError: The search failed.
        """
        # Thousands of samples or of commands take tens of milliseconds: not of the event loop's.
        query = await asyncio.to_thread(plan_query_from_proto, request, self._prices)
        try:
            result = await self._planner.plan(query)
        except ComputationError as error:
            logger.warning("plans could not be searched for", extra={"reason": str(error)})
            raise PlanningFailedError(
                f"plans could not be searched for: {error}; if the question is large, ask for fewer pools of "
                "GPUs at a time"
            ) from error
        return await asyncio.to_thread(plans_to_proto, request, query, result)
