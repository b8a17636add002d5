"""Consistent hashing: keys and owners on a circle, where few keys move when owners come and go.

Karger et al., "Consistent hashing and random trees", STOC'97. A key belongs to
the owner of the first point clockwise from it; an owner has many points, so
that shares are even.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

VIRTUAL_NODE_COUNT = 160
# A point is a place on the circle (44 bits) followed by its owner's slot (20 bits), so that one
# number says both: a million owners, and about no two points at one place.
_SLOT_BITS = 20
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_PLACE_MASK = np.uint64((1 << 64) - 1 - _SLOT_MASK)
_CIRCLE = 1 << 64
_POINTS_PER_DIGEST = 8
# Points are kept in sorted blocks of at most this many: an insertion moves a few kilobytes.
_BLOCK_POINT_COUNT = 1024


class HashRing:
    """A circle of owners.

    Adding or removing an owner costs its points times O(log n), about 0.3 ms,
    besides the comparison of names; many at once are sorted in anew, 10,000 in
    about 0.4 s. Each point is kept twice, in 8 bytes: 2.5 KB per owner.

    Args:
        virtual_node_count: Points per owner; more make shares more even.
    """

    def __init__(self, virtual_node_count: int = VIRTUAL_NODE_COUNT) -> None:
        self._virtual_node_count = virtual_node_count
        # Each owner's points, sorted.
        self._points: dict[str, array[int]] = {}
        self._owners: list[str] = []
        self._free_slots: list[int] = []
        # All points in order, in blocks, and the first point of each block.
        self._blocks: list[array[int]] = []
        self._firsts: list[int] = []

    def __len__(self) -> int:
        """Return the number of owners."""
        return len(self._points)

    def __contains__(self, owner: str) -> bool:
        """Return whether an owner has its points on the circle."""
        return owner in self._points

    def update(self, owners: Iterable[str]) -> None:
        """Let these be the owners, and no others. Points of those that stay do not move."""
        wanted = dict.fromkeys(owners)
        removed = [owner for owner in self._points if owner not in wanted]
        added = [owner for owner in wanted if owner not in self._points]
        if 8 * (len(removed) + len(added)) > len(self._points):
            for owner in removed:
                self._forget(owner)
            for owner in added:
                self._make_points(owner)
            self._sort_all()
            return
        for owner in removed:
            for point in self._forget(owner):
                self._delete_point(point)
        for owner in added:
            for point in self._make_points(owner):
                self._insert_point(point)

    def walk(self, key: str) -> Iterator[str]:
        """Yield the owners in the order in which they are met clockwise from a key, each once."""
        if not self._points:
            return
        place = place_of(key)
        block_index = max(0, bisect_left(self._firsts, place) - 1)
        offset = bisect_left(self._blocks[block_index], place)
        met: set[int] = set()
        while True:
            for point in self._blocks[block_index][offset:]:
                slot = point & _SLOT_MASK
                if slot not in met:
                    met.add(slot)
                    yield self._owners[slot]
                    if len(met) == len(self._points):
                        return
            block_index = (block_index + 1) % len(self._blocks)
            offset = 0

    def distances(self, key: str, owners: Iterable[str]) -> list[int]:
        """Return how far clockwise from a key each owner's first point is.

        Their order is that of :meth:`walk`. Costs O(log points) per owner asked
        for, however many others there are. One that is not on the circle is
        farther than any other.
        """
        place = place_of(key)
        distances = []
        for owner in owners:
            points = self._points.get(owner)
            if points is None:
                distances.append(_CIRCLE)
                continue
            index = bisect_left(points, place)
            point = points[index] if index < len(points) else points[0] + _CIRCLE
            distances.append(point - place)
        return distances

    # -- inside ----------------------------------------------------------------------

    def _make_points(self, owner: str) -> array[int]:
        slot = self._free_slots.pop() if self._free_slots else len(self._owners)
        if slot == len(self._owners):
            self._owners.append(owner)
        else:
            self._owners[slot] = owner
        name = owner.encode("utf-8", "surrogatepass")
        digest_count = -(-self._virtual_node_count // _POINTS_PER_DIGEST)
        digests = b"".join(
            hashlib.blake2b(name, salt=b"%d" % number).digest() for number in range(digest_count)
        )
        places = np.frombuffer(digests, dtype="<u8")[: self._virtual_node_count]
        points = array("Q", np.sort(places & _PLACE_MASK | np.uint64(slot)).tobytes())
        self._points[owner] = points
        return points

    def _forget(self, owner: str) -> array[int]:
        points = self._points.pop(owner)
        self._free_slots.append(points[0] & _SLOT_MASK)
        return points

    def _insert_point(self, point: int) -> None:
        index = max(0, bisect_left(self._firsts, point) - 1)
        block = self._blocks[index]
        insort(block, point)
        if len(block) > _BLOCK_POINT_COUNT:
            middle = len(block) // 2
            self._blocks[index : index + 1] = [block[:middle], block[middle:]]
            self._firsts.insert(index + 1, block[middle])
        self._firsts[index] = self._blocks[index][0]

    def _delete_point(self, point: int) -> None:
        index = max(0, bisect_left(self._firsts, point + 1) - 1)
        block = self._blocks[index]
        del block[bisect_left(block, point)]
        if block:
            self._firsts[index] = block[0]
        else:
            del self._blocks[index], self._firsts[index]

    def _sort_all(self) -> None:
        if not self._points:
            self._blocks, self._firsts = [], []
            return
        points = np.sort(np.concatenate([np.frombuffer(p, dtype=np.uint64) for p in self._points.values()]))
        half = _BLOCK_POINT_COUNT // 2
        self._blocks = [array("Q", points[i : i + half].tobytes()) for i in range(0, len(points), half)]
        self._firsts = [block[0] for block in self._blocks]


def place_of(key: str) -> int:
    """Return the place of a key on the circle, 0 to 2**64 - 1."""
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )
