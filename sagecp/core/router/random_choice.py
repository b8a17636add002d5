"""Chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, Placement, RoutingContext, RoutingStrategy
from sagecp.core.types import CandidateScore


class RandomStrategy(RoutingStrategy):
    """Takes any instance with equal chance, from the core's seeded generator."""

    name: ClassVar[str] = "random"

    def __init__(self, context: RoutingContext) -> None:
        self._random = context.random

    def place(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> Placement:
        """Choose by chance."""
        chosen = candidates[self._random.randrange(len(candidates))]
        return Placement(
            chosen.instance_id,
            (CandidateScore(chosen.instance_id, 0.0),),
            f"random: one of {len(candidates)}",
        )
