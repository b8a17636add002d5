"""What no scheduler can exceed on a trace and a fleet, and references that none is likely to.

Three limits, from strict to telling:

* :func:`strict_attainment_bound`: no schedule on these engines has a larger
  share of good requests. Loose: it lets all engines share one infinite cache
  and split the work of a prompt at no cost.
* :func:`cache_bounds`: hits of one cache as large as all engines' together, if
  it knew the future (Belady), and if it is least-recently-used. A router that
  cannot change what engines evict has hardly more than the latter.
* :func:`limit_rate_per_s`: the rate at which the fleet's engines would be busy
  all the time with the least work that the Belady cache leaves.

Work is counted in seconds of one pooled engine. ``step >= o + b0 + b1*T +
g*KV + d*pairs`` and ``T <= B`` make the work of a request at least ``(b1 + (o +
b0)/B)`` per token computed, ``g`` per token of context of each token after the
first, and ``d*u*(L - u/2)`` for attention in prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.sim.fleet.belady import (
    belady_cached_token_counts,
    lru_cached_token_counts,
    unlimited_cached_token_counts,
)
from sagecp.sim.fleet.controller import ObjectiveRule
from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import Flags, Floats, Integers
from sagecp.sim.fleet.scheduler_controller import step_time_prior
from sagecp.sim.fleet.traces import Trace

_SHORTEST_WINDOW_S = 0.25
# Sums of rounded numbers must not make a bound too small.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class CacheBounds:
    """Shares of all prompt tokens that caches would have had.

    Attributes:
        infinite_hit_share: A cache without limit, shared by all.
        belady_hit_share: One of the fleet's total size that knows the future.
        pooled_lru_hit_share: One of the fleet's total size that drops the least recently used.
    """

    infinite_hit_share: float
    belady_hit_share: float
    pooled_lru_hit_share: float


@dataclass(frozen=True, slots=True)
class _Kind:
    """Instances that are alike.

    Attributes:
        weight: Seconds of the pooled engine per second of one instance; over all instances they sum to 1.
        fits: Which requests it can serve at all.
        prefill_s: Least time on it of each request's prefill.
        decode_s: Least time of the tokens after the first.
        token_gap_s: Least time between two tokens of each request.
    """

    weight: float
    fits: Flags
    prefill_s: Floats
    decode_s: Floats
    token_gap_s: Floats


def cache_bounds(trace: Trace, fleet: Sequence[SimInstance], *, held_share: float = 0.0) -> CacheBounds:
    """Return the hit shares of three ideal caches.

    Args:
        trace: What arrives.
        fleet: The instances.
        held_share: Share of the engines' memory that running requests keep from the two
            finite caches; 0 makes the Belady share a bound, the share seen in a run a likeness.

    Raises:
        ValueError: The trace is closed-loop, or has no requests.
    """
    block_count = round((1.0 - held_share) * pooled_block_count(trace, fleet))
    prompt_token_count = sum(request.prompt_token_count for request in trace.requests)
    if not prompt_token_count:
        raise ValueError(f"trace {trace.name} has no requests")
    return CacheBounds(
        int(unlimited_cached_token_counts(trace).sum()) / prompt_token_count,
        int(belady_cached_token_counts(trace, block_count).sum()) / prompt_token_count,
        int(lru_cached_token_counts(trace, block_count).sum()) / prompt_token_count,
    )


def work_utilisation(
    trace: Trace, fleet: Sequence[SimInstance], cached_token_counts: Integers, *, with_decode: bool = True
) -> float:
    """Return the share of the fleet's time that the least work of a trace takes; above 1 it cannot be done.

    Args:
        trace: What arrives. Requests that no instance can serve count as no work.
        fleet: The instances.
        cached_token_counts: Prompt tokens of each request that need no computing, from
            :mod:`sagecp.sim.fleet.belady` or from a run.
        with_decode: Whether the tokens after the first count, too.
    """
    kinds = _kinds(trace, fleet, cached_token_counts)
    return float(_pooled_work_s(kinds, with_decode=with_decode).sum()) / trace.duration_s


def limit_rate_per_s(trace: Trace, fleet: Sequence[SimInstance]) -> float:
    """Return the rate of requests like the trace's at which the fleet is fully used, with a Belady cache.

    Hits depend on the order of arrival and not on its speed, so that work grows
    in proportion to the rate. Not a bound on goodput: a scheduler that serves
    short requests only may exceed it.

    Raises:
        ValueError: The trace is closed-loop.
    """
    cached = belady_cached_token_counts(trace, pooled_block_count(trace, fleet))
    return len(trace.requests) / trace.duration_s / work_utilisation(trace, fleet, cached)


def share_of_limit(goodput_per_s: float, trace: Trace, fleet: Sequence[SimInstance]) -> float:
    """Return a goodput as a share of :func:`limit_rate_per_s`."""
    return goodput_per_s / limit_rate_per_s(trace, fleet)


def strict_attainment_bound(
    trace: Trace, fleet: Sequence[SimInstance], rule: ObjectiveRule | None = None
) -> float:
    """Return a share of good requests that no scheduler can exceed, from 0 to 1.

    With an infinite shared cache, each block is computed once at most. It is
    charged to the first request to arrive that has it, whether or not that one
    is served, so that the charges of any set of requests are at most the work
    that serving the set takes, in whatever order.

    The good requests among those that arrive in a window are prefilled between
    the first arrival and the last one plus the largest TTFT objective, and
    answered by the time that their TPOT objectives allow. So in each window no
    more can be good than the smallest ones whose work fits, once for prefill and
    once for all. Windows that do not overlap add up; they are chosen, from a quarter
    of a second to the whole trace, so that the sum is small. Requests that miss on
    every idle instance are out beforehand.

    Args:
        trace: What arrives.
        fleet: The instances. Of unlike ones each second counts with a fixed weight, and a
            request's work is where it weighs least: a relaxation that holds for any weights.
        rule: Objectives of requests that state none.

    Raises:
        ValueError: The trace is closed-loop, or has no requests.
    """
    if not trace.requests:
        raise ValueError(f"trace {trace.name} has no requests")
    objectives = [(rule or ObjectiveRule()).of(request) for request in trace.requests]
    ttft_slo_s = np.array([each.ttft_s for each in objectives])
    tpot_slo_s = np.array([each.tpot_s for each in objectives])
    deadline_s = np.array([np.inf if each.deadline_s is None else each.deadline_s for each in objectives])
    further_count = np.array([request.output_token_count - 1 for request in trace.requests])
    kinds = _kinds(trace, fleet, unlimited_cached_token_counts(trace))
    attainable = np.zeros(len(trace.requests), dtype=np.bool_)
    for kind in kinds:
        attainable |= (
            kind.fits
            & (kind.prefill_s <= ttft_slo_s)
            & ((further_count == 0) | (kind.token_gap_s <= tpot_slo_s))
            & (kind.prefill_s + further_count * kind.token_gap_s <= deadline_s)
        )
    # A trace is in order of arrival.
    arrival_s = np.array([request.arrival_s for request in trace.requests])[attainable]
    first_token_by_s = np.minimum(ttft_slo_s, deadline_s)[attainable]
    end_by_s = np.minimum(ttft_slo_s + further_count * tpot_slo_s, deadline_s)[attainable]
    prefill_s = _pooled_work_s(kinds, with_decode=False)[attainable]
    whole_s = _pooled_work_s(kinds, with_decode=True)[attainable]
    most = min(
        _most_in_windows(arrival_s, prefill_s, first_token_by_s),
        _most_in_windows(arrival_s, whole_s, end_by_s),
    )
    return most / len(trace.requests)


def _most_in_windows(arrival_s: Floats, work_s: Floats, slack_s: Floats) -> int:
    """Return how many requests, in order of arrival, can be done at most.

    The time is halved again and again; of each part what counts is what fits in it
    as a whole, or what its halves allow together if that is fewer.
    """
    if not len(arrival_s):
        return 0
    first_s, last_s = float(arrival_s[0]), float(arrival_s[-1])
    # From the first arrival to the last end.
    capacity_s = (last_s - first_s + float(slack_s.max())) * (1 + _ROUNDING)
    fitting = int(np.searchsorted(np.cumsum(np.sort(work_s)), capacity_s, side="right"))
    if last_s - first_s <= _SHORTEST_WINDOW_S:
        return fitting
    split = int(np.searchsorted(arrival_s, (first_s + last_s) / 2))
    halves = sum(
        _most_in_windows(arrival_s[part], work_s[part], slack_s[part])
        for part in (slice(None, split), slice(split, None))
    )
    return min(fitting, halves)


def pooled_block_count(trace: Trace, fleet: Sequence[SimInstance]) -> int:
    """Return how many blocks of a trace's size fit in the memory of all instances that cache prefixes."""
    return sum(
        instance.kv_token_capacity // trace.block_token_count for instance in fleet if instance.prefix_caching
    )


