"""The queue: lines per model, bounds, what waits, and other policies' lines."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import ErrorReason, QueueFullError
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.slo_line import SloLine
from sagecp.core.types import RequestMetadata, RequestPriority
from sagecp.core.waiting_line import KeyedLine, WaitingLine
from tests.support.core_world import make_record


def by_arrival(record: RequestRecord) -> float:
    return record.arrival_s


def by_class(record: RequestRecord) -> float:
    return record.arrival_s + 30.0 * record.metadata.priority


def lines_by(key: Callable[[RequestRecord], float]) -> Callable[[], WaitingLine]:
    return lambda: KeyedLine(key)


def make_queue(max_request_count: int = 1000, max_size_bytes: int = 1 << 20) -> RequestQueue:
    return RequestQueue(lines_by(by_arrival), max_request_count, max_size_bytes)


def fill(queue: RequestQueue, count: int, model: str = "m") -> list[RequestRecord]:
    """Push requests that arrive one second apart."""
    records = [make_record(f"{model}-{n}", model, sequence=n, arrival_s=float(n)) for n in range(count)]
    for record in records:
        queue.push(record)
    return records


def take_all(queue: RequestQueue, model: str = "m") -> list[RequestRecord]:
    taken = []
    while (line := queue.line(model)) is not None and (head := line.head(0.0)) is not None:
        queue.remove(head)
        taken.append(head)
    return taken


def models(queue: RequestQueue) -> list[str]:
    return [model for model, _ in queue.lines()]


def test_an_empty_queue() -> None:
    queue = make_queue()
    assert len(queue) == 0
    assert models(queue) == []
    assert queue.line("m") is None
    assert queue.work_s == 0.0
    assert queue.count_by_model() == {}
    assert list(queue) == []


def test_first_in_first_out_whatever_the_order_of_pushes() -> None:
    queue = make_queue()
    records = [make_record(f"r{n}", sequence=n, arrival_s=float(n)) for n in range(50)]
    for record in random.Random(1).sample(records, len(records)):
        queue.push(record)
    assert take_all(queue) == records


def test_ties_go_to_the_earlier_arrival() -> None:
    queue = make_queue()
    records = [make_record(f"r{n}", sequence=n, arrival_s=7.0) for n in range(10)]
    for record in reversed(records):
        queue.push(record)
    assert take_all(queue) == records


def test_models_do_not_mix() -> None:
    queue = make_queue()
    ours, theirs = fill(queue, 3, "m"), fill(queue, 2, "n")
    assert sorted(models(queue)) == ["m", "n"]
    assert queue.count_by_model() == {"m": 3, "n": 2}
    assert take_all(queue, "m") == ours
    assert models(queue) == ["n"]
    assert take_all(queue, "n") == theirs
    assert models(queue) == []


def test_heads_of_different_models_compare_without_comparing_requests() -> None:
    queue = make_queue()
    for model in ("n", "m"):
        queue.push(make_record(model, model, sequence=ord(model), arrival_s=1.0))
    assert min((line.rank(0.0), model) for model, line in queue.lines()) == ((1.0, ord("m")), "m")


def test_count_and_bytes_follow_every_change() -> None:
    queue = make_queue()
    records = [make_record(f"r{n}", sequence=n, prompt="x" * n * 10) for n in range(5)]
    for record in records:
        queue.push(record)
    assert (len(queue), queue.size_bytes) == (5, 100)
    assert all(record.queued for record in records)
    queue.remove(records[3])
    assert (len(queue), queue.size_bytes) == (4, 70)
    assert not records[3].queued
    assert records[3] not in list(queue)


def test_work_follows_every_change_and_ends_at_exactly_nothing() -> None:
    queue = make_queue()
    records = fill(queue, 3, "m") + fill(queue, 3, "n")
    for record in records:
        queue.remove(record)
    for number, record in enumerate(records):
        record.work_s = 0.1 * (number + 1)
        queue.push(record)
    assert queue.work_s == pytest.approx(2.1)
    queue.remove(records[5])
    assert queue.work_s == pytest.approx(1.5)
    for record in records[:5]:
        queue.remove(record)
    assert queue.work_s == 0.0


def test_removal_from_the_middle_keeps_the_order() -> None:
    queue = make_queue()
    records = fill(queue, 20)
    for record in records[5:15]:
        queue.remove(record)
    assert take_all(queue) == records[:5] + records[15:]


def test_a_request_may_come_back_while_its_dead_entry_is_still_there() -> None:
    queue = make_queue()
    records = fill(queue, 4)
    for _ in range(3):
        queue.remove(records[2])
        queue.push(records[2])
    assert len(queue) == 4
    assert list(queue).count(records[2]) == 1
    assert queue.position(records[3], 0.0) == 3
    assert take_all(queue) == records


def test_removed_requests_do_not_pile_up() -> None:
    queue = make_queue(max_request_count=10**6)
    keeper = make_record("keeper", sequence=0, arrival_s=0.0)
    queue.push(keeper)
    for number in range(1, 5000):
        record = make_record(f"r{number}", sequence=number, arrival_s=float(number))
        queue.push(record)
        queue.remove(record)
    line = queue.line("m")
    assert isinstance(line, KeyedLine)
    assert len(line._heap._heap) <= 65
    assert take_all(queue) == [keeper]
    assert not queue._lines


def test_position_counts_those_that_go_before() -> None:
    queue = make_queue()
    records = fill(queue, 10)
    queue.remove(records[0])
    queue.remove(records[4])
    waiting = [record for record in records if record.queued]
    assert [queue.position(record, 0.0) for record in waiting] == list(range(8))


def test_a_new_policy_reorders_what_waits() -> None:
    queue = make_queue()
    low = make_record("low", sequence=1, arrival_s=0.0, priority=RequestPriority.LOW)
    normal = make_record("normal", sequence=2, arrival_s=1.0)
    high = make_record("high", sequence=3, arrival_s=2.0, priority=RequestPriority.HIGH)
    gone = make_record("gone", sequence=4, arrival_s=0.5)
    for record in (low, normal, high, gone):
        queue.push(record)
    queue.remove(gone)
    assert [queue.position(record, 0.0) for record in (low, normal, high)] == [0, 1, 2]
    queue.reorder(lines_by(by_class))
    assert [queue.position(record, 0.0) for record in (high, normal, low)] == [0, 1, 2]
    late = make_record("late", sequence=5, arrival_s=3.0, priority=RequestPriority.CRITICAL)
    queue.push(late)
    assert take_all(queue) == [late, high, normal, low]


def test_new_lines_are_of_the_policy_in_force() -> None:
    queue = make_queue()
    queue.reorder(lines_by(by_class))
    background = make_record("background", sequence=1, priority=RequestPriority.BACKGROUND)
    normal = make_record("normal", sequence=2, arrival_s=1.0)
    queue.push(background)
    queue.push(normal)
    assert take_all(queue) == [normal, background]


def test_the_hopeless_stay_so_in_another_order_and_back() -> None:
    def slo_line() -> WaitingLine:
        return SloLine(by_arrival, 0.1)

    queue = make_queue()
    queue.reorder(slo_line)
    hopeless, feasible = fill(queue, 2)
    # Otherwise it costs nothing to let it go first.
    hopeless.work_s = 1.0
    queue.demote(hopeless)
    assert [queue.position(record, 0.0) for record in (feasible, hopeless)] == [0, 1]
    queue.reorder(lines_by(by_arrival))
    assert [queue.position(record, 0.0) for record in (feasible, hopeless)] == [1, 0]
    queue.reorder(slo_line)
    assert take_all(queue) == [feasible, hopeless]


@pytest.mark.parametrize(
    ("max_request_count", "max_size_bytes", "size_bytes", "message"),
    [
        (
            2,
            1000,
            0,
            "the queue holds 2 requests, and 2 is the limit for CRITICAL",
        ),
        (
            3,
            100,
            81,
            "the queue holds 20 bytes of prompts, and 100 is the limit for CRITICAL; 81 more do not fit",
        ),
    ],
)
def test_a_full_queue_says_which_bound_and_when_to_come_back(
    max_request_count: int, max_size_bytes: int, size_bytes: int, message: str
) -> None:
    queue = make_queue(max_request_count, max_size_bytes)
    for number in range(2):
        queue.push(make_record(f"r{number}", prompt="x" * 10))
    with pytest.raises(QueueFullError) as caught:
        queue.check_room(critical("x" * size_bytes), 0.0)
    assert str(caught.value) == f"{message}; try again in about 1.0 s"
    assert caught.value.reason is ErrorReason.QUEUE_FULL
    assert caught.value.retry_after_s == 1.0


def test_the_bounds_themselves_may_be_reached() -> None:
    queue = make_queue(max_request_count=2, max_size_bytes=100)
    queue.push(make_record("r1", prompt="x" * 20))
    assert queue.check_room(critical("x" * 80), 0.0) == 80


def critical(prompt: str) -> RequestMetadata:
    return RequestMetadata(prompt=prompt, priority=RequestPriority.CRITICAL)


def test_a_request_that_comes_back_needs_no_room() -> None:
    queue = make_queue(max_request_count=1)
    fill(queue, 3)
    assert len(queue) == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "remove", "again", "reorder"]),
            st.integers(0, 30),
            st.sampled_from(["m", "n"]),
            st.sampled_from(RequestPriority),
        ),
        max_size=80,
    )
)
def test_the_queue_is_a_sorted_list_per_model(
    steps: list[tuple[str, int, str, RequestPriority]],
) -> None:
    queue = make_queue()
    key = by_arrival
    waiting: list[RequestRecord] = []
    removed: list[RequestRecord] = []
    for sequence, (step, number, model, priority) in enumerate(steps):
        if step == "push":
            record = make_record(
                f"r{sequence}", model, sequence, float(number % 7), prompt="x" * number, priority=priority
            )
            queue.push(record)
            waiting.append(record)
        elif step == "remove" and waiting:
            record = waiting.pop(number % len(waiting))
            queue.remove(record)
            removed.append(record)
        elif step == "again" and removed:
            record = removed.pop(number % len(removed))
            queue.push(record)
            waiting.append(record)
        elif step == "reorder":
            key = by_class if number % 2 else by_arrival
            queue.reorder(lines_by(key))
    assert len(queue) == len(waiting)
    assert queue.size_bytes == sum(record.size_bytes for record in waiting)
    expected = sorted(waiting, key=lambda record: (key(record), record.sequence))
    for model in ("m", "n"):
        assert take_all(queue, model) == [record for record in expected if record.model == model]
    assert not queue._lines
