"""Who is refused when the queue fills: by class, by tenant, and with which time to come back."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core import effects as fx
from sagecp.core.errors import QueueFullError
from sagecp.core.shedding import MAX_RETRY_S, MIN_RETRY_S, ClassShares, QueueShares
from sagecp.core.types import RequestPriority
from tests.support.core_world import World, arrive, healthy

CRITICAL, HIGH, NORMAL, LOW, BACKGROUND = RequestPriority
GIB = 1 << 30


def make_shares(max_count: int = 100, max_bytes: int = GIB, **shares: float) -> QueueShares:
    return QueueShares(max_count, max_bytes, ClassShares(**shares))


def offer(
    shares: QueueShares, priority: RequestPriority, tenant: str = "t", size: int = 1, now: float = 0.0
) -> QueueFullError | None:
    """Let a request in if it may wait, as admission does; else return why not."""
    try:
        shares.check_count(priority, tenant, now)
        shares.check_bytes(priority, tenant, size, now)
    except QueueFullError as error:
        return error
    shares.enter(priority, tenant, size)
    return None


def fill(shares: QueueShares, priority: RequestPriority, tenant: str = "t", size: int = 1) -> int:
    """Offer requests until one is refused; return how many got in."""
    count = 0
    while offer(shares, priority, tenant, size) is None:
        count += 1
    return count


# -- classes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "count"), [(CRITICAL, 100), (HIGH, 90), (NORMAL, 80), (LOW, 65), (BACKGROUND, 50)]
)
def test_each_class_fills_its_share_by_count_and_by_bytes(priority: RequestPriority, count: int) -> None:
    assert fill(make_shares(100), priority) == count
    assert fill(make_shares(10**6, 1000), priority, size=10) == count


def test_the_least_important_are_refused_first_and_the_rest_goes_on() -> None:
    shares = make_shares(100)
    got_in = [fill(shares, priority) for priority in (BACKGROUND, LOW, NORMAL, HIGH, CRITICAL)]
    assert got_in == [50, 15, 15, 10, 10]
    for priority in RequestPriority:
        error = offer(shares, priority)
        assert error is not None
        assert f"limit for {priority.name}" in error.message
        assert error.metadata["bound"] == "requests"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_smallest_queue_has_a_place_for_every_class(limit: int) -> None:
    for priority in RequestPriority:
        assert offer(make_shares(limit), priority) is None


def test_a_prompt_that_can_never_fit_is_not_told_to_come_back() -> None:
    error = offer(make_shares(max_bytes=100), BACKGROUND, size=51)
    assert error is not None
    assert error.retry_after_s is None
    assert "51 bytes" in error.message
    assert "50 bytes of the queue" in error.message


@pytest.mark.parametrize(
    ("shares", "bad"),
    [
        (ClassShares(), []),
        (ClassShares(critical=0.9, high=0.9, normal=0.9, low=0.9, background=0.9), []),
        (ClassShares(low=0.95), ["low"]),
        (ClassShares(critical=0.5), ["high", "normal", "low"]),
        (ClassShares(background=0.0, critical=1.5), ["critical", "background"]),
    ],
)
def test_shares_grow_with_importance(shares: ClassShares, bad: list[str]) -> None:
    assert [violation.field for violation in shares.violations()] == bad


# -- tenants ---------------------------------------------------------------------------


def test_a_tenant_alone_may_use_all_of_a_class() -> None:
    assert fill(make_shares(100), CRITICAL, "alone") == 100


def test_beyond_half_no_tenant_holds_more_than_its_part() -> None:
    shares = make_shares(100, critical=1.0)
    for tenant in ("a", "b", "c"):
        assert offer(shares, CRITICAL, tenant) is None
    assert fill(shares, CRITICAL, "a") + 1 == 48, "a queue that is half empty is nobody's loss"
    error = offer(shares, CRITICAL, "a")
    assert error is not None
    assert (
        "48 requests of this tenant wait that are CRITICAL or more important, and 33 is its share"
        in error.message
    )
    assert error.metadata["bound"] == "tenant_requests"
    assert fill(shares, CRITICAL, "b") + 1 == 33
    assert fill(shares, CRITICAL, "c") + 1 == 19
    assert shares.request_count == 100


def test_what_a_tenant_has_waiting_does_not_stop_its_more_important_requests() -> None:
    shares = make_shares(100)
    for tenant in ("a", "b"):
        assert offer(shares, NORMAL, tenant) is None
    while offer(shares, NORMAL, "a") is None or offer(shares, NORMAL, "b") is None:
        pass
    for tenant in ("a", "b"):
        assert offer(shares, NORMAL, tenant) is not None
        assert offer(shares, CRITICAL, tenant) is None


def test_bytes_are_shared_between_tenants_as_well() -> None:
    shares = make_shares(10**6, 1000)
    for tenant in ("a", "b"):
        assert offer(shares, CRITICAL, tenant, 10) is None
    fill(shares, CRITICAL, "a", 10)
    error = offer(shares, CRITICAL, "a", 10)
    assert error is not None
    assert "500 is its share among 2 tenants" in error.message
    assert fill(shares, CRITICAL, "b", 10) == 49


def test_a_tenant_with_nothing_waiting_is_always_let_in_while_there_is_room() -> None:
    shares = make_shares(100)
    for number in range(100):
        assert offer(shares, CRITICAL, f"tenant-{number}") is None


def test_places_that_come_free_are_kept_for_those_that_were_refused() -> None:
    shares = make_shares(100)
    assert fill(shares, CRITICAL, "greedy") == 100
    assert offer(shares, CRITICAL, "late", now=1.0) is not None
    taken: Counter[str] = Counter()
    for turn in range(40):
        shares.leave(CRITICAL, "greedy", 1)
        now = 1.0 + 0.1 * turn
        for tenant in ("greedy", "late"):
            taken[tenant] += offer(shares, CRITICAL, tenant, now=now) is None
    assert taken == {"greedy": 0, "late": 40}


def test_who_asked_long_ago_takes_nothing_from_anybody() -> None:
    shares = make_shares(100)
    assert fill(shares, CRITICAL, "greedy") == 100
    assert offer(shares, CRITICAL, "gone", now=1.0) is not None
    shares.leave(CRITICAL, "greedy", 1)
    assert offer(shares, CRITICAL, "greedy", now=2.0) is not None
    assert offer(shares, CRITICAL, "greedy", now=60.0) is None


def test_invented_tenants_do_not_fill_the_memory() -> None:
    shares = make_shares(1)
    assert offer(shares, CRITICAL, "first") is None
    for number in range(10_000):
        assert offer(shares, CRITICAL, f"invented-{number}") is not None
    assert len(shares._asking) <= 4096
    assert set(shares._held) == {"first"}


# -- when to come back -----------------------------------------------------------------


def told_s(error: QueueFullError | None) -> float:
    assert error is not None
    assert error.retry_after_s is not None
    said = re.search(r"in about ([0-9.]+) s", error.message)
    assert said is not None
    assert float(said[1]) == pytest.approx(error.retry_after_s, abs=0.05)
    return error.retry_after_s


def full_with_pace(interval_s: float, burst: int = 1) -> tuple[QueueShares, float]:
    """Return a queue full for every class whose places come free at a pace, and the present time."""
    shares, now = make_shares(100), 0.0
    fill(shares, CRITICAL)
    for _ in range(20):
        now += interval_s * burst
        for _ in range(burst):
            shares.note_departure(now)
    return shares, now


@pytest.mark.parametrize("burst", [1, 8])
def test_a_class_waits_until_the_queue_has_fallen_to_its_share(burst: int) -> None:
    shares, now = full_with_pace(0.2, burst)
    tolerance = 0.05 if burst == 1 else 0.35
    for priority, places in ((CRITICAL, 1), (HIGH, 11), (NORMAL, 21), (LOW, 36), (BACKGROUND, 51)):
        expected = pytest.approx(0.2 * places, rel=tolerance)
        assert told_s(offer(shares, priority, now=now)) == expected


def test_refused_ones_are_told_one_place_after_the_other() -> None:
    shares, now = full_with_pace(0.5)
    assert [told_s(offer(shares, CRITICAL, now=now)) for _ in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    # A second later two of them have had their turn.
    for _ in range(2):
        shares.note_departure(now + 1.0)
    assert told_s(offer(shares, CRITICAL, now=now + 1.0)) == pytest.approx(1.5, rel=0.1)


def test_promises_are_forgotten_when_nobody_comes_for_the_places() -> None:
    shares, now = full_with_pace(0.5)
    for _ in range(50):
        offer(shares, CRITICAL, now=now)
    assert told_s(offer(shares, CRITICAL, now=now)) > 25.0
    for _ in range(60):
        shares.leave(CRITICAL, "t", 1)
    assert fill(shares, CRITICAL) == 60
    assert told_s(offer(shares, CRITICAL, now=now)) == pytest.approx(1.0), (
        "after the one that ended the filling"
    )


def test_times_are_bounded_and_grow_while_nothing_leaves() -> None:
    shares, now = full_with_pace(0.0001)
    assert told_s(offer(shares, CRITICAL, now=now)) == MIN_RETRY_S
    later = told_s(offer(shares, CRITICAL, now=now + 300.0))
    assert later > 5.0
    for _ in range(100):
        assert told_s(offer(shares, CRITICAL, now=now + 300.0)) <= MAX_RETRY_S


def test_a_queue_that_never_moved_gives_a_guess() -> None:
    shares = make_shares(1)
    assert offer(shares, CRITICAL) is None
    assert told_s(offer(shares, CRITICAL)) == 1.0


# -- through the door ------------------------------------------------------------------


def refusal(world: World, request_id: str, **fields: Any) -> QueueFullError | None:
    for effect in world.effects(arrive(request_id, **fields)):
        if isinstance(effect, fx.RequestRejected):
            assert isinstance(effect.error, QueueFullError)
            return effect.error
    return None


def test_what_was_accepted_stays_whatever_comes() -> None:
    world = World(default_concurrency_limit=1, max_queued_request_count=10)
    world.feed(healthy("a"))
    accepted = [f"low-{n}" for n in range(20) if refusal(world, f"low-{n}", priority=BACKGROUND) is None]
    assert len(accepted) == 6, "one runs, five wait"
    critical = [f"top-{n}" for n in range(20) if refusal(world, f"top-{n}", priority=CRITICAL) is None]
    assert len(critical) == 5
    assert {record.request_id for record in world.scheduler.requests()} == {*accepted, *critical}


def test_a_refused_prompt_is_not_looked_at() -> None:
    """A prompt that cannot even be measured shows that nobody tried to."""
    world = World(default_concurrency_limit=1, max_queued_request_count=1)
    world.feed(healthy("a"), arrive("runs"), arrive("waits"))

    class Untouchable(dict[str, object]):
        def get(self, *_: object) -> object:
            raise AssertionError("looked at")

    error = refusal(world, "refused", prompt=None, messages=(Untouchable(),))
    assert error is not None
    assert error.metadata["bound"] == "requests"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["offer", "leave"]),
            st.sampled_from(RequestPriority),
            st.sampled_from("abcd"),
            st.integers(0, 40),
        ),
        max_size=200,
    )
)
def test_bounds_hold_and_books_balance(steps: list[tuple[str, RequestPriority, str, int]]) -> None:
    shares = make_shares(20, 300)
    waiting: list[tuple[RequestPriority, str, int]] = []
    for now, (step, priority, tenant, size) in enumerate(steps):
        if step == "offer":
            error = offer(shares, priority, tenant, size, float(now))
            if error is None:
                waiting.append((priority, tenant, size))
                share = ClassShares().by_priority()[priority]
                assert len(waiting) <= 20 * share
                assert sum(each for _, _, each in waiting) <= 300 * share
            else:
                assert error.retry_after_s is None or MIN_RETRY_S <= error.retry_after_s <= MAX_RETRY_S
                assert (error.retry_after_s is None) == (size > 300 * ClassShares().by_priority()[priority])
        elif waiting:
            shares.leave(*waiting.pop(size % len(waiting)))
            shares.note_departure(float(now))
    assert shares.request_count == len(waiting)
    assert shares.size_bytes == sum(size for _, _, size in waiting)
    assert {tenant: sum(held.counts) for tenant, held in shares._held.items()} == Counter(
        tenant for _, tenant, _ in waiting
    )
    assert [shares.counts[priority] for priority in RequestPriority] == [
        sum(each is priority for each, _, _ in waiting) for priority in RequestPriority
    ]
