"""What a placement is made from, as values: the same values give the same choice, now and later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sagecp.core.prediction.step_time import StepTimeParameters


class RequestRow(NamedTuple):
    """A request as a placement sees it. Times in seconds, counts in tokens.

    Attributes:
        prompt_token_count: Estimate, exact for token ids.
        output_token_count: Expected output per choice.
        waited_s: Since it arrived.
        ttft_objective_s: From arrival to the first token; the default where it states none.
        tpot_objective_s: Likewise, between tokens.
        deadline_s: From arrival to the last token; infinite: none.
        priority: Number of its class, 1 the most important.
        cost_budget_usd: Most it may cost; infinite: no bound.
    """

    prompt_token_count: int
    output_token_count: float
    waited_s: float
    ttft_objective_s: float
    tpot_objective_s: float
    deadline_s: float
    priority: int
    cost_budget_usd: float


class CandidateRow(NamedTuple):
    """An instance as a placement sees it, for one request at one moment.

    Attributes:
        last_dispatch_sequence: Number of the last dispatch it got; breaks ties.
        is_open: 1: it can take the request now. 0: it could after ``opens_in_s``.
        opens_in_s: Seconds until it should take new work.
        in_flight_count: Requests that this control plane has on it.
        concurrency_limit: Most requests to have on it.
        reserved_token_count: Tokens its requests should hold at their ends.
        key_value_token_capacity: Tokens that fit its KV cache; infinite: unknown.
        cached_token_count: Leading prompt tokens it probably has in its prefix cache.
        backlog_s: Predicted seconds of prefill work it has before it.
        decode_count: Requests that produce tokens on it.
        context_token_count: Tokens that those hold.
        prefill_share: Share of recent time spent on prefill, 0 to 1.
        ttft_factor: Observed over predicted time to first token of late.
        tpot_factor: Likewise for time per output token.
        sigma: Spread of the logarithm of that ratio.
        latency_estimate_s: Observed latency of a reference request; infinite: never measured.
        ttft_estimate_s: Observed mean time to first token; infinite: never measured.
        tpot_estimate_s: Observed mean time per output token; infinite: never measured.
        usd_per_hour: Price of the whole instance; 0: unknown.
        extra: What the routing strategy or balancer adds: a weight, a position, a draw.
        step_time: Constants of a step of its kind.
        plan_mismatch: 1: its parallel sizes do not suit the request, and others' do.
    """

    instance_id: str
    last_dispatch_sequence: int
    is_open: int
    opens_in_s: float
    in_flight_count: int
    concurrency_limit: int
    reserved_token_count: int
    key_value_token_capacity: float
    cached_token_count: int
    backlog_s: float
    decode_count: int
    context_token_count: float
    prefill_share: float
    ttft_factor: float
    tpot_factor: float
    sigma: float
    latency_estimate_s: float
    ttft_estimate_s: float
    tpot_estimate_s: float
    usd_per_hour: float
    extra: float
    step_time: StepTimeParameters
    plan_mismatch: int = 0


@dataclass(frozen=True, slots=True)
class PlacementInputs:
    """Everything a placement is made from.

    Attributes:
        request: The request's side.
        candidates: The instances' side.
        parameters: Values of all parameters that were in force.
    """

    request: RequestRow
    candidates: tuple[CandidateRow, ...]
    parameters: Mapping[str, float]
