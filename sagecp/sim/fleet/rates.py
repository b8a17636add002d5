"""Rates over time, such as a week of them, that the arrivals of a trace can be made to follow."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sagecp.sim.fleet.trace_formats import TraceError, read_text
from sagecp.sim.fleet.traces import Trace

TIME_COLUMN = "t_s"
RATE_COLUMN = "total_rps"


@dataclass(frozen=True, slots=True)
class RateSeries:
    """Rates of consecutive windows of time.

    Attributes:
        start_s: When each window begins; the first at 0, rising.
        rate_per_s: Requests per second in each, at least 0, not all 0.
    """

    start_s: tuple[float, ...]
    rate_per_s: tuple[float, ...]


def read_rates(path: Path) -> RateSeries:
    """Read a CSV, compressed with gzip or not, of ``t_s``, ``total_rps`` and columns that are not looked at.

    Raises:
        TraceError: The file cannot be read, or is something else.
    """
    reader = csv.reader(io.StringIO(read_text(path)))
    columns = [name.strip() for name in next(reader, [])]
    if TIME_COLUMN not in columns or RATE_COLUMN not in columns:
        raise TraceError(path, 1, f"lacks the columns {TIME_COLUMN} and {RATE_COLUMN} of a series of rates")
    places = columns.index(TIME_COLUMN), columns.index(RATE_COLUMN)
    rows: list[tuple[float, float]] = []
    for cells in reader:
        if not cells:
            continue
        try:
            start_s, rate_per_s = (float(cells[place]) for place in places)
        except (ValueError, IndexError):
            raise TraceError(path, reader.line_num, "has no number where one is needed") from None
        is_first = not rows
        if not math.isfinite(start_s) or (start_s != 0 if is_first else start_s <= rows[-1][0]):
            raise TraceError(
                path, reader.line_num, f"{TIME_COLUMN} must begin at 0 and rise, not {start_s:g}"
            )
        if not 0 <= rate_per_s < math.inf:
            raise TraceError(path, reader.line_num, f"{RATE_COLUMN} must be at least 0, not {rate_per_s:g}")
        rows.append((start_s, rate_per_s))
    if len(rows) < 2 or not any(rate for _, rate in rows):
        raise TraceError(path, 0, "needs two windows or more, and a rate above 0 in one of them")
    starts_s, rates_per_s = zip(*rows, strict=True)
    return RateSeries(starts_s, rates_per_s)


def follow_rates(trace: Trace, series: RateSeries) -> Trace:
    """Return a trace whose arrivals are denser where the series is higher.

    The series is stretched or shrunk to the trace's duration. Order, number and
    mean rate of the requests stay: each moves to where as large a part of the
    series' requests has arrived as of the trace's time had passed.

    Raises:
        ValueError: The trace is closed-loop, or covers no time.
    """
    if trace.is_closed_loop or trace.duration_s <= 0:
        raise ValueError(f"trace {trace.name} has no arrivals over time, which could follow rates")
    # The last window is as long as the one before.
    starts_s = np.array([*series.start_s, 2 * series.start_s[-1] - series.start_s[-2]])
    arrived = np.concatenate(([0.0], np.cumsum(np.diff(starts_s) * np.array(series.rate_per_s))))
    # Where nothing arrives, nothing is to be placed.
    rising = np.diff(arrived) > 0
    is_kept = np.concatenate((rising, [False])) | np.concatenate(([False], rising))
    shares = np.array([request.arrival_s for request in trace.requests]) / trace.duration_s
    moved_s = np.interp(
        shares, arrived[is_kept] / arrived[-1], starts_s[is_kept] / starts_s[-1] * trace.duration_s
    )
    requests = tuple(
        replace(request, arrival_s=float(arrival_s))
        for request, arrival_s in zip(trace.requests, moved_s, strict=True)
    )
    return replace(trace, requests=requests)
