"""Finds readers that take nothing, and detaches them: a stalled reader must not become a memory leak.

A write to a stream whose reader does not read waits, in gRPC's flow control,
and so does the message. Readers note which message they are writing, which
costs the token path two assignments. One task looks at all of them once in a
while: one that is still at the same message stalls.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any

from google.protobuf.message import Message

from sagecp.core.errors import ReaderStalledError

logger = logging.getLogger(__name__)

# Looks per stall timeout: a reader is found at most this part of the timeout late.
_LOOKS_PER_TIMEOUT = 8
_LONGEST_PAUSE_S = 1.0


class Reader:
    """One stream that somebody should read, to be used as a context manager by the task that writes it.

    Leaving the context raises `ReaderStalledError` if the task was cancelled for that.

    Attributes:
        message: What is being written; ``None``: nothing.
    """

    __slots__ = ("_seen", "_since_s", "_size_bytes", "_stalled", "_task", "_watch", "message")

    def __init__(self, watch: ReaderWatch) -> None:
        self._watch = watch
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self.message: Message | None = None
        # The message of the last look. Kept, so that another cannot be taken for it.
        self._seen: Message | None = None
        self._since_s = 0.0
        self._size_bytes = 0
        self._stalled = ""

    def __enter__(self) -> Reader:
        self._watch.readers.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.readers.discard(self)
        # A caller that left at the same time has cancelled once more, and needs no answer.
        if self._stalled and isinstance(error, asyncio.CancelledError) and not self._uncancel():
            raise ReaderStalledError(
                f"the stream was closed because {self._stalled}; "
                "unless leaving cancels the request, go on with Stream from the last token received"
            ) from None

    def _uncancel(self) -> int:
        return self._task.uncancel() if self._task is not None else 0

    def blocked_bytes(self, now: float) -> int:
        """Return how much waits for the reader since the last look or longer; 0: it does not stall."""
        message = self.message
        if message is None or message is not self._seen:
            self._seen, self._since_s, self._size_bytes = message, now, 0
            return 0
        if not self._size_bytes:
            self._size_bytes = message.ByteSize()
        return self._size_bytes

    @property
    def since_s(self) -> float:
        """When the present message was first seen waiting."""
        return self._since_s

    def detach(self, why: str) -> None:
        """End the stream; the task gets to know why."""
        if self._task is not None and not self._stalled:
            self._stalled = why
            self._task.cancel()


class ReaderWatch:
    """Looks after every stream of a server.

    Args:
        stall_timeout_s: A reader that takes nothing for longer is detached.
        max_unread_bytes: When messages that wait for stalled readers hold more than this
            together, those that have stalled longest are detached at once.

    Attributes:
        readers: All that are open.
        detached_count: How many were detached so far.
    """

    def __init__(self, stall_timeout_s: float, max_unread_bytes: int) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._max_unread_bytes = max_unread_bytes
        self.readers: set[Reader] = set()
        self.detached_count = 0

    def reading(self) -> Reader:
        """Return a reader for the current task."""
        return Reader(self)

    async def run(self) -> None:
        """Look until cancelled."""
        pause_s = min(_LONGEST_PAUSE_S, self._stall_timeout_s / _LOOKS_PER_TIMEOUT)
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        watched_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            now = loop.time()
            # A server that stood still for a while has kept its readers waiting, not they it.
            watched_s += min(now - last_s, 2.0 * pause_s)
            last_s = now
            self.look(watched_s)

    def look(self, now: float) -> None:
        """Detach readers that stall for too long, or hold too much together.

        Args:
            now: Seconds of watching, never fewer than before.
        """
        unread_bytes = 0
        blocked: list[tuple[Reader, int]] = []
        for reader in self.readers:
            size_bytes = reader.blocked_bytes(now)
            if not size_bytes:
                continue
            if now - reader.since_s >= self._stall_timeout_s:
                self._detach(reader, f"nothing was read from it for {self._stall_timeout_s:g} s")
            else:
                unread_bytes += size_bytes
                blocked.append((reader, size_bytes))
        if unread_bytes <= self._max_unread_bytes:
            return
        blocked.sort(key=lambda entry: entry[0].since_s)
        why = f"readers that stall left more than {self._max_unread_bytes} bytes unread in all"
        for reader, size_bytes in blocked:
            self._detach(reader, why)
            unread_bytes -= size_bytes
            if unread_bytes <= self._max_unread_bytes:
                return

    def _detach(self, reader: Reader, why: str) -> None:
        self.detached_count += 1
        reader.detach(why)
        logger.info("stalled reader detached", extra={"why": why, "detached_count": self.detached_count})
