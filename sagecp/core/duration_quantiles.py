"""Quantiles of a duration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DurationQuantiles:
    """Quantiles of a duration, in seconds; zeros when there is no sample."""

    sample_count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0


NO_DURATIONS = DurationQuantiles()
"""Without a sample."""
