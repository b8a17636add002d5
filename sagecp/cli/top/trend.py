"""How a figure went over the last minutes, in little memory, and as a row of bars."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

BUCKET_S = 5.0
BUCKET_COUNT = 60
_BARS = "▁▂▃▄▅▆▇█"
# A figure that was not read for a while is taken for unchanged, but not for ever.
_LONGEST_GAP = 6
_NOTHING = float("nan")


class Trend:
    """The last value of every 5 s of the last 5 minutes."""

    __slots__ = ("_last", "_values")

    def __init__(self) -> None:
        self._values = array("f", [_NOTHING]) * BUCKET_COUNT
        self._last = -1

    def add(self, value: float | None, now_s: float) -> None:
        """Note a value; ``None`` is unknown.

        Args:
            value: The figure.
            now_s: On any clock that does not jump.
        """
        bucket = int(now_s / BUCKET_S)
        if self._last >= 0:
            for skipped in range(max(self._last + 1, bucket - BUCKET_COUNT + 1), bucket + 1):
                self._values[skipped % BUCKET_COUNT] = _NOTHING
        self._last = max(self._last, bucket)
        if value is not None:
            self._values[bucket % BUCKET_COUNT] = value

    def recent(self, count: int, now_s: float, buckets_each: int = 1) -> list[float | None]:
        """Return one figure per bar, oldest first: the mean of its buckets, ``None`` where nothing is known.

        Args:
            count: How many bars.
            now_s: On the clock of `add`.
            buckets_each: Buckets that a bar stands for.
        """
        end = int(now_s / BUCKET_S)
        first = end - count * buckets_each + 1
        filled: list[float | None] = []
        known, gap = None, _LONGEST_GAP
        # From before the first bar on, as what is carried into it may lie there.
        for bucket in range(max(0, end - BUCKET_COUNT + 1, first - _LONGEST_GAP), end + 1):
            value = self._values[bucket % BUCKET_COUNT] if bucket <= self._last else _NOTHING
            if math.isnan(value):
                gap += 1
            else:
                known, gap = value, 0
            if bucket >= first:
                filled.append(known if gap <= _LONGEST_GAP else None)
        padding: list[float | None] = [None] * (count * buckets_each - len(filled))
        filled = padding + filled
        return [_mean(filled[i : i + buckets_each]) for i in range(0, len(filled), buckets_each)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def bars(values: Sequence[float | None], top: float | None = None) -> str:
    """Return values as bars of text, one character each; a blank where nothing is known.

    Args:
        values: What to draw.
        top: Value of a full bar; ``None``: the largest of them.
    """
    if top is None:
        top = max((value for value in values if value is not None), default=0.0)
    return "".join(" " if value is None else _bar(value, top) for value in values)


def _bar(value: float, top: float) -> str:
    if top <= 0 or value <= 0:
        return _BARS[0]
    return _BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))]
