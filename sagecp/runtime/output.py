"""The output of one request: an append-only log that any number of readers follow."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence

from sagecp.core.errors import TokenIndexOutOfRangeError
from sagecp.runtime.engines.base import EngineDelta

# What a piece of output costs in memory beside its text: the object, its list
# entries and one token id.
_BYTES_PER_DELTA = 240


class OutputLog:
    """Everything a request has produced so far.

    The engine client appends from its read callback; readers hold a cursor and
    take whatever is there when they get to run. So chunks that are already
    waiting are coalesced, a slow reader costs nothing beyond the log itself,
    and a late or second reader starts where it likes.

    Attributes:
        deltas: The pieces, in order.
        token_count: Tokens so far; the index of the next one.
        epoch: Attempt that produces the output.
        size_bytes: Roughly what the log holds in memory.
        closed: Whether nothing follows.
    """

    __slots__ = (
        "_first_indexes",
        "_on_first",
        "_waiters",
        "closed",
        "deltas",
        "epoch",
        "reader_count",
        "size_bytes",
        "token_count",
    )

    def __init__(self, on_first: Callable[[], None]) -> None:
        """Make an empty log; ``on_first`` is called once per epoch, at its first output."""
        self.deltas: list[EngineDelta] = []
        self._first_indexes: list[int] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._on_first: Callable[[], None] | None = on_first
        self.token_count = 0
        self.epoch = 0
        self.size_bytes = 0
        self.reader_count = 0
        self.closed = False

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Append pieces of output; late ones, after the end, are dropped."""
        if self.closed:
            return
        first_indexes = self._first_indexes
        count = self.token_count
        size_bytes = self.size_bytes
        for delta in deltas:
            first_indexes.append(count)
            count += delta.token_count
            size_bytes += _BYTES_PER_DELTA + len(delta.text)
            if delta.raw is not None:
                size_bytes += len(delta.raw)
        self.size_bytes = size_bytes
        self.deltas.extend(deltas)
        self.token_count = count
        if self._on_first is not None:
            on_first, self._on_first = self._on_first, None
            on_first()
        self._wake()

    def close(self) -> None:
        """Say that nothing follows."""
        self.closed = True
        self._on_first = None
        self._wake()

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def first_index(self, cursor: int) -> int:
        """Return the index of the first token at a cursor (a position in :attr:`deltas`)."""
        return self._first_indexes[cursor] if cursor < len(self._first_indexes) else self.token_count

    def seek(self, token_index: int) -> int:
        """Return the cursor of the piece that holds a token, or of the end.

        Raises:
            TokenIndexOutOfRangeError: The index is beyond the next token.
        """
        if token_index > self.token_count:
            raise TokenIndexOutOfRangeError(
                f"token index {token_index} is ahead of the stream, "
                f"which has {self.token_count} tokens so far; ask for at most {self.token_count}"
            )
        if token_index == 0:
            return 0
        if token_index == self.token_count:
            # The reader has every token. Whether it has what came after them (a finish
            # reason) cannot be told; saying that again does no harm, repeating text would.
            cursor = len(self.deltas)
            while cursor and not self.deltas[cursor - 1].token_count and not self.deltas[cursor - 1].text:
                cursor -= 1
            return cursor
        return bisect_right(self._first_indexes, token_index) - 1

    async def wait_beyond(self, cursor: int) -> None:
        """Return when there is output at the cursor, or the log is closed."""
        while len(self.deltas) <= cursor and not self.closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                raise
