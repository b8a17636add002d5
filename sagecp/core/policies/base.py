"""What a scheduling policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.service_books import ServiceBooks
from sagecp.core.waiting_line import WaitingLine


@dataclass(frozen=True, slots=True)
class PolicyVerdict:
    """Which policy the evidence speaks for.

    Attributes:
        policy: Its name.
        why: In a sentence, for people.
        since_s: When it was found, on the core's clock; ``None``: it is the first.
    """

    policy: str = "slo_aware"
    why: str = "nothing to judge by yet"
    since_s: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What policies are made from.

    Attributes:
        parameters: Values of all parameters in force.
        books: What each tenant was served; outlives every policy.
        verdict: For the policy that chooses among the others.
    """

    parameters: Mapping[str, float]
    books: ServiceBooks
    verdict: PolicyVerdict = PolicyVerdict()


class SchedulingPolicy(ABC):
    """Orders waiting requests, and may weigh placements by what it cares for.

    Attributes:
        is_patient: It may wait for a better instance that is busy, where the
            balancer's scores are losses; requests behind it then go first.
        is_paced: It holds prefill back where it would slow down the decodes of
            an instance beyond their objective.
        demotes: Requests whose objective is out of reach make way.
    """

    name: ClassVar[str]
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()
    is_patient: bool = False
    is_paced: bool = False
    demotes: bool = False

    def __init__(self, context: PolicyContext) -> None:
        self.parameters = context.parameters

    @abstractmethod
    def new_line(self) -> WaitingLine:
        """Return an empty line for the waiting requests of one model."""

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        """Return a candidate's score as this policy sees it, from nothing but the arguments."""
        del request, candidate, parameters
        return score

    @property
    def in_force(self) -> str:
        """Name of the policy that decides; another one's for a policy that chooses among policies."""
        return self.name

    def explain(self, record: RequestRecord) -> str:
        """Return, in a few words, why the request was next."""
        return f"{self.name}: first of its model's line"

    def why(self) -> str:
        """Return why this policy is in force, for policies that choose; else ``""``."""
        return ""
