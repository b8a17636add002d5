"""Chooses among the other policies by evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.policies.base import PolicyContext, SchedulingPolicy
from sagecp.core.policies.priority import PriorityPolicy
from sagecp.core.request import RequestRecord
from sagecp.core.waiting_line import WaitingLine


class AdaptivePolicy(SchedulingPolicy):
    """Lets another policy decide, and says which and why."""

    name: ClassVar[str] = "adaptive"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.inner: SchedulingPolicy = PriorityPolicy(context)
        self._why = "the start: nothing was seen yet"

    @property
    def in_force(self) -> str:
        """Name of the policy that decides."""
        return self.inner.name

    def new_line(self) -> WaitingLine:
        """Return a line of the policy that decides."""
        return self.inner.new_line()

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        """Leave it to the policy that decides."""
        return self.inner.rescore(request, candidate, score, parameters)

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        return f"adaptive: {self.inner.explain(record)}"

    def why(self) -> str:
        """Return why the policy that decides is in force."""
        return self._why
