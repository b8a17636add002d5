"""One after the other, the larger ones more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, ScorerContext
from sagecp.core.types import ExecutionInstance

WEIGHT_LABEL = "sagecp.weight"
# A label outside these bounds is no weight: zero would starve an instance without a word.
_WEIGHT_RANGE = (0.001, 1_000_000.0)


class WeightedRoundRobinBalancer(LoadBalancer):
    """Smooth weighted round robin, as in nginx: no runs of one instance.

    At every choice each candidate's credit grows by its weight; the largest
    credit wins and pays the sum of the weights. So each gets its share within
    any stretch, evenly spread, and credits add up to zero. The weight is the
    label ``sagecp.weight``, 0.001 to 1,000,000, or else the number of GPUs, at
    least 1. Instances that are no candidates neither earn nor pay.

    The ``extra`` is how far a candidate's credit is behind the largest.
    """

    name: ClassVar[str] = "weighted_round_robin"

    def __init__(self, context: ScorerContext) -> None:
        super().__init__(context)
        self._credits: dict[str, float] = {}
        # What the credits become if the present choice is made, and what it costs.
        self._offered: dict[str, float] = {}
        self._price = 0.0

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Return how far each is behind, after earning its weight.

        A choice that is not followed by a dispatch changes nothing.
        """
        weights = [weight_of(instance.spec) for instance in instances]
        self._offered = {
            instance.instance_id: self._credits.get(instance.instance_id, 0.0) + weight
            for instance, weight in zip(instances, weights, strict=True)
        }
        self._price = sum(weights)
        largest = max(self._offered.values(), default=0.0)
        return [largest - credit for credit in self._offered.values()]

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return how far it is behind."""
        return candidate.extra

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        return "weighted_round_robin: its turn by weight"

    def note_dispatch(self, request: RequestRecord, instance_id: str) -> None:
        """Let all that were candidates earn, and the chosen one pay."""
        if instance_id in self._offered:
            self._offered[instance_id] -= self._price
            self._credits.update(self._offered)
        self._offered = {}

    def note_fleet(self, instance_ids: Sequence[str]) -> None:
        """Forget instances that left."""
        present = set(instance_ids)
        self._credits = {name: credit for name, credit in self._credits.items() if name in present}
        self._offered = {}


def weight_of(instance: ExecutionInstance) -> float:
    """Return the weight of an instance: its label's, or else its number of GPUs."""
    label = instance.labels.get(WEIGHT_LABEL)
    if label is not None:
        try:
            weight = float(label)
        except ValueError:
            weight = 0.0
        if _WEIGHT_RANGE[0] <= weight <= _WEIGHT_RANGE[1]:
            return weight
    return float(max(1, instance.gpu_count))
