"""The counting KV cache: the order in which contents are lost, and the same books as the exact cache."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.sim.fleet.block_cache import BlockCache, FreedContents
from sagecp.sim.kv_cache import BlockTable, KvCache


def hold(cache: BlockCache, contents: list[int], anonymous: int = 0) -> list[int]:
    """Hold blocks of these contents, as a sequence does that computes what it does not find."""
    held = cache.match(contents, len(contents))
    found = len(held)
    assert cache.open(held, len(contents) - found + anonymous)
    cache.commit(contents[found:], held)
    cache.check()
    return held


def test_the_end_of_a_sequence_is_lost_first_and_old_sequences_before_new_ones() -> None:
    cache = BlockCache(6)
    old = hold(cache, [1, 2, 3])
    new = hold(cache, [4, 5, 6])
    cache.close(old, 0)
    cache.close(new, 0)
    assert (cache.free_block_count, cache.used_block_count, cache.known_block_count) == (6, 0, 6)
    lost: list[int] = []
    for _ in range(6):
        before = {content for content in range(1, 7) if cache.knows_any([content])}
        cache.take(1)
        lost += before - {content for content in range(1, 7) if cache.knows_any([content])}
        cache.check()
    assert lost == [3, 2, 1, 6, 5, 4]


def test_blocks_without_contents_are_given_away_first() -> None:
    cache = BlockCache(10)
    held = hold(cache, [1, 2], anonymous=3)
    cache.close(held, 3)
    assert cache.blank_block_count == 8
    cache.take(8)
    assert cache.known_block_count == 2
    cache.take(1)
    assert cache.match([1, 2], 2) == [1]


def test_shared_contents_stay_until_the_last_holder_goes() -> None:
    cache = BlockCache(4)
    first, second, third = (hold(cache, [1, 2]) for _ in range(3))
    assert cache.used_block_count == 2
    for held in (first, second):
        cache.close(held, 0)
        cache.check()
        assert (cache.used_block_count, cache.unheld_count([1, 2])) == (2, 0)
    cache.close(third, 0)
    assert (cache.used_block_count, cache.unheld_count([1, 2])) == (0, 2)


def test_without_room_nothing_changes() -> None:
    cache = BlockCache(4)
    cache.close(hold(cache, [1, 2]), 0)
    held = cache.match([1, 2], 2)
    assert not cache.open(held, 3)
    cache.check()
    assert (cache.free_block_count, cache.unheld_count([1, 2])) == (4, 2)
    assert cache.open(held, 2)
    assert cache.free_block_count == 0


def test_a_copy_of_known_contents_is_anonymous() -> None:
    cache = BlockCache(4)
    held_by_both: list[list[int]] = []
    for _ in range(2):
        cache.take(2)
        held_by_both.append([])
    for held in held_by_both:
        cache.commit((1, 2), held)
    assert held_by_both == [[1, 2], []]
    cache.close(held_by_both[1], 2)
    cache.close(held_by_both[0], 0)
    cache.check()
    assert (cache.blank_block_count, cache.known_block_count) == (2, 2)


def test_a_match_ends_at_its_limit_and_at_the_first_unknown() -> None:
    cache = BlockCache(5)
    hold(cache, [1, 2, 3])
    assert cache.match((1, 2, 3), 2) == [1, 2]
    assert cache.match((1, 9, 3), 3) == [1]
    assert cache.match((), 3) == []


def test_what_was_held_again_counts_from_when_it_is_freed_again() -> None:
    freed = FreedContents()
    freed.add([1, 2, 3, 4, 5])
    freed.add([6, 7])
    freed.strike([2, 3])
    freed.check()
    assert (len(freed), 3 in freed, 4 in freed, freed.count_in([1, 2, 6])) == (5, False, True, 2)
    freed.add([2, 3])
    freed.check()
    assert sorted(freed.pop(2)) == [4, 5]
    freed.check()
    assert [freed.pop(1)[0] for _ in range(len(freed))] == [1, 7, 6, 3, 2]
    assert len(freed) == 0


def test_striking_off_again_and_again_leaves_nothing_behind() -> None:
    freed = FreedContents()
    freed.add([0])
    for _ in range(1000):
        freed.add([1, 2, 3])
        freed.strike([1, 2, 3])
    freed.check()
    assert len(freed._groups) == 1


@pytest.mark.parametrize("count", [0, -1])
def test_a_cache_needs_blocks(count: int) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        BlockCache(count)


class Books:
    """One sequence in both caches."""

    def __init__(self, tokens: list[int], contents: list[int]) -> None:
        self.tokens = tokens
        self.contents = contents
        self.table = BlockTable()
        self.held: list[int] = []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_it_keeps_the_same_books_as_the_exact_cache(seed: int) -> None:
    draw = random.Random(seed)
    block_count = draw.choice([3, 8, 20])
    exact, counting = KvCache(block_count, 1), BlockCache(block_count)
    ids: dict[tuple[int, ...], int] = {}
    alive: list[Books] = []
    for _ in range(120):
        if alive and draw.random() < 0.4:
            books = alive.pop(draw.randrange(len(alive)))
            anonymous = len(books.table.block_ids) - len(books.held)
            exact.close(books.table)
            counting.close(books.held, anonymous)
        else:
            # The last token is computed, never found.
            tokens = [draw.randrange(2) for _ in range(draw.randrange(2, 8))]
            ends = range(1, len(tokens))
            books = Books(tokens, [ids.setdefault(tuple(tokens[:end]), len(ids)) for end in ends])
            found = exact.match(tokens)
            books.held = counting.match(books.contents, len(tokens) - 1)
            assert len(books.held) == len(found)
            table = exact.open(found, len(tokens))
            opened = counting.open(books.held, len(tokens) - len(found))
            assert opened == (table is not None)
            if table is not None:
                books.table = table
                alive.append(books)
                if draw.random() < 0.8:
                    exact.commit(table, tokens, len(tokens) - 1)
                    counting.commit(books.contents[len(found) :], books.held)
        counting.check()
        assert counting.free_block_count == exact.free_block_count
        assert counting.known_block_count == exact.cached_block_count
        assert counting.used_block_count == exact.used_block_count
