"""Requests and instances as the rows that placements are made from."""

from __future__ import annotations

import math

from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord


def request_row(record: RequestRecord, now: float) -> RequestRow:
    """Return a request as placements see it."""
    metadata = record.metadata
    deadline_ms, budget = metadata.slo_deadline_ms, metadata.cost_budget
    return RequestRow(
        record.prompt_token_count,
        record.expected_output_token_count / metadata.choice_count,
        now - record.arrival_s,
        record.ttft_objective_s,
        record.tpot_objective_s,
        math.inf if deadline_ms is None else deadline_ms / 1000.0,
        int(metadata.priority),
        math.inf if budget is None else budget,
    )


def candidate_row(
    instance: InstanceRecord,
    cached_token_count: int,
    extra: float,
    now: float,
    *,
    is_open: bool = True,
    plan_mismatch: int = 0,
) -> CandidateRow:
    """Return an instance as placements see it."""
    load = instance.load
    capacity = instance.spec.key_value_token_capacity
    backlog_s, decodes, context, share, ttft_factor, tpot_factor, sigma = load.view(now)
    latency_s, ttft_s, tpot_s = (
        instance.latency_estimate_s,
        instance.ttft_estimate_s,
        instance.tpot_estimate_s,
    )
    return CandidateRow(
        instance.instance_id,
        instance.last_dispatch_sequence,
        1 if is_open else 0,
        0.0 if is_open else max(0.0, instance.gate_opens_s - now),
        instance.in_flight_count,
        instance.concurrency_limit,
        instance.reserved_token_count,
        math.inf if capacity is None else float(capacity),
        cached_token_count,
        backlog_s,
        decodes,
        context,
        share,
        ttft_factor,
        tpot_factor,
        sigma,
        math.inf if latency_s is None else latency_s,
        math.inf if ttft_s is None else ttft_s,
        math.inf if tpot_s is None else tpot_s,
        instance.usd_per_hour,
        extra,
        load.kind.model.parameters,
        plan_mismatch,
    )
