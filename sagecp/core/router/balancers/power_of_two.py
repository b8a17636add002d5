"""The better of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, ScorerContext


class PowerOfTwoBalancer(LoadBalancer):
    """Draws two instances and takes the one with less of its limit in use.

    Mitzenmacher, "The power of two choices in randomized load balancing", 2001:
    the second draw makes the longest queue exponentially shorter, and several
    control planes with stale figures do not all run to one instance.

    The ``extra`` is 0 for those that were drawn, 1 for the others.
    """

    name: ClassVar[str] = "power_of_two"

    def __init__(self, context: ScorerContext) -> None:
        super().__init__(context)
        self._random = context.random

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Draw two different candidates, or the only one."""
        count = len(instances)
        extras = [1.0] * count
        first = self._random.randrange(count)
        extras[first] = 0.0
        if count > 1:
            second = self._random.randrange(count - 1)
            extras[second + (second >= first)] = 0.0
        return extras

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the share of the limit in use; infinite for those that were not drawn."""
        if candidate.extra:
            return math.inf
        return candidate.in_flight_count / candidate.concurrency_limit

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        return (
            f"power_of_two: {best.in_flight_count} of {best.concurrency_limit} in flight, the better of two"
        )
