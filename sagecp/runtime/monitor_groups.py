"""What the slices of a window add up to by group of keys, kept from one question to the next.

Most slices of a window are in the next one, too. So the sums are kept, and only what came
since then is added, and what went is subtracted: counts, whole nanoseconds and whole trillionths of
a dollar, exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagecp.core.quantile_sketch import DURATIONS, Counts, QuantileSketch, Values, nearest_ranks
from sagecp.runtime.monitor_slices import (
    BUCKETS_PER_KEY,
    COST_USD,
    DURATION_COUNT,
    SUM_COUNT,
    Cells,
    Halves,
    Numbers,
    Slice,
    added,
    codes_of,
    counts_of,
)

SHARES = (0.5, 0.95, 0.99)
_BUCKETS = DURATIONS.bucket_count
# Sums are kept as whole numbers: of floats, what was added and subtracted would leave a rest.
_UNITS = np.ones(SUM_COUNT)
_UNITS[:DURATION_COUNT] = 1e9
# A request may cost a millionth of a dollar; whole numbers reach up to 9 million of them.
_UNITS[COST_USD] = 1e12
MAX_KEPT_COUNT = 8
MAX_KEPT_BYTES = 16 << 20
KEPT_FOR_S = 60.0
"""Sums that nobody asked for in this time are let go of."""


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """What samples of some groups add up to.

    Attributes:
        sums: Groups x sums.
        sample_counts: Groups x durations.
        quantiles_s: Groups x durations x (0.5, 0.95, 0.99).
    """

    sums: Values
    sample_counts: Counts
    quantiles_s: Values


def overall_figures(slices: Sequence[Slice]) -> GroupFigures:
    """Return what everything adds up to, as one group."""
    sums = np.zeros((1, SUM_COUNT))
    sketches = [QuantileSketch(DURATIONS) for _ in range(DURATION_COUNT)]
    for each in slices:
        sums += each.sums
        for sketch, part in zip(sketches, each.sketches, strict=True):
            sketch.merge(part)
    return GroupFigures(
        sums,
        np.array([[sketch.count for sketch in sketches]]),
        np.array([[sketch.quantiles(SHARES) for sketch in sketches]]),
    )


class GroupSums:
    """What slices add up to by group. Begins with no slice."""

    def __init__(self) -> None:
        self._slices: list[Slice] = []
        self._groups: Numbers = np.empty(0, np.int64)
        # As the cells of tables, with groups for keys. Apart, because all of them are looked at each time.
        self._codes: Halves = np.empty(0, np.uint32)
        self._counts: Halves = np.empty(0, np.uint32)
        self._sums: npt.NDArray[np.int64] = np.zeros((SUM_COUNT, 0), np.int64)

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, without the slices."""
        return self._groups.nbytes + self._codes.nbytes + self._counts.nbytes + self._sums.nbytes

    def figures(self, slices: Sequence[Slice], group_of_key: Numbers, group_count: int) -> GroupFigures:
        """Return what the groups of keys add up to.

        Args:
            slices: The window.
            group_of_key: The group of each key, by its number; -1: none.
            group_count: Groups.
        """
        self._follow(slices, group_of_key, group_count)
        return GroupFigures((self._sums / _UNITS[:, np.newaxis]).T, *self._quantiles(group_count))

    def _follow(self, slices: Sequence[Slice], group_of_key: Numbers, group_count: int) -> None:
        known = len(self._groups)
        if self._sums.shape[1] != group_count or not np.array_equal(group_of_key[:known], self._groups):
            self._slices = []
            self._codes, self._counts = self._codes[:0], self._counts[:0]
            self._sums = np.zeros((SUM_COUNT, group_count), np.int64)
        self._groups = group_of_key
        before, now = set(map(id, self._slices)), set(map(id, slices))
        came = [each for each in slices if id(each) not in before]
        went = [each for each in self._slices if id(each) not in now]
        self._slices = list(slices)
        parts = [self._part(each, group_count, is_added=True) for each in came]
        parts += [self._part(each, group_count, is_added=False) for each in went]
        if parts:
            changes = added(np.concatenate(parts))
            self._change(codes_of(changes), counts_of(changes))

    def _change(self, codes: Halves, counts: Halves) -> None:
        """Add counts of codes in ascending order; modulo 2^32, so that they may also become smaller."""
        codes = np.ascontiguousarray(codes)
        places = np.searchsorted(self._codes, codes)
        is_known = np.zeros(len(codes), bool)
        inside = places < len(self._codes)
        is_known[inside] = self._codes[places[inside]] == codes[inside]
        self._counts[places[is_known]] += counts[is_known]
        is_new = ~is_known
        if is_new.any():
            self._codes = np.insert(self._codes, places[is_new], codes[is_new])
            self._counts = np.insert(self._counts, places[is_new], counts[is_new])
        is_there = self._counts != 0
        if not is_there.all():
            self._codes, self._counts = self._codes[is_there], self._counts[is_there]

    def _part(self, each: Slice, group_count: int, *, is_added: bool) -> Cells:
        """Add the sums of a slice or subtract them; return the cells to add, by group."""
        table = each.table
        groups = self._groups[table.numbers]
        numbers_in = groups >= 0
        places = groups[numbers_in]
        for column, part in enumerate(table.sums):
            # In the same order both times, so that what is subtracted is what was added.
            total = np.rint(np.bincount(places, part[numbers_in], group_count) * _UNITS[column])
            self._sums[column] += total.astype(np.int64) if is_added else -total.astype(np.int64)
        codes = codes_of(table.cells)
        keys = codes // np.uint32(BUCKETS_PER_KEY)
        # Modulo 2^32, so that codes can become smaller as well.
        moves = ((self._groups - np.arange(len(self._groups))) * BUCKETS_PER_KEY).astype(np.uint32)
        cells = np.empty(len(codes), np.uint64)
        codes_of(cells)[:] = codes + moves[keys]
        # Likewise: a count to be subtracted is one of 2^32 less.
        counts_of(cells)[:] = counts_of(table.cells) if is_added else -counts_of(table.cells)
        return cells if numbers_in.all() else cells[(self._groups >= 0)[keys]]

    def _quantiles(self, group_count: int) -> tuple[Counts, Values]:
        """Return how many samples there are of each group and duration, and their quantiles."""
        shape = (group_count, DURATION_COUNT)
        codes = self._codes
        running = np.cumsum(self._counts, dtype=np.uint32)
        if not len(codes):
            return np.zeros(shape, np.int64), np.zeros((*shape, len(SHARES)))
        edges = np.arange(group_count * DURATION_COUNT + 1, dtype=np.uint32) * np.uint32(_BUCKETS)
        firsts = np.searchsorted(codes, edges)
        below = np.where(firsts > 0, running[firsts - 1], 0).astype(np.int64)
        sizes = np.diff(below)
        ranks = below[:-1, np.newaxis] + nearest_ranks(sizes, SHARES)
        found = np.searchsorted(running, ranks.astype(running.dtype))
        # An empty sketch finds a cell of one of its successors, or none at all.
        buckets = codes[np.minimum(found, len(codes) - 1)] % np.uint32(_BUCKETS)
        values_s = np.where(sizes[:, np.newaxis] > 0, DURATIONS.values[buckets], 0.0)
        return sizes.reshape(shape), values_s.reshape(*shape, len(SHARES))


class KeptSums:
    """Sums for the questions that are asked again and again: a few of them, within bounds."""

    def __init__(self) -> None:
        # Those asked for last at the end.
        self._sums: dict[Hashable, tuple[GroupSums, float]] = {}

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, without the slices."""
        return sum(sums.size_bytes for sums, _ in self._sums.values())

    def figures(
        self, question: Hashable, slices: Sequence[Slice], groups: Numbers, group_count: int, now: float
    ) -> GroupFigures:
        """Return what groups add up to; ``question`` stands for which window and groups. See `GroupSums`."""
        kept = self._sums.pop(question, None)
        sums = GroupSums() if kept is None else kept[0]
        found = sums.figures(slices, groups, group_count)
        self._sums[question] = sums, now
        while len(self._sums) > MAX_KEPT_COUNT or (len(self._sums) > 1 and self.size_bytes > MAX_KEPT_BYTES):
            del self._sums[next(iter(self._sums))]
        return found

    def let_go(self, now: float) -> None:
        """Forget what nobody asked for lately: it holds slices that are out of every window."""
        while self._sums:
            question = next(iter(self._sums))
            if self._sums[question][1] > now - KEPT_FOR_S:
                return
            del self._sums[question]
