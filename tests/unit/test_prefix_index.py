"""The mirror of the engines' prefix caches, against a slow and obvious one."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sagecp.core.prefix_index import HOLDER_LIMIT, PrefixIndex


def chain(*path: int) -> tuple[int, ...]:
    """Hashes that cover what is before them, as those of a prompt do."""
    hashes, value = [], 17
    for step in path:
        value = (value * 1_000_003 + step + 1) % (1 << 61)
        hashes.append(value)
    return tuple(hashes)


def index_of(*instance_ids: str, capacity: int = 100, bound: int = 1000) -> PrefixIndex:
    index = PrefixIndex(bound)
    for instance_id in instance_ids:
        index.add_instance(instance_id, capacity)
    return index


def serve(index: PrefixIndex, instance_id: str, blocks: Sequence[int]) -> None:
    index.insert(instance_id, blocks, pinned=True)
    index.release(instance_id, blocks)


LONG = chain(1, 2, 3, 4, 5)
FORK = chain(1, 2, 9, 9)


def test_a_match_names_the_holders_longest_first() -> None:
    index = index_of("a", "b", "c", "d")
    index.insert("a", LONG[:2], pinned=True)
    index.insert("b", LONG, pinned=False)
    index.insert("c", FORK, pinned=True)
    assert list(index.match(LONG).items()) in (
        [("b", 5), ("a", 2), ("c", 2)],
        [("b", 5), ("c", 2), ("a", 2)],
    )
    assert dict(index.match(FORK)) == {"c": 4, "a": 2, "b": 2}
    assert dict(index.match(LONG[:1])) == {"a": 1, "b": 1, "c": 1}
    assert [index.match_one(name, LONG) for name in "abcdx"] == [2, 5, 2, 0, 0]
    for unknown in ((), chain(7), chain(8, 1)):
        assert index.match(unknown) == {}


def test_at_most_so_many_holders_are_named_and_the_prompt_says_which() -> None:
    ids = [f"i{number}" for number in range(100)]
    index = index_of(*ids, bound=100_000)
    named: Counter[str] = Counter()
    for number in range(200):
        start = chain(number, 0)
        for instance_id in ids:
            index.insert(instance_id, start, pinned=False)
        index.insert("i50", chain(number, 0, 1), pinned=False)
        match = index.match(chain(number, 0, 1, 2))
        assert len(match) == HOLDER_LIMIT
        assert next(iter(match.items())) == ("i50", 3)
        assert set(match.values()) == {3, 2}
        named.update(match)
    assert len(named) == 100


def test_the_least_recent_goes_first_and_of_a_prompt_the_end() -> None:
    index = index_of("a", capacity=8)
    old, new = chain(1, 1, 1, 1), chain(2, 2, 2, 2)
    serve(index, "a", old)
    serve(index, "a", new)
    serve(index, "a", chain(3, 3))
    assert [index.match_one("a", blocks) for blocks in (old, new, chain(3, 3))] == [2, 4, 2]
    # Use makes recent.
    serve(index, "a", old[:2])
    serve(index, "a", chain(4))
    assert [index.match_one("a", blocks) for blocks in (old, new, chain(3, 3))] == [2, 3, 2]


def test_what_runs_is_not_evicted() -> None:
    index = index_of("a", capacity=4)
    index.insert("a", LONG, pinned=True)
    assert index.match_one("a", LONG) == 5, "above the capacity that was estimated"
    serve(index, "a", chain(7, 7))
    assert index.match_one("a", LONG) == 5
    assert index.match_one("a", chain(7, 7)) == 0
    index.insert("a", LONG[:3], pinned=True)
    index.release("a", LONG)
    assert index.match_one("a", LONG) == 4
    index.resize("a", 0)
    assert index.match_one("a", LONG) == 3, "another request runs on these"
    index.release("a", LONG[:3])
    assert len(index) == 0


@pytest.mark.parametrize(("capacity", "held"), [(-1, 0), (0, 0), (3, 3), (5, 5), (50, 5)])
def test_an_unpinned_prompt_is_kept_as_far_as_it_fits(capacity: int, held: int) -> None:
    index = index_of("a", capacity=capacity)
    assert index.insert("a", LONG, pinned=False) == held
    assert index.match_one("a", LONG) == index.block_count("a") == len(index) == held


def test_a_restart_forgets_and_late_releases_change_nothing() -> None:
    index = index_of("a", "b")
    index.insert("a", LONG, pinned=True)
    serve(index, "b", LONG)
    index.add_instance("a", 100)
    assert dict(index.match(LONG)) == {"b": 5}
    index.release("a", LONG)
    assert dict(index.match(LONG)) == {"b": 5}
    index.remove_instance("b")
    index.remove_instance("b")
    assert index.match(LONG) == {}
    assert index._masks == {}
    for instance_id in ("b", "never"):
        assert index.insert(instance_id, LONG, pinned=True) == 0
        index.release(instance_id, LONG)
        index.resize(instance_id, 5)
    assert len(index) == 0


def test_places_of_those_that_left_are_used_again() -> None:
    index = index_of(*"abcd")
    for number in range(50):
        index.remove_instance("b")
        index.remove_instance("d")
        index.add_instance(f"n{number}", 10)
        index.insert(f"n{number}", LONG, pinned=True)
        index.remove_instance(f"n{number}")
    assert len(index._slots) == 4


def test_at_the_bound_over_everything_all_give_up_some() -> None:
    index = index_of("a", "b", "c", capacity=10**9, bound=30)
    serve(index, "a", chain(*range(20)))
    serve(index, "b", chain(*range(100, 110)))
    serve(index, "c", chain(*range(200, 210)))
    assert len(index) == 30
    assert (index.block_count("a"), index.block_count("b")) == (15, 5)
    assert index.match_one("c", chain(*range(200, 210))) == 10
    assert index.match_one("a", chain(*range(20))) == 15


def test_at_the_bound_with_everything_pinned_the_rest_is_not_taken() -> None:
    index = index_of("a", "b", capacity=10**9, bound=8)
    first, second = chain(1, 1, 1, 1, 1), chain(1, 1, 2, 2, 2, 2)
    assert index.insert("a", first, pinned=True) == 5
    assert index.insert("b", second, pinned=True) == 3
    assert index.insert("a", second, pinned=True) == 2, "of these nothing is new"
    assert index.match_one("a", first) == 5
    assert len(index) == 8
    index.release("a", second[:2])
    index.release("a", first)
    index.release("b", second[:3])
    assert not any(cache.pins for cache in index._caches.values())


def test_memory_per_block_is_bounded() -> None:
    block_count = 6_000
    index = index_of(*(f"i{number}" for number in range(200)), capacity=10**9, bound=block_count)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(3 * block_count // 25):
            serve(index, f"i{number % 200}", chain(number, *range(24)))
            # A second holder of the same start.
            serve(index, f"i{number * 7 % 200}", chain(number, *range(12)))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(index) == block_count
    assert used / block_count < 450


class Naive:
    """One instance's cache: a list of blocks in order of use, and what runs."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.recency: list[int] = []
        self.running: list[tuple[int, ...]] = []

    def pinned(self) -> set[int]:
        return {block for blocks in self.running for block in blocks}

    def touch(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            if block in self.recency:
                self.recency.remove(block)
            self.recency.append(block)

    def trim(self) -> None:
        pinned = self.pinned()
        while len(self.recency) > self.capacity:
            spare = [block for block in self.recency if block not in pinned]
            if not spare:
                return
            self.recency.remove(spare[0])

    def match(self, blocks: Sequence[int]) -> int:
        count = 0
        while count < len(blocks) and blocks[count] in self.recency:
            count += 1
        return count


IDS = st.sampled_from("abcdef")
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=7).map(lambda path: chain(*path))


