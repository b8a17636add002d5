"""The choice of an instance: ties, patience, and waiting for a better one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.choice import Choice, choose
from sagecp.core.placement import CandidateRow, PlacementInputs, RequestRow
from sagecp.core.policies.base import PolicyContext, SchedulingPolicy
from sagecp.core.policies.fifo import FifoPolicy
from sagecp.core.router.base import LoadBalancer, RoutingStrategy, ScorerContext
from sagecp.core.router.registry import make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import PARAMETERS
from tests.support.placement_rows import candidate_row, request_row

PATIENCE = 0.05


class ByExtra(RoutingStrategy):
    """Scores are given with the rows."""

    name: ClassVar[str] = "by_extra"

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        return candidate.extra


class LossByExtra(ByExtra):
    is_loss: ClassVar[bool] = True


class Doubter(FifoPolicy):
    """Turns the order of scores around."""

    def rescore(
        self, request: RequestRow, candidate: CandidateRow, score: float, parameters: Mapping[str, float]
    ) -> float:
        return -score


def strategy_of(kind: type[RoutingStrategy] = LossByExtra) -> RoutingStrategy:
    class Nothing(LoadBalancer):
        def score(
            self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]
        ) -> float:
            raise AssertionError("never asked")

    context = ScorerContext(random.Random(0))
    return kind(context, Nothing(context))


def made(
    *rows: CandidateRow,
    kind: type[RoutingStrategy] = LossByExtra,
    policy: type[SchedulingPolicy] = FifoPolicy,
    patience: float = PATIENCE,
) -> Choice:
    parameters = PARAMETERS.resolve({"dispatch.patience": patience})
    inputs = PlacementInputs(request_row(), rows, parameters)
    return choose(strategy_of(kind), policy(PolicyContext(parameters, ServiceBooks())), inputs)


def row(instance_id: str, score: float, last: int = 0, *, busy: bool = False) -> CandidateRow:
    return candidate_row(
        instance_id,
        extra=score,
        last_dispatch_sequence=last,
        is_open=0 if busy else 1,
        opens_in_s=1.0 if busy else 0.0,
    )


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        ([row("a", 0.2), row("b", 0.1), row("c", 0.3)], "bac"),
        # Ties: chosen longest ago.
        ([row("a", 0.1, 7), row("b", 0.1, 3), row("c", 0.1, 5)], "bca"),
        # Then by id, whatever the order of the rows.
        ([row("c", 0.1), row("a", 0.1), row("b", 0.1)], "abc"),
        ([row("a", float("inf"), 2), row("b", float("inf"), 1)], "ba"),
        ([row("a", 0.0)], "a"),
    ],
)
def test_the_lowest_score_wins(rows: list[CandidateRow], order: str) -> None:
    for kind in (ByExtra, LossByExtra):
        choice = made(*rows, kind=kind)
        assert [each.instance_id for _, each in choice.ranked] == list(order)
        assert choice.chosen is choice.best is choice.ranked[0][1]
        assert choice.score == choice.ranked[0][0]


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        # The best is open.
        ([row("a", 0.1), row("b", 0.09, busy=False)], "b"),
        # Within the patience the best open one is taken.
        ([row("best", 0.10, busy=True), row("near", 0.14), row("far", 0.5)], "near"),
        ([row("best", 0.10, busy=True), row("near", 0.14), row("nearer", 0.12)], "nearer"),
        ([row("best", 0.10, busy=True), row("second", 0.11, busy=True), row("near", 0.14)], "near"),
        ([row("best", 0.25, busy=True), row("edge", 0.30)], "edge"),
        # Farther than that: wait.
        ([row("best", 0.10, busy=True), row("far", 0.16)], ""),
        ([row("best", 0.10, busy=True)], ""),
        # An equal that is open is as good.
        ([row("busy", 0.10, busy=True), row("open", 0.10, 9)], "open"),
    ],
)
def test_a_busy_winner_is_waited_for_within_reason(rows: list[CandidateRow], chosen: str) -> None:
    choice = made(*rows)
    assert (choice.chosen.instance_id if choice.chosen else "") == chosen
    if choice.chosen is None:
        assert choice.score == choice.ranked[0][0]


@pytest.mark.parametrize(("patience", "chosen"), [(0.0, ""), (0.05, ""), (0.07, "far"), (10.0, "far")])
def test_patience_is_a_parameter(patience: float, chosen: str) -> None:
    choice = made(row("best", 0.10, busy=True), row("far", 0.16), patience=patience)
    assert (choice.chosen.instance_id if choice.chosen else "") == chosen


def test_scores_that_are_no_losses_know_no_patience() -> None:
    choice = made(row("best", 3.0, busy=True), row("near", 3.01), kind=ByExtra, patience=10.0)
    assert choice.chosen is None
    assert choice.best.instance_id == "best"


def test_the_policy_has_the_last_word_on_losses_and_none_on_other_scores() -> None:
    rows = [row("a", 1.0), row("b", 2.0)]
    assert made(*rows, policy=Doubter).best.instance_id == "b"
    assert made(*rows, policy=Doubter).ranked[0][0] == -2.0
    assert made(*rows, policy=Doubter, kind=ByExtra).best.instance_id == "a"


def test_the_score_is_that_of_the_chosen_one() -> None:
    choice = made(row("best", 0.10, busy=True), row("near", 0.14))
    assert choice.score == 0.14
    assert choice.best.instance_id == "best"


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.04, 0.05, 0.2, 1.0]), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_rows_does_not_matter(
    cells: list[tuple[float, int, bool]], patience: float, draw: random.Random
) -> None:
    rows = [row(f"i{n}", score, last, busy=busy) for n, (score, last, busy) in enumerate(cells)]
    choice = made(*rows, patience=patience)
    draw.shuffle(rows)
    assert made(*rows, patience=patience) == choice
    open_scores = [each.extra for each in rows if each.is_open]
    least = min(each.extra for each in rows)
    if choice.chosen is None:
        assert not open_scores or min(open_scores) > least + patience
    else:
        assert choice.chosen.is_open
        assert choice.chosen.extra == min(open_scores)


def test_load_balanced_asks_its_balancer_whether_scores_are_losses() -> None:
    assert make_strategy("load_balanced", "predicted_latency", random.Random(0)).is_loss
    assert not make_strategy("load_balanced", "least_connections", random.Random(0)).is_loss
    assert not make_strategy("round_robin", "predicted_latency", random.Random(0)).is_loss
