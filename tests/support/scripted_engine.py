"""An engine that does exactly what a test says, byte for byte: a raw TCP server with a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"


class Request:
    """One request that arrived, and the means to answer it as badly as one likes."""

    def __init__(
        self, head: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        line, *lines = head.split("\r\n")
        self.method, self.path, _ = line.split(" ")
        self.headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in lines)}
        self.body = body
        self.connection_number = number
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Write each piece by itself."""
        for piece in pieces:
            if self.writer.transport.is_closing():
                raise ConnectionResetError  # What uvloop says differently.
            self.writer.write(piece)
            await self.writer.drain()

    async def send_events(self, *events: bytes) -> None:
        """Write each event as one chunk, as vLLM does."""
        await self.send(*(chunk(event) for event in events))

    async def stream(self, *events: bytes) -> None:
        """Answer with a whole, well-formed stream."""
        await self.send(SSE_HEAD)
        await self.send_events(*events)
        await self.send(b"0\r\n\r\n")

    async def answer(self, status: str, body: bytes, content_type: str = "application/json") -> None:
        """Answer with a whole, well-formed message of known length."""
        headers = f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        await self.send(f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body)

    async def disconnected(self) -> None:
        """Return when the client has closed its connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1 << 16):
                pass

    def close(self) -> None:
        """Close the connection in an orderly way."""
        self.writer.close()

    def reset(self) -> None:
        """Break the connection: the client sees a reset."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Request], Awaitable[None]]


class ScriptedEngine:
    """The server. Follows its scripts in turn, one for each request; the last one serves for the rest."""

    def __init__(self, scripts: Sequence[Script], scheme: str) -> None:
        self._scripts = list(scripts)
        self._scheme = scheme
        self._tasks: set[asyncio.Task[Any]] = set()
        self.requests: list[Request] = []
        self.connection_count = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        number = self.connection_count
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1")
                length = int((head.lower().partition("content-length: ")[2] or "0").partition("\r\n")[0])
                request = Request(head, await reader.readexactly(length), reader, writer, number)
                self.requests.append(request)
                script = self._scripts[min(len(self.requests), len(self._scripts)) - 1]
                await script(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            pass  # By stop(). The stream server would log a handler that ends as cancelled.
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def scripted_engine(
    *scripts: Script, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedEngine]:
    """Run an engine on a free port."""
    engine = ScriptedEngine(scripts, "https" if ssl_context else "http")
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, ssl=ssl_context)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        await engine.stop()


def chunk(data: bytes) -> bytes:
    """Return a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(value: Any) -> bytes:
    """Return an event with a JSON value."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str, finish_reason: str | None = None, index: int = 0, **fields: Any) -> bytes:
    """Return a completion's event with one choice."""
    return sse({"choices": [{"index": index, "text": text, "finish_reason": finish_reason, **fields}]})
