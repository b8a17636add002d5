"""A network between two programs that becomes slow, breaks, or swallows what is sent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

UP, DOWN = "up", "down"
"""The directions: to whom the proxy leads, and back."""

_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class FaultProxy:
    """Passes TCP on, as well or badly as it is told.

    Args:
        target: Host and port that it leads to.

    Attributes:
        address: Where it listens.
        latency_s: Every piece is held back for so long, in either direction.
        bytes_per_s: The pace of what it leads back; ``None``: as fast as it comes.
        refusing: New connections are reset.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = {UP: asyncio.Event(), DOWN: asyncio.Event()}
        self.address = ""
        self.latency_s = 0.0
        self.bytes_per_s: float | None = None
        self.refusing = False
        for event in self._flowing.values():
            event.set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def swallow(self, *directions: str) -> None:
        """Let nothing through in these directions, by default in both; no end is told either.

        As behind a firewall that drops: senders see their bytes accepted and nothing come of it.
        """
        for direction in directions or (UP, DOWN):
            self._flowing[direction].clear()

    def heal(self) -> None:
        """Let everything through again, and first what was kept."""
        self.latency_s, self.bytes_per_s, self.refusing = 0.0, None, False
        for event in self._flowing.values():
            event.set()

    def reset(self) -> None:
        """Break every connection with RST."""
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        """End."""
        self.reset()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self.refusing:
            self.reset()
            return
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(upstream_writer)
        for source, sink, direction in ((reader, upstream_writer, UP), (upstream_reader, writer, DOWN)):
            task = asyncio.create_task(self._pass_on(source, sink, direction))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: str
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                await self._flowing[direction].wait()
                while data and direction == DOWN and self.bytes_per_s is not None:
                    sink.write(data[:1])
                    data = data[1:]
                    await sink.drain()
                    await asyncio.sleep(1.0 / self.bytes_per_s)
                sink.write(data)
                await sink.drain()
        await self._flowing[direction].wait()
        self._writers.discard(sink)
        sink.close()


@contextlib.asynccontextmanager
async def fault_proxy(target: str) -> AsyncIterator[FaultProxy]:
    """Run a proxy to ``target``."""
    proxy = FaultProxy(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
