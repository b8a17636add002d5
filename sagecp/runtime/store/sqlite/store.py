"""The store as the event loop sees it: hands records to the writer's thread, and bounds what waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import StoreError, StoreStatus, Written
from sagecp.runtime.store.codec import approximate_byte_count
from sagecp.runtime.store.memory import without_output
from sagecp.runtime.store.records import (
    OutputProduced,
    PromptTokenized,
    Record,
    RequestAccepted,
    RequestEnded,
)
from sagecp.runtime.store.sqlite.archive_table import archive_key, find_ended
from sagecp.runtime.store.sqlite.database import open_reader, translated_errors
from sagecp.runtime.store.sqlite.side_files import side_file
from sagecp.runtime.store.sqlite.writer import (
    RETRY_INTERVAL_S,
    JournalWriter,
    Outcome,
    Waiting,
    answer,
)


class SqliteStore:
    """A journal in a SQLite file. Implements :class:`sagecp.runtime.store.base.Store`.

    What waits is bounded by ``max_pending_bytes``: beyond it new requests are
    refused; beyond twice that, output is not written any more (a request whose
    output was left out once has none written until it ends). What is left is
    small and bounded by the number of accepted requests.
    """

    def __init__(
        self, path: Path, config: JournalConfig | None = None, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Set up; nothing is opened yet.

        Args:
            path: The file; its folder is made when it is missing.
            config: Bounds.
            wall_clock: Unix seconds, for what is kept for a time.
        """
        self._path = path
        self._config = config or JournalConfig()
        self._wall_clock = wall_clock
        self._writer: JournalWriter | None = None
        self._closing: asyncio.Future[None] | None = None
        self._keys: set[int] = set()
        # Given, and not in the archive yet.
        self._pending_ended: dict[tuple[str, str], RequestEnded] = {}
        self._next: list[Waiting] = []
        self._pending_count = self._pending_bytes = 0
        self._without_output: set[str] = set()
        self._state = Outcome()
        # One thread: its connection is made in it, at the first read.
        self._readers = ThreadPoolExecutor(1, "journal-reader")
        self._reader: apsw.Connection | None = None

    async def open(self) -> Sequence[Record]:
        """Open, check everything, and return what is live; see the port."""
        if self._writer is not None:
            raise RuntimeError("the store was opened before")
        self._loop = asyncio.get_running_loop()
        self._writer = JournalWriter(self._path, self._config, self._wall_clock, self._take_note)
        file = await self._writer.start()
        self._keys = file.archive.keys
        records, file.records = file.records, ()
        return records

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        """Have a record written; see the port."""
        if self._writer is None:
            raise RuntimeError("the store is not open")
        if self._closing is not None:
            self._answer_soon(then, StoreError("the journal is closed"))
            return
        byte_count = approximate_byte_count(record)
        if isinstance(record, RequestAccepted):
            refusal = self._refusal(byte_count)
            if refusal is not None:
                self._answer_soon(then, refusal)
                return
            self._without_output.discard(record.request_id)
        elif self._is_left_out(record):
            self._answer_soon(then, None)
            return
        elif isinstance(record, RequestEnded):
            self._without_output.discard(record.request_id)
            if self._pending_bytes > 2 * self._config.max_pending_bytes and record.pieces:
                record = without_output(record)
                byte_count = approximate_byte_count(record)
            self._pending_ended[record.tenant_id, record.request_id] = record
        self._give(Waiting(record, sync, then, byte_count))

    def _give(self, waiting: Waiting) -> None:
        self._pending_count += 1
        self._pending_bytes += waiting.byte_count
        if not self._next:
            # Once for everything that this turn of the loop gives.
            self._loop.call_soon(self._hand_over)
        self._next.append(waiting)

    def _hand_over(self) -> None:
        if self._next and self._writer is not None:
            self._writer.give(self._next)
            self._next = []

    def _answer_soon(self, then: Written | None, error: StoreError | None) -> None:
        if then is not None:
            self._loop.call_soon(then, error)

    def _refusal(self, byte_count: int) -> StoreError | None:
        if self._state.trouble:
            retry_after_s = None if self._state.is_final else RETRY_INTERVAL_S
            return StoreError(self._state.trouble, retry_after_s=retry_after_s)
        if self._pending_bytes + byte_count > self._config.max_pending_bytes:
            return StoreError(
                f"the journal is behind: {self._pending_bytes >> 20} MiB wait to be written; "
                "try again in a moment",
                retry_after_s=RETRY_INTERVAL_S,
            )
        return None

    def _is_left_out(self, record: Record) -> bool:
        if not isinstance(record, OutputProduced | PromptTokenized):
            return False
        if record.request_id in self._without_output:
            return True
        if self._pending_bytes <= 2 * self._config.max_pending_bytes:
            return False
        # Whatever follows would leave a gap.
        self._without_output.add(record.request_id)
        return True

    def _take_note(self, outcome: Outcome) -> None:
        """Called with what became of a batch."""
        self._state = outcome
        for waiting in outcome.released:
            self._pending_count -= 1
            self._pending_bytes -= waiting.byte_count
            record = waiting.record
            if isinstance(record, RequestEnded):
                key = (record.tenant_id, record.request_id)
                if self._pending_ended.get(key) is record:
                    del self._pending_ended[key]
        answer(outcome.answers)

    def may_have_ended(self, tenant_id: str, request_id: str) -> bool:
        """Whether an ended request under this id may be kept; ``False`` is certain."""
        return (tenant_id, request_id) in self._pending_ended or (
            archive_key(tenant_id, request_id) in self._keys
        )

    async def find_ended(self, tenant_id: str, request_id: str) -> RequestEnded | None:
        """Return an ended request that is kept; see the port. Reads beside the writer, never behind it."""
        pending = self._pending_ended.get((tenant_id, request_id))
        if pending is not None:
            return pending
        if not self.may_have_ended(tenant_id, request_id):
            return None
        if self._closing is not None:
            raise StoreError("the journal is closed")
        return await self._loop.run_in_executor(self._readers, self._read_ended, tenant_id, request_id)

    def _read_ended(self, tenant_id: str, request_id: str) -> RequestEnded | None:
        if self._reader is None:
            with translated_errors(self._path):
                self._reader = open_reader(self._path)
        return find_ended(self._reader, self._path, tenant_id, request_id)

    def status(self) -> StoreStatus:
        """Return how the store does."""
        is_open = self._writer is not None and self._closing is None
        size_bytes = 0
        for path in (self._path, side_file(self._path, "-wal")):
            with contextlib.suppress(OSError):
                size_bytes += path.stat().st_size
        return StoreStatus(
            accepting=is_open and self._refusal(0) is None,
            trouble=self._state.trouble if is_open else "the store is not open",
            pending_count=self._pending_count,
            pending_bytes=self._pending_bytes,
            written_count=self._state.written_count,
            commit_count=self._state.commit_count,
            commit_s=self._state.commit_s,
            size_bytes=size_bytes,
        )

    async def flush(self) -> None:
        """Return when everything given so far is synced.

        Raises:
            StoreError: It cannot be, for now.
        """
        if self._writer is None or self._closing is not None:
            return
        synced: asyncio.Future[None] = self._loop.create_future()

        def settle(error: StoreError | None) -> None:
            if synced.done():
                return
            if error is None:
                synced.set_result(None)
            else:
                synced.set_exception(error)

        self._give(Waiting(None, True, settle, 0))
        await synced

    async def close(self) -> None:
        """Write what waits, and let go of everything. Idempotent."""
        if self._closing is not None:
            await asyncio.shield(self._closing)
            return
        self._closing = asyncio.get_running_loop().create_future()
        try:
            if self._writer is not None:
                await self._loop.run_in_executor(self._readers, self._close_reader)
                self._hand_over()
                await self._writer.stop()
            self._readers.shutdown(wait=False)
        finally:
            self._closing.set_result(None)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
