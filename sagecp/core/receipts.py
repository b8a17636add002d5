"""Receipts: what a decision was made from, and making it again."""

from __future__ import annotations

import random

from sagecp.core.choice import Choice, choose
from sagecp.core.errors import SageError
from sagecp.core.placement import CandidateRow, PlacementInputs
from sagecp.core.policies.base import PolicyContext
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.router.registry import make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.types import CandidateScore, SchedulingDecision

# Candidates kept in a receipt. The choice does not depend on the others: each score
# is made from its own row alone.
RECEIPT_CANDIDATE_LIMIT = 8


def kept_inputs(inputs: PlacementInputs, choice: Choice) -> PlacementInputs:
    """Return the inputs with the best candidates only, the chosen one among them."""
    if len(inputs.candidates) <= RECEIPT_CANDIDATE_LIMIT:
        return inputs
    return PlacementInputs(inputs.request, tuple(row for _, row in _kept(choice)), inputs.parameters)


def kept_scores(choice: Choice) -> tuple[CandidateScore, ...]:
    """Return the scores of the candidates that a receipt keeps, best first."""
    return tuple(CandidateScore(row.instance_id, score) for score, row in _kept(choice))


def _kept(choice: Choice) -> tuple[tuple[float, CandidateRow], ...]:
    best, chosen = choice.ranked[:RECEIPT_CANDIDATE_LIMIT], choice.chosen
    if chosen is None or any(row is chosen for _, row in best):
        return best
    # It was open, and all of these were not.
    return (*best[:-1], next(entry for entry in choice.ranked if entry[1] is chosen))


def run_again(decision: SchedulingDecision) -> tuple[str, tuple[CandidateScore, ...]]:
    """Make a decision again from its receipt.

    Returns:
        The instance chosen, and the scores, best first: both equal the
        receipt's, bit for bit.

    Raises:
        SageError: The receipt holds no inputs.
    """
    if decision.inputs is None:
        raise SageError(f"the receipt of {decision.request_id!r} holds no inputs; it cannot be run again")
    # Chance is in the inputs already: this generator is never asked.
    strategy = make_strategy(decision.routing_strategy, decision.load_balancer, random.Random(0))
    name = decision.policy_in_force or decision.scheduling_policy
    policy = SCHEDULING_POLICIES.get(name)(PolicyContext(decision.inputs.parameters, ServiceBooks()))
    choice = choose(strategy, policy, decision.inputs)
    scores = tuple(CandidateScore(row.instance_id, score) for score, row in choice.ranked)
    return (choice.chosen.instance_id if choice.chosen is not None else "", scores)
