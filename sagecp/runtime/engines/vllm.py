"""The client of a vLLM server, and of what speaks its OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Sequence

from sagecp.runtime.engines.base import (
    EngineApi,
    EngineCall,
    EngineEndpoint,
    EngineError,
    EngineFailedError,
    EngineHealth,
    EngineOutcome,
    EngineOverloadedError,
    EngineSink,
    EngineStreamBrokenError,
    EngineTimeoutError,
    EngineTimeouts,
    EngineUnreachableError,
)
from sagecp.runtime.engines.http1 import BodyCollector, HttpClient, HttpTimeoutError
from sagecp.runtime.engines.http1_connection import (
    HttpConnectError,
    HttpConnection,
    HttpDisconnectedError,
    HttpExchange,
    PoolOptions,
)
from sagecp.runtime.engines.http1_wire import BodySink, HttpError, HttpLimits, HttpProtocolError, ResponseHead
from sagecp.runtime.engines.openai_stream import OpenAiStreamParser, error_of_response, printable
from sagecp.runtime.engines.sse import SseError, SseSplitter
from sagecp.version import __version__

# Enough for any message; the rest of a longer one is not read.
_MAX_ERROR_BODY_BYTES = 64 << 10
# How long a connection may take to end its message after [DONE] said so.
_LINGER_S = 1.0
_PROBE_PROMPT = "Hello"


class VllmEngineClient:
    """Runs calls on one vLLM server.

    Connections are kept alive and reused. The scheduler decides how much an
    engine takes; ``max_connection_count`` only bounds what a mistake could
    cost, and a call beyond it fails at once with
    :class:`EngineOverloadedError` of status 0.

    Args:
        endpoint: Where the engine listens.
        max_connection_count: Most connections at once.
        max_idle_connection_count: Most idle connections kept for later calls.
        idle_timeout_s: When an idle connection is closed.
        ssl_context: For https; default: the system's trusted certificates.

    Raises:
        ValueError: The URL or the API key is not usable.
    """

    def __init__(
        self,
        endpoint: EngineEndpoint,
        *,
        max_connection_count: int = 4096,
        max_idle_connection_count: int = 256,
        idle_timeout_s: float = 4.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        headers = {"User-Agent": f"sagecp/{__version__}"}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._max_connection_count = max_connection_count
        self._activity = _Activity()
        self._http = HttpClient(
            endpoint.base_url,
            headers=headers,
            ssl_context=ssl_context,
            limits=HttpLimits(),
            options=PoolOptions(max_idle_connection_count, idle_timeout_s),
        )

    @property
    def last_output_s(self) -> float:
        """When any call last produced output, on the monotonic clock; ``-inf`` before."""
        return self._activity.last_output_s

    async def generate(self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts) -> EngineOutcome:
        """Run one call to its end; see :class:`~sagecp.runtime.engines.base.EngineClient`.

        Raises:
            EngineError: The call did not complete; the subclass says how.
            ValueError: A header of the call is not valid.
        """
        pool = self._http.pool
        if pool.idle_count == 0 and pool.open_count >= self._max_connection_count:
            raise EngineOverloadedError(
                f"all {self._max_connection_count} connections to the engine are in use", 0
            )
        end_s = math.inf
        if timeouts.total_s < math.inf:
            end_s = asyncio.get_running_loop().time() + timeouts.total_s
        generation = _Generation(call, sink, timeouts, end_s, self._activity)
        exchanging = self._http.perform(
            generation,
            "POST",
            call.api.value,
            headers={
                **call.headers,
                "Accept": "text/event-stream",
                "Content-Type": "application/json",
                "X-Request-Id": call.request_id,
            },
            body=call.body,
            connect_timeout_s=min(timeouts.connect_s, timeouts.total_s),
        )
        # Its body may be large, and the answer takes long.
        del call
        try:
            return await exchanging
        except (HttpError, SseError) as error:
            if isinstance(error, HttpConnectError) and asyncio.get_running_loop().time() >= end_s:
                raise _out_of_time(timeouts) from error
            raise _engine_error_of(error) from error

    async def health(self, timeout_s: float) -> EngineHealth:
        """Ask ``/health``; an engine that is down is an answer, too."""
        start_s = time.monotonic()  # The event loop's own clock may tick in milliseconds.
        detail = ""
        try:
            response = await self._http.get("/health", timeout_s=timeout_s)
            if response.status != 200:
                detail = f"/health answered HTTP {response.status}{redirection_of(response.head)}"
        except HttpError as error:
            detail = str(error)
        return EngineHealth(healthy=not detail, latency_s=time.monotonic() - start_s, detail=detail)

    async def probe(self, model: str, timeout_s: float) -> EngineHealth:
        """Have the engine generate one token; an engine that is down or full is an answer, too."""
        start_s = time.monotonic()
        detail = ""
        body = {"model": model, "prompt": _PROBE_PROMPT, "max_tokens": 1, "temperature": 0}
        try:
            response = await self._http.request_json(
                "POST", EngineApi.COMPLETIONS.value, body, timeout_s=timeout_s
            )
            if response.status != 200:
                elsewhere = redirection_of(response.head)
                error = error_of_response(response.status, response.body)
                said = f"HTTP {response.status}{elsewhere}" if elsewhere else str(error)
                detail = f"a probe for one token failed: {said}"
            else:
                parser = OpenAiStreamParser()
                parser.parse_whole(response.body)
                parser.outcome()
        except HttpError as error:
            detail = str(error)
        except EngineError as error:
            detail = f"a probe for one token failed: {error}"
        return EngineHealth(healthy=not detail, latency_s=time.monotonic() - start_s, detail=detail)

    async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Ask ``/detokenize``; see :class:`~sagecp.runtime.engines.base.EngineClient`.

        Raises:
            EngineError: No answer, or none that is text.
        """
        body = {"model": model, "tokens": list(token_ids)}
        answer = await self._ask("POST", "/detokenize", body, timeout_s)
        text = answer.get("prompt") if isinstance(answer, dict) else None
        if not isinstance(text, str):
            raise EngineStreamBrokenError("the engine answered /detokenize without a text")
        return text

    async def context_token_count(self, model: str, timeout_s: float) -> int:
        """Ask ``/v1/models``; see :class:`~sagecp.runtime.engines.base.EngineClient`.

        Raises:
            EngineError: No answer, or none that tells.
        """
        answer = await self._ask("GET", "/v1/models", None, timeout_s)
        cards = answer.get("data") if isinstance(answer, dict) else None
        for card in cards if isinstance(cards, list) else ():
            if isinstance(card, dict) and card.get("id") == model:
                count = card.get("max_model_len")
                if type(count) is int and count > 0:
                    return count
        raise EngineStreamBrokenError(f"the engine's /v1/models does not tell the context of {model!r}")

    async def _ask(self, method: str, path: str, value: object, timeout_s: float) -> object:
        """Return the JSON of a small answer.

        Raises:
            EngineError: There is none.
        """
        try:
            response = await self._http.request_json(method, path, value, timeout_s=timeout_s)
            if response.status != 200:
                raise error_of_response(response.status, response.body)
            answer: object = response.json()
        except HttpTimeoutError as error:
            raise EngineTimeoutError(str(error), "first_token") from error
        except HttpDisconnectedError as error:
            # Whatever the engine died of, it was not at work on a request's tokens.
            raise EngineUnreachableError(str(error)) from error
        except HttpError as error:
            raise _engine_error_of(error) from error
        return answer

    async def close(self) -> None:
        """Close every connection. Idempotent; calls in progress fail."""
        await self._http.close()


