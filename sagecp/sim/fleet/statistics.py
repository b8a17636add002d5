"""How well a simulated run served its requests.

A request is good when it succeeded and met every objective that it has: time
to the first token, time per further token, deadline. A rejected or expired
request is a miss. TPOT is ``(latency - TTFT) / (output tokens - 1)``, for two
tokens and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sagecp.core.types import DurationQuantiles, RequestPriority
from sagecp.sim.fleet.fairness import TenantService, jain_index, max_service_lag, tenant_service
from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.intervals import GoodputAt, Interval, goodput_at, mean_confidence, paired_difference
from sagecp.sim.fleet.outcomes import Flags, Floats, OutcomeArrays, Outcomes, OutcomeState
from sagecp.sim.fleet.time_series import TimeSeries, time_series

__all__ = [
    "GoodputAt",
    "Interval",
    "LengthStatistics",
    "PriorityStatistics",
    "RunStatistics",
    "TenantStatistics",
    "TimeSeries",
    "goodput_at",
    "mean_confidence",
    "paired_difference",
    "summarise",
    "time_series",
]

_FEWEST_REQUESTS_OF_WORST_TENANT = 50
_LENGTHS = ("short", "middle", "long")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """One third of the requests by prompt length; equal lengths stay together.

    Attributes:
        longest_prompt_token_count: Of this third; 0 when it is empty.
        attainment: Share of good ones; ``None`` when it is empty.
    """

    request_count: int
    longest_prompt_token_count: int
    attainment: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityStatistics:
    """The requests of one class.

    Attributes:
        attainment: Share of good ones.
        ttft: Time to the first token of those that got one.
    """

    request_count: int
    attainment: float
    ttft: DurationQuantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStatistics:
    """The requests of one tenant; service is in weighted tokens, see :mod:`sagecp.sim.fleet.fairness`.

    Attributes:
        attainment: Share of good ones.
        demand: Service that was due to it while the load lasted.
        served: Service that it got until then, at most its demand.
        fair_share: Service that was fair to give it.
        served_over_fair_share: 1 is fair; ``None`` where nothing was asked for or served to anyone.
    """

    tenant_id: str
    request_count: int
    rejected_count: int
    attainment: float
    ttft: DurationQuantiles
    demand: float
    served: float
    fair_share: float
    served_over_fair_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """Figures of one run. ``None`` is undefined, such as the cost per good request when none was good.

    Attributes:
        duration_s: Time in which requests arrived; rates and costs are over it.
        offered_per_s: Requests submitted.
        good_count: Requests that succeeded and met every objective.
        attainment: Good requests over all.
        goodput_per_s: Good requests.
        token_weighted_attainment: Prompt tokens of good requests over those of all.
        attainment_by_length: ``short``, ``middle`` and ``long`` prompts.
        worst_tenant_id: Lowest attainment among tenants with 50 requests or more; empty: there is none.
        ttft: Of requests that got a first token.
        tpot: Of succeeded requests with two tokens or more.
        latency: Arrival to end, of succeeded requests.
        queue_wait: Arrival to dispatch, of requests that were dispatched.
        prefix_hit_share: Prompt tokens found in caches, over all of the requests that got a first token.
        preemption_count: Times that an engine took a request's memory away.
        rejected_share: Of all requests, like the following four.
        usd_total: Price of the fleet over the duration.
        usd_per_1000_good: The same per 1,000 good requests.
        prompt_tokens_per_s: Of requests that got a first token.
        output_tokens_per_s: Of all requests.
        jain_index: Jain's index over tenants of service over fair share.
        max_service_lag: Largest difference in service between two tenants while both waited, weighted tokens.
        by_priority: By name of the class, most important first.
        tenants: Of largest demand first.
    """

    duration_s: float
    request_count: int
    succeeded_count: int
    good_count: int
    offered_per_s: float
    attainment: float | None
    goodput_per_s: float
    token_weighted_attainment: float | None
    attainment_by_length: Mapping[str, LengthStatistics]
    worst_tenant_id: str
    worst_tenant_attainment: float | None
    ttft: DurationQuantiles
    tpot: DurationQuantiles
    latency: DurationQuantiles
    queue_wait: DurationQuantiles
    prefix_hit_share: float | None
    preemption_count: int
    rejected_share: float
    expired_share: float
    failed_share: float
    cancelled_share: float
    unfinished_share: float
    usd_total: float
    usd_per_1000_good: float | None
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    jain_index: float | None
    max_service_lag: float | None
    by_priority: Mapping[str, PriorityStatistics]
    tenants: tuple[TenantStatistics, ...]


def summarise(
    outcomes: Outcomes | OutcomeArrays, fleet: Sequence[SimInstance], *, duration_s: float
) -> RunStatistics:
    """Return the figures of a run; ``dataclasses.asdict`` makes JSON of them.

    Args:
        outcomes: One row per request that was submitted.
        fleet: For its price.
        duration_s: Time in which the requests arrived, not the time until the last one ended.

    Raises:
        ValueError: ``duration_s`` is not above 0.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s must be above 0, not {duration_s}")
    rows = outcomes.as_arrays() if isinstance(outcomes, Outcomes) else outcomes
    count = len(rows.arrival_s)
    good = rows.good
    good_count = int(good.sum())
    has_first = np.isfinite(rows.first_token_s)
    service = tenant_service(rows, duration_s)
    tenants = _tenants(rows, good, service)
    worst = min(
        (tenant for tenant in tenants if tenant.request_count >= _FEWEST_REQUESTS_OF_WORST_TENANT),
        key=lambda tenant: (tenant.attainment, tenant.tenant_id),
        default=None,
    )
    usd_total = sum(instance.usd_per_hour for instance in fleet) * duration_s / 3600

    def state_share(state: OutcomeState) -> float:
        return int((rows.state == state).sum()) / count if count else 0.0

    return RunStatistics(
        duration_s=duration_s,
        request_count=count,
        succeeded_count=int(rows.succeeded.sum()),
        good_count=good_count,
        offered_per_s=count / duration_s,
        attainment=_ratio(good_count, count),
        goodput_per_s=good_count / duration_s,
        token_weighted_attainment=_ratio(
            int(rows.prompt_token_count[good].sum()), int(rows.prompt_token_count.sum())
        ),
        attainment_by_length=_by_length(rows, good),
        worst_tenant_id=worst.tenant_id if worst else "",
        worst_tenant_attainment=worst.attainment if worst else None,
        ttft=_quantiles(rows.ttft_s),
        tpot=_quantiles(rows.tpot_s),
        latency=_quantiles(rows.latency_s[rows.succeeded]),
        queue_wait=_quantiles(rows.dispatch_s - rows.arrival_s),
        prefix_hit_share=_ratio(
            int(rows.cached_token_count[has_first].sum()), int(rows.prompt_token_count[has_first].sum())
        ),
        preemption_count=int(rows.preemption_count.sum()),
        rejected_share=state_share(OutcomeState.REJECTED),
        expired_share=state_share(OutcomeState.EXPIRED),
        failed_share=state_share(OutcomeState.FAILED),
        cancelled_share=state_share(OutcomeState.CANCELLED),
        unfinished_share=state_share(OutcomeState.UNFINISHED),
        usd_total=usd_total,
        usd_per_1000_good=_ratio(1000 * usd_total, good_count),
        prompt_tokens_per_s=int(rows.prompt_token_count[has_first].sum()) / duration_s,
        output_tokens_per_s=int(rows.produced_token_count.sum()) / duration_s,
        jain_index=jain_index(service.normalized),
        max_service_lag=max_service_lag(rows, service),
        by_priority=_by_priority(rows, good),
        tenants=tenants,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _quantiles(durations_s: Floats) -> DurationQuantiles:
    """Return the mean and quantiles, interpolated linearly between samples, NaN left out."""
    known = durations_s[np.isfinite(durations_s)]
    if not len(known):
        return DurationQuantiles()
    p50, p95, p99 = (float(value) for value in np.quantile(known, (0.5, 0.95, 0.99)))
    return DurationQuantiles(len(known), float(known.mean()), p50, p95, p99)


def _by_length(rows: OutcomeArrays, good: Flags) -> dict[str, LengthStatistics]:
    lengths = rows.prompt_token_count
    bounds = np.quantile(lengths, (1 / 3, 2 / 3)) if len(lengths) else np.zeros(2)
    # 0, 1 or 2: how many bounds the length is above.
    third = (lengths[:, np.newaxis] > bounds).sum(axis=1)
    found: dict[str, LengthStatistics] = {}
    for index, name in enumerate(_LENGTHS):
        chosen = third == index
        found[name] = LengthStatistics(
            request_count=int(chosen.sum()),
            longest_prompt_token_count=int(lengths[chosen].max(initial=0)),
            attainment=_ratio(int(good[chosen].sum()), int(chosen.sum())),
        )
    return found


def _by_priority(rows: OutcomeArrays, good: Flags) -> dict[str, PriorityStatistics]:
    found: dict[str, PriorityStatistics] = {}
    for priority in RequestPriority:
        chosen = rows.priority == priority
        if chosen.any():
            found[priority.name] = PriorityStatistics(
                request_count=int(chosen.sum()),
                attainment=float(good[chosen].mean()),
                ttft=_quantiles(rows.ttft_s[chosen]),
            )
    return found


def _tenants(rows: OutcomeArrays, good: Flags, service: TenantService) -> tuple[TenantStatistics, ...]:
    found: list[TenantStatistics] = []
    ttft_s, normalized = rows.ttft_s, service.normalized
    for index, tenant_id in enumerate(rows.tenant_ids):
        chosen = rows.tenant_index == index
        found.append(
            TenantStatistics(
                tenant_id=tenant_id,
                request_count=int(chosen.sum()),
                rejected_count=int((rows.state[chosen] == OutcomeState.REJECTED).sum()),
                attainment=float(good[chosen].mean()),
                ttft=_quantiles(ttft_s[chosen]),
                demand=float(service.demand[index]),
                served=float(service.served[index]),
                fair_share=float(service.share[index]),
                served_over_fair_share=float(normalized[index]) if np.isfinite(normalized[index]) else None,
            )
        )
    return tuple(sorted(found, key=lambda tenant: (-tenant.demand, tenant.tenant_id)))
