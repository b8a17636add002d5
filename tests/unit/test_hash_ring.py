"""The ring that session affinity is made of: even, stable, and quick to change."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.router.hash_ring import HashRing, place_of

KEYS = [f"key {number}" for number in range(4000)]


def ring_of(*owners: str, virtual_node_count: int = 160) -> HashRing:
    ring = HashRing(virtual_node_count)
    ring.update(owners)
    return ring


def names(count: int) -> list[str]:
    return [f"instance-{number}" for number in range(count)]


def home(ring: HashRing, key: str) -> str:
    return next(ring.walk(key))


def test_places_do_not_depend_on_the_process() -> None:
    # Values, so that a change of the hash, which moves every session, does not go unnoticed.
    assert place_of("session s-1") == 211291941289477260
    assert [home(ring_of(*names(5)), key) for key in KEYS[:4]] == [
        "instance-0",
        "instance-0",
        "instance-4",
        "instance-4",
    ]


def test_an_empty_ring_leads_nowhere() -> None:
    ring = HashRing()
    assert list(ring.walk("k")) == []
    assert len(ring) == 0
    assert "a" not in ring
    ring.update(["a"])
    assert list(ring.walk("k")) == ["a"]
    assert "a" in ring
    ring.update([])
    assert list(ring.walk("k")) == []


def test_shares_are_even() -> None:
    ring = ring_of(*names(20))
    counts = Counter(home(ring, key) for key in KEYS)
    assert len(counts) == 20
    # The standard deviation of a share with v points is about 1/sqrt(v) of it.
    assert statistics.pstdev(counts.values()) < 0.2 * len(KEYS) / 20


@pytest.mark.parametrize("count", [8, 40, 300])
def test_only_keys_of_the_instance_that_left_move_and_they_come_back(count: int) -> None:
    ring = ring_of(*names(count))
    before = {key: home(ring, key) for key in KEYS}
    gone = "instance-3"
    heirs = {key: list(itertools.islice(ring.walk(key), 2))[1] for key in KEYS if before[key] == gone}
    ring.update([name for name in names(count) if name != gone])
    after = {key: home(ring, key) for key in KEYS}
    assert {key for key in KEYS if before[key] != after[key]} == set(heirs)
    assert {key: after[key] for key in heirs} == heirs
    assert len(set(heirs.values())) > 1, "its keys do not all go to one neighbour"
    ring.update(names(count))
    assert {key: home(ring, key) for key in KEYS} == before


@settings(max_examples=60, deadline=None)
@given(
    fleets=st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=12),
    key=st.text(max_size=8),
    virtual_node_count=st.sampled_from([1, 7, 160]),
)
def test_a_ring_that_changed_is_the_ring_built_at_once(
    fleets: list[set[int]], key: str, virtual_node_count: int
) -> None:
    ring = HashRing(virtual_node_count)
    for fleet in fleets:
        owners = [f"o{number}" for number in sorted(fleet)]
        ring.update(owners)
        assert len(ring) == len(owners)
        walked = list(ring.walk(key))
        assert sorted(walked) == sorted(owners)
        assert walked == list(ring_of(*owners, virtual_node_count=virtual_node_count).walk(key))
        distances = dict(zip(owners, ring.distances(key, owners), strict=True))
        assert walked == sorted(owners, key=distances.__getitem__)


def test_one_at_a_time_is_the_same_as_all_at_once() -> None:
    ring = HashRing()
    for count in range(1, 201):
        ring.update(names(count))
    for count in range(200, 120, -1):
        ring.update(names(count))
    at_once = ring_of(*names(121))
    for key in KEYS[:200]:
        assert list(ring.walk(key)) == list(at_once.walk(key))


def test_an_owner_that_is_not_on_the_ring_is_last() -> None:
    ring = ring_of("a", "b")
    near, unknown, other = ring.distances("k", ["a", "unknown", "b"])
    assert unknown > max(near, other)


def test_a_change_touches_few_points() -> None:
    ring = ring_of(*names(2000))
    blocks = {id(block) for block in ring._blocks}
    ring.update([*names(2000), "new"])
    kept = sum(id(block) in blocks for block in ring._blocks)
    assert kept >= len(blocks) - 160
    assert sum(map(len, ring._blocks)) == 2001 * 160
    assert ring._firsts == [block[0] for block in ring._blocks]
