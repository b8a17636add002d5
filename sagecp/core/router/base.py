"""What routing strategies and load balancers are."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sagecp.core.request import RequestRecord
from sagecp.core.types import CandidateScore, ExecutionInstance

RECEIPT_CANDIDATE_LIMIT = 5


class InstanceView(Protocol):
    """What placement may read of an instance. The fleet's records satisfy it."""

    @property
    def instance_id(self) -> str:
        """Name of the instance."""

    @property
    def spec(self) -> ExecutionInstance:
        """What the instance is."""

    @property
    def in_flight_count(self) -> int:
        """Requests that this control plane has on it."""

    @property
    def concurrency_limit(self) -> int:
        """Most requests to have on it at once, at this moment."""

    @property
    def reserved_token_count(self) -> int:
        """Tokens that its requests are expected to hold at their ends."""

    @property
    def latency_estimate_s(self) -> float | None:
        """Learned latency of a request of a fixed length there; ``None`` before the first."""

    @property
    def last_dispatch_sequence(self) -> int:
        """Number of the last dispatch it got, counted over the fleet; 0: none."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A choice, with what it was made from.

    Attributes:
        scores: The best candidates, best first; the first is the choice.
        reason: Why, in a few words.
    """

    instance_id: str
    scores: tuple[CandidateScore, ...]
    reason: str


class LoadBalancer(ABC):
    """Rates instances for a request; lower is better."""

    name: ClassVar[str]

    @abstractmethod
    def scores(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> list[float]:
        """Return one score per candidate, in their order."""

    def reason(self, request: RequestRecord, best: InstanceView, score: float) -> str:
        """Return why ``best`` won, in a few words."""
        return f"{self.name}: lowest score {score:.4g}"


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What strategies are made from: the balancer in force and a seeded generator."""

    load_balancer: LoadBalancer
    random: random.Random


class RoutingStrategy(ABC):
    """Chooses an instance among those that can take the request now."""

    name: ClassVar[str]

    def __init__(self, context: RoutingContext) -> None:
        """Take from the context what the strategy needs; most need little."""
        del context

    @abstractmethod
    def place(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> Placement:
        """Choose. ``candidates`` is not empty; its order is reproducible and means nothing."""
