"""The output of one request: an append-only log that any number of readers follow."""

from __future__ import annotations

import asyncio
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence

from sagecp.core.errors import TokenIndexOutOfRangeError
from sagecp.runtime.delta_log import LOOSE_BYTES, DeltaLog
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.store.codec import pack_token_ids


class OutputLog:
    """Everything a request has produced so far.

    The engine client appends from its read callback; readers hold a cursor and
    take whatever is there when they get to run. So chunks that are already
    waiting are coalesced, a slow reader costs nothing beyond the log itself,
    and a late or second reader starts where it likes.

    Attributes:
        deltas: The pieces, in order.
        prompt_token_ids: Ids of the prompt, once an engine told them; packed, four bytes each.
        token_count: Tokens so far; the index of the next one.
        epoch: Attempt that produces the output.
        gap: Why what follows the output here may contradict what a reader has; ``""``: it does not.
        size_bytes: Roughly what the log holds in memory.
        sealed: Whether nothing is taken any more.
        closed: Whether nothing follows, and readers may know.
    """

    __slots__ = (
        "_epoch_starts",
        "_first_indexes",
        "_on_first",
        "_on_first_due",
        "_waiters",
        "closed",
        "deltas",
        "epoch",
        "gap",
        "prompt_token_ids",
        "reader_count",
        "sealed",
        "size_bytes",
        "token_count",
    )

    def __init__(self, on_first: Callable[[], None]) -> None:
        """Make an empty log; ``on_first`` is called once per attempt, at its first output."""
        self.deltas = DeltaLog()
        self.prompt_token_ids = b""
        self.gap = ""
        self._first_indexes = array("I")
        self._waiters: list[asyncio.Future[None]] = []
        self._on_first: Callable[[], None] | None = on_first
        self._on_first_due = True
        # Cursors at which attempts began that found output there.
        self._epoch_starts: list[tuple[int, int]] = []
        self.token_count = 0
        self.epoch = 0
        self.size_bytes = 0
        self.reader_count = 0
        self.sealed = False
        self.closed = False

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Append pieces of output; late ones, after the end, are dropped."""
        if self.sealed:
            return
        first_indexes = self._first_indexes
        count = self.token_count
        size_bytes = self.size_bytes
        for delta in deltas:
            first_indexes.append(count)
            count += delta.token_count
            size_bytes += LOOSE_BYTES + len(delta.text)
            if delta.raw is not None:
                size_bytes += len(delta.raw)
        self.size_bytes = size_bytes - self.deltas.extend(deltas)
        self.token_count = count
        if self._on_first_due and self._on_first is not None:
            self._on_first_due = False
            self._on_first()
        self._wake()

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Take the prompt as the engine reads it."""
        if not self.prompt_token_ids and not self.closed:
            self.prompt_token_ids = pack_token_ids(token_ids)

    def begin_attempt(self, epoch: int) -> None:
        """Expect output of another attempt from now on."""
        self.epoch = epoch
        self._on_first_due = True
        if self.deltas:
            self._epoch_starts.append((len(self.deltas), epoch))
        elif epoch > 1:
            self._epoch_starts = [(0, epoch)]

    def preload(self, deltas: Sequence[EngineDelta], epoch: int) -> None:
        """Take output that an attempt produced before this log was made."""
        if not deltas:
            return
        self.begin_attempt(epoch)
        self._on_first_due = False
        self.on_deltas(deltas)

    def let_go(self, token_count: int) -> None:
        """Know how many tokens there were, and nothing else: the output is not kept any more."""
        self.token_count = token_count

    def attempt_at(self, cursor: int) -> tuple[int, int]:
        """Return which attempt produced the piece at a cursor, and the cursor at which the next one began.

        The latter is beyond every piece where there is no next one.
        """
        epoch = 1
        for start, later in self._epoch_starts:
            if start > cursor:
                return epoch, start
            epoch = later
        return epoch, sys.maxsize

    def token_ids(self) -> list[int] | None:
        """Return the ids of all tokens of the first choice, or ``None`` where one is not known."""
        ids: list[int] = []
        for delta in self.deltas:
            if delta.token_ids is not None:
                ids.extend(delta.token_ids)
            elif delta.token_count:
                return None
        return ids

    def finish_reason(self) -> str:
        """Return the finish reason that the output holds already, or ``""``."""
        for delta in reversed(self.deltas[-4:]):
            if delta.finish_reason:
                return delta.finish_reason
        return ""

    def stir(self) -> None:
        """Have every reader look again: there is news beside output."""
        self._wake()

    def seal(self) -> None:
        """Take nothing more: the request has ended with what is here, and readers will hear of it."""
        self.sealed = True

    def close(self) -> None:
        """Say that nothing follows."""
        self.sealed = self.closed = True
        # What leads back to the request's owner, and what only another attempt would need.
        self._on_first = None
        self.prompt_token_ids = b""
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
            TokenIndexOutOfRangeError: The index is beyond the next token, or the output is not kept any more.
        """
        if token_index > self.token_count:
            raise TokenIndexOutOfRangeError(
                f"token index {token_index} is ahead of the stream, "
                f"which has {self.token_count} tokens so far; ask for at most {self.token_count}"
            )
        if token_index < self.token_count and not self.deltas:
            raise TokenIndexOutOfRangeError(
                f"the output of the request is not kept any more; its {self.token_count} tokens have ended, "
                f"and only what follows them can be asked for, from index {self.token_count}"
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
        """Return when there is output at the cursor, the log is closed, or :meth:`stir` was called."""
        if len(self.deltas) <= cursor and not self.closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                raise
