"""Traces over OpenTelemetry: one trace per request, sent to a collector over OTLP.

    request ─┬─ queue      from arrival, or the loss of an attempt, to a dispatch
             ├─ decision   the moment of the dispatch: why it went where it went
             └─ engine ─┬─ prefill   from the dispatch to the first output
                        └─ decode    from there to the end

Every part is made of the events that the core is told and of what it answers:
nothing else in the control plane knows of spans. Attributes follow the
semantic conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), others begin with
``sagecp.``. No prompt and no output is ever part of a trace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sagecp.config import TracingConfig
from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import Failure
from sagecp.core.request import RequestRecord
from sagecp.core.types import (
    ExecutionInstance,
    OpenAiApi,
    RequestMetadata,
    RequestState,
    SchedulingDecision,
)
from sagecp.runtime.tracing.base import CALLER_TRACE
from sagecp.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

MAX_CANDIDATE_COUNT = 8
"""Candidates of a decision that are shown with their scores."""
_MAX_SCHEDULE_DELAY_MS = 1000
_W3C = TraceContextTextMapPropagator()
_NOTHING: Mapping[str, str] = {}


class _RequestTrace:
    """The open spans of one request."""

    __slots__ = ("context", "engine", "engine_context", "epoch", "phase", "root", "waiting")

    def __init__(self, root: Span, context: otel_context.Context) -> None:
        self.root = root
        self.context = context
        self.waiting: Span | None = None
        self.engine: Span | None = None
        self.engine_context: otel_context.Context | None = None
        self.phase: Span | None = None
        self.epoch = 0


class OtelRequestTracer:
    """Makes spans of requests and sends them in batches from a thread of its own.

    What cannot be sent is dropped, and told once in a while in the log: requests never wait for it.

    Args:
        config: Where to send, and how much.
        instance_of: Returns what is known of an instance; ``None``: it left.
        exporter: Instead of the one that ``config`` describes.
    """

    def __init__(
        self,
        config: TracingConfig,
        instance_of: Callable[[str], ExecutionInstance | None],
        exporter: SpanExporter | None = None,
    ) -> None:
        self._instance_of = instance_of
        resource = Resource.create({"service.name": config.service_name, "service.version": __version__})
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBased(TraceIdRatioBased(config.sample_ratio))
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or _exporter(config), schedule_delay_millis=_MAX_SCHEDULE_DELAY_MS)
        )
        self._tracer = self._provider.get_tracer("sagecp", __version__)
        # Sampled requests that live, by id.
        self._traces: dict[str, _RequestTrace] = {}
        # What the calls of the others carry, so that their engines do not sample them either.
        self._unsampled: dict[str, Mapping[str, str]] = {}

    async def close(self) -> None:
        """Send what was not sent yet; a collector that does not answer is given up after a while."""
        await asyncio.to_thread(self._provider.shutdown)

    def attempt_headers(self, request_id: str, epoch: int) -> Mapping[str, str]:
        """Return the trace context of an attempt's span as W3C headers."""
        known = self._traces.get(request_id)
        if known is None:
            return self._unsampled.get(request_id, _NOTHING)
        if known.engine_context is None or known.epoch != epoch:
            return _NOTHING
        headers: dict[str, str] = {}
        _W3C.inject(headers, context=known.engine_context)
        return headers

    def on_event(self, now: float, event: ev.Event, effects: Sequence[fx.Effect]) -> None:
        """Turn an event of the core and its answer into spans."""
        time_ns = time.time_ns()
        try:
            if isinstance(event, ev.RequestArrived):
                self._begin(event.metadata, time_ns)
            elif isinstance(event, ev.AttemptProgressed):
                self._first_output(event, time_ns)
            elif isinstance(event, ev.AttemptSucceeded):
                self._end_attempt(event, time_ns)
            restored = isinstance(event, ev.RequestsRestored)
            for effect in effects:
                if restored and isinstance(effect, fx.RequestAccepted):
                    self._begin(effect.record.metadata, time_ns, restored=True)
                self._take(effect, time_ns)
        except Exception:
            # A trace is not worth a request.
            logger.exception("tracing failed")

    def _take(self, effect: fx.Effect, time_ns: int) -> None:
        if isinstance(effect, fx.RequestAccepted):
            self._accept(effect.record, time_ns)
        elif isinstance(effect, fx.RequestRejected):
            self._reject(effect, time_ns)
        elif isinstance(effect, fx.DispatchAttempt):
            self._dispatch(effect, time_ns)
        elif isinstance(effect, fx.RequestRequeued):
            self._requeue(effect, time_ns)
        elif isinstance(effect, fx.RequestEnded):
            self._end(effect, time_ns)

    # -- the request -----------------------------------------------------------------

    def _begin(self, metadata: RequestMetadata, time_ns: int, *, restored: bool = False) -> None:
        parent = None if restored else _W3C.extract(CALLER_TRACE.get(_NOTHING))
        root = self._tracer.start_span(
            "request", parent, SpanKind.SERVER, _request_attributes(metadata), start_time=time_ns
        )
        context = trace.set_span_in_context(root)
        if not root.is_recording():
            headers: dict[str, str] = {}
            _W3C.inject(headers, context=context)
            self._unsampled[metadata.request_id] = headers
            return
        if restored:
            root.set_attribute("sagecp.restored", True)
        self._traces[metadata.request_id] = _RequestTrace(root, context)

    def _accept(self, record: RequestRecord, time_ns: int) -> None:
        known = self._traces.get(record.request_id)
        if known is not None:
            known.root.set_attributes(
                {
                    "gen_ai.request.model": record.model,
                    "sagecp.prompt.estimated_tokens": record.prompt_token_count,
                }
            )
            self._wait(known, record, time_ns)

    def _reject(self, effect: fx.RequestRejected, time_ns: int) -> None:
        self._unsampled.pop(effect.request_id, None)
        known = self._traces.pop(effect.request_id, None)
        if known is not None:
            known.root.set_attribute("error.type", effect.error.reason.name)
            known.root.set_status(Status(StatusCode.ERROR, effect.error.reason.name))
            known.root.end(time_ns)

    def _end(self, effect: fx.RequestEnded, time_ns: int) -> None:
        record = effect.record
        self._unsampled.pop(record.request_id, None)
        known = self._traces.pop(record.request_id, None)
        if known is None:
            return
        if known.waiting is not None:
            known.waiting.end(time_ns)
        self._close_engine(known, time_ns, effect.failure)
        root = known.root
        root.set_attributes({"sagecp.state": effect.state.name, "sagecp.attempts": record.epoch})
        if record.first_token_s is not None:
            root.set_attribute("sagecp.ttft_s", record.first_token_s - record.arrival_s)
        if effect.failure is not None:
            root.set_attribute("error.type", effect.failure.reason.name)
        if effect.state in {RequestState.FAILED, RequestState.EXPIRED}:
            root.set_status(Status(StatusCode.ERROR, effect.state.name))
        root.end(time_ns)

    # -- its parts ---------------------------------------------------------------------

    def _wait(self, known: _RequestTrace, record: RequestRecord, time_ns: int) -> None:
        known.waiting = self._tracer.start_span(
            "queue",
            known.context,
            attributes={"sagecp.priority": record.metadata.priority.name, "sagecp.model": record.model},
            start_time=time_ns,
        )

    def _dispatch(self, effect: fx.DispatchAttempt, time_ns: int) -> None:
        known = self._traces.get(effect.record.request_id)
        if known is None:
            return
        if known.waiting is not None:
            known.waiting.end(time_ns)
            known.waiting = None
        decision = self._tracer.start_span(
            "decision",
            known.context,
            attributes=_decision_attributes(effect.decision),
            start_time=time_ns,
        )
        decision.end(time_ns)
        instance = self._instance_of(effect.instance_id)
        known.epoch = effect.epoch
        known.engine = self._tracer.start_span(
            f"{_operation(effect.record.metadata)} {effect.record.model}",
            known.context,
            SpanKind.CLIENT,
            _engine_attributes(effect, instance),
            start_time=time_ns,
        )
        known.engine_context = trace.set_span_in_context(known.engine)
        known.phase = self._tracer.start_span("prefill", known.engine_context, start_time=time_ns)

    def _first_output(self, event: ev.AttemptProgressed, time_ns: int) -> None:
        known = self._traces.get(event.request_id)
        if known is None or known.engine_context is None or known.epoch != event.epoch:
            return
        if known.phase is not None:
            known.phase.end(time_ns)
        known.root.add_event("first token", timestamp=time_ns)
        known.phase = self._tracer.start_span("decode", known.engine_context, start_time=time_ns)

    def _end_attempt(self, event: ev.AttemptSucceeded, time_ns: int) -> None:
        known = self._traces.get(event.request_id)
        if known is None or known.engine is None or known.epoch != event.epoch:
            return
        usage: dict[str, Any] = {"gen_ai.usage.output_tokens": event.output_token_count}
        if event.prompt_token_count is not None:
            usage["gen_ai.usage.input_tokens"] = event.prompt_token_count
        if event.cached_prompt_token_count is not None:
            usage["gen_ai.usage.cache_read.input_tokens"] = event.cached_prompt_token_count
        if event.finish_reasons:
            usage["gen_ai.response.finish_reasons"] = list(event.finish_reasons)
        known.engine.set_attributes(usage)
        known.root.set_attributes(usage)
        self._close_engine(known, time_ns, None)

    def _requeue(self, effect: fx.RequestRequeued, time_ns: int) -> None:
        known = self._traces.get(effect.record.request_id)
        if known is not None:
            self._close_engine(known, time_ns, effect.failure)
            known.root.add_event(
                "attempt lost", {"error.type": effect.failure.reason.name}, timestamp=time_ns
            )
            self._wait(known, effect.record, time_ns)

    def _close_engine(self, known: _RequestTrace, time_ns: int, failure: Failure | None) -> None:
        if known.phase is not None:
            known.phase.end(time_ns)
            known.phase = None
        if known.engine is not None:
            if failure is not None:
                known.engine.set_attribute("error.type", failure.reason.name)
                known.engine.set_status(Status(StatusCode.ERROR, failure.reason.name))
            known.engine.end(time_ns)
        known.engine = known.engine_context = None


