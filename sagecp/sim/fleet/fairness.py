"""How evenly the tenants of a run were served.

Service is counted in weighted tokens as in VTC (OSDI'24): a prompt token that
was computed counts 1, an output token 2. Prompt tokens found in a cache cost
the fleet next to nothing and count nothing.

Everybody is served completely in the end, when the load is over. What can be
unfair is who is served while it lasts, so service is counted up to then.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from sagecp.sim.fleet.outcomes import Flags, Floats, OutcomeArrays
from sagecp.sim.fleet.time_series import amount_before, first_known, last_time_s

PROMPT_TOKEN_WEIGHT = 1.0
OUTPUT_TOKEN_WEIGHT = 2.0
_MOST_LAG_TENANTS = 32
_LAG_SAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class TenantService:
    """What tenants asked for and got, in weighted tokens; arrays by tenant.

    Attributes:
        demand: What was due: the whole answers, or of those that the objectives allow more time for
            a part in proportion.
        served: What was computed, at most the demand: more, before it is due, is nobody's loss.
        share: What is fair to give: the max-min fair division of all that was served, so nobody's
            is above their demand.
    """

    demand: Floats
    served: Floats
    share: Floats

    @property
    def normalized(self) -> Floats:
        """Served over fair share, 1 for a tenant that got exactly that; NaN without demand."""
        ratios = np.full(len(self.share), np.nan)
        np.divide(self.served, self.share, out=ratios, where=self.share > 0)
        return ratios


def tenant_service(rows: OutcomeArrays, until_s: float = math.inf) -> TenantService:
    """Return each tenant's demand, service and fair share up to a time.

    Args:
        rows: The requests.
        until_s: The time; a request that has no objectives is due when it arrives.
    """
    prompts, produced = _weighted(rows)
    wanted = prompts + rows.output_token_count * OUTPUT_TOKEN_WEIGHT
    allowed_s = rows.ttft_slo_s + np.maximum(0, rows.output_token_count - 1) * rows.tpot_slo_s
    due = wanted * _elapsed_share(rows.arrival_s, np.nan_to_num(allowed_s, nan=0.0), until_s)
    started = np.isfinite(rows.first_token_s) & (rows.first_token_s <= until_s)
    decode_s = np.nan_to_num(rows.finish_s - rows.first_token_s, nan=0.0)
    given = prompts + produced * _elapsed_share(rows.first_token_s, decode_s, until_s)
    demand, served = np.zeros(len(rows.tenant_ids)), np.zeros(len(rows.tenant_ids))
    np.add.at(demand, rows.tenant_index, due)
    np.add.at(served, rows.tenant_index, np.where(started, given, 0.0))
    served = np.minimum(served, demand)
    return TenantService(demand, served, max_min_fair(demand, float(served.sum())))


def _elapsed_share(start_s: Floats, duration_s: Floats, until_s: float) -> Floats:
    """Return how much of each span is over by a time, 0 to 1."""
    if until_s == math.inf:
        return np.ones(len(start_s))
    # A span without any length is over when it begins.
    elapsed_s = until_s - start_s
    shares = np.where(elapsed_s >= 0.0, 1.0, 0.0)
    np.divide(elapsed_s, duration_s, out=shares, where=duration_s > 0.0)
    return np.asarray(np.clip(shares, 0.0, 1.0))


def _weighted(rows: OutcomeArrays) -> tuple[Floats, Floats]:
    """Return the weight of each request's uncached prompt, and of the output that it got."""
    uncached = (rows.prompt_token_count - rows.cached_token_count).astype(np.float64)
    return uncached * PROMPT_TOKEN_WEIGHT, rows.produced_token_count.astype(np.float64) * OUTPUT_TOKEN_WEIGHT


def max_min_fair(demand: Floats, capacity: float) -> Floats:
    """Divide a capacity so that no share can grow but by taking from a smaller one.

    Every demand is met up to one common level (progressive filling; Bertsekas
    and Gallager, Data Networks).
    """
    share = np.zeros(len(demand))
    left = capacity
    order = np.argsort(demand, kind="stable")
    for place, tenant in enumerate(order):
        share[tenant] = min(float(demand[tenant]), left / (len(order) - place))
        left -= share[tenant]
    return share


def jain_index(values: Floats) -> float | None:
    """Return ``(sum x)^2 / (n * sum x^2)``: 1 when all are equal, 1/n when one has everything.

    Source: Jain, Chiu, Hawe, DEC-TR-301, 1984. NaN values are left out;
    ``None`` when no value, or only zeros, are left.
    """
    values = values[np.isfinite(values)]
    squares = float(np.square(values).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else None


def max_service_lag(rows: OutcomeArrays, service: TenantService) -> float | None:
    """Return the largest difference in service between two tenants over any time in which both waited.

    This is what VTC (OSDI'24) bounds by twice the larger of the largest prompt
    and the largest batch, in weighted tokens. A tenant waits while it has a
    request that arrived and that no engine has begun to run. The run is looked
    at in 2,000 moments, and the 32 tenants of the largest demand are compared.
    Service for a prompt counts when the first token comes.

    Returns:
        ``None`` when no two tenants ever waited together.
    """
    order = np.argsort(-service.demand, kind="stable")[:_MOST_LAG_TENANTS]
    times_s = np.linspace(0.0, last_time_s(rows), _LAG_SAMPLES + 1)
    progress = [_progress(rows, rows.tenant_index == tenant, times_s) for tenant in order]
    largest: float | None = None
    for (served, waits), (other_served, other_waits) in itertools.combinations(progress, 2):
        lag = _largest_swing(served - other_served, waits & other_waits)
        if lag is not None:
            largest = lag if largest is None else max(largest, lag)
    return largest


def _progress(rows: OutcomeArrays, chosen: Flags, times_s: Floats) -> tuple[Floats, Flags]:
    """Return a tenant's service up to each time, and whether it waits then."""
    end_s = float(times_s[-1])
    begun_s = first_known(rows.scheduled_s, rows.finish_s, end_s)[chosen]
    arrived = np.searchsorted(np.sort(rows.arrival_s[chosen]), times_s, side="right")
    begun = np.searchsorted(np.sort(begun_s), times_s, side="right")
    started = chosen & np.isfinite(rows.first_token_s)
    first_s = rows.first_token_s[started]
    finish_s = first_known(rows.finish_s, rows.finish_s, end_s)[started]
    prompts, produced = _weighted(rows)
    served = amount_before(first_s, first_s, prompts[started], times_s)
    served += amount_before(first_s, finish_s, produced[started], times_s)
    return served, np.asarray(arrived > begun)


def _largest_swing(difference: Floats, together: Flags) -> float | None:
    """Return the largest rise or fall of the difference within a stretch in which both waited."""
    changes = np.diff(np.concatenate(([0], together.astype(np.int8), [0])))
    starts, ends = np.flatnonzero(changes == 1), np.flatnonzero(changes == -1)
    if not len(starts):
        return None
    bounds = np.column_stack((starts, ends)).ravel()
    # reduceat also reduces between the stretches, at odd places, which are dropped; one more
    # value lets the last stretch end at the end.
    padded = np.append(difference, 0.0)
    swings = np.maximum.reduceat(padded, bounds)[::2] - np.minimum.reduceat(padded, bounds)[::2]
    return float(swings.max())
