"""Notices at once that a process has gone: its end closes an idle connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_REARM_S = 1.0


class Tripwire:
    """Holds an idle connection to a server and tells when it closes.

    A closed connection proves nothing, a proxy may have been bored: it only says
    that it is worth looking at once instead of at the next interval.

    Args:
        host: Of the server.
        port: Of the server.
        tripped: Called, in the event loop, when the connection closes.
    """

    def __init__(self, host: str, port: int, tripped: Callable[[], None]) -> None:
        self._host = host
        self._port = port
        self._tripped = tripped
        self._transport: asyncio.Transport | None = None
        self._rearm_s = 0.0

    async def arm(self, now_s: float, timeout_s: float) -> None:
        """Connect, unless connected. Fails silently: without it, intervals decide.

        Args:
            now_s: On a monotonic clock.
            timeout_s: For connecting.
        """
        if now_s < self._rearm_s or (self._transport is not None and not self._transport.is_closing()):
            return
        # A server that closes at once must not make us look without end.
        self._rearm_s = now_s + _REARM_S
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                transport, _ = await loop.create_connection(lambda: _Wire(self._lost), self._host, self._port)
        except (OSError, TimeoutError):
            return
        self._transport = transport

    def disarm(self) -> None:
        """Close without telling."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def _lost(self) -> None:
        if self._transport is not None:
            self._transport = None
            self._tripped()


class _Wire(asyncio.Protocol):
    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost

    def eof_received(self) -> bool:
        return False  # Close our side too.

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()