def redirection_of(head: ResponseHead) -> str:
    """Return what an answer that leads elsewhere says, and what to do about it; ``""``: it does not.

    Nothing is ever followed: an engine's address is configuration, and where it leads was not checked.
    """
    if not 300 <= head.status < 400:
        return ""
    where = printable(head.headers.get("location", ""), 200) or "an address that it does not name"
    return f", which redirects to {where}; register the final address"


class _Activity:
    """When any call of a client last produced output."""

    __slots__ = ("last_output_s",)

    def __init__(self) -> None:
        self.last_output_s = -math.inf


def _out_of_time(timeouts: EngineTimeouts) -> EngineTimeoutError:
    return EngineTimeoutError(
        f"the request's time was up: the engine had {timeouts.total_s:g} s left for it", "total"
    )


def _engine_error_of(error: HttpError | SseError) -> EngineError:
    if isinstance(error, HttpConnectError):
        return EngineUnreachableError(str(error))
    if isinstance(error, HttpDisconnectedError) and not error.response_started:
        return EngineUnreachableError(str(error), sent=True)
    return EngineStreamBrokenError(str(error))


class _Generation(HttpExchange[EngineOutcome]):
    """One call: from the response's bytes to the sink.

    One timer serves all timeouts. Output only notes the time; the timer looks
    at the note when it fires, and arms itself for what is left.
    """

    __slots__ = (
        "_activity",
        "_collector",
        "_end_s",
        "_has_output",
        "_last_activity_s",
        "_loop",
        "_parser",
        "_sink",
        "_status",
        "_timeouts",
        "_timer",
    )

    def __init__(
        self,
        call: EngineCall,
        sink: EngineSink,
        timeouts: EngineTimeouts,
        end_s: float = math.inf,
        activity: _Activity | None = None,
    ) -> None:
        super().__init__()
        self._end_s = end_s
        self._activity = activity or _Activity()
        self._sink = sink
        self._timeouts = timeouts
        self._parser = OpenAiStreamParser(
            keep_raw=call.keep_raw,
            expected_choice_count=call.expected_choice_count,
            on_prompt=self._on_prompt,
        )
        self._status = 0
        self._collector: BodyCollector | None = None
        self._loop: asyncio.AbstractEventLoop
        self._last_activity_s = 0.0
        self._has_output = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connection: HttpConnection) -> asyncio.Future[EngineOutcome]:
        self._loop = connection.loop
        self._last_activity_s = self._loop.time()
        timeouts = self._timeouts
        self._arm(min(timeouts.first_token_s, timeouts.inter_token_s, self._end_s - self._last_activity_s))
        return super().begin(connection)

    def dispose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_head(self, head: ResponseHead) -> BodySink:
        self._status = head.status
        if 300 <= head.status < 400:
            raise EngineFailedError(
                f"the engine answered HTTP {head.status}{redirection_of(head)}", head.status
            )
        if head.status != 200:
            self._collector = BodyCollector(_MAX_ERROR_BODY_BYTES)
            return self._collector.feed
        if head.content_type == "text/event-stream":
            return SseSplitter(self._parser.parse).feed
        if head.content_type == "application/json":
            self._collector = BodyCollector(HttpLimits().max_body_bytes)
            return self._collector.feed
        raise HttpProtocolError(
            f"the engine answered with {printable(head.content_type, 80) or 'no content type'} "
            "instead of text/event-stream"
        )

    def on_read(self) -> None:
        parser = self._parser
        deltas = parser.deltas
        if self.result.done():
            # The caller was cancelled in this turn of the loop, or has its answer.
            return
        if deltas:
            parser.deltas = []
            if parser.progressed:
                parser.progressed = False
                self._has_output = True
                self._activity.last_output_s = self._last_activity_s = self._loop.time()
            self._sink.on_deltas(deltas)
        if parser.done and not self.result.done():
            # The message's last bytes may be still to come; the answer need not wait for them.
            self.connection.linger(_LINGER_S)
            self.result.set_result(parser.outcome())

    def on_end(self) -> None:
        collector = self._collector
        if collector is not None:
            if self._status != 200:
                raise error_of_response(self._status, bytes(collector.body))
            self._parser.parse_whole(bytes(collector.body))
            self.on_read()
        if not self.result.done():
            self.result.set_result(self._parser.outcome())

    def on_failure(self, error: Exception) -> None:
        if self.result.done():
            return
        if self._status not in {0, 200} and self._collector is not None and isinstance(error, HttpError):
            # The status says what happened, even if its explanation was cut off or too long.
            error = error_of_response(self._status, bytes(self._collector.body))
        elif (
            isinstance(error, HttpDisconnectedError) and self._collector is None and self._parser.is_complete
        ):
            # The engine said why every choice finished; nothing of the answer can be missing.
            self.result.set_result(self._parser.outcome())
            return
        deltas, self._parser.deltas = self._parser.deltas, []
        if deltas:
            # What came before the damage is output all the same.
            try:
                self._sink.on_deltas(deltas)
            except Exception as sink_error:  # noqa: BLE001 - the caller must hear of it, and of nothing else
                error = sink_error
        # The sink may have had the call cancelled.
        if not self.result.done():
            self.result.set_exception(error)

    def _on_prompt(self, token_ids: Sequence[int]) -> None:
        if not self.result.done():
            self._sink.on_prompt(token_ids)

    def _arm(self, delay_s: float) -> None:
        self._timer = self._loop.call_later(max(delay_s, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        timeouts = self._timeouts
        if self._has_output:
            phase, limit_s = "inter_token", timeouts.inter_token_s
        else:
            phase, limit_s = "first_token", timeouts.first_token_s
        now = self._loop.time()
        silent_s = now - self._last_activity_s
        if silent_s < limit_s and now < self._end_s:
            # Never sleep past the moment at which output that comes now would be overdue.
            self._arm(min(limit_s - silent_s, timeouts.inter_token_s, self._end_s - now))
            return
        self.dispose()
        if not self.result.done():
            if now >= self._end_s:
                error = _out_of_time(timeouts)
            else:
                what = "no output" if phase == "first_token" else "no further output"
                error = EngineTimeoutError(f"{what} within {limit_s:g} s", phase)
            self.result.set_exception(error)
        self.connection.abandon(self)
