"""Things that may happen a thousand times a second, told a few times and then counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(slots=True)
class _Window:
    begin_s: float
    told_count: int = 0
    untold: Counter[str] = field(default_factory=Counter)


class Repetition(Generic[KeyT]):
    """Decides which repetitions are told: the first few in each window of time, the others as a count.

    Args:
        interval_s: Length of a window, which begins with the first occurrence.
        told_count: How many are told in each.
        max_key_count: Different things that are kept apart at once; beyond it the oldest is forgotten.
    """

    def __init__(self, interval_s: float = 60.0, told_count: int = 1, max_key_count: int = 4096) -> None:
        self._interval_s = interval_s
        self._told_count = told_count
        self._max_key_count = max_key_count
        # By key, the window that began first comes first.
        self._windows: dict[KeyT, _Window] = {}

    def note(self, key: KeyT, now: float, what: str = "") -> bool:
        """Return whether an occurrence is told; else it counts, under ``what``, for :meth:`due`."""
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= self._max_key_count:
                del self._windows[next(iter(self._windows))]
            window = self._windows[key] = _Window(now)
        if window.told_count < self._told_count:
            window.told_count += 1
            return True
        window.untold[what] += 1
        return False

    def due(self, now: float) -> Iterator[tuple[KeyT, Counter[str]]]:
        """Yield what was not told in the windows that are over, with its counts.

        Such a thing begins a new window, in which it was told once by this.
        """
        over = []
        for key, window in self._windows.items():
            if now - window.begin_s < self._interval_s:
                break
            over.append(key)
        for key in over:
            window = self._windows.pop(key)
            if window.untold:
                self._windows[key] = _Window(now, self._told_count)
                yield key, window.untold
