"""How long to wait before the next try, and how often to speak of it."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Exponential backoff with full jitter, at the cap too.

    Each wait is drawn evenly from zero to a bound that doubles. A thousand agents
    whose control plane restarts therefore come back spread over the bound,
    however often they have tried: jitter that fades at the cap would bring them
    back in step.

    Args:
        base_s: Bound of the first wait.
        cap_s: Largest bound.
        draw: Returns a number from 0 to 1, for tests.
    """

    __slots__ = ("_base_s", "_cap_s", "_draw", "_failure_count")

    def __init__(
        self, base_s: float = 0.2, cap_s: float = 10.0, draw: Callable[[], float] = random.random
    ) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._draw = draw
        self._failure_count = 0

    @property
    def bound_s(self) -> float:
        """Longest that the next wait can be."""
        # The exponent is bounded: 2.0**2000 overflows.
        return float(min(self._cap_s, self._base_s * 2.0 ** min(self._failure_count, 64)))

    def next_wait_s(self) -> float:
        """Return how long to wait now, and double the bound."""
        wait_s = self._draw() * self.bound_s
        self._failure_count += 1
        return wait_s

    def reset(self) -> None:
        """Start over: it worked."""
        self._failure_count = 0


class Reminder:
    """Decides whether a line is worth saying again: when its text is new, and every so often.

    Args:
        clock: Monotonic seconds.
        interval_s: After which the same text is said again.
    """

    __slots__ = ("_clock", "_due_s", "_interval_s", "_text")

    def __init__(self, clock: Callable[[], float], interval_s: float = 30.0) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._text = ""
        self._due_s = 0.0

    def is_due(self, text: str) -> bool:
        """Return whether to say it now, and note that it is said."""
        now_s = self._clock()
        if text == self._text and now_s < self._due_s:
            return False
        self._text, self._due_s = text, now_s + self._interval_s
        return True

    def reset(self) -> None:
        """Forget what was said: the matter is settled."""
        self._text = ""
