"""The address of a simulated engine: listening, or refusing for a while."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

_BACKLOG = 2048


class Listener:
    """Accepts connections on one address.

    Args:
        host: The address.
        port: 0 takes a free one.

    Raises:
        OSError: The address is in use or not this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._host = host
        # Bound at once: an address in use must fail before anything else exists.
        self._socket = socket.create_server((host, port), family=self._family, backlog=_BACKLOG)
        self._port: int = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._factory: Callable[[], asyncio.BaseProtocol] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

    async def open(self, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        """Accept connections."""
        self._factory = factory
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(factory, sock=self._socket, backlog=_BACKLOG)

    def close(self) -> None:
        """Accept no more connections, for good. Those that are open stay. Idempotent."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._opening is not None:
            self._opening.cancel()
        if self._server is not None:
            self._server.close()
        self._socket.close()

    def refuse(self, duration_s: float) -> None:
        """Refuse connections for so long from now, as if nothing ran here; 0 accepts them again."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        elif duration_s > 0 and self._server is not None:
            self._server.close()
            # Bound and deaf: it refuses, and nobody else can take the port.
            self._socket = socket.socket(self._family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((self._host, self._port))
        else:
            return
        self._again = asyncio.get_running_loop().call_later(duration_s, self._listen_again)

    def _listen_again(self) -> None:
        self._again = None
        assert self._factory is not None  # noqa: S101 - it was open before
        self._opening = asyncio.get_running_loop().create_task(self.open(self._factory))
