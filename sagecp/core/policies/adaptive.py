"""Chooses among the other policies by evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.policies.base import PolicyContext, SchedulingPolicy
from sagecp.core.policies.cost_optimized import CostOptimizedPolicy
from sagecp.core.policies.fifo import FifoPolicy
from sagecp.core.policies.priority import PriorityPolicy
from sagecp.core.policies.slo_aware import SloAwarePolicy
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestPriority
from sagecp.core.waiting_line import WaitingLine

_POLICIES: Mapping[str, type[SchedulingPolicy]] = {
    policy.name: policy for policy in (CostOptimizedPolicy, FifoPolicy, PriorityPolicy, SloAwarePolicy)
}
_CLASS_WEIGHTS = {
    RequestPriority.CRITICAL: 4.0,
    RequestPriority.HIGH: 2.0,
    RequestPriority.NORMAL: 1.0,
    RequestPriority.LOW: 0.5,
    RequestPriority.BACKGROUND: 0.25,
}


def class_weight_name(priority: RequestPriority) -> str:
    """Return the parameter that says what a request of a class counts."""
    return f"adaptive.weight_{priority.name.lower()}"


class AdaptivePolicy(SchedulingPolicy):
    """Lets another policy decide, and says which and why.

    Which one is the verdict of :class:`~sagecp.core.adaptation.AdaptationBook`:
    the arrivals of the last minute are replayed under each candidate, on
    simulated engines as fast as the real ones were found to be. A verdict never
    changes during the life of this object.
    """

    name: ClassVar[str] = "adaptive"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("adaptive.interval_s", 20.0, 1.0, 3600.0, "Time between two replays of the last minute."),
        Parameter(
            "adaptive.gain", 0.02, 0.0, 1.0, "A policy that meets more objectives by this share is better."
        ),
        Parameter(
            "adaptive.confirmations", 2.0, 1.0, 100.0, "Replays in a row that find it better before it rules."
        ),
        Parameter(
            "adaptive.cheap_below_share",
            0.6,
            0.0,
            1.0,
            "Prefill share of the fleet below which cost_optimized is a candidate.",
        ),
        *(
            Parameter(
                class_weight_name(priority),
                weight,
                0.0,
                1000.0,
                f"What meeting the objectives of a {priority.name} request counts.",
            )
            for priority, weight in _CLASS_WEIGHTS.items()
        ),
    )

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._verdict = context.verdict
        self._inner = _POLICIES[context.verdict.policy](context)
        self.is_patient = self._inner.is_patient
        self.is_paced = self._inner.is_paced
        self.demotes = self._inner.demotes

    @property
    def in_force(self) -> str:
        """Name of the policy that decides."""
        return self._inner.name

    def new_line(self) -> WaitingLine:
        """Return a line of the policy that decides."""
        return self._inner.new_line()

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        """Leave it to the policy that decides."""
        return self._inner.rescore(request, candidate, score, parameters)

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        return f"adaptive: {self._inner.explain(record)}"

    def why(self) -> str:
        """Return why the policy that decides is in force."""
        return self._verdict.why
