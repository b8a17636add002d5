"""A small HTTP/1.1 client for engines.

Redirects, proxies, cookies and compression do not exist here on purpose: an
engine's address is configuration, and anything that leads elsewhere is a fault.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from sagecp.runtime.engines.http1_connection import (
    ConnectionPool,
    HttpConnection,
    HttpDisconnectedError,
    HttpExchange,
    PoolOptions,
)
from sagecp.runtime.engines.http1_wire import (
    BodySink,
    HttpError,
    HttpLimits,
    HttpProtocolError,
    ResponseHead,
    encode_request_head,
)

T = TypeVar("T")


@functools.cache
def _default_ssl_context() -> ssl.SSLContext:
    """Return the context that trusts what the system trusts; loading that takes tens of milliseconds."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class HttpTimeoutError(HttpError):
    """No complete response in time."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A collected response."""

    head: ResponseHead
    body: bytes = field(repr=False)

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.head.status

    def json(self) -> Any:  # noqa: ANN401 - JSON is any of several types
        """Return the decoded body.

        Raises:
            HttpProtocolError: It is not JSON.
        """
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise HttpProtocolError(f"the answer (HTTP {self.status}) is not JSON") from None


class BodyCollector:
    """A body sink that keeps everything, up to a bound."""

    __slots__ = ("_max_bytes", "body")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.body = bytearray()

    def feed(self, data: bytes, start: int, stop: int) -> None:
        """Keep ``data[start:stop]``.

        Raises:
            HttpProtocolError: The bound is exceeded; what fits is kept.
        """
        room_bytes = self._max_bytes - len(self.body)
        self.body += data[start : min(stop, start + room_bytes)]
        if stop - start > room_bytes:
            raise HttpProtocolError(f"the answer exceeds {self._max_bytes} bytes")


class _CollectingExchange(HttpExchange[HttpResponse]):
    """Collects a whole response."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._collector = BodyCollector(max_bytes)
        self._head: ResponseHead | None = None

    def on_head(self, head: ResponseHead) -> BodySink:
        self._head = head
        return self._collector.feed

    def on_end(self) -> None:
        assert self._head is not None  # noqa: S101 - no end without a head
        if not self.result.done():
            self.result.set_result(HttpResponse(self._head, bytes(self._collector.body)))


class HttpClient:
    """Speaks HTTP/1.1 to one server, over pooled connections.

    Args:
        base_url: ``http://host:port`` or ``https://host:port``, with an optional path prefix.
        headers: Sent with every request.
        ssl_context: For https; default: the system's trusted certificates.
        limits: Bounds on responses.
        options: How many connections are kept.

    Raises:
        ValueError: The URL or a header is not usable; the message says why.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        limits: HttpLimits | None = None,
        options: PoolOptions | None = None,
    ) -> None:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError as error:
            raise ValueError(f"engine URL {base_url!r} is not valid: {error}") from None
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError(f"engine URL {base_url!r} must look like http://host:port")
        if url.username is not None or url.query or url.fragment:
            raise ValueError("an engine URL takes no credentials, query or fragment; use the API key setting")
        if not base_url.isascii() or not base_url.isprintable() or " " in base_url:
            raise ValueError(f"engine URL {base_url!r} holds characters that a URL cannot have")
        secure = url.scheme == "https"
        self.limits = limits or HttpLimits()
        self._host_header = url.netloc
        self._prefix = url.path.rstrip("/")
        self._headers = dict(headers or {})
        encode_request_head("GET", "/", self._host_header, self._headers, None)
        if secure and ssl_context is None:
            ssl_context = _default_ssl_context()
        self.pool = ConnectionPool(
            url.hostname,
            port if port is not None else (443 if secure else 80),
            ssl_context if secure else None,
            self.limits,
            options or PoolOptions(),
        )

    async def perform(
        self,
        exchange: HttpExchange[T],
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        connect_timeout_s: float,
    ) -> T:
        """Send a request and return what the exchange makes of the response.

        A kept-alive connection that turns out to be closed before any byte of
        the response is replaced by a fresh one, once. A fresh one is not.
        Cancelling closes the connection at once.

        Raises:
            HttpError: The exchange did not complete.
            ValueError: A header is not valid.
        """
        request_head = encode_request_head(
            method,
            self._prefix + path,
            self._host_header,
            {**self._headers, **headers} if headers else self._headers,
            None if body is None else len(body),
        )
        exchange.unanswered = request_head, body or b""
        # The exchange lets go of them when they are not needed any more; this must not hold them.
        del request_head, headers, body
        connection = self.pool.take_idle()
        if connection is not None:
            try:
                return await _run(connection, exchange)
            except HttpDisconnectedError as error:
                if error.response_started:
                    raise
        connection = await self.pool.connect(connect_timeout_s)
        return await _run(connection, exchange)

    async def request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        max_body_bytes: int | None = None,
    ) -> HttpResponse:
        """Send a request and collect the response, whatever its status.

        Args:
            method: HTTP method other than HEAD and CONNECT.
            path: Appended to the base URL; starts with a slash.
            timeout_s: For everything, from the connection to the last byte.
            headers: Further headers.
            body: Sent with a Content-Length when given.
            max_body_bytes: Largest response body; default: the client's limit.

        Raises:
            HttpError: No complete, well-formed response in time.
        """
        exchange = _CollectingExchange(
            self.limits.max_body_bytes if max_body_bytes is None else max_body_bytes
        )
        try:
            async with asyncio.timeout(timeout_s):
                return await self.perform(
                    exchange, method, path, headers=headers, body=body, connect_timeout_s=timeout_s
                )
        except TimeoutError:
            raise HttpTimeoutError(f"no complete answer to {method} {path} within {timeout_s:g} s") from None

    async def get(self, path: str, *, timeout_s: float) -> HttpResponse:
        """Send a GET request; see :meth:`request`."""
        return await self.request("GET", path, timeout_s=timeout_s)

    async def request_json(
        self,
        method: str,
        path: str,
        value: Any = None,  # noqa: ANN401 - anything that JSON can hold
        *,
        timeout_s: float,
    ) -> HttpResponse:
        """Send a value as JSON (nothing when ``None``); read the answer with :meth:`HttpResponse.json`."""
        headers = {"Accept": "application/json"}
        body = None
        if value is not None:
            headers["Content-Type"] = "application/json"
            body = msgspec.json.encode(value)
        return await self.request(method, path, timeout_s=timeout_s, headers=headers, body=body)

    async def close(self) -> None:
        """Close every connection; exchanges in progress fail. Idempotent."""
        await self.pool.close()


async def _run(connection: HttpConnection, exchange: HttpExchange[T]) -> T:
    result = exchange.begin(connection)
    assert exchange.unanswered is not None  # noqa: S101 - no byte of a response has come
    connection.start(exchange, *exchange.unanswered)
    try:
        return await result
    finally:
        exchange.dispose()
        connection.abandon(exchange)
