"""Rows that placements are made from, and a dispatcher in a few lines, for testing scorers alone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sagecp.core.parameters import ParameterTable
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.request import RequestRecord
from sagecp.core.router.registry import ROUTER_PARAMETERS, make_strategy
from sagecp.core.types import ExecutionInstance, RequestMetadata

DEFAULTS: Mapping[str, float] = ParameterTable(ROUTER_PARAMETERS).resolve({})
STEP_TIME = StepTimeParameters(
    overhead_s=0.002,
    memory_base_s=0.006,
    memory_per_token_s=15e-6,
    compute_base_s=0.003,
    compute_per_token_s=20e-6,
    context_per_token_s=5e-8,
    attention_per_token_pair_s=1e-9,
)


def request_row(**fields: Any) -> RequestRow:
    """A request of 1,000 tokens with the usual objectives."""
    return RequestRow(
        prompt_token_count=1000,
        output_token_count=100.0,
        waited_s=0.0,
        ttft_objective_s=1.25,
        tpot_objective_s=0.15,
        deadline_s=math.inf,
        priority=3,
        cost_budget_usd=math.inf,
    )._replace(**fields)


def candidate_row(instance_id: str = "a", **fields: Any) -> CandidateRow:
    """An idle instance of which nothing was measured."""
    return CandidateRow(
        instance_id=instance_id,
        last_dispatch_sequence=0,
        is_open=1,
        opens_in_s=0.0,
        in_flight_count=0,
        concurrency_limit=16,
        reserved_token_count=0,
        key_value_token_capacity=math.inf,
        cached_token_count=0,
        backlog_s=0.0,
        decode_count=0,
        context_token_count=0.0,
        prefill_share=0.0,
        ttft_factor=1.0,
        tpot_factor=1.0,
        sigma=0.0,
        latency_estimate_s=math.inf,
        ttft_estimate_s=math.inf,
        tpot_estimate_s=math.inf,
        usd_per_hour=0.0,
        extra=0.0,
        step_time=STEP_TIME,
    )._replace(**fields)


def asked(session_id: str = "", user_id: str = "") -> RequestRecord:
    """A request as strategies see it."""
    return RequestRecord(RequestMetadata(request_id="r", session_id=session_id, user_id=user_id), "m", 1, 0.0)


@dataclass
class Instance:
    """An instance in a certain situation."""

    instance_id: str
    in_flight_count: int = 0
    concurrency_limit: int = 16
    last_dispatch_sequence: int = 0
    ttft_estimate_s: float | None = None
    tpot_estimate_s: float | None = None
    cached_token_count: int = 0
    gpu_count: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> ExecutionInstance:
        return ExecutionInstance(
            instance_id=self.instance_id,
            host="localhost",
            port=8000,
            model_name="m",
            gpu_count=self.gpu_count,
            labels=self.labels,
        )

    def row(self, extra: float) -> CandidateRow:
        return candidate_row(
            self.instance_id,
            last_dispatch_sequence=self.last_dispatch_sequence,
            in_flight_count=self.in_flight_count,
            concurrency_limit=self.concurrency_limit,
            cached_token_count=self.cached_token_count,
            ttft_estimate_s=math.inf if self.ttft_estimate_s is None else self.ttft_estimate_s,
            extra=extra,
        )


class Placer:
    """Does with a strategy what the dispatcher does, and nothing else."""

    def __init__(
        self,
        routing_strategy: str,
        load_balancer: str = "least_connections",
        parameters: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.strategy = make_strategy(routing_strategy, load_balancer, random.Random(seed))
        self.parameters = {**DEFAULTS, **(parameters or {})}
        self.sequence = 0
        self.reason = ""
        self.scores: dict[str, float] = {}

    def rows(self, instances: Sequence[Instance], record: RequestRecord | None = None) -> list[CandidateRow]:
        extras = self.strategy.extras(record or asked(), instances)
        return [instance.row(0.0 if extras is None else extras[i]) for i, instance in enumerate(instances)]

    def choose(self, instances: Sequence[Instance], record: RequestRecord | None = None) -> str:
        """Choose, and change nothing else."""
        rows = self.rows(instances, record)
        request = request_row()
        self.scores = {r.instance_id: self.strategy.score(request, r, self.parameters) for r in rows}
        best = min(rows, key=lambda r: (self.scores[r.instance_id], r.last_dispatch_sequence, r.instance_id))
        self.reason = self.strategy.reason(request, best, self.scores[best.instance_id])
        return best.instance_id

    def place(self, instances: Sequence[Instance], record: RequestRecord | None = None) -> str:
        """Choose, and dispatch: the request stays on its instance."""
        chosen = self.choose(instances, record)
        self.strategy.note_dispatch(record or asked(), chosen)
        self.sequence += 1
        for instance in instances:
            if instance.instance_id == chosen:
                instance.in_flight_count += 1
                instance.last_dispatch_sequence = self.sequence
        return chosen

    def spread(
        self, instances: Sequence[Instance], count: int, record: RequestRecord | None = None
    ) -> list[str]:
        """Place requests that all run at once."""
        return [self.place(instances, record) for _ in range(count)]