def _operation(metadata: RequestMetadata) -> str:
    is_chat = metadata.messages or metadata.openai_api is OpenAiApi.CHAT_COMPLETIONS
    return "chat" if is_chat else "text_completion"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != ""}


def _request_attributes(metadata: RequestMetadata) -> dict[str, Any]:
    sampling = metadata.sampling
    return _given(
        {
            "gen_ai.operation.name": _operation(metadata),
            "gen_ai.request.max_tokens": metadata.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.choice.count": None if metadata.choice_count == 1 else metadata.choice_count,
            "gen_ai.conversation.id": metadata.session_id,
            "sagecp.request.id": metadata.request_id,
            "sagecp.tenant.id": metadata.tenant_id,
            "sagecp.priority": metadata.priority.name,
            "sagecp.slo.deadline_ms": metadata.slo_deadline_ms,
            "sagecp.slo.ttft_ms": metadata.ttft_slo_ms,
            "sagecp.slo.tpot_ms": metadata.tpot_slo_ms,
        }
    )


def _decision_attributes(decision: SchedulingDecision) -> dict[str, Any]:
    shown = decision.candidates[:MAX_CANDIDATE_COUNT]
    return {
        "sagecp.instance.id": decision.instance_id,
        "sagecp.scheduling_policy": decision.policy_in_force or decision.scheduling_policy,
        "sagecp.routing_strategy": decision.routing_strategy,
        "sagecp.load_balancer": decision.load_balancer,
        "sagecp.config_version": decision.config_version,
        "sagecp.queue_wait_s": decision.queue_wait_s,
        "sagecp.reason": decision.reason,
        "sagecp.candidate.count": decision.candidate_count,
        "sagecp.candidate.ids": [each.instance_id for each in shown],
        "sagecp.candidate.scores": [float(each.score) for each in shown],
    }


def _engine_attributes(effect: fx.DispatchAttempt, instance: ExecutionInstance | None) -> dict[str, Any]:
    attributes = {
        "gen_ai.operation.name": _operation(effect.record.metadata),
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": effect.record.model,
        "sagecp.instance.id": effect.instance_id,
        "sagecp.attempt": effect.epoch,
    }
    if instance is not None:
        attributes |= {
            "gen_ai.provider.name": instance.engine_kind,
            "server.address": instance.host,
            "server.port": instance.port,
        }
    return attributes


def _exporter(config: TracingConfig) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(
        endpoint=config.otlp_endpoint,
        insecure=not config.otlp_endpoint.startswith("https://"),
        timeout=config.export_timeout_s,
    )
