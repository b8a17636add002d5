"""How many heartbeats came, and how many were refused, by reason."""

from __future__ import annotations

from collections import Counter

from sagecp.runtime.loop_runs import LoopRuns

BAD_FIGURE = "BAD_FIGURE"
"""Reason of a heartbeat that was taken but for figures that cannot be; other reasons are those of errors."""


class HeartbeatCounts:
    """Since the start.

    Args:
        interval_s: How often agents are asked to report.

    Attributes:
        runs: Those that were taken.
        refused_counts: Those that were not, in part or as a whole, by reason.
    """

    def __init__(self, interval_s: float) -> None:
        self.runs = LoopRuns("heartbeat", interval_s)
        self.refused_counts: Counter[str] = Counter()

    def note_taken(self, now: float) -> None:
        """One was taken."""
        self.runs.note(now)
