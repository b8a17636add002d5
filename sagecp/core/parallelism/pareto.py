"""Which plans no other beats in everything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sagecp.core.parallelism.estimates import PlanEstimate

# Differences below this share are no difference.
_TOLERANCE = 1e-3


def pareto_front(plans: Sequence[PlanEstimate], *, at_rate: bool) -> tuple[PlanEstimate, ...]:
    """Return the plans that no other beats, in their order.

    A plan beats another that is nowhere better and somewhere worse, in time to first token, time
    per output token, output tokens per second and price of a million output tokens.

    Args:
        plans: The plans.
        at_rate: Compare times and prices at the rate that all plans are told at, where there is
            such a rate; otherwise times of a request that is alone, and prices at the goodput.
    """
    points = [_point(plan, at_rate=at_rate) for plan in plans]
    return tuple(
        plan
        for index, plan in enumerate(plans)
        if not any(
            _beats(other, points[index]) or (other == points[index] and earlier < index)
            for earlier, other in enumerate(points)
            if earlier != index
        )
    )


def _point(plan: PlanEstimate, *, at_rate: bool) -> tuple[float, float, float, float]:
    """What counts, less being better in each."""
    if not at_rate:
        price = plan.usd_per_million_output_tokens
        return plan.single_ttft_s, plan.single_tpot_s, -plan.output_tokens_per_second, price
    served_rate = min(plan.goodput, plan.request_rate)
    # Room for more than there is to serve is paid for all the same.
    price = plan.usd_per_hour / served_rate if served_rate > 0.0 else math.inf
    return plan.ttft_s, plan.tpot_s, -plan.output_tokens_per_second, price


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    no_worse = all(
        mine <= its + _TOLERANCE * abs(its) if mine != its else True
        for mine, its in zip(one, other, strict=True)
    )
    return no_worse and any(
        mine < its - _TOLERANCE * abs(its) if mine != its else False
        for mine, its in zip(one, other, strict=True)
    )
