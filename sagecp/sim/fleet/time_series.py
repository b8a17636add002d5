"""What a run did over time, for plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import Flags, Floats, OutcomeArrays, Outcomes

_MOST_BINS = 1_000_000
# What takes less time than this is at one moment: rates over shorter spans lose their precision.
_SHORTEST_SPAN_S = 1e-6


@dataclass(frozen=True, slots=True)
class TimeSeries:
    """Averages over bins of equal length; arrays over bins, or over instances and bins.

    Attributes:
        bin_s: Length of a bin.
        start_s: Where each bin starts.
        instance_ids: Of the rows of the arrays with two dimensions.
        arrivals_per_s: Requests submitted.
        good_per_s: Good requests that ended.
        attainment: Share of good ones among the requests that arrived then; NaN: none did.
        queued_count: Requests that had arrived and were not dispatched.
        in_flight_count: Requests that were dispatched and had not ended, by instance.
        prompt_tokens_per_s: Uncached prompt tokens, as of their first output token, by instance.
        output_tokens_per_s: Output tokens, spread evenly from the first to the last, by instance.
    """

    bin_s: float
    start_s: Floats
    instance_ids: tuple[str, ...]
    arrivals_per_s: Floats
    good_per_s: Floats
    attainment: Floats
    queued_count: Floats
    in_flight_count: Floats
    prompt_tokens_per_s: Floats
    output_tokens_per_s: Floats


def time_series(outcomes: Outcomes | OutcomeArrays, fleet: Sequence[SimInstance], bin_s: float) -> TimeSeries:
    """Return how load and speed of each instance went over time, until the last request ended.

    Raises:
        ValueError: ``bin_s`` is not above 0, or so small that the bins are too many.
    """
    rows = outcomes.as_arrays() if isinstance(outcomes, Outcomes) else outcomes
    end_s = last_time_s(rows)
    if not bin_s > 0 or end_s / bin_s > _MOST_BINS:
        raise ValueError(f"bin_s must be above 0 and make at most {_MOST_BINS} bins, not {bin_s}")
    edges_s = np.arange(max(1, math.ceil(end_s / bin_s)) + 1, dtype=np.float64) * bin_s
    # A last bin that the very end touches holds it.
    if end_s >= edges_s[-1]:
        edges_s = np.append(edges_s, edges_s[-1] + bin_s)
    good = rows.good
    arrivals = point_bins(rows.arrival_s, np.ones(len(good)), edges_s)
    good_arrivals = point_bins(rows.arrival_s[good], np.ones(int(good.sum())), edges_s)
    dispatched_s = first_known(rows.dispatch_s, rows.finish_s, end_s)
    ended_s = first_known(rows.finish_s, rows.finish_s, end_s)
    by_instance = [rows.instance_index == index for index in range(len(fleet))]
    uncached = (rows.prompt_token_count - rows.cached_token_count).astype(np.float64)
    has_first = np.isfinite(rows.first_token_s)

    def load(chosen: Flags) -> Floats:
        chosen = chosen & np.isfinite(rows.dispatch_s)
        spans_s = ended_s[chosen] - rows.dispatch_s[chosen]
        return spread_over_bins(rows.dispatch_s[chosen], ended_s[chosen], spans_s, edges_s)

    def prompts(chosen: Flags) -> Floats:
        return point_bins(rows.first_token_s[chosen & has_first], uncached[chosen & has_first], edges_s)

    def outputs(chosen: Flags) -> Floats:
        chosen = chosen & has_first
        produced = rows.produced_token_count[chosen].astype(np.float64)
        return spread_over_bins(rows.first_token_s[chosen], ended_s[chosen], produced, edges_s)

    shape = (len(fleet), len(edges_s) - 1)
    return TimeSeries(
        bin_s=bin_s,
        start_s=edges_s[:-1],
        instance_ids=tuple(instance.instance_id for instance in fleet),
        arrivals_per_s=arrivals / bin_s,
        good_per_s=point_bins(rows.finish_s[good], np.ones(int(good.sum())), edges_s) / bin_s,
        attainment=np.divide(good_arrivals, arrivals, out=np.full(shape[1], np.nan), where=arrivals > 0),
        queued_count=spread_over_bins(rows.arrival_s, dispatched_s, dispatched_s - rows.arrival_s, edges_s)
        / bin_s,
        in_flight_count=np.array([load(chosen) for chosen in by_instance]).reshape(shape) / bin_s,
        prompt_tokens_per_s=np.array([prompts(chosen) for chosen in by_instance]).reshape(shape) / bin_s,
        output_tokens_per_s=np.array([outputs(chosen) for chosen in by_instance]).reshape(shape) / bin_s,
    )


def last_time_s(rows: OutcomeArrays) -> float:
    """Return the last moment at which something happened, 0 for an empty run."""
    times = np.concatenate((rows.arrival_s, rows.dispatch_s, rows.first_token_s, rows.finish_s))
    times = times[np.isfinite(times)]
    return float(times.max()) if len(times) else 0.0


def first_known(times_s: Floats, otherwise_s: Floats, end_s: float) -> Floats:
    """Return the times, where they are unknown the others, and where those are the end."""
    known = np.where(np.isnan(times_s), otherwise_s, times_s)
    return np.where(np.isnan(known), end_s, known)


def point_bins(times_s: Floats, amounts: Floats, edges_s: Floats) -> Floats:
    """Return the sum of amounts in each bin; a bin includes its start and not its end."""
    return np.diff(amount_before(times_s, times_s, amounts, edges_s))


def spread_over_bins(starts_s: Floats, ends_s: Floats, amounts: Floats, edges_s: Floats) -> Floats:
    """Return how much of the amounts falls into each bin, each spread evenly from its start to its end."""
    return np.diff(amount_before(starts_s, ends_s, amounts, edges_s))


def amount_before(starts_s: Floats, ends_s: Floats, amounts: Floats, times_s: Floats) -> Floats:
    """Return the total of what came before each time, each amount spread evenly from its start to its end."""
    spans_s = ends_s - starts_s
    is_point = spans_s < _SHORTEST_SPAN_S
    order = np.argsort(starts_s[is_point], kind="stable")
    sums = np.concatenate(([0.0], np.cumsum(amounts[is_point][order])))
    total = sums[np.searchsorted(starts_s[is_point][order], times_s, side="left")]
    rates = amounts[~is_point] / spans_s[~is_point]
    # An amount up to t is a ramp from its start on, less the same ramp from its end on.
    rising = _ramps(starts_s[~is_point], rates, times_s)
    falling = _ramps(ends_s[~is_point], rates, times_s)
    return np.asarray(total + rising - falling)


def _ramps(starts_s: Floats, rates: Floats, times_s: Floats) -> Floats:
    """Return ``sum(rate * max(0, t - start))`` for each time, in O((n + m) log n)."""
    order = np.argsort(starts_s, kind="stable")
    starts_s, rates = starts_s[order], rates[order]
    rate_sums = np.concatenate(([0.0], np.cumsum(rates)))
    moments = np.concatenate(([0.0], np.cumsum(rates * starts_s)))
    begun = np.searchsorted(starts_s, times_s, side="right")
    return np.asarray(rate_sums[begun] * times_s - moments[begun])
