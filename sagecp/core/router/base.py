"""What routing strategies and load balancers are.

Both rate instances. What they may know is in two rows of numbers, one of the
request and one of each candidate; from equal rows they give equal scores, so
that a receipt can be run again. What they remember between requests, and what
they draw by chance, enters the row as its ``extra``.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.types import ExecutionInstance


class InstanceView(Protocol):
    """What a scorer may read of an instance when it makes extras. The fleet's records satisfy it."""

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
    def last_dispatch_sequence(self) -> int:
        """Number of the last dispatch it got, counted over the fleet; 0: none."""

    @property
    def tpot_estimate_s(self) -> float | None:
        """Observed mean time per output token; ``None`` before the first."""


@dataclass(frozen=True, slots=True)
class ScorerContext:
    """What scorers are made from: the core's seeded generator."""

    random: random.Random


class Scorer(ABC):
    """Rates instances for a request; lower is better, infinite is out of the question."""

    name: ClassVar[str]
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()
    # Whether scores are losses that can be compared with a fixed patience, so that waiting for a
    # better instance that is busy can be weighed against taking a worse one now.
    is_loss: ClassVar[bool] = False

    def __init__(self, context: ScorerContext) -> None:
        """Take from the context what is needed; most need nothing."""
        del context

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Return the ``extra`` of each candidate's row; ``None``: all zero.

        The only method that may read state of its own or draw by chance.
        """
        del request, instances
        return None

    @abstractmethod
    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Rate one candidate, from nothing but the arguments."""

    def terms(
        self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]
    ) -> dict[str, float]:
        """Return what a score was made of, for people."""
        del request, candidate, parameters
        return {}

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won, in a few words."""
        del request, best
        return f"{self.name}: lowest score {score:.4g}"

    def wants(self, request: RequestRecord) -> Sequence[str]:
        """Return instances that must be among the candidates of a sampled fleet if they can take it."""
        del request
        return ()

    def note_dispatch(self, request: RequestRecord, instance_id: str) -> None:
        """Remember a dispatch, where later choices depend on it."""
        del request, instance_id

    def note_fleet(self, instance_ids: Sequence[str]) -> None:
        """Take notice of which instances exist, after some joined or left. Sorted."""
        del instance_ids


class LoadBalancer(Scorer):
    """How the ``load_balanced`` strategy rates instances.

    Extras and scores are 0 or more: strategies that only sometimes leave a
    request to the balancer pack both into one extra of their own.
    """


class RoutingStrategy(Scorer):
    """How an instance is chosen among those that can take a request.

    Args:
        context: What scorers are made from.
        balancer: The load balancer in force, for strategies that leave requests to it.
    """

    def __init__(self, context: ScorerContext, balancer: LoadBalancer) -> None:
        super().__init__(context)
        self.balancer = balancer