class AgainstTheNaiveOne(RuleBasedStateMachine):
    """No bound over everything: there the naive model would only repeat the code."""

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex()
        self.caches: dict[str, Naive] = {}

    @rule(instance_id=IDS, capacity=st.integers(0, 12))
    def add(self, instance_id: str, capacity: int) -> None:
        self.index.add_instance(instance_id, capacity)
        self.caches[instance_id] = Naive(capacity)

    @rule(instance_id=IDS)
    def remove(self, instance_id: str) -> None:
        self.index.remove_instance(instance_id)
        self.caches.pop(instance_id, None)

    @rule(instance_id=IDS, capacity=st.integers(0, 12))
    def resize(self, instance_id: str, capacity: int) -> None:
        self.index.resize(instance_id, capacity)
        if instance_id in self.caches:
            self.caches[instance_id].capacity = capacity
            self.caches[instance_id].trim()

    @rule(instance_id=IDS, blocks=PATHS)
    def begin(self, instance_id: str, blocks: tuple[int, ...]) -> None:
        taken = self.index.insert(instance_id, blocks, pinned=True)
        cache = self.caches.get(instance_id)
        assert taken == (len(blocks) if cache else 0)
        if cache:
            cache.running.append(blocks)
            cache.touch(blocks)
            cache.trim()

    @rule(instance_id=IDS, blocks=PATHS)
    def note(self, instance_id: str, blocks: tuple[int, ...]) -> None:
        taken = self.index.insert(instance_id, blocks, pinned=False)
        cache = self.caches.get(instance_id)
        if cache:
            pinned = cache.pinned()
            cache.touch([block for block in blocks if block not in pinned])
            cache.trim()
            assert taken == cache.match(blocks)

    @precondition(lambda self: any(cache.running for cache in self.caches.values()))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        busy = sorted(name for name, cache in self.caches.items() if cache.running)
        instance_id = data.draw(st.sampled_from(busy))
        cache = self.caches[instance_id]
        blocks = cache.running.pop(data.draw(st.integers(0, len(cache.running) - 1)))
        pinned = cache.pinned()
        cache.touch([block for block in blocks if block not in pinned])
        cache.trim()
        self.index.release(instance_id, blocks)

    @rule(blocks=PATHS)
    def match(self, blocks: tuple[int, ...]) -> None:
        expected = {name: n for name, cache in self.caches.items() if (n := cache.match(blocks))}
        found = self.index.match(blocks)
        assert dict(found) == expected
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for name, count in expected.items():
            assert self.index.match_one(name, blocks) == count

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "caches"):
            return
        assert len(self.index) == sum(len(cache.recency) for cache in self.caches.values())
        for name, cache in self.caches.items():
            assert self.index.block_count(name) == len(cache.recency)
        held = {block for cache in self.caches.values() for block in cache.recency}
        assert set(self.index._masks) == held


