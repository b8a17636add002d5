"""The port to an inference engine: what the execution coordinator needs from one.

An engine client turns an :class:`EngineCall` into HTTP (or another protocol),
feeds every piece of output to a sink as it arrives, and returns an
:class:`EngineOutcome` only when the engine said why it finished. Anything else
raises an :class:`EngineError`: a bare end of stream is a failure.

The sink is called synchronously from the transport's read callback, because a
task switch per token would cost more than everything else on the token path.
It must not block and must not raise.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec


class EngineApi(enum.Enum):
    """Which of the engine's generation endpoints a call uses."""

    COMPLETIONS = "/v1/completions"
    CHAT_COMPLETIONS = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class EngineEndpoint:
    """Where an engine listens.

    Attributes:
        base_url: Scheme, host and port without a trailing slash, for example
            ``http://127.0.0.1:8000``; ``https`` uses TLS.
        api_key: Sent as a bearer token when not empty. Never logged.
    """

    base_url: str
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """Bounds on an engine's silence, in seconds.

    Attributes:
        connect_s: From the call to an open connection.
        first_token_s: From the request being sent to the first output
            (covers the engine's own queue and the prefill).
        inter_token_s: Between two pieces of output: a stopped engine keeps
            its connections open, so only this detects it.
        total_s: From the call to its end: what is left of the request's deadline.
    """

    connect_s: float = 5.0
    first_token_s: float = 300.0
    inter_token_s: float = 60.0
    total_s: float = math.inf


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One generation call, ready to send.

    Attributes:
        api: The endpoint.
        body: The JSON request body. The caller has set ``stream`` and
            ``stream_options.include_usage``.
        request_id: Sent as ``X-Request-Id``.
        headers: Further headers, such as a trace context.
        keep_raw: Keep each event's JSON in :attr:`EngineDelta.raw`, for callers
            who speak the OpenAI protocol and want every field.
        expected_choice_count: How many choices must finish before the call is complete.
    """

    api: EngineApi
    body: bytes = field(repr=False)
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    keep_raw: bool = False
    expected_choice_count: int = 1


class EngineDelta(msgspec.Struct, gc=False, eq=False, array_like=True):
    """One piece of output for one choice.

    One is made per engine chunk: a struct costs a third of a class with
    ``__slots__`` to make, and the garbage collector never looks at it (it
    holds no references that could form a cycle). Compared by identity.

    Attributes:
        choice_index: Which of the ``n`` choices.
        text: New text; may be empty (a token that completes no character).
        token_ids: New token ids, or ``None`` where the engine gives none.
        token_count: Tokens in this piece: ``len(token_ids)`` when known, else 1
            for a piece with content and 0 for one without.
        finish_reason: ``stop``, ``length``, ``tool_calls``, ... on the last
            piece of a choice, else ``""``.
        stop_reason: The stop string, or the stop token id as text, when the engine names it.
        raw: The event's JSON when the call asked for it, else ``None``. Set on
            the first delta of an event only, so that concatenating them repeats nothing.
    """

    choice_index: int
    text: str
    token_ids: Sequence[int] | None
    token_count: int
    finish_reason: str = ""
    stop_reason: str = ""
    raw: bytes | None = None


class EngineSink(Protocol):
    """Receives output as it arrives, synchronously, from the read callback."""

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Take the ids of the prompt as the engine reads it, each below 2**32.

        Called at most once for a call, before the first delta, and only where
        the engine gives the ids (never empty).
        """

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Take the pieces found in one read of the socket, in order (never empty)."""


@dataclass(frozen=True, slots=True)
class EngineOutcome:
    """A completed call.

    Attributes:
        finish_reasons: The finish reason of every choice, by choice index.
        prompt_token_count: From the engine's usage, or ``None`` if it sent none.
        completion_token_count: Likewise.
        cached_token_count: Prompt tokens served from the prefix cache, or ``None``.
    """

    finish_reasons: tuple[str, ...]
    prompt_token_count: int | None = None
    completion_token_count: int | None = None
    cached_token_count: int | None = None


class EngineError(Exception):
    """A call did not complete.

    Attributes:
        retryable: Whether another attempt, elsewhere, could succeed.
        counts_against_engine: Whether a circuit breaker should count it:
            transport errors and 5xx do, a 4xx never does.
    """

    retryable = True
    counts_against_engine = True


class EngineUnreachableError(EngineError):
    """No connection: refused, reset before a response, name not found, connect timeout.

    Attributes:
        sent: The call had been sent when the connection was lost.
    """

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class EngineTimeoutError(EngineError):
    """The engine was silent for too long.

    Attributes:
        phase: ``first_token``, ``inter_token``, or ``total``: the request's time
            was up, which no other attempt helps, and the engine is not to blame for.
    """

    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.phase = phase
        if phase == "total":
            self.retryable = False
            self.counts_against_engine = False


class EngineRejectedError(EngineError):
    """The engine answered with a 4xx: the request itself is at fault.

    Attributes:
        status: The HTTP status.
        parameter: The field the engine blames, or ``""``.
    """

    retryable = False
    counts_against_engine = False

    def __init__(self, message: str, status: int, parameter: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


class EngineFailedError(EngineError):
    """The engine answered with a 5xx, or sent an error inside a 200 stream.

    Attributes:
        status: The HTTP status (200 for an error inside a stream).
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EngineUnauthorizedError(EngineFailedError):
    """The engine does not accept the control plane's credentials (401 or 403).

    A fault of the configuration, not of the request: another instance may have
    the right key, so another attempt is allowed, and the breaker counts it, so
    an instance that refuses everything at once does not attract all the work.
    """


class EngineOverloadedError(EngineError):
    """The engine refused because it is full (429, or 503 of its own queue bound): try elsewhere or later.

    Attributes:
        status: The HTTP status.
    """

    counts_against_engine = False

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EngineStreamBrokenError(EngineError):
    """The stream ended without a finish reason, finished with ``abort``, or was not understood."""


class EngineSpliceError(EngineError):
    """The engine cannot go on after output of another one, without a break in the text.

    The engines of a model read its tokens alike, so no other one could either.
    """

    retryable = False
    counts_against_engine = False


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The answer of a health probe.

    Attributes:
        healthy: Whether ``/health`` answered 200 in time, or a token was generated in time.
        latency_s: How long the answer took.
        detail: Why not healthy, in a sentence, else ``""``.
    """

    healthy: bool
    latency_s: float
    detail: str = ""


class EngineClient(Protocol):
    """A client for one engine."""

    @property
    def last_output_s(self) -> float:
        """When any call last produced output, on the monotonic clock; ``-inf`` before."""

    async def generate(self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts) -> EngineOutcome:
        """Run one call to its end.

        Cancelling the awaiting task closes the connection at once, which makes
        the engine stop its work.

        Raises:
            EngineError: The call did not complete; the subclass says how.
        """

    async def health(self, timeout_s: float) -> EngineHealth:
        """Probe the engine; never raises for an engine that is down."""

    async def probe(self, model: str, timeout_s: float) -> EngineHealth:
        """Have the engine generate one token, as a hung engine cannot; never raises for one that is down."""

    async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Return the text of tokens, special ones included.

        Raises:
            EngineError: No answer, or none that is text.
        """

    async def context_token_count(self, model: str, timeout_s: float) -> int:
        """Return how many tokens, prompt and output together, a model's context holds.

        Raises:
            EngineError: No answer, or none that tells.
        """

    async def close(self) -> None:
        """Close every connection. Idempotent; calls in progress fail."""
