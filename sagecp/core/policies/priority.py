"""Classes of importance, with aging, and fair service between tenants inside a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.fair_line import FairLine
from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.policies.base import PolicyContext, SchedulingPolicy
from sagecp.core.prediction.placement import predict
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestPriority
from sagecp.core.waiting_line import WaitingLine

_BOOST_DEFAULTS_S = {
    RequestPriority.CRITICAL: 300.0,
    RequestPriority.HIGH: 30.0,
    RequestPriority.NORMAL: 0.0,
    RequestPriority.LOW: -60.0,
    RequestPriority.BACKGROUND: -600.0,
}

_WEIGHT_PREFIX = "priority.weight."


def _boost_name(priority: RequestPriority) -> str:
    return f"priority.boost_{priority.name.lower()}_s"


class PriorityPolicy(SchedulingPolicy):
    """Arrival time minus a head start per class; inside a class the tenant that was served least.

    A class goes first when its oldest request, less the class's head start, is
    the oldest: age is part of the key from the start, so nothing starves, and a
    class overtakes another by its head start at most. Inside a class tenants get
    engine time in proportion to their weights (see :class:`FairLine`). CRITICAL
    and HIGH requests weigh a fast instance more than the balancer does.
    """

    name: ClassVar[str] = "priority"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        *(
            Parameter(
                _boost_name(priority),
                boost_s,
                -86_400.0,
                86_400.0,
                f"Head start of {priority.name} over an equally old NORMAL request.",
            )
            for priority, boost_s in _BOOST_DEFAULTS_S.items()
        ),
        Parameter(
            "priority.weight.*",
            1.0,
            0.001,
            1000.0,
            "Share of engine time of the tenant of that name; others have 1.",
        ),
        Parameter(
            "priority.speed_weight",
            0.5,
            0.0,
            100.0,
            "Loss per second of predicted TTFT and 100 tokens for CRITICAL; HIGH half of it.",
        ),
    )

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._books = context.books
        self._weights = {
            name.removeprefix(_WEIGHT_PREFIX): value
            for name, value in context.parameters.items()
            if name.startswith(_WEIGHT_PREFIX)
        }
        self._boosts_s = {priority: context.parameters[_boost_name(priority)] for priority in RequestPriority}

    def new_line(self) -> WaitingLine:
        """Return a line that is fair inside each class."""
        weights = self._weights
        return FairLine(self._boosts_s, lambda tenant: weights.get(tenant, 1.0), self._books)

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        """Add the predicted time of an important request to a candidate's score."""
        if request.priority > RequestPriority.HIGH:
            return score
        predicted = predict(request, candidate)
        weight = parameters["priority.speed_weight"] / request.priority
        return score + weight * (predicted.ttft_s + 100.0 * predicted.tpot_s)

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        priority = record.metadata.priority
        return (
            f"priority: class {priority.name} (head start {self._boosts_s[priority]:+.0f} s) had the oldest "
            "request, and its tenant the least service"
        )
