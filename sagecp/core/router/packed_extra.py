"""Two numbers in the one ``extra`` of a row: a count, and a number of any size that comes second.

Strategies that compare a candidate with the whole set, and leave the rest to a
balancer with an ``extra`` of its own, need both.
"""

from __future__ import annotations

import math


def squeeze(value: float) -> float:
    """Map 0 to infinity onto 0 to 1, keeping the order: ``x / (1 + x)``."""
    return 1.0 if math.isinf(value) else value / (1.0 + value)


def unsqueeze(value: float) -> float:
    """Undo :func:`squeeze`."""
    return math.inf if value >= 1.0 else value / (1.0 - value)


def pack(count: int, value: float) -> float:
    """Put a count, at least 0, and a finite value, at least 0, into one float.

    The value keeps about 12 digits beside a count below a thousand; 0 and 1 stay exact.
    """
    return count + squeeze(value)


def unpack(packed: float) -> tuple[int, float]:
    """Undo :func:`pack`."""
    count = math.floor(packed)
    return count, unsqueeze(packed - count)
