"""Whether a request that arrives can be served as it asks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sagecp.core.candidates import OPEN_CANDIDATE_LIMIT
from sagecp.core.dispatcher import Dispatcher
from sagecp.core.errors import InfeasibleError
from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.placement_rows import candidate_row, request_row
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prediction.cost import request_cost_usd
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT, predict
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.types import InstanceState

# A deadline leaves at least this share of itself to the first token.
_LEAST_TTFT_SHARE = 0.1


class Admission:
    """Estimates what an arriving request needs, and refuses what cannot be.

    Args:
        fleet: The instances.
        queue: What waits.
        index: Who holds the start of which prompt.
        book: What was learned.
        dispatcher: Knows the policy in force.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: RequestQueue,
        index: PrefixIndex,
        book: PredictionBook,
        dispatcher: Dispatcher,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._index = index
        self._book = book
        self._dispatcher = dispatcher

    def estimate(self, record: RequestRecord, parameters: Mapping[str, float]) -> None:
        """Set what the core expects of a request: its output, its work and its objectives."""
        metadata = record.metadata
        output_tokens = self._book.output_lengths.expected(
            metadata.tenant_id, metadata.max_tokens, record.prompt_token_count
        )
        record.expected_output_token_count = max(1, math.ceil(output_tokens)) * metadata.choice_count
        instance = self._fleet.first_serving(record.model)
        token_s = 0.02
        if instance is not None:
            matches = self._index.match(record.digest.block_hashes) if record.digest.block_hashes else {}
            cached = max(matches.values(), default=0) * record.digest.block_token_count
            step = instance.load.kind.model.parameters
            uncached = max(1, record.prompt_token_count - cached)
            record.work_s = step.work_s(uncached, record.prompt_token_count, BATCH_TOKEN_COUNT)
            token_s = step.decode_step_s(1, record.prompt_token_count)
        deadline_s = None if metadata.slo_deadline_ms is None else metadata.slo_deadline_ms / 1000.0
        if metadata.ttft_slo_ms is not None:
            record.ttft_objective_s = metadata.ttft_slo_ms / 1000.0
        elif deadline_s is not None:
            rest_s = deadline_s - output_tokens * token_s
            record.ttft_objective_s = max(_LEAST_TTFT_SHARE * deadline_s, rest_s)
        else:
            per_token_s = parameters["objectives.ttft_per_1000_tokens_s"] / 1000.0
            base_s = parameters["objectives.ttft_base_s"]
            record.ttft_objective_s = base_s + per_token_s * record.prompt_token_count
        if metadata.tpot_slo_ms is not None:
            record.tpot_objective_s = metadata.tpot_slo_ms / 1000.0
        elif deadline_s is not None:
            record.tpot_objective_s = deadline_s / max(1.0, output_tokens)
        else:
            record.tpot_objective_s = parameters["objectives.tpot_s"]

    def check(self, record: RequestRecord, parameters: Mapping[str, float], now: float) -> None:
        """Make sure that a request can meet its deadline and its budget, as far as can be told.

        Raises:
            InfeasibleError: It cannot; says the predicted figure, and when to try again if
                that could help.
        """
        metadata = record.metadata
        if metadata.slo_deadline_ms is None and metadata.cost_budget is None:
            return
        rows = self._rows(record, now)
        if not rows:
            return
        request = request_row(record, now)
        if metadata.cost_budget is not None:
            self._check_budget(request, rows, parameters, metadata.choice_count)
        if metadata.slo_deadline_ms is not None and parameters["admission.refuse_infeasible"] >= 0.5:
            self._check_deadline(record, request, rows, parameters)

    def _rows(self, record: RequestRecord, now: float) -> list[CandidateRow]:
        """Return the instances that could run it and whose predictions are believed."""
        matches = self._index.match(record.digest.block_hashes) if record.digest.block_hashes else {}
        instances: dict[str, InstanceRecord] = {
            each.instance_id: each
            for each in (
                *self._fleet.with_room_for(record, OPEN_CANDIDATE_LIMIT),
                *self._fleet.closed_gates(record.model, OPEN_CANDIDATE_LIMIT),
            )
        }
        for instance_id in matches:
            holder = self._fleet.find(instance_id)
            if holder is not None and record.model in holder.spec.served_models:
                instances[instance_id] = holder
        if not instances:
            instances = {
                each.instance_id: each for each in self._fleet.serving(record.model)[:OPEN_CANDIDATE_LIMIT]
            }
        block_tokens = record.digest.block_token_count
        most_cached = record.prompt_token_count - 1
        return [
            candidate_row(each, min(most_cached, matches.get(each.instance_id, 0) * block_tokens), 0.0, now)
            for each in instances.values()
            if each.state is InstanceState.READY and each.load.kind.trusted
        ]

    def _check_budget(
        self,
        request: RequestRow,
        rows: list[CandidateRow],
        parameters: Mapping[str, float],
        choice_count: int,
    ) -> None:
        priced = [row for row in rows if row.usd_per_hour > 0.0]
        if not priced:
            return
        sharing = parameters["cost_optimized.decode_sharing"]
        cost_usd, _, cheapest = min(
            (
                request_cost_usd(request, row, predict(request, row), sharing, choice_count),
                row.instance_id,
                row,
            )
            for row in priced
        )
        if cost_usd > request.cost_budget_usd:
            raise InfeasibleError(
                f"the cheapest instance, {cheapest.instance_id}, would cost about {cost_usd:.6f} US dollars "
                f"and the budget is {request.cost_budget_usd:.6f}; raise it, or ask for fewer tokens",
                predicted_cost_usd=f"{cost_usd:.9f}",
                cost_budget_usd=f"{request.cost_budget_usd:.9f}",
                instance_id=cheapest.instance_id,
            )

    def _check_deadline(
        self,
        record: RequestRecord,
        request: RequestRow,
        rows: list[CandidateRow],
        parameters: Mapping[str, float],
    ) -> None:
        # What waits is shared by all; how much of it goes first is the order's secret, so
        # only a queue without any order that helps counts whole.
        wait_s = self._queue.work_s / max(1, self._fleet.ready_count(record.model))
        if self._dispatcher.policy.in_force != "fifo":
            wait_s = min(wait_s, record.work_s)
        alone_s = loaded_s = math.inf
        for row in rows:
            predicted = predict(request, row)
            decode_s = (request.output_token_count - 1.0) * predicted.tpot_s
            loaded_s = min(loaded_s, predicted.ttft_s + decode_s)
            idle_row = row._replace(
                backlog_s=0.0,
                decode_count=0,
                context_token_count=0.0,
                prefill_share=0.0,
            )
            idle = predict(request, idle_row)
            alone_s = min(alone_s, idle.ttft_s + (request.output_token_count - 1.0) * idle.tpot_s)
        predicted_s = loaded_s + wait_s
        if predicted_s <= request.deadline_s * parameters["admission.tolerance"]:
            return
        hopeless = alone_s > request.deadline_s * parameters["admission.tolerance"]
        retry_after_s = None if hopeless else min(60.0, max(0.1, predicted_s - request.deadline_s))
        advice = (
            "even an idle instance would need that long; allow more time, or ask for fewer tokens"
            if hopeless
            else f"try again in about {retry_after_s:.1f} s, or allow more time"
        )
        raise InfeasibleError(
            f"it would finish after about {predicted_s:.2f} s "
            f"and the deadline is {request.deadline_s:.2f} s; {advice}",
            retry_after_s=retry_after_s,
            predicted_finish_s=f"{predicted_s:.3f}",
            deadline_s=f"{request.deadline_s:.3f}",
        )