def _kinds(trace: Trace, fleet: Sequence[SimInstance], cached_token_counts: Integers) -> list[_Kind]:
    """Return the kinds of instances of a fleet with the least work of each request on each."""
    counts: dict[tuple[object, ...], tuple[SimInstance, int]] = {}
    for instance in fleet:
        key = (
            instance.profile,
            instance.slowness,
            instance.max_batch_tokens,
            instance.kv_token_capacity,
            instance.model,
        )
        counts[key] = (instance, counts.get(key, (instance, 0))[1] + 1)
    kinds = [(count, _kind_of(trace, instance, cached_token_counts)) for instance, count in counts.values()]
    # Speed at the mean request that it can serve, relative to the sum over the fleet.
    speeds = []
    for _, kind in kinds:
        mean_s = float((kind.prefill_s + kind.decode_s)[kind.fits].mean()) if kind.fits.any() else 0.0
        speeds.append(1.0 / mean_s if mean_s > 0.0 else 0.0)
    total = sum(count * speed for (count, _), speed in zip(kinds, speeds, strict=True))
    return [
        _Kind(speed / total if total else 0.0, kind.fits, kind.prefill_s, kind.decode_s, kind.token_gap_s)
        for (_, kind), speed in zip(kinds, speeds, strict=True)
    ]


