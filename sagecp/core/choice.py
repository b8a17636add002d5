"""The choice of an instance, as a function of a receipt's inputs and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.placement import CandidateRow, PlacementInputs
from sagecp.core.plan_preference import unsuited_score
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.router.base import RoutingStrategy

_Ranked = tuple[float, int, str, CandidateRow]


@dataclass(frozen=True, slots=True)
class Choice:
    """What came out.

    Attributes:
        chosen: The instance to take now; ``None``: wait for the best.
        ranked: Score and candidate, best first.
    """

    chosen: CandidateRow | None
    ranked: tuple[tuple[float, CandidateRow], ...]

    @property
    def best(self) -> CandidateRow:
        """The candidate with the lowest score, whether or not it is open."""
        return self.ranked[0][1]

    @property
    def score(self) -> float:
        """Score of the chosen candidate, or of the best."""
        chosen = self.chosen or self.best
        return next(score for score, row in self.ranked if row is chosen)


def choose(strategy: RoutingStrategy, policy: SchedulingPolicy, inputs: PlacementInputs) -> Choice:
    """Choose an instance, or to wait for one.

    The lowest score wins, after those of instances whose plan does not suit were made
    worse; ties go to the instance that was chosen longest ago, then by id. When the
    winner is busy, the best open candidate is taken if its score is within the
    patience of the winner's.

    Args:
        strategy: Rates the candidates.
        policy: May weigh the ratings by what it cares for.
        inputs: What is known; at least one candidate.
    """
    request, parameters = inputs.request, inputs.parameters
    score = strategy.score
    ranked: list[_Ranked]
    # Most policies leave scores as they are: no call, then.
    if strategy.is_loss and type(policy).rescore is not SchedulingPolicy.rescore:
        rescore = policy.rescore
        ranked = [
            (
                rescore(request, row, score(request, row, parameters), parameters),
                row.last_dispatch_sequence,
                row.instance_id,
                row,
            )
            for row in inputs.candidates
        ]
    else:
        ranked = [
            (score(request, row, parameters), row.last_dispatch_sequence, row.instance_id, row)
            for row in inputs.candidates
        ]
    if any(row.plan_mismatch for row in inputs.candidates):
        share = parameters["placement.plan_preference"]
        ranked = [
            (unsuited_score(entry[0], share, is_loss=strategy.is_loss), *entry[1:])
            if entry[3].plan_mismatch
            else entry
            for entry in ranked
        ]
    # Ids are unique: no comparison gets as far as the rows.
    ranked.sort()
    best_score, _, _, best = ranked[0]
    chosen: CandidateRow | None = best
    if not best.is_open:
        patience = parameters["dispatch.patience"] if strategy.is_loss else 0.0
        chosen = next(
            (row for row_score, _, _, row in ranked if row.is_open and row_score <= best_score + patience),
            None,
        )
    return Choice(chosen, tuple((row_score, row) for row_score, _, _, row in ranked))
