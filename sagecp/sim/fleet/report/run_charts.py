"""What charts of one run are drawn from: few numbers, which travel between processes and fit a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import Floats, OutcomeArrays
from sagecp.sim.fleet.time_series import last_time_s, time_series

CURVE_SHARES = (*(number / 100 for number in range(100)), 0.995, 0.999, 1.0)
"""Shares of the requests at which distributions are kept."""

_MOST_BINS = 120
_MOST_LENGTH_BINS = 12
_FEWEST_OF_LENGTH_BIN = 20
_BIN_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
_SIGNIFICANT_DIGITS = 6

Numbers = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """How long something took.

    Attributes:
        quantiles_s: At :data:`CURVE_SHARES`; empty: nothing was measured.
        measured_share: Part of the requests it applies to that it was measured of: the others
            never got there.
        objective_low_s: Smallest objective of any request; ``None``: there is none.
        objective_high_s: Largest.
        objective_met_share: Part of the requests it applies to that met theirs.
    """

    quantiles_s: tuple[float, ...]
    measured_share: float
    objective_low_s: float | None
    objective_high_s: float | None
    objective_met_share: float


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Requests of similar prompt length.

    Attributes:
        low_token_count: Shortest prompt.
        high_token_count: Longest prompt.
        ttft_p50_s: Of those that got a first token; ``None``: none did.
        ttft_p95_s: Likewise.
        objective_s: Median objective for it.
        attainment: Share of good ones.
    """

    low_token_count: int
    high_token_count: int
    request_count: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    objective_s: float | None
    attainment: float


@dataclass(frozen=True, slots=True)
class RunSeries:
    """A run over time, in bins of equal length; ``None``: nothing to tell of that bin.

    Attributes:
        bin_s: Length of a bin; the first starts at 0.
        attainment: Share of good ones among the requests that arrived in the bin.
        queued_count: Requests that waited in the scheduler.
        in_flight_count: Requests on each instance, one row per instance.
        prompt_tokens_per_s: Uncached, over all instances.
        output_tokens_per_s: Over all instances.
    """

    bin_s: float
    instance_ids: tuple[str, ...]
    arrivals_per_s: Numbers
    attainment: Numbers
    queued_count: Numbers
    in_flight_count: tuple[Numbers, ...]
    prompt_tokens_per_s: Numbers
    output_tokens_per_s: Numbers


@dataclass(frozen=True, slots=True)
class RunCharts:
    """Everything that is drawn of a run."""

    ttft: Distribution
    tpot: Distribution
    by_length: tuple[LengthBin, ...]
    series: RunSeries


def run_charts(rows: OutcomeArrays, fleet: Sequence[SimInstance]) -> RunCharts:
    """Return what charts of a run are drawn from."""
    # An answer of one token has no time per further token.
    has_further = rows.output_token_count > 1
    return RunCharts(
        _distribution(rows.ttft_s, rows.ttft_slo_s),
        _distribution(rows.tpot_s[has_further], rows.tpot_slo_s[has_further]),
        _by_length(rows),
        _series(rows, fleet),
    )


def rounded(value: float) -> float | None:
    """Return a number with as many digits as anybody reads; ``None`` for what is none."""
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def _numbers(values: Floats) -> Numbers:
    return tuple(rounded(float(value)) for value in values)


def _distribution(durations_s: Floats, objectives_s: Floats) -> Distribution:
    known = durations_s[np.isfinite(durations_s)]
    stated = objectives_s[np.isfinite(objectives_s)]
    count = max(1, len(durations_s))
    quantiles = np.quantile(known, CURVE_SHARES) if len(known) else np.zeros(0)
    return Distribution(
        tuple(float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in quantiles),
        len(known) / count,
        rounded(float(stated.min())) if len(stated) else None,
        rounded(float(stated.max())) if len(stated) else None,
        # A comparison with NaN is false, so an absent objective needs no special case.
        int((np.isfinite(durations_s) & ~(durations_s > objectives_s)).sum()) / count,
    )


def _by_length(rows: OutcomeArrays) -> tuple[LengthBin, ...]:
    """Return bins of about equally many requests; equal lengths stay together."""
    lengths = rows.prompt_token_count
    bin_count = max(1, min(_MOST_LENGTH_BINS, len(lengths) // _FEWEST_OF_LENGTH_BIN))
    if not len(lengths):
        return ()
    bounds = np.unique(np.quantile(lengths, np.arange(1, bin_count) / bin_count, method="lower"))
    place = np.searchsorted(bounds, lengths, side="left")
    good, ttft_s = rows.good, rows.ttft_s
    found: list[LengthBin] = []
    for index in range(len(bounds) + 1):
        chosen = place == index
        if not chosen.any():
            continue
        known = ttft_s[chosen][np.isfinite(ttft_s[chosen])]
        stated = rows.ttft_slo_s[chosen][np.isfinite(rows.ttft_slo_s[chosen])]
        found.append(
            LengthBin(
                int(lengths[chosen].min()),
                int(lengths[chosen].max()),
                int(chosen.sum()),
                rounded(float(np.quantile(known, 0.5))) if len(known) else None,
                rounded(float(np.quantile(known, 0.95))) if len(known) else None,
                rounded(float(np.median(stated))) if len(stated) else None,
                float(good[chosen].mean()),
            )
        )
    return tuple(found)


def _series(rows: OutcomeArrays, fleet: Sequence[SimInstance]) -> RunSeries:
    end_s = last_time_s(rows)
    bin_s = next((step for step in _BIN_STEPS_S if end_s <= step * _MOST_BINS), math.ceil(end_s / _MOST_BINS))
    series = time_series(rows, fleet, bin_s)
    return RunSeries(
        float(bin_s),
        series.instance_ids,
        _numbers(series.arrivals_per_s),
        _numbers(series.attainment),
        _numbers(series.queued_count),
        tuple(_numbers(row) for row in series.in_flight_count),
        _numbers(series.prompt_tokens_per_s.sum(axis=0)),
        _numbers(series.output_tokens_per_s.sum(axis=0)),
    )
