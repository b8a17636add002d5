"""The waiting line of the priority policy: classes that age, and fair shares within a class."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sagecp.core.fair_line import FairLine
from sagecp.core.request import RequestRecord
from sagecp.core.service_books import LaneKey, ServiceBooks, tenant_of
from sagecp.core.types import RequestPriority
from tests.support.core_world import make_record

CRITICAL, HIGH, NORMAL, LOW, BACKGROUND = RequestPriority
BOOSTS_S = {CRITICAL: 300.0, HIGH: 30.0, NORMAL: 0.0, LOW: -60.0, BACKGROUND: -600.0}
_TICKETS = itertools.count(1)


class Bench:
    """A line, and short ways to use it as a queue and a scheduler do."""

    def __init__(self, weights: dict[str, float] | None = None, books: ServiceBooks | None = None) -> None:
        self.weights = weights or {}
        self.books = books if books is not None else ServiceBooks()
        self.line = self.new_line()
        self.sequence = 0
        self.served_s: defaultdict[str, float] = defaultdict(float)

    def new_line(self) -> FairLine:
        return FairLine(BOOSTS_S, lambda tenant: self.weights.get(tenant, 1.0), self.books)

    def add(
        self, tenant: str, priority: RequestPriority = NORMAL, arrival_s: float = 0.0, model: str = "m"
    ) -> RequestRecord:
        self.sequence += 1
        record = make_record(
            f"r{self.sequence}", model, self.sequence, arrival_s, priority=priority, tenant_id=tenant
        )
        self.push(record)
        return record

    def push(self, record: RequestRecord) -> None:
        record.queue_ticket = next(_TICKETS)
        self.line.push(record)

    def drop(self, record: RequestRecord) -> None:
        record.queue_ticket = 0
        self.line.discard(record)

    def serve(self, cost_s: float = 1.0) -> RequestRecord:
        record = self.line.head(0.0)
        assert record is not None
        self.drop(record)
        self.line.note_dispatch(record, cost_s)
        self.served_s[tenant_of(record)] += cost_s
        return record

    def settle(self, record: RequestRecord, actual_cost_s: float) -> None:
        if self.books.settle(record, actual_cost_s):
            self.line.note_settled(record)

    def serve_names(self, count: int, cost_s: float = 1.0) -> str:
        return "".join(tenant_of(self.serve(cost_s)) for _ in range(count))

    def account(self, tenant: str, priority: RequestPriority = NORMAL, model: str = "m") -> Any:
        return self.books.account(LaneKey(model, priority), tenant)


def test_an_empty_line() -> None:
    line = Bench().line
    assert line.head(0.0) is None
    assert line.rank(0.0)[0] == float("inf")
    assert len(line) == 0
    assert list(line) == []
    line.step_over()
    line.step_back()


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([(NORMAL, 0.0), (HIGH, 10.0)], 1),
        ([(NORMAL, 0.0), (HIGH, 29.0)], 1),
        ([(NORMAL, 0.0), (HIGH, 31.0)], 0),
        ([(NORMAL, 0.0), (HIGH, 30.0)], 0),  # a tie goes to the earlier arrival
        ([(LOW, 0.0), (NORMAL, 59.0)], 1),
        ([(LOW, 0.0), (NORMAL, 61.0)], 0),
        ([(BACKGROUND, 0.0), (CRITICAL, 899.0)], 1),
        ([(BACKGROUND, 0.0), (CRITICAL, 901.0)], 0),
        ([(HIGH, 200.0), (CRITICAL, 450.0), (NORMAL, 160.0)], 1),
    ],
)
def test_the_class_whose_oldest_request_has_the_smallest_aged_arrival_goes_first(
    waiting: list[tuple[RequestPriority, float]], expected: int
) -> None:
    bench = Bench()
    records = [bench.add("a", priority, arrival_s) for priority, arrival_s in waiting]
    assert bench.line.head(1000.0) is records[expected]
    priority, arrival_s = waiting[expected]
    assert bench.line.rank(1000.0) == (arrival_s - BOOSTS_S[priority], records[expected].sequence)


def test_a_class_has_the_rank_of_its_oldest_request_whoever_is_served() -> None:
    bench = Bench()
    old = bench.add("flood", NORMAL, 0.0)
    bench.add("zeal", NORMAL, 40.0)
    bench.account("flood").standing_s = 50.0
    bench.add("other", HIGH, 50.0)
    assert [bench.serve_names(1) for _ in range(3)] == ["zeal", "flood", "other"]
    assert old.queue_ticket == 0


def test_background_is_served_under_a_constant_flow_of_high() -> None:
    bench = Bench()
    bench.add("night", BACKGROUND, 0.0)
    served_at_s = None
    for second in range(2000):
        # Two arrive for each that is served.
        bench.add("day", HIGH, float(second))
        bench.add("day", HIGH, float(second))
        if tenant_of(bench.serve()) == "night":
            served_at_s = second
            break
    # All that aged less than 630 s after it go first, at one a second.
    assert served_at_s == 2 * 630


def test_within_a_tenant_in_order_of_arrival_even_when_one_comes_back() -> None:
    bench = Bench()
    records = [bench.add("a", arrival_s=float(number)) for number in range(5)]
    first = bench.serve()
    assert first is records[0]
    bench.push(first)
    assert [bench.serve() for _ in range(5)] == records


def test_tenants_take_turns_and_ties_go_by_name() -> None:
    bench = Bench()
    for tenant in "cab" * 3:
        bench.add(tenant)
    assert bench.serve_names(9) == "abcabcabc"


def test_a_request_without_a_tenant_counts_for_its_user() -> None:
    assert tenant_of(make_record(user_id="u")) == "u"
    assert tenant_of(make_record(user_id="u", tenant_id="t")) == "t"


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]), min_size=2, max_size=4),
    costs_s=st.lists(st.floats(0.01, 20.0), min_size=50, max_size=120),
)
def test_service_per_weight_of_backlogged_tenants_differs_by_two_largest_costs_at_most(
    weights: list[float], costs_s: list[float]
) -> None:
    bench = Bench({str(number): weight for number, weight in enumerate(weights)})
    for tenant in bench.weights:
        for _ in costs_s:
            bench.add(tenant)
    bound_s = 2 * max(costs_s) / min(weights)
    for cost_s in costs_s:
        bench.serve(cost_s)
        shares_s = [bench.served_s[tenant] / weight for tenant, weight in bench.weights.items()]
        assert max(shares_s) - min(shares_s) <= bound_s + 1e-9


def test_weights_one_and_three_are_served_one_to_three_within_one_request() -> None:
    bench = Bench({"a": 1.0, "b": 3.0})
    for _ in range(400):
        bench.add("a")
        bench.add("b")
    for count in range(1, 401):
        bench.serve()
        assert abs(bench.served_s["a"] - count / 4) <= 1.0


def test_a_newcomer_has_no_claim_on_the_past() -> None:
    bench = Bench()
    for _ in range(300):
        bench.add("a")
    bench.serve_names(200)
    for _ in range(100):
        bench.add("b")
    assert bench.serve_names(10) == "ab" * 5


def test_idle_time_is_not_saved_up() -> None:
    bench = Bench()
    bench.add("b")
    bench.serve()
    for _ in range(300):
        bench.add("a")
    bench.serve_names(200)
    for _ in range(100):
        bench.add("b")
    assert bench.serve_names(6) in {"ab" * 3, "ba" * 3}


def test_an_empty_lane_lifts_to_the_last_that_left_it() -> None:
    bench = Bench()
    bench.add("a")
    bench.serve(100.0)
    bench.add("b")
    assert bench.line.head(0.0) is not None
    assert bench.account("b").standing_s == 100.0


def test_leaving_for_a_moment_wipes_out_no_debt() -> None:
    bench = Bench()
    for _ in range(20):
        bench.add("b")
    bench.add("a")
    bench.serve(10.0)
    bench.add("a")
    # It has had 10 s, so the other has 10 s first.
    assert bench.serve_names(11) == "b" * 10 + "a"


def test_service_of_another_class_or_model_is_no_debt() -> None:
    bench = Bench()
    other = Bench(books=bench.books)
    for _ in range(1000):
        bench.add("a", BACKGROUND)
        other.add("a", NORMAL, model="idle")
        bench.serve()
        other.serve()
    for _ in range(4):
        bench.add("b", NORMAL)
        bench.add("a", NORMAL)
    assert bench.serve_names(6) == "ababab"


def test_a_flood_delays_one_request_of_another_by_one_request() -> None:
    bench = Bench()
    for _ in range(10_000):
        bench.add("flood")
    bench.serve_names(100)
    bench.add("single", arrival_s=1.0)
    assert "single" in [tenant_of(bench.serve()) for _ in range(2)]


def test_a_tenant_whose_answers_are_longer_than_predicted_pays_for_them() -> None:
    bench = Bench()
    for _ in range(400):
        bench.add("long")
        bench.add("short")
    actual_s: defaultdict[str, float] = defaultdict(float)
    for _ in range(200):
        record = bench.serve(1.0)
        cost_s = 3.0 if tenant_of(record) == "long" else 1.0
        actual_s[tenant_of(record)] += cost_s
        bench.settle(record, cost_s)
    assert abs(actual_s["long"] - actual_s["short"]) <= 2 * 3.0


def test_a_refund_moves_a_waiting_tenant_forward_at_once() -> None:
    bench = Bench()
    for _ in range(10):
        bench.add("a")
        bench.add("b")
    record = bench.serve(100.0)
    assert tenant_of(record) == "a"
    assert bench.serve_names(2) == "bb"
    bench.settle(record, 1.0)
    assert bench.serve_names(4) == "aaba"


def test_a_refund_for_what_was_before_is_no_credit_now() -> None:
    bench = Bench()
    bench.add("a")
    old = bench.serve(100.0)
    for _ in range(10):
        bench.add("b")
    assert bench.line.head(0.0) is not None
    bench.account("b").standing_s = 150.0
    bench.account("a").standing_s = 200.0
    bench.add("a")
    assert bench.line.head(0.0) is not None
    bench.settle(old, 0.0)
    assert bench.account("a").standing_s == 150.0


def test_settlement_without_the_line_that_charged() -> None:
    bench = Bench()
    for _ in range(3):
        bench.add("a")
        bench.add("b")
    record = bench.serve(1.0)
    bench.books.settle(record, 2.5)
    assert bench.serve_names(4) == "bbba"


def test_books_survive_the_lines() -> None:
    bench = Bench()
    for _ in range(20):
        bench.add("a", arrival_s=1.0)
        bench.add("b", arrival_s=1.0)
    bench.serve(10.0)
    records = list(bench.line)
    bench.line = bench.new_line()
    for record in sorted(records, key=lambda each: each.sequence):
        bench.push(record)
    assert len(bench.line) == 39
    assert bench.serve_names(11) == "b" * 10 + "a"


# -- stepping over ---------------------------------------------------------------


def test_stepping_over_goes_through_the_order_of_service_and_back() -> None:
    bench = Bench()
    records = [bench.add(tenant, arrival_s=float(n)) for n, tenant in enumerate("aaab")]
    records.append(bench.add("c", LOW, 0.0))
    heads = []
    for _ in range(5):
        heads.append(bench.line.head(0.0))
        bench.line.step_over()
    # The other tenant is next, then the first again, and the lower class at the end.
    assert heads == [records[0], records[3], records[1], records[2], records[4]]
    assert bench.line.head(0.0) is None
    assert bench.line.rank(0.0)[0] == float("inf")
    assert len(bench.line) == 5
    assert sorted(r.sequence for r in bench.line) == [1, 2, 3, 4, 5]
    bench.line.step_over()
    bench.line.step_back()
    assert bench.line.head(0.0) is records[0]
    assert bench.serve_names(5) == "abaac"


def test_a_dispatch_between_stepping_over_and_back() -> None:
    bench = Bench()
    first, second, third = (bench.add("a", arrival_s=float(n)) for n in range(3))
    bench.line.step_over()
    assert bench.serve() is second
    bench.line.step_over()
    bench.line.step_back()
    assert [bench.serve(), bench.serve()] == [first, third]
    assert len(bench.line) == 0


def test_a_stepped_over_request_may_leave() -> None:
    bench = Bench()
    gone = bench.add("a")
    bench.line.step_over()
    bench.drop(gone)
    assert len(bench.line) == 0
    bench.line.step_back()
    assert bench.line.head(0.0) is None
    back = bench.add("a")
    assert bench.line.head(0.0) is back


# -- position ----------------------------------------------------------------------

WAITING = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([HIGH, NORMAL, LOW]), st.integers(0, 90)), max_size=25
)


@given(WAITING, st.dictionaries(st.sampled_from("abc"), st.integers(0, 6)))
def test_positions_come_true_if_each_request_costs_the_mean(
    waiting: list[tuple[str, RequestPriority, int]], standings: dict[str, int]
) -> None:
    bench = Bench({"b": 2.0, "c": 4.0})
    for tenant, priority, arrival_s in waiting:
        bench.add(tenant, priority, float(arrival_s))
    for tenant, standing_s in standings.items():
        bench.account(tenant).standing_s = float(standing_s)
    # 1 s is the mean before the first dispatch, and stays so.
    predicted = {record.sequence: bench.line.position(record, 0.0) for record in bench.line}
    assert len(bench.line) == 0 or bench.line.head(0.0) is not None
    assert predicted == {record.sequence: bench.line.position(record, 0.0) for record in bench.line}
    assert {bench.serve().sequence: n for n in range(len(waiting))} == predicted


def test_the_position_of_a_newcomer_is_that_of_one_who_is_lifted() -> None:
    bench = Bench()
    for _ in range(8):
        bench.add("a")
    bench.serve_names(4)
    records = [bench.add("b") for _ in range(3)]
    assert [bench.line.position(record, 0.0) for record in records] == [1, 3, 5]
    # Asking lifted nobody.
    assert bench.account("b").standing_s == 0.0


def test_positions_are_exact_where_standings_are_not() -> None:
    """Sums of tenths: the turn of a request must count as its own, whatever they round to."""
    for number in range(1, 50):
        bench = Bench()
        bench.add("a", HIGH)
        bench.add("b", HIGH)
        bench.serve_names(2, cost_s=0.1 * number)
        # Two tenants, so that each one's turn is compared with the other's.
        high = [bench.add(tenant, HIGH) for _ in range(4) for tenant in "ab"]
        normal = [bench.add("c") for _ in range(3)]
        assert [bench.line.position(record, 0.0) for record in (*high, *normal)] == list(range(11))


def test_position_where_requests_cost_nothing() -> None:
    bench = Bench()
    records = [bench.add(tenant) for tenant in "abab"]
    bench.books.ledger(LaneKey("m", NORMAL)).mean_cost_s = 0.0
    assert [bench.line.position(record, 0.0) for record in records] == [0, 2, 1, 3]


# -- books -------------------------------------------------------------------------


def test_books_forget_the_least_recent_account() -> None:
    books = ServiceBooks(3)
    lane = LaneKey("m", NORMAL)
    for tenant in "abc":
        books.account(lane, tenant).standing_s = 5.0
    books.account(lane, "a")
    books.account(lane, "d")
    assert len(books) == 3
    assert [books.account(lane, tenant).standing_s for tenant in "acb"] == [5.0, 5.0, 0.0]


def test_books_spare_accounts_with_running_requests_up_to_twice_the_limit() -> None:
    books = ServiceBooks(3)
    lane = LaneKey("m", NORMAL)
    for number in range(5):
        books.account(lane, f"running{number}").running_count = 1
    assert len(books) == 5
    account = books.account(lane, "new")
    assert books.account(lane, "new") is account
    for number in range(100):
        books.account(lane, f"more{number}").running_count = 1
        assert len(books) <= 6


def test_a_waiting_tenant_is_not_forgotten() -> None:
    books = ServiceBooks(2)
    bench = Bench(books=books)
    for _ in range(3):
        bench.add("a")
    bench.serve(40.0)
    for number in range(10):
        books.account(LaneKey("other", NORMAL), str(number))
    bench.serve(2.0)
    assert bench.account("a").standing_s == 42.0


def test_ledgers_are_bounded() -> None:
    books = ServiceBooks(2)
    first = books.ledger(LaneKey("m0", NORMAL))
    second = books.ledger(LaneKey("m1", NORMAL))
    assert books.ledger(LaneKey("m0", NORMAL)) is first
    books.ledger(LaneKey("m2", NORMAL))
    assert books.ledger(LaneKey("m0", NORMAL)) is first
    assert books.ledger(LaneKey("m1", NORMAL)) is not second


# -- everything at once ----------------------------------------------------------


@dataclass
class NaiveLine:
    """The same order from lists, looked through from end to end every time."""

    weights: dict[str, float]
    waiting: list[RequestRecord] = field(default_factory=list)
    stepped: list[RequestRecord] = field(default_factory=list)
    provisional_s: dict[tuple[RequestPriority, str], float] = field(default_factory=dict)
    standing_s: dict[tuple[RequestPriority, str], float] = field(default_factory=dict)
    floor_s: dict[tuple[RequestPriority, str], float] = field(default_factory=dict)
    last_to_leave: dict[RequestPriority, tuple[RequestPriority, str]] = field(default_factory=dict)
    mean_cost_s: dict[RequestPriority, float] = field(default_factory=dict)

    @staticmethod
    def key(record: RequestRecord) -> tuple[RequestPriority, str]:
        return (record.metadata.priority, tenant_of(record))

    def push(self, record: RequestRecord) -> None:
        key = self.key(record)
        waiting_keys = {self.key(r) for r in self.waiting if r.metadata.priority == key[0]}
        if key not in waiting_keys:
            last = self.last_to_leave.get(key[0])
            if waiting_keys:
                floor_s = min(self.standing_s[k] for k in waiting_keys)
            else:
                floor_s = self.standing_s[last] if last is not None else 0.0
            self.floor_s[key] = floor_s
            self.standing_s[key] = max(self.standing_s.get(key, 0.0), floor_s)
        self.waiting.append(record)

    def discard(self, record: RequestRecord) -> None:
        self.waiting.remove(record)
        if not any(r.metadata.priority == record.metadata.priority for r in self.waiting):
            self.last_to_leave[record.metadata.priority] = self.key(record)

    def charge(self, record: RequestRecord, cost_s: float) -> None:
        key = self.key(record)
        standing_s = self.standing_s.get(key, 0.0) + cost_s / self.weights[key[1]]
        self.standing_s[key] = max(self.floor_s.get(key, 0.0), standing_s)

    def dispatch(self, record: RequestRecord, cost_s: float) -> None:
        self.discard(record)
        self.charge(record, cost_s)
        mean_cost_s = self.mean_cost_s.get(record.metadata.priority, 1.0)
        self.mean_cost_s[record.metadata.priority] = mean_cost_s + 0.05 * (cost_s - mean_cost_s)

    def step_over(self, record: RequestRecord) -> None:
        key = self.key(record)
        cost_s = self.mean_cost_s.get(key[0], 1.0) / self.weights[key[1]]
        self.provisional_s[key] = self.provisional_s.get(key, 0.0) + cost_s
        self.stepped.append(record)

    def step_back(self) -> None:
        self.stepped.clear()
        self.provisional_s.clear()

    def head_and_rank(self) -> tuple[RequestRecord, tuple[float, int]] | None:
        there = [r for r in self.waiting if r not in self.stepped]
        if not there:
            return None
        rank, priority = min(
            ((r.arrival_s - BOOSTS_S[r.metadata.priority], r.sequence), r.metadata.priority) for r in there
        )

        def order(record: RequestRecord) -> tuple[float, str, float, int]:
            key = self.key(record)
            standing_s = self.standing_s[key] + self.provisional_s.get(key, 0.0)
            return (standing_s, key[1], record.arrival_s, record.sequence)

        return min((r for r in there if r.metadata.priority == priority), key=order), rank


COST_S = st.integers(0, 40).map(lambda quarters: quarters / 4)


class FairLineMachine(RuleBasedStateMachine):
    """Random use of the line and of the naive one, compared after every step."""

    @initialize()
    def start(self) -> None:
        weights = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 0.5}
        self.bench = Bench(weights)
        self.naive = NaiveLine(weights)
        self.running: list[tuple[RequestRecord, float]] = []

    @rule(
        tenant=st.sampled_from("abcd"),
        priority=st.sampled_from([HIGH, NORMAL, LOW]),
        arrival_s=st.integers(0, 100),
        count=st.integers(1, 4),
    )
    def arrive(self, tenant: str, priority: RequestPriority, arrival_s: int, count: int) -> None:
        for _ in range(count):
            self.naive.push(self.bench.add(tenant, priority, float(arrival_s)))

    @rule(cost_s=COST_S, step_over_count=st.integers(0, 6))
    def dispatch(self, cost_s: float, step_over_count: int) -> None:
        for _ in range(step_over_count):
            head = self.bench.line.head(0.0)
            if head is not None:
                self.bench.line.step_over()
                self.naive.step_over(head)
            self.compare()
        if self.bench.line.head(0.0) is not None:
            record = self.bench.serve(cost_s)
            self.naive.dispatch(record, cost_s)
            self.running.append((record, cost_s))
            self.compare()
        self.bench.line.step_back()
        self.naive.step_back()

    @rule(choice=st.integers(0, 50))
    def cancel(self, choice: int) -> None:
        if self.naive.waiting:
            record = self.naive.waiting[choice % len(self.naive.waiting)]
            self.naive.discard(record)
            self.bench.drop(record)

    @rule(choice=st.integers(0, 50), actual_s=COST_S, comes_back=st.booleans())
    def settle(self, choice: int, actual_s: float, comes_back: bool) -> None:
        if self.running:
            record, predicted_s = self.running.pop(choice % len(self.running))
            self.bench.settle(record, actual_s)
            self.naive.charge(record, actual_s - predicted_s)
            if comes_back:
                self.bench.push(record)
                self.naive.push(record)

    @invariant()
    def compare(self) -> None:
        line = self.bench.line
        expected = self.naive.head_and_rank()
        head = line.head(0.0)
        assert (None if expected is None else expected[0]) is head
        if expected is not None:
            assert line.rank(0.0) == expected[1]
        assert len(line) == len(self.naive.waiting)
        assert sorted(r.sequence for r in line) == sorted(r.sequence for r in self.naive.waiting)
        for (priority, tenant), standing_s in self.naive.standing_s.items():
            assert self.bench.account(tenant, priority).standing_s == standing_s


FairLineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFairLineMachine = FairLineMachine.TestCase


def test_dead_entries_do_not_pile_up() -> None:
    bench = Bench()
    for tenant in "ab":
        bench.add(tenant)
    for _ in range(5000):
        record = bench.add("a", arrival_s=5.0)
        bench.line.note_dispatch(record, 0.001)
        bench.settle(record, 0.0005)
        bench.drop(record)
    lane = bench.line._lanes[NORMAL]
    assert len(lane._order) <= 64
    assert len(lane.by_age._heap) <= 200
    assert bench.serve_names(2) == "ba"
