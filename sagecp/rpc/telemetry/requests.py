"""What is counted of requests as they are accepted, refused, retried and ended."""

from __future__ import annotations

from collections.abc import Iterator

from sagecp.core.errors import ErrorReason
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestMetadata, RequestPriority, RequestState
from sagecp.rpc.telemetry.families import Counter, Family, Histogram, counter, histogram
from sagecp.rpc.telemetry.tenant_labels import OTHER, TenantLabels
from sagecp.runtime.monitor import EndedSample
from sagecp.runtime.requests import RequestHandle

MAX_MODELS = 100
"""Models with series of their own; requests of further ones count as ``other``."""
MAX_TENANTS = 100
TENANT_IDLE_S = 3600.0

SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKEN_SECONDS_BOUNDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5,
)  # fmt: skip
_CLASS = ("model", "priority")
_OVERLOAD_REASONS = (ErrorReason.QUEUE_FULL, ErrorReason.INFEASIBLE, ErrorReason.JOURNAL_UNAVAILABLE)


class _Class:
    """The series of one model and priority, so that a request costs one look-up."""

    __slots__ = (
        "accepted", "cached_tokens", "cost_usd", "ended", "input_tokens", "latency", "output_tokens",
        "queue_wait", "slo", "tpot", "ttft",
    )  # fmt: skip

    def __init__(self, telemetry: RequestTelemetry, model: str, priority: str) -> None:
        self.accepted = telemetry.accepted_count.cell(model, priority)
        self.latency = telemetry.latency.cell(model, priority)
        self.ttft = telemetry.ttft.cell(model, priority)
        self.tpot = telemetry.tpot.cell(model, priority)
        self.queue_wait = telemetry.queue_wait.cell(model, priority)
        self.input_tokens = telemetry.input_tokens.cell(model, priority)
        self.cached_tokens = telemetry.cached_tokens.cell(model, priority)
        self.output_tokens = telemetry.output_tokens.cell(model, priority)
        self.cost_usd = telemetry.cost_usd.cell(model, priority)
        self.ended: dict[tuple[RequestState, ErrorReason | None], Counter] = {}
        # By objective: met, violated. Both from the start, so that a first violation is an increase.
        self.slo: dict[str, tuple[Counter, Counter]] = {}