def _kind_of(trace: Trace, instance: SimInstance, cached_token_counts: Integers) -> _Kind:
    step_time: StepTimeParameters = step_time_prior(instance.profile, 0.0, 0)
    requests = trace.requests
    prompt = np.array([request.prompt_token_count for request in requests], dtype=np.float64)
    further = np.array([request.output_token_count - 1 for request in requests], dtype=np.float64)
    serves = np.array([request.model in ("", instance.model) for request in requests], dtype=np.bool_)
    block = trace.block_token_count
    uncached = prompt - cached_token_counts
    per_token_s = (
        step_time.overhead_s + step_time.compute_base_s
    ) / instance.max_batch_tokens + step_time.compute_per_token_s
    prefill_s = per_token_s * uncached + step_time.attention_per_token_pair_s * uncached * (
        prompt - 0.5 * uncached
    )
    contexts = further * prompt + 0.5 * further * (further + 1)
    decode_s = per_token_s * further + step_time.context_per_token_s * contexts
    token_gap_s = step_time.decode_step_s(1, 0) + step_time.context_per_token_s * prompt
    return _Kind(
        0.0,
        serves & (prompt + further + 1 <= instance.kv_token_capacity // block * block),
        instance.slowness * prefill_s,
        instance.slowness * decode_s,
        instance.slowness * token_gap_s,
    )


def _pooled_work_s(kinds: Sequence[_Kind], *, with_decode: bool) -> Floats:
    """Return the least pooled time of each request; 0 of one that no instance can serve."""
    least = np.full(len(kinds[0].fits), np.inf)
    for kind in kinds:
        work_s = kind.weight * (kind.prefill_s + kind.decode_s if with_decode else kind.prefill_s)
        least = np.where(kind.fits, np.minimum(least, work_s), least)
    return np.where(np.isfinite(least), least, 0.0)
