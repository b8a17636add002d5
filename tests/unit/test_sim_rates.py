"""Arrivals that follow rates: as many as before, in the same order, denser where the series is higher."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest

from sagecp.sim.fleet.rates import RateSeries, follow_rates, read_rates
from sagecp.sim.fleet.trace_formats import TraceError
from sagecp.sim.fleet.traces import Trace, TraceRequest, read_trace


def even_trace(count: int = 1000, duration_s: float = 100.0) -> Trace:
    requests = tuple(
        TraceRequest(
            request_id=f"r{number}",
            arrival_s=(number + 0.5) * duration_s / count,
            prompt_token_count=10,
            output_token_count=1,
        )
        for number in range(count)
    )
    return Trace("even", 16, requests, duration_s, False)


def counts_in(trace: Trace, window_count: int) -> list[int]:
    arrivals_s = [request.arrival_s for request in trace.requests]
    return [int(each) for each in np.histogram(arrivals_s, window_count, (0.0, trace.duration_s))[0]]


def test_arrivals_follow_the_series() -> None:
    moved = follow_rates(even_trace(), RateSeries((0.0, 600.0, 1200.0, 1800.0), (1.0, 4.0, 0.0, 5.0)))
    assert counts_in(moved, 4) == [100, 400, 0, 500]
    assert [request.request_id for request in moved.requests] == [f"r{number}" for number in range(1000)]
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(moved.requests))
    assert moved.duration_s == 100.0


def test_windows_of_unlike_lengths_count_by_their_time() -> None:
    moved = follow_rates(even_trace(), RateSeries((0.0, 30.0, 40.0), (0.0, 9.0, 1.0)))
    # The last window lasts 10, as the one before: 90 requests in the fourth fifth, 10 in the last.
    assert counts_in(moved, 5) == [0, 0, 0, 900, 100]


def test_an_even_series_changes_nothing() -> None:
    moved = follow_rates(even_trace(), RateSeries((0.0, 1.0, 2.0), (3.0, 3.0, 3.0)))
    before = [request.arrival_s for request in even_trace().requests]
    assert [request.arrival_s for request in moved.requests] == pytest.approx(before)


def test_a_file_of_rates(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv.gz"
    path.write_bytes(gzip.compress(b"t_s,total_rps,tenant1_rps\n0,1.5,1\n600,2,\n\n1200,0,0\n"))
    assert read_rates(path) == RateSeries((0.0, 600.0, 1200.0), (1.5, 2.0, 0.0))
    with pytest.raises(TraceError, match="is a series of rates, not a trace; give it as --rates"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: lacks the columns t_s and total_rps"),
        ("t_s,rate\n0,1\n", "line 1: lacks the columns"),
        ("t_s,total_rps\n0,x\n", "line 2: has no number"),
        ("t_s,total_rps\n0\n", "line 2: has no number"),
        ("t_s,total_rps\n5,1\n", "line 2: t_s must begin at 0 and rise, not 5"),
        ("t_s,total_rps\n0,1\n0,1\n", "line 3: t_s must begin at 0 and rise, not 0"),
        ("t_s,total_rps\n0,-1\n", "line 2: total_rps must be at least 0, not -1"),
        ("t_s,total_rps\n0,nan\n", "line 2: total_rps must be at least 0, not nan"),
        ("t_s,total_rps\n0,1\n", "needs two windows"),
        ("t_s,total_rps\n0,0\n1,0\n", "needs two windows or more, and a rate above 0"),
    ],
)
def test_what_is_no_series(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rates.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError) as raised:
        read_rates(path)
    assert message in str(raised.value)


def test_sessions_and_moments_follow_nothing() -> None:
    series = RateSeries((0.0, 1.0), (1.0, 2.0))
    closed = Trace("sessions", 64, even_trace().requests, 100.0, True)
    moment = Trace("moment", 16, even_trace().requests[:1], 0.0, False)
    for trace in (closed, moment):
        with pytest.raises(ValueError, match="which could follow rates"):
            follow_rates(trace, series)
