"""What a scheduling policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from sagecp.core.request import RequestRecord


class SchedulingPolicy(ABC):
    """Orders waiting requests by a static key; the smallest goes first.

    A key is computed once, when the request enters the queue, so that every
    queue operation stays O(log n). What changes with time (age, for example)
    must be part of the key from the start.
    """

    name: ClassVar[str]

    @abstractmethod
    def key(self, request: RequestRecord) -> float:
        """Return the sort key of a request. Ties go to the earlier arrival."""

    def explain(self, request: RequestRecord) -> str:
        """Return, in a few words, why the request was next."""
        return f"{self.name}: first of its model's queue"
