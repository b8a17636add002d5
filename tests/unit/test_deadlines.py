"""The heap of deadlines: what counts, what is forgotten, and how large it gets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.deadlines import DeadlineHeap
from sagecp.core.request import RequestRecord
from tests.support.core_world import make_record


class Watched:
    """A heap, and the live requests it is asked about."""

    def __init__(self) -> None:
        self.heap = DeadlineHeap()
        self.live: dict[str, RequestRecord] = {}

    def add(self, request_id: str, time_s: float) -> None:
        record = self.live.setdefault(request_id, make_record(request_id))
        record.expire_s = time_s
        self.heap.add(time_s, request_id, self.live)

    def due(self, now: float) -> list[str]:
        return [record.request_id for record in self.heap.pop_due(now, self.live)]

    def next_s(self) -> float | None:
        return self.heap.next_s(self.live)


def test_nothing_is_due_when_nothing_is_watched() -> None:
    watched = Watched()
    assert watched.next_s() is None
    assert watched.due(1e9) == []


def test_due_in_order_of_time_each_once() -> None:
    watched = Watched()
    for request_id, time_s in (("late", 3.0), ("first", 1.0), ("second", 2.0)):
        watched.add(request_id, time_s)
    assert watched.next_s() == 1.0
    assert watched.due(0.999) == []
    assert watched.due(2.0) == ["first", "second"]
    assert watched.due(2.0) == []
    assert watched.next_s() == 3.0


def test_ended_requests_are_forgotten() -> None:
    watched = Watched()
    watched.add("ended", 1.0)
    watched.add("lives", 2.0)
    del watched.live["ended"]
    assert watched.next_s() == 2.0
    assert watched.due(5.0) == ["lives"]


def test_a_new_time_replaces_the_old_one() -> None:
    watched = Watched()
    watched.add("r", 1.0)
    watched.add("r", 5.0)
    assert watched.next_s() == 5.0
    assert watched.due(4.0) == []
    assert watched.due(5.0) == ["r"]


def test_a_request_that_is_no_longer_watched_is_not_due() -> None:
    watched = Watched()
    watched.add("r", 1.0)
    watched.live["r"].expire_s = None
    assert watched.due(2.0) == []
    assert watched.next_s() is None


def test_an_id_that_is_used_again_does_not_inherit_the_old_time() -> None:
    watched = Watched()
    watched.add("r", 1.0)
    del watched.live["r"]
    watched.add("r", 10.0)
    assert watched.due(1.0) == []
    assert watched.due(10.0) == ["r"]


def test_the_same_time_twice_is_due_once() -> None:
    watched = Watched()
    watched.add("r", 1.0)
    watched.add("r", 1.0)
    assert watched.due(1.0) == ["r"]


def test_size_is_bounded_by_what_lives() -> None:
    watched = Watched()
    for number in range(20_000):
        watched.add(f"r{number}", float(number))
        if number >= 10:
            del watched.live[f"r{number - 10}"]
    assert len(watched.heap) <= 1025
    assert watched.next_s() == 19_990.0


def test_size_is_bounded_when_one_request_is_watched_again_and_again() -> None:
    watched = Watched()
    for number in range(5000):
        watched.add("r", float(number // 2))
    assert len(watched.heap) <= 1025
    assert watched.due(2499.0) == ["r"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=40), st.integers(0, 20))
def test_due_equals_what_a_scan_finds(changes: list[tuple[int, int]], now: int) -> None:
    watched = Watched()
    for number, time_s in changes:
        if time_s == 0:
            watched.live.pop(f"r{number}", None)
        else:
            watched.add(f"r{number}", float(time_s))
    times = [record.expire_s for record in watched.live.values() if record.expire_s is not None]
    assert watched.next_s() == min(times, default=None)
    expected = {r.request_id for r in watched.live.values() if r.expire_s is not None and r.expire_s <= now}
    assert set(watched.due(float(now))) == expected
