"""When a periodic loop last ran, for operators."""

from __future__ import annotations

from sagecp.core.types import LoopStatus


class LoopRuns:
    """Counts the runs of one loop.

    Args:
        name: As operators know it.
        interval_s: How often it runs.
    """

    __slots__ = ("_interval_s", "_last_run_s", "_name", "count")

    def __init__(self, name: str, interval_s: float) -> None:
        self._name = name
        self._interval_s = interval_s
        self._last_run_s: float | None = None
        self.count = 0

    def note(self, now: float) -> None:
        """It ran, at a time on the core's clock."""
        self._last_run_s = now
        self.count += 1

    def status(self, wall_offset_s: float) -> LoopStatus:
        """Return what is known; add ``wall_offset_s`` to the core's clock to get Unix seconds."""
        last_run_s = self._last_run_s
        return LoopStatus(
            self._name,
            self._interval_s,
            None if last_run_s is None else last_run_s + wall_offset_s,
            self.count,
        )