class RequestTelemetry:
    """Counts requests by model and priority, and tokens and requests by tenant.

    Labels are bounded: models, priorities, states, reasons, and the busiest
    tenants; nothing names a user, a session or a request.
    """

    def __init__(self) -> None:
        self.accepted_count = counter("sagecp_requests_accepted_total", "Requests accepted.", _CLASS)
        self.ended_count = counter(
            "sagecp_requests_ended_total",
            "Requests that ended, by their last state and, unless they succeeded, by why.",
            (*_CLASS, "state", "reason"),
        )
        self.refused_count = counter(
            "sagecp_requests_refused_total", "Requests that were never accepted, by why.", ("reason",)
        )
        # From the start, so that the first refusal is an increase that alerts can see.
        for reason in _OVERLOAD_REASONS:
            self.refused_count.cell(reason.name)
        self.lost_attempts = counter(
            "sagecp_attempts_lost_total",
            "Attempts that were lost and whose requests were tried again or went on elsewhere, by why.",
            ("model", "reason"),
        )
        self.latency = histogram(
            "sagecp_request_latency_seconds",
            "Time from arrival to the end of requests that succeeded.",
            _CLASS,
            SECONDS_BOUNDS,
        )
        self.ttft = histogram(
            "sagecp_request_ttft_seconds",
            "Time from arrival to the first token of requests that succeeded.",
            _CLASS,
            SECONDS_BOUNDS,
        )
        self.tpot = histogram(
            "sagecp_request_tpot_seconds",
            "Time per output token after the first of requests that succeeded.",
            _CLASS,
            TOKEN_SECONDS_BOUNDS,
        )
        self.queue_wait = histogram(
            "sagecp_request_queue_wait_seconds",
            "Time from arrival to the last dispatch, or to the end of requests that never had one.",
            _CLASS,
            SECONDS_BOUNDS,
        )
        self.input_tokens = counter(
            "sagecp_input_tokens_total", "Prompt tokens of ended requests, as engines counted them.", _CLASS
        )
        self.cached_tokens = counter(
            "sagecp_cached_input_tokens_total",
            "Those of the prompt tokens that engines had in their caches.",
            _CLASS,
        )
        self.output_tokens = counter(
            "sagecp_output_tokens_total", "Tokens that ended requests produced.", _CLASS
        )
        self.cost_usd = counter(
            "sagecp_request_cost_usd_total",
            "What ended requests cost, US dollars: their shares of busy time, where a price is known.",
            _CLASS,
        )
        self.slo_count = counter(
            "sagecp_slo_requests_total",
            "Ended requests with an objective, by objective and whether it was met; objective all: every "
            "one that the request had.",
            (*_CLASS, "objective", "outcome"),
        )
        self.tenant_requests = counter(
            "sagecp_tenant_requests_ended_total", "Requests that ended, by tenant.", ("tenant", "state")
        )
        self.tenant_input_tokens = counter(
            "sagecp_tenant_input_tokens_total", "Prompt tokens of ended requests, by tenant.", ("tenant",)
        )
        self.tenant_output_tokens = counter(
            "sagecp_tenant_output_tokens_total",
            "Tokens that ended requests produced, by tenant.",
            ("tenant",),
        )
        self.tenant_cost_usd = counter(
            "sagecp_tenant_cost_usd_total", "What ended requests cost, US dollars, by tenant.", ("tenant",)
        )
        self._families: tuple[Family[Counter] | Family[Histogram], ...] = (
            self.accepted_count, self.ended_count, self.refused_count, self.lost_attempts,
            self.latency, self.ttft, self.tpot, self.queue_wait,
            self.input_tokens, self.cached_tokens, self.output_tokens, self.cost_usd, self.slo_count,
            self.tenant_requests, self.tenant_input_tokens, self.tenant_output_tokens, self.tenant_cost_usd,
        )  # fmt: skip
        self._classes: dict[tuple[str, RequestPriority], _Class] = {}
        self._models: set[str] = set()
        self._tenants = TenantLabels(MAX_TENANTS, TENANT_IDLE_S, self._retire)

    # -- what happens ------------------------------------------------------------

    def accepted(self, record: RequestRecord) -> None:
        """Count a new request."""
        self._class_of(record).accepted.value += 1

    def refused(self, reason: ErrorReason) -> None:
        """Count a refusal."""
        self.refused_count.cell(reason.name).value += 1

    def attempt_lost(self, record: RequestRecord, reason: ErrorReason) -> None:
        """Count an attempt that was lost."""
        self.lost_attempts.cell(self._model_label(record.model), reason.name).value += 1

    def ended(self, handle: RequestHandle, sample: EndedSample) -> None:
        """Count an ended request."""
        record, state = handle.record, sample.state
        cells = self._class_of(record)
        reason = handle.failure.reason if handle.failure is not None else None
        ended = cells.ended.get((state, reason))
        if ended is None:
            labels = self._model_label(record.model), record.metadata.priority.name
            ended = self.ended_count.cell(*labels, state.name, reason.name if reason else "")
            cells.ended[state, reason] = ended
        ended.value += 1
        cells.queue_wait.observe(sample.queue_wait_s)
        if state is RequestState.SUCCEEDED:
            cells.latency.observe(sample.latency_s)
            if sample.ttft_s is not None:
                cells.ttft.observe(sample.ttft_s)
            if sample.tpot_s is not None:
                cells.tpot.observe(sample.tpot_s)
        outcome = handle.outcome
        prompt_tokens = (outcome.prompt_token_count if outcome is not None else None) or 0
        cells.input_tokens.value += prompt_tokens
        cells.output_tokens.value += sample.output_token_count
        if outcome is not None and outcome.cached_token_count:
            cells.cached_tokens.value += outcome.cached_token_count
        if sample.slo_met is not None:
            self._judge(cells, record, sample)
        tenant = self._tenants.label(record.metadata.tenant_id, sample.end_s)
        self.tenant_requests.cell(tenant, state.name).value += 1
        self.tenant_input_tokens.cell(tenant).value += prompt_tokens
        self.tenant_output_tokens.cell(tenant).value += sample.output_token_count
        if sample.cost_usd is not None:
            cells.cost_usd.value += sample.cost_usd
            self.tenant_cost_usd.cell(tenant).value += sample.cost_usd

    def _judge(self, cells: _Class, record: RequestRecord, sample: EndedSample) -> None:
        succeeded = sample.state is RequestState.SUCCEEDED
        judged = [("all", bool(sample.slo_met))]
        for objective, limit_s, value_s in _objectives(record.metadata, sample):
            # Without a second token there is no time between tokens to miss.
            judged.append((objective, succeeded and (value_s is None or value_s <= limit_s)))
        for objective, met in judged:
            counters = cells.slo.get(objective)
            if counters is None:
                labels = self._model_label(record.model), record.metadata.priority.name, objective
                counters = self.slo_count.cell(*labels, "met"), self.slo_count.cell(*labels, "violated")
                cells.slo[objective] = counters
            counters[0 if met else 1].value += 1

    # -- labels --------------------------------------------------------------------

    def _class_of(self, record: RequestRecord) -> _Class:
        key = record.model, record.metadata.priority
        found = self._classes.get(key)
        if found is None:
            model = self._model_label(record.model)
            if model == OTHER and model != record.model:
                key = OTHER, key[1]
            found = self._classes.get(key)
            if found is None:
                found = self._classes[key] = _Class(self, model, key[1].name)
        return found

    def _model_label(self, model: str) -> str:
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                return OTHER
            self._models.add(model)
        return model

    def _retire(self, tenant: str) -> None:
        for state in RequestState:
            self.tenant_requests.drop(tenant, state.name)
        self.tenant_input_tokens.drop(tenant)
        self.tenant_output_tokens.drop(tenant)
        self.tenant_cost_usd.drop(tenant)

    # -- writing -------------------------------------------------------------------

    def pieces(self) -> Iterator[str]:
        """Return all series as text, piece by piece."""
        for family in self._families:
            yield from family.pieces()


def _objectives(metadata: RequestMetadata, sample: EndedSample) -> Iterator[tuple[str, float, float | None]]:
    """Return the objectives that a request had: name, limit and value, in seconds."""
    if metadata.slo_deadline_ms is not None:
        yield "latency", metadata.slo_deadline_ms / 1000, sample.latency_s
    if metadata.ttft_slo_ms is not None:
        yield "ttft", metadata.ttft_slo_ms / 1000, sample.ttft_s
    if metadata.tpot_slo_ms is not None:
        yield "tpot", metadata.tpot_slo_ms / 1000, sample.tpot_s
