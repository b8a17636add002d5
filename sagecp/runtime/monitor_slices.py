"""Samples of ended requests as sketches by key and slice of time, which add up to any window and group.

A table holds the sketches of all keys of a slice at once, and of each only the
buckets that are not empty: there may be thousands of keys with a few samples each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagecp.core.quantile_sketch import DURATIONS, QuantileSketch, Values
from sagecp.core.types import RequestState

# The durations that quantiles are kept of.
LATENCY, TTFT, TPOT, QUEUE_WAIT = range(4)
DURATION_COUNT = 4
# Columns of sums: of each duration first, as they are numbered above.
ENDED, SUCCEEDED, TOKENS, JUDGED, MET, COST_USD, PRICED, PRICED_TOKENS = range(4, 12)
SUM_COUNT = 12

_BUCKETS = DURATIONS.bucket_count
BUCKETS_PER_KEY = DURATION_COUNT * _BUCKETS
# A cell is one number: key, duration and bucket (its code) in the upper half, how many samples in the
# lower one. Plain sorting brings what belongs together side by side, and costs a fifth of sorting with an
# index; halves are seen in place, because to copy 100,000s of cells costs more than to compute with them.
_COUNT_BITS = np.uint64(32)
_COUNT_HALF, _CODE_HALF = (0, 1) if sys.byteorder == "little" else (1, 0)

Cells = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.int64]

# Slices become longer with age: of each width, and how old their ends are at least.
_WIDTHS_S = ((150.0, 300.0), (15.0, 60.0), (5.0, -math.inf))
SLICE_S = 5.0
LONGEST_WINDOW_S = 3600.0
"""Longest window of rates and quantiles."""
KEPT_S = LONGEST_WINDOW_S + 150.0
"""No slice refers to what is older than this."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Sketches and sums of many keys.

    Attributes:
        cells: Counts of samples by key, duration and bucket; ascending, each at most once.
        numbers: Keys that there are sums of, ascending.
        sums: Sums x keys: of durations in seconds, then numbers of requests and tokens, and US dollars.
    """

    cells: Cells
    numbers: Numbers
    sums: Values

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return self.cells.nbytes + self.numbers.nbytes + self.sums.nbytes


def table_of(rows: Values) -> SampleTable:
    """Return the table of some samples.

    Args:
        rows: Samples x (key, state, latency, TTFT, TPOT, wait, tokens, objectives met, cost); NaN: does
            not apply.
    """
    keys = rows[:, 0].astype(np.int64)
    succeeded = rows[:, 1] == RequestState.SUCCEEDED
    durations = np.where(succeeded[:, np.newaxis], rows[:, 2:6], np.nan)
    known = ~np.isnan(durations)
    buckets = DURATIONS.indices(np.where(known, durations, 0.0))
    places = keys[:, np.newaxis] * DURATION_COUNT + np.arange(DURATION_COUNT)
    codes = (places * _BUCKETS + buckets)[known].astype(np.uint64)
    sums = np.empty((SUM_COUNT, len(rows)))
    sums[:DURATION_COUNT] = np.where(known, durations, 0.0).T
    sums[ENDED] = 1.0
    sums[SUCCEEDED] = succeeded
    sums[TOKENS] = rows[:, 6]
    sums[JUDGED] = ~np.isnan(rows[:, 7])
    sums[MET] = rows[:, 7] == 1.0
    is_priced = ~np.isnan(rows[:, 8])
    sums[COST_USD] = np.where(is_priced, rows[:, 8], 0.0)
    sums[PRICED] = is_priced
    sums[PRICED_TOKENS] = np.where(is_priced, rows[:, 6], 0.0)
    return SampleTable(added((codes << _COUNT_BITS) | np.uint64(1)), *_sums_by_key(keys, sums))


def merged(tables: Sequence[SampleTable]) -> SampleTable:
    """Return the table of everything that some tables hold."""
    numbers, sums = _sums_by_key(
        np.concatenate([table.numbers for table in tables]),
        np.concatenate([table.sums for table in tables], axis=1),
    )
    return SampleTable(added(np.concatenate([table.cells for table in tables])), numbers, sums)


def codes_of(cells: Cells) -> Halves:
    """Return a view of what cells count: key, duration and bucket, in one number."""
    return cells.view(np.uint32)[_CODE_HALF::2]


def counts_of(cells: Cells) -> Halves:
    """Return a view of how many samples cells count."""
    return cells.view(np.uint32)[_COUNT_HALF::2]


def added(cells: Cells) -> Cells:
    """Return cells in order, those of one code as one; counts add up modulo 2^32. Sorts in place."""
    cells.sort()
    codes = codes_of(cells)
    is_first = np.ones(len(cells), bool)
    np.not_equal(codes[1:], codes[:-1], out=is_first[1:])
    firsts = np.flatnonzero(is_first)
    if len(firsts) == len(cells):
        return cells
    added = cells[firsts]
    counts_of(added)[:] = np.add.reduceat(counts_of(cells), firsts)
    return added


def _sums_by_key(keys: Numbers, sums: Values) -> tuple[Numbers, Values]:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[firsts], np.add.reduceat(sums[:, order], firsts, axis=1)


class Slice:
    """Everything that ended between two times.

    Attributes:
        start_s: From here on.
        end_s: Before this.
        table: Sketches and sums by key.
        sketches: Of each duration, over all keys.
        sums: Likewise.
    """

    __slots__ = ("end_s", "sketches", "start_s", "sums", "table")

    def __init__(self, start_s: float, end_s: float, table: SampleTable) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.table = table
        self.sums: Values = table.sums.sum(axis=1)
        places = codes_of(table.cells) % np.uint32(BUCKETS_PER_KEY)
        counts = np.bincount(places, counts_of(table.cells), BUCKETS_PER_KEY).astype(np.int64)
        self.sketches = tuple(
            QuantileSketch(DURATIONS, each, float(total))
            for each, total in zip(counts.reshape(DURATION_COUNT, _BUCKETS), self.sums, strict=False)
        )


class SliceStore:
    """The slices of the last hour.

    They are 5 s long, 15 s from the age of a minute on, and 150 s from five
    minutes on: at most 70 at any time. A window begins with a whole one, and so
    is longer than was asked by less than one: by 5 s of a minute, 15 s of five
    minutes, 150 s of an hour.

    Args:
        max_size_bytes: Most memory; beyond it the oldest slices are dropped, and windows end there.
    """

    def __init__(self, max_size_bytes: int) -> None:
        self._max_size_bytes = max_size_bytes
        # By time.
        self._slices: list[Slice] = []
        self._dropped_until_s = -math.inf

    @property
    def size_bytes(self) -> int:
        """Memory that the tables take."""
        return sum(each.table.size_bytes for each in self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def add(self, start_s: float, table: SampleTable) -> None:
        """Take samples of one slice; none of an earlier slice than before."""
        last = self._slices[-1] if self._slices else None
        if last is not None and start_s < last.end_s:
            self._slices[-1] = Slice(last.start_s, last.end_s, merged([last.table, table]))
            return
        self._slices.append(Slice(start_s, start_s + SLICE_S, table))
        self._age(start_s)

    def _age(self, now: float) -> None:
        """Make old slices longer, and drop those that are too old or too many."""
        kept: list[Slice] = []
        group: list[Slice] = []
        span = (math.nan, math.nan)
        for each in self._slices:
            if each.end_s <= now - KEPT_S:
                continue
            own_span = _span_at(each, now)
            if group and own_span != span:
                kept.append(_joined(group, span))
                group = []
            group.append(each)
            span = own_span
        kept.append(_joined(group, span))
        size_bytes = sum(each.table.size_bytes for each in kept)
        while size_bytes > self._max_size_bytes and len(kept) > 1:
            oldest = kept.pop(0)
            size_bytes -= oldest.table.size_bytes
            self._dropped_until_s = oldest.end_s
        self._slices = kept

    def within(self, now: float, window_s: float) -> tuple[list[Slice], float]:
        """Return the slices of a window that ends now, and how long it is really."""
        if self._dropped_until_s > now - window_s:
            window_s = now - self._dropped_until_s
        found = [each for each in self._slices if each.end_s > now - window_s]
        return found, max(window_s, now - found[0].start_s) if found else window_s


def _span_at(each: Slice, now: float) -> tuple[float, float]:
    """Return from when to when the slice should reach that this one is part of."""
    for width_s, age_s in _WIDTHS_S:
        start_s = each.start_s // width_s * width_s
        if start_s + width_s <= now - age_s:
            return start_s, start_s + width_s
    return each.start_s, each.end_s


def _joined(group: list[Slice], span: tuple[float, float]) -> Slice:
    if len(group) == 1:
        return group[0]
    return Slice(*span, merged([each.table for each in group]))
