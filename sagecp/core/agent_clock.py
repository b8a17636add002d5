"""How far an agent's clock is from ours, by its heartbeats."""

from __future__ import annotations

SKEW_S = 5.0
"""Clocks that are further apart than this are far apart."""
SKEW_OVER_S = 2.5
"""And together again when they are nearer than this."""
# One slow heartbeat among so many is no skew.
_WINDOW = 8


class AgentClock:
    """Estimates an offset: positive where the agent's clock is ahead.

    What a heartbeat shows is the offset less the time that it took on its way, which
    is never negative. So the highest of the last few is the best estimate.

    Attributes:
        offset_s: The estimate; ``None``: unknown.
        skewed: Whether the clocks are far apart.
    """

    __slots__ = ("_shown_s", "offset_s", "skewed")

    def __init__(self) -> None:
        self.offset_s: float | None = None
        self.skewed = False
        # A deque would take 600 bytes of each instance.
        self._shown_s: tuple[float, ...] = ()

    def note(self, offset_s: float | None) -> bool:
        """Take what a heartbeat shows; return whether the clocks came apart or together by it."""
        if offset_s is None:
            return False
        self._shown_s = (*self._shown_s[1 - _WINDOW :], offset_s)
        self.offset_s = max(self._shown_s)
        was_skewed = self.skewed
        self.skewed = abs(self.offset_s) > (SKEW_OVER_S if was_skewed else SKEW_S)
        return self.skewed is not was_skewed
