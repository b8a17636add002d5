"""What the runtime needs of a tracer, and the caller's trace on its way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

from sagecp.core.effects import Effect
from sagecp.core.events import Event

TRACE_CONTEXT_KEYS = frozenset({"traceparent", "tracestate", "baggage"})
"""Headers of the W3C trace context (https://www.w3.org/TR/trace-context/) and baggage."""

CALLER_TRACE: ContextVar[Mapping[str, str]] = ContextVar("caller_trace")
"""The trace context that the call being handled came with. Set only while there is a tracer."""


class RequestTracer(Protocol):
    """Makes spans of what the core is told and answers. Must not raise and must be cheap."""

    def on_event(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Take an event of the core and its answer, before anything is done about it."""

    def attempt_headers(self, request_id: str, epoch: int) -> Mapping[str, str]:
        """Return what an attempt's call to its engine carries, so that the engine's spans belong to it."""

    async def close(self) -> None:
        """Send what was not sent yet."""
