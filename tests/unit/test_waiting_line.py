"""Lines of waiting requests: lazy heaps, and the order of a key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.request import RequestRecord
from sagecp.core.slo_line import SloLine
from sagecp.core.waiting_line import KeyedLine, LazyHeap, WaitingLine
from tests.support.core_world import make_record


class Tickets:
    """Gives and takes tickets as the queue does."""

    def __init__(self) -> None:
        self.last = 0

    def give(self, record: RequestRecord) -> RequestRecord:
        self.last += 1
        record.queue_ticket = self.last
        return record


def records(*keys: float) -> list[RequestRecord]:
    """Requests with tickets, whose arrivals are the keys."""
    tickets = Tickets()
    return [
        tickets.give(make_record(f"r{n}", sequence=n, arrival_s=key)) for n, key in enumerate(keys, start=1)
    ]


def heap_of(waiting: list[RequestRecord]) -> LazyHeap:
    heap = LazyHeap()
    for record in waiting:
        heap.push(record.arrival_s, record)
    return heap


def leave(heap: LazyHeap, record: RequestRecord) -> None:
    record.queue_ticket = 0
    heap.discard()


def heads(heap: LazyHeap) -> list[RequestRecord]:
    """Take everything out, first to last."""
    taken = []
    while (entry := heap.head()) is not None:
        taken.append(entry[3])
        heap.pop(entry[3])
    return taken


# -- the heap --------------------------------------------------------------------------


def test_an_empty_heap() -> None:
    heap = LazyHeap()
    assert heap.head() is None
    assert heap.live_count == 0
    assert list(heap) == []
    heap.step_over()
    heap.step_back()
    assert heap.head() is None


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ([3.0, 1.0, 2.0], [2, 3, 1]),
        ([5.0, 5.0, 5.0], [1, 2, 3]),
        ([float("inf"), 0.0, float("-inf")], [3, 2, 1]),
    ],
)
def test_the_smallest_key_is_first_and_ties_go_to_the_earlier(keys: list[float], order: list[int]) -> None:
    assert [record.sequence for record in heads(heap_of(records(*keys)))] == order


def test_whoever_left_is_not_the_head() -> None:
    waiting = records(1.0, 2.0, 3.0)
    heap = heap_of(waiting)
    leave(heap, waiting[0])
    assert heap.live_count == 2
    assert {entry[3].request_id for entry in heap} == {"r2", "r3"}
    assert heads(heap) == waiting[1:]


def test_a_request_that_came_back_is_not_its_own_dead_entry() -> None:
    waiting = records(1.0, 2.0)
    heap = heap_of(waiting)
    leave(heap, waiting[0])
    waiting[0].queue_ticket = 99
    heap.push(3.0, waiting[0])
    assert [entry[3] for entry in heap].count(waiting[0]) == 1
    assert heads(heap) == [waiting[1], waiting[0]]


def test_only_the_head_can_be_popped() -> None:
    waiting = records(1.0, 2.0)
    heap = heap_of(waiting)
    with pytest.raises(ValueError, match="request 'r2' is not the head"):
        heap.pop(waiting[1])
    assert heap.live_count == 2
    with pytest.raises(ValueError, match="is not the head"):
        LazyHeap().pop(waiting[0])


def test_stepping_over_uncovers_the_next_until_stepping_back() -> None:
    waiting = records(1.0, 2.0, 3.0, 4.0)
    heap = heap_of(waiting)
    heap.step_over()
    heap.step_over()
    assert heap.live_count == 4
    head = heap.head()
    assert head is not None
    assert head[3] is waiting[2]
    assert {entry[3].request_id for entry in heap} == {"r1", "r2", "r3", "r4"}
    leave(heap, waiting[1])
    heap.step_back()
    assert heads(heap) == [waiting[0], waiting[2], waiting[3]]


def test_stepping_over_skips_the_dead() -> None:
    waiting = records(1.0, 2.0)
    heap = heap_of(waiting)
    leave(heap, waiting[0])
    heap.step_over()
    assert heap.head() is None
    heap.step_back()
    assert heads(heap) == [waiting[1]]


def test_the_dead_do_not_outnumber_the_living_for_long() -> None:
    keeper = records(0.0)
    heap = heap_of(keeper)
    for number in range(5000):
        record = make_record(f"x{number}", sequence=number + 10, arrival_s=float(number))
        record.queue_ticket = number + 10
        heap.push(record.arrival_s, record)
        leave(heap, record)
        assert len(heap._heap) <= 65
    assert heads(heap) == keeper


# -- the line --------------------------------------------------------------------------


def keyed(key: Callable[[RequestRecord], float]) -> KeyedLine:
    return KeyedLine(key)


def drain(line: WaitingLine) -> list[RequestRecord]:
    taken = []
    while (record := line.head(0.0)) is not None:
        record.queue_ticket = 0
        line.discard(record)
        taken.append(record)
    return taken


def test_a_keyed_line_is_in_the_order_of_its_key() -> None:
    line = keyed(lambda record: -record.arrival_s)
    waiting = records(1.0, 3.0, 2.0)
    for record in waiting:
        line.push(record)
    assert len(line) == 3
    assert line.rank(0.0) == (-3.0, 2)
    assert [line.position(record, 0.0) for record in waiting] == [2, 0, 1]
    assert set(line) == set(waiting)
    assert drain(line) == [waiting[1], waiting[2], waiting[0]]
    assert line.rank(0.0) == (float("inf"), 0)
    assert line.head(0.0) is None


def test_a_line_that_was_stepped_over_as_a_whole_has_no_head() -> None:
    line = keyed(lambda record: record.arrival_s)
    waiting = records(1.0, 2.0)
    for record in waiting:
        line.push(record)
    line.step_over()
    line.step_over()
    assert line.head(0.0) is None
    assert len(line) == 2
    assert [line.position(record, 0.0) for record in waiting] == [0, 1]
    line.step_back()
    assert drain(line) == waiting


def test_a_line_without_a_place_for_the_hopeless_says_so() -> None:
    line = keyed(lambda record: record.arrival_s)
    with pytest.raises(NotImplementedError, match="KeyedLine has no place for r1"):
        line.demote(records(1.0)[0])


def test_a_line_without_accounts_charges_nobody() -> None:
    line = keyed(lambda record: record.arrival_s)
    [record] = records(1.0)
    line.push(record)
    line.note_dispatch(record, 5.0)
    line.note_settled(record)
    assert line.head(0.0) is record


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "remove", "again", "step_over", "step_back"]), st.integers(0, 20)
    ),
    max_size=80,
)


@given(STEPS, st.booleans())
def test_a_line_is_a_sorted_list(steps: list[tuple[str, int]], slo: bool) -> None:
    line: WaitingLine = (
        SloLine(lambda r: r.arrival_s, 0.1) if slo else KeyedLine(lambda record: record.arrival_s)
    )
    tickets = Tickets()
    waiting: list[RequestRecord] = []
    gone: list[RequestRecord] = []
    over: list[RequestRecord] = []

    def order(record: RequestRecord) -> tuple[float, int]:
        return record.arrival_s, record.sequence

    for sequence, (step, number) in enumerate(steps):
        in_view = sorted((record for record in waiting if record not in over), key=order)
        if step == "push":
            record = tickets.give(make_record(f"r{sequence}", sequence=sequence, arrival_s=float(number % 5)))
            line.push(record)
            waiting.append(record)
        elif step == "remove" and waiting:
            record = waiting.pop(number % len(waiting))
            record.queue_ticket = 0
            line.discard(record)
            gone.append(record)
            over = [each for each in over if each is not record]
        elif step == "again" and gone:
            record = tickets.give(gone.pop(number % len(gone)))
            line.push(record)
            waiting.append(record)
        elif step == "step_over" and in_view:
            line.step_over()
            over.append(in_view[0])
        elif step == "step_back":
            line.step_back()
            over.clear()
        in_view = sorted((record for record in waiting if record not in over), key=order)
        assert line.head(0.0) is (in_view[0] if in_view else None)
        assert line.rank(0.0)[0] == (in_view[0].arrival_s if in_view else float("inf"))
        assert len(line) == len(waiting)
        assert sorted(r.sequence for r in line) == sorted(r.sequence for r in waiting)
    line.step_back()
    expected = sorted(waiting, key=order)
    assert [line.position(record, 0.0) for record in expected] == list(range(len(expected)))
    assert drain(line) == expected
