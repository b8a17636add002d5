"""Connections to an HTTP/1.1 server, kept alive in a pool: raw protocols without tasks of their own.

A response is decoded inside the transport's read callback and handed to an
:class:`HttpExchange`, so a streamed token wakes no task.
"""

from __future__ import annotations

import abc
import asyncio
import os
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from sagecp.core.engine_address import why_no_engine
from sagecp.runtime.engines.http1_wire import (
    BodyDecoder,
    BodySink,
    HeadReader,
    HttpError,
    HttpLimits,
    ResponseHead,
    make_body_decoder,
)

T = TypeVar("T")

READ_BUFFER_BYTES = 64 << 10
# Bodies up to this size are joined with the head, to leave in one segment.
_JOINED_BODY_BYTES = 64 << 10
# Sockets that are closed at once report it in the loop's next turn.
_CLOSE_TIMEOUT_S = 1.0


class HttpConnectError(HttpError):
    """No connection could be opened."""


class HttpDisconnectedError(HttpError):
    """The connection ended before the response did.

    Attributes:
        response_started: Whether any byte of the response had come.
    """

    def __init__(self, message: str, *, response_started: bool) -> None:
        super().__init__(message)
        self.response_started = response_started


class _ReadBuffer(threading.local):
    """The memory that sockets are read into: one for all connections of a thread.

    A transport asks for the buffer, fills it and reports it within one
    callback, and the report copies what it keeps, so it is never in use twice.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_BUFFER_BYTES))


_READ_BUFFER = _ReadBuffer()


class HttpExchange(abc.ABC, Generic[T]):
    """One request's response, taken in as it arrives.

    The methods are called from read callbacks, in the order head, body pieces
    and reads, then either the end or a failure. An exception that one of them
    (or the body sink) raises ends the exchange: the connection is closed and
    the exception is passed to :meth:`on_failure`.

    Attributes:
        unanswered: Head and body of the request, while it may have to be sent once more;
            a streamed response may take minutes, and a body may be large.
    """

    __slots__ = ("connection", "result", "unanswered")

    def __init__(self) -> None:
        self.result: asyncio.Future[T]
        self.connection: HttpConnection
        self.unanswered: tuple[bytes, bytes] | None = None

    def begin(self, connection: HttpConnection) -> asyncio.Future[T]:
        """Return the future of the result; called just before the request is written."""
        self.connection = connection
        self.result = connection.loop.create_future()
        return self.result

    @abc.abstractmethod
    def on_head(self, head: ResponseHead) -> BodySink:
        """Take the head; return what takes the body."""

    def on_read(self) -> None:
        """Everything found in one read of the socket has been handed over."""

    @abc.abstractmethod
    def on_end(self) -> None:
        """The response is complete."""

    def on_failure(self, error: Exception) -> None:
        """The response will not be complete."""
        if not self.result.done():
            self.result.set_exception(error)

    def dispose(self) -> None:
        """The caller has the result, or has gone away: release timers."""


class HttpConnection(asyncio.BufferedProtocol):
    """One connection; carries one exchange at a time.

    Attributes:
        loop: The event loop it belongs to.
        idle_since_s: When it was last put back into the pool, in loop time.
    """

    __slots__ = (
        "_decoder",
        "_exchange",
        "_head_reader",
        "_keeps_connection",
        "_linger_timer",
        "_pool",
        "_response_started",
        "_sink",
        "_transport",
        "_view",
        "idle_since_s",
        "loop",
    )

    _sink: BodySink

    def __init__(self, pool: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.idle_since_s = 0.0
        self._pool = pool
        self._view = _READ_BUFFER.view
        self._transport: asyncio.Transport | None = None
        self._exchange: HttpExchange[Any] | None = None
        self._head_reader: HeadReader | None = None
        self._decoder: BodyDecoder | None = None
        self._keeps_connection = False
        self._response_started = False
        self._linger_timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request can be written."""
        return self._transport is not None and not self._transport.is_closing()

    def why_no_engine(self) -> str:
        """Return why the other end cannot be an engine, whatever its name; ``""``: it can.

        By the address that was reached: to look a name up beforehand would not say what it
        stands for a moment later.
        """
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        if not isinstance(peer, tuple):
            return ""
        why = why_no_engine(peer[0])
        return f"stands for {peer[0]}, which {why}" if why else ""

    def start(self, exchange: HttpExchange[Any], head: bytes, body: bytes) -> None:
        """Write a request whose response goes to the exchange."""
        transport = self._transport
        assert transport is not None  # noqa: S101 - the pool hands out open connections only
        self._exchange = exchange
        self._head_reader = HeadReader(self._pool.limits.max_head_bytes)
        self._decoder = None
        self._response_started = False
        if len(body) <= _JOINED_BODY_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def abandon(self, exchange: HttpExchange[Any]) -> None:
        """Close the connection at once if the exchange is still using it."""
        if self._exchange is exchange and self._linger_timer is None:
            self._exchange = None
            self.abort()

    def linger(self, timeout_s: float) -> None:
        """Keep the connection for a result that is known already, in case its message ends soon."""
        if self._exchange is not None and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(timeout_s, self.abort)

    def abort(self) -> None:
        """Close at once, without sending what is still buffered."""
        self._stop_lingering()
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    # From here on: called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, and turn off delayed sending."""
        self._transport = cast("asyncio.Transport", transport)  # By duck typing only, under uvloop.
        connected_socket = transport.get_extra_info("socket")
        if connected_socket is not None and connected_socket.family in {socket.AF_INET, socket.AF_INET6}:
            connected_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next read goes."""
        del sizehint
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Decode what was read."""
        exchange = self._exchange
        if exchange is None:
            # Nothing was asked: whatever this is, the next response would be read wrongly.
            self.abort()
            return
        data = bytes(self._view[:nbytes])
        try:
            decoder = self._decoder
            if decoder is None:
                self._response_started = True
                exchange.unanswered = None
                assert self._head_reader is not None  # noqa: S101 - made with the exchange
                found = self._head_reader.feed(data)
                if found is None:
                    return
                self._head_reader = None
                head, data, position = found
                decoder = self._decoder = make_body_decoder(head, self._pool.limits)
                self._keeps_connection = head.keeps_connection
                self._sink = exchange.on_head(head)
                end = decoder.feed(data, position, self._sink)
            else:
                end = decoder.feed(data, 0, self._sink)
            exchange.on_read()
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits the exchange
            self._fail(error)
            return
        if end >= 0:
            self._finish(reusable=self._keeps_connection and end == len(data))

    def eof_received(self) -> None:
        """The server closed its side: nothing more will come, so close ours."""
        self._lose(None)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._lose(exc)
        self._stop_lingering()
        self._pool.forget(self)
        self._transport = None
        self._pool.note_lost(self)

    def _finish(self, *, reusable: bool) -> None:
        exchange, self._exchange = self._exchange, None
        self._stop_lingering()
        transport = self._transport
        # A server may answer before it has read everything; the rest of the
        # request must not be taken for the next one.
        if reusable and transport is not None and transport.get_write_buffer_size() == 0:
            self._pool.release(self)
        else:
            self.abort()
        if exchange is not None:
            _end(exchange)

    def _fail(self, error: Exception) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.on_failure(error)

    def _lose(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if exc is None and self._decoder is not None and self._decoder.ends_with_connection:
            _end(exchange)
            return
        when = "in the middle of its answer" if self._response_started else "before it answered"
        how = "closed" if exc is None else "broke"
        exchange.on_failure(
            HttpDisconnectedError(f"the connection {how} {when}", response_started=self._response_started)
        )

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None


def _end(exchange: HttpExchange[Any]) -> None:
    """Report the end; an exchange that cannot take it has failed, and its caller must hear of it."""
    try:
        exchange.on_end()
    except Exception as error:  # noqa: BLE001 - handed to whoever awaits the exchange
        exchange.on_failure(error)


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How many connections are kept, and for how long.

    Attributes:
        max_idle_count: Most idle connections.
        idle_timeout_s: When an idle one is closed. Below the 5 s after which
            vLLM's HTTP server closes it, so that requests rarely meet a
            connection that is just going away.
    """

    max_idle_count: int = 256
    idle_timeout_s: float = 4.0


class ConnectionPool:
    """Connections to one server. Used from one event loop.

    Args:
        host: Name or address.
        port: TCP port.
        ssl_context: For TLS, else ``None``.
        limits: Bounds on responses.
        options: What is kept.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ssl_context: ssl.SSLContext | None,
        limits: HttpLimits,
        options: PoolOptions,
    ) -> None:
        self.limits = limits
        self._host = host
        self._port = port
        self._ssl_context = ssl_context
        self._options = options
        self._idle: list[HttpConnection] = []  # Most recently used last.
        self._open: set[HttpConnection] = set()
        self._connecting_count = 0
        self._closing: set[HttpConnection] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._all_lost: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def open_count(self) -> int:
        """Connections that are open or being opened."""
        return len(self._open) + self._connecting_count

    @property
    def idle_count(self) -> int:
        """Open connections that no exchange uses."""
        return len(self._idle)

    def take_idle(self) -> HttpConnection | None:
        """Return the most recently used idle connection, or ``None``."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def connect(self, timeout_s: float) -> HttpConnection:
        """Open a connection.

        Raises:
            HttpConnectError: Refused, unknown name, TLS failure, or not in time.
        """
        where = f"{self._host}:{self._port}"
        if self._closed:
            raise HttpConnectError(f"the client for {where} is closed")
        loop = asyncio.get_running_loop()
        self._connecting_count += 1
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: HttpConnection(self, loop), self._host, self._port, ssl=self._ssl_context
                )
        except TimeoutError:
            raise HttpConnectError(f"no connection to {where} within {timeout_s:g} s") from None
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or "handshake failed"
            raise HttpConnectError(f"no TLS connection to {where}: {reason}") from error
        except OSError as error:
            # Event loops word their errors differently; the system's words are the same everywhere.
            number = error.errno or 0
            reason = os.strerror(number) if number > 0 else error.strerror or str(error)
            raise HttpConnectError(f"no connection to {where}: {reason}") from error
        except UnicodeError as error:
            raise HttpConnectError(f"{self._host!r} is no host name") from error
        finally:
            self._connecting_count -= 1
        if self._closed:
            connection.abort()
            raise HttpConnectError(f"the client for {where} is closed")
        why = connection.why_no_engine()
        if why:
            connection.abort()
            raise HttpConnectError(f"{where} {why}")
        if not connection.is_open:
            raise HttpConnectError(f"{where} closed the connection as soon as it was open")
        self._open.add(connection)
        return connection

    def release(self, connection: HttpConnection) -> None:
        """Take back a connection whose response is complete."""
        if self._closed or len(self._idle) >= self._options.max_idle_count:
            connection.abort()
            return
        connection.idle_since_s = connection.loop.time()
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._sweep_timer = connection.loop.call_later(
                self._options.idle_timeout_s, self._sweep, connection.loop
            )

    def forget(self, connection: HttpConnection) -> None:
        """A connection is being closed; it is not handed out again."""
        if connection in self._open:
            self._open.remove(connection)
            self._closing.add(connection)
            if connection in self._idle:
                self._idle.remove(connection)

    def note_lost(self, connection: HttpConnection) -> None:
        """A connection's socket is closed."""
        self._closing.discard(connection)
        if self._all_lost is not None and not self._closing and not self._all_lost.done():
            self._all_lost.set_result(None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close connections that were idle for too long; one timer for all of them."""
        self._sweep_timer = None
        limit_s = loop.time() - self._options.idle_timeout_s
        for connection in [known for known in self._idle if known.idle_since_s <= limit_s]:
            connection.abort()
        if self._idle:
            wait_s = self._idle[0].idle_since_s - limit_s
            self._sweep_timer = loop.call_later(max(wait_s, 0.01), self._sweep, loop)

    async def close(self) -> None:
        """Close every connection and wait until they are gone. Idempotent."""
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for connection in list(self._open):
            connection.abort()
        if self._closing:
            if self._all_lost is None or self._all_lost.done():
                self._all_lost = asyncio.get_running_loop().create_future()
            # Bounded, and without cancelling the future: several may wait for it.
            await asyncio.wait({self._all_lost}, timeout=_CLOSE_TIMEOUT_S)
