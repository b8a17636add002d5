"""Checks of single fields, which note what is wrong and go on, so that all is said at once."""

from __future__ import annotations

import math

from sagecp.core.errors import FieldViolation


class FieldChecks:
    """Notes the bad fields of a message.

    Attributes:
        violations: What was noted.
    """

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def note(self, field: str, description: str) -> None:
        """Note what is wrong with a field."""
        self.violations.append(FieldViolation(field, description))

    def number(
        self, field: str, value: float, low: float, high: float, *, above: bool = False, unit: str = ""
    ) -> bool:
        """Return whether a number is finite and in a range; ``above``: the lowest itself is not."""
        is_good = math.isfinite(value) and (low < value if above else low <= value) and value <= high
        if not is_good:
            span = f"above {low:,g}, and at most {high:,g}" if above else f"{low:,g} to {high:,g}"
            self.note(field, f"is {value:g}; must be {span}{unit and ' '}{unit}")
        return is_good

    def count(self, field: str, value: int, low: int, high: int) -> bool:
        """Return whether a count is in a range."""
        if low <= value <= high:
            return True
        self.note(field, f"is {value:,}; must be {low:,} to {high:,}")
        return False

    def length(self, field: str, size: int, limit: int, what: str) -> bool:
        """Return whether something is not too long."""
        if size <= limit:
            return True
        self.note(field, f"has {size:,} {what}; at most {limit:,} are allowed")
        return False
