"""The paged KV cache: sharing, eviction, and blocks that never get lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.sim.kv_cache import BlockTable, KvCache

BLOCK = 4


def fill(cache: KvCache, tokens: list[int]) -> BlockTable:
    """Open a table for tokens and compute all of them."""
    table = cache.open(cache.match(tokens), len(tokens))
    assert table is not None
    cache.commit(table, tokens, len(tokens))
    return table


def test_a_prefix_is_found_by_its_full_blocks_but_never_whole() -> None:
    cache = KvCache(8, BLOCK)
    tokens = list(range(8))
    fill(cache, tokens)
    assert len(cache.match([*tokens, 99])) == 2
    assert len(cache.match(tokens)) == 1, "the last token must be computed, so its block cannot be reused"
    assert len(cache.match([*tokens[:4], 99, *tokens[5:], 100])) == 1
    assert cache.match([7, *tokens[1:]]) == []


def test_the_same_tokens_elsewhere_in_a_sequence_are_no_hit() -> None:
    cache = KvCache(8, BLOCK)
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.match([5, 6, 7, 8, 1]) == []


def test_requests_share_blocks_and_the_last_holder_frees_them() -> None:
    cache = KvCache(8, BLOCK)
    tokens = list(range(9))
    first = fill(cache, tokens)
    second = fill(cache, tokens)
    assert first.block_ids[:2] == second.block_ids[:2]
    assert cache.used_block_count == 4
    cache.close(first)
    assert cache.used_block_count == 3
    cache.close(second)
    assert cache.used_block_count == 0
    cache.check()


def test_freed_blocks_keep_their_contents_until_others_need_the_room() -> None:
    cache = KvCache(4, BLOCK)
    old, new = list(range(100, 108)), list(range(200, 208))
    cache.close(fill(cache, old))
    cache.close(fill(cache, new))
    assert len(cache.match([*old, 1])) == 2
    assert len(cache.match([*new, 1])) == 2
    table = fill(cache, list(range(300, 304)))
    assert len(cache.match([*old, 1])) == 1, "the end of the least recently used sequence goes first"
    assert len(cache.match([*new, 1])) == 2
    cache.close(table)
    cache.check()


def test_blocks_without_contents_are_reused_before_cached_ones() -> None:
    cache = KvCache(4, BLOCK)
    cache.close(fill(cache, [1, 2, 3, 4, 5]))
    cache.close(fill(cache, [6, 7]))
    for _ in range(3):
        cache.close(fill(cache, [8, 9]))
    assert len(cache.match([1, 2, 3, 4, 5])) == 1


def test_a_table_grows_until_the_cache_is_full_and_then_not_at_all() -> None:
    cache = KvCache(3, BLOCK)
    table = cache.open([], 5)
    assert table is not None
    assert cache.grow(table, 12)
    assert not cache.grow(table, 13)
    assert len(table.block_ids) == 3
    assert cache.open([], 1) is None
    assert cache.usage == 1.0


def test_reviving_a_prefix_counts_as_taking_its_room() -> None:
    cache = KvCache(3, BLOCK)
    tokens = list(range(8))
    cache.close(fill(cache, [*tokens, 1]))
    prefix = cache.match([*tokens, 2])
    assert len(prefix) == 2
    assert cache.open(prefix, 13) is None, "two revived and two new blocks are more than three"
    table = cache.open(prefix, 12)
    assert table is not None
    assert cache.free_block_count == 0
    cache.check()


def test_without_prefix_caching_nothing_is_found() -> None:
    cache = KvCache(8, BLOCK, prefix_caching=False)
    tokens = list(range(9))
    fill(cache, tokens)
    assert cache.match(tokens) == []
    assert cache.cached_block_count == 0


def test_clear_forgets_what_nobody_holds() -> None:
    cache = KvCache(8, BLOCK)
    kept, freed = list(range(5)), list(range(50, 55))
    fill(cache, kept)
    cache.close(fill(cache, freed))
    cache.clear()
    assert len(cache.match(kept)) == 1
    assert cache.match(freed) == []
    cache.check()


def test_a_cache_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold anything"):
        KvCache(0, 16)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 40)), max_size=60))
def test_blocks_are_conserved_whatever_happens(operations: list[tuple[int, int, int]]) -> None:
    cache = KvCache(12, BLOCK)
    held: dict[int, tuple[BlockTable, list[int]]] = {}
    for kind, slot, size in operations:
        if kind <= 1 and slot not in held:
            # Few distinct prompts, so that prefixes are often shared.
            tokens = [(slot % 2) * 1000 + position for position in range(size)]
            table = cache.open(cache.match(tokens), len(tokens))
            if table is not None:
                cache.commit(table, tokens, len(tokens))
                held[slot] = (table, tokens)
        elif kind == 2 and slot in held:
            table, tokens = held[slot]
            if cache.grow(table, len(tokens) + size):
                tokens.extend([slot + 7] * size)
                cache.commit(table, tokens, len(tokens))
        elif kind == 3 and slot in held:
            cache.close(held.pop(slot)[0])
        cache.check()
        distinct = {block_id for table, _ in held.values() for block_id in table.block_ids}
        assert cache.used_block_count == len(distinct)
    for table, _ in held.values():
        cache.close(table)
    cache.check()
    assert cache.free_block_count == cache.block_count
