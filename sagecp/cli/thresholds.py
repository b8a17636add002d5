"""Thresholds in the notation of monitoring plugins.

See "Threshold and ranges" of the Monitoring Plugins Development Guidelines
(https://www.monitoring-plugins.org/doc/guidelines.html).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_RANGE = re.compile(rf"(?P<inside>@)?(?:(?P<start>~|{_NUMBER}|):)?(?P<end>{_NUMBER})?")


@dataclass(frozen=True, slots=True)
class Range:
    """A range of good values, or, ``inside``, of bad ones. Its ends belong to it.

    Attributes:
        text: As it was written.
    """

    start: float
    end: float
    inside: bool
    text: str

    def alerts(self, value: float) -> bool:
        """Return whether a value is a reason to alert."""
        return (self.start <= value <= self.end) is self.inside


def parse_range(text: str) -> Range:
    """Return a range.

    ``10`` is 0 to 10, ``10:`` 10 and more, ``~:10`` 10 and less, ``10:20`` between the two;
    ``@10:20`` alerts between them instead of outside.

    Raises:
        ValueError: It is none; says how ranges are written.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None or not (match["start"] or match["end"]):
        raise ValueError(f"{text!r} is no range; for example 10 (at most), 2: (at least), 2:10 or @2:10")
    start = -math.inf if match["start"] == "~" else float(match["start"] or 0)
    end = math.inf if match["end"] is None else float(match["end"])
    if start > end:
        raise ValueError(f"{text!r} is no range: its start is above its end")
    return Range(start, end, match["inside"] is not None, text.strip())