AgainstTheNaiveOne.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstTheNaiveOne = AgainstTheNaiveOne.TestCase


@settings(max_examples=80, deadline=None)
@given(
    bound=st.integers(1, 30),
    steps=st.lists(st.tuples(IDS, PATHS, st.booleans(), st.booleans()), max_size=40),
)
def test_the_bound_over_everything_holds_and_starts_stay_whole(
    bound: int, steps: list[tuple[str, tuple[int, ...], bool, bool]]
) -> None:
    index = index_of(*"abcdef", capacity=12, bound=bound)
    running: list[tuple[str, tuple[int, ...]]] = []
    for instance_id, blocks, pinned, ends in steps:
        taken = index.insert(instance_id, blocks, pinned)
        if pinned:
            running.append((instance_id, blocks[:taken]))
        assert len(index) <= bound
        assert len(index) == sum(mask.bit_count() for mask in index._masks.values())
        for name, held in running:
            assert index.match_one(name, held) == len(held), "what runs is not dropped"
        if ends and running:
            index.release(*running.pop(0))
        # Bisection needs it: who has a block has all before it.
        for _, path, _, _ in steps:
            for name in "abcdef":
                cache = index._caches[name]
                present = [block in cache.pins or block in cache.evictable for block in path]
                assert present == sorted(present, reverse=True)
    for name, held in running:
        index.release(name, held)
    assert not any(cache.pins for cache in index._caches.values())
