"""A journal that is open: checked from end to end, then written one transaction at a time.

Everything here runs in the writer's thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import msgspec

from sagecp.config import JournalConfig
from sagecp.runtime.failpoints import reach
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.codec import encode_pieces
from sagecp.runtime.store.records import Record, RequestEnded
from sagecp.runtime.store.sqlite.archive_table import ArchiveTable, EncodedEnd
from sagecp.runtime.store.sqlite.checking import replay_checked
from sagecp.runtime.store.sqlite.checksums import JournalRow
from sagecp.runtime.store.sqlite.database import (
    PAGE_SIZE_BYTES,
    corrupt,
    open_database,
    read_meta,
    translated_errors,
)
from sagecp.runtime.store.sqlite.journal_table import JournalTable
from sagecp.runtime.store.sqlite.side_files import FileLock, Mark, MarkFile, side_file, sync_folder
from sagecp.runtime.store.sqlite.wal_file import WalLog, read_wal

logger = logging.getLogger(__name__)

# The log is folded into the file once it has so many pages: it is read whole at
# a start, and a step of 4 MiB holds commits up for some 10 ms.
_CHECKPOINT_PAGE_COUNT = 512
# Old rows go once they take this much, and more than those that are needed.
_CLEANING_FROM_BYTES = 4 << 20
_CLEANED_ROW_COUNT = 64
_CLEANED_ROW_COUNT_MOST = 2048
_MOVED_BYTES = 256 << 10


@dataclass(slots=True)
class Batch:
    """What one transaction writes.

    Attributes:
        sync: Whether it is synced.
        rows: New rows of the journal.
        ended: Ended requests and their output as bytes, by the number of their row.
        unwritable: Records that cannot be encoded, and why; they are left out.
    """

    sync: bool = False
    rows: list[JournalRow] = field(default_factory=list)
    ended: dict[int, EncodedEnd] = field(default_factory=dict)
    unwritable: list[tuple[Record, str]] = field(default_factory=list)


class JournalFile:
    """The file, its log, its lock and its mark. See the module.

    Attributes:
        journal: The table of records.
        archive: The table of what has ended.
        records: What was live when it was opened.
    """

    def __init__(self, path: Path, config: JournalConfig, wall_clock: Callable[[], float]) -> None:
        """Open, check everything, and have it all synced.

        Raises:
            StoreCorruptError: It is damaged; names where.
            StoreError: It cannot be used, or another process uses it.
        """
        self._path = path
        self._wall_clock = wall_clock
        self._synchronous_full = True
        self._has_unsynced = False
        self._pages_at_checkpoint = 0
        self._journal_id = 0
        self._lock = FileLock(path)
        self._mark = MarkFile(path)
        self._connection: apsw.Connection | None = None
        with translated_errors(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            mark = self._mark.read()
            with translated_errors(path):
                log = read_wal(side_file(path, "-wal"), PAGE_SIZE_BYTES)
                was_there = path.exists() and path.stat().st_size > 0
                if mark is not None and not was_there:
                    raise corrupt(
                        path,
                        f"the file is missing or empty, and {mark.sequence} records were promised; bring it "
                        f"back, or delete {path}-mark to begin without them",
                        1,
                    )
                connection = self._connection = open_database(path)
                if not was_there:
                    sync_folder(path)
                self.journal = JournalTable(connection, path)
                self.archive = ArchiveTable(connection, path, config)
            if mark is None and was_there:
                logger.warning(
                    "journal has no mark: records missing at its end cannot be noticed",
                    extra={"path": str(path)},
                )
            self.records: Sequence[Record] = replay_checked(connection, path, self.journal, log, mark)
            with translated_errors(path):
                self.archive.load()
                self._journal_id = read_meta(connection, path, "journal_id")
        except BaseException:
            self.abandon()
            raise
        self._settle(log)

    @property
    def connection(self) -> apsw.Connection:
        """The one connection that writes."""
        if self._connection is None:
            raise StoreError(f"journal {self._path} is closed")
        return self._connection

    def _settle(self, log: WalLog) -> None:
        """Have everything that was read synced, and the log emptied."""
        if log.damage_offset is not None:
            logger.warning(
                "the end of the journal's log was cut off; nothing of it had been promised",
                extra={"path": str(self._path), "offset": log.damage_offset},
            )
        try:
            self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            for _slot in range(2):
                self._write_mark()
        except (apsw.FullError, apsw.BusyError) as error:
            logger.warning(
                "the journal's log cannot be folded in now: %s", error, extra={"path": str(self._path)}
            )
        except (apsw.Error, OSError) as error:
            self.abandon()
            raise StoreError(
                f"journal {self._path} cannot be synced: {error}", path=str(self._path)
            ) from error

    # -- writing -----------------------------------------------------------------------------

    def probe(self) -> None:
        """Write and sync a row without a record, to see whether that works.

        Raises:
            apsw.Error: It does not; everything is as before.
        """
        self._has_unsynced = True
        self.write((), sync=True)

    def write(self, records: Sequence[Record], *, sync: bool) -> Batch:
        """Write records in one transaction. Either all of it is written, or none.

        Records of what is not live any more are left out.

        Args:
            records: In order.
            sync: Return only when they, and all before them, survive a loss of power.

        Raises:
            apsw.Error: It could not be; everything is as before.
        """
        batch = Batch(sync)
        output_bytes = self.archive.output_bytes
        self.journal.begin()
        try:
            for record in records:
                self._prepare(record, batch)
            if sync and not batch.rows and self._has_unsynced:
                batch.rows.append(self.journal.prepare_nothing())
            if not batch.rows:
                return batch
            self._transact(lambda: self._insert(batch), sync=sync)
        except BaseException:
            self.journal.undo()
            self.archive.undo(output_bytes)
            raise
        self.archive.written(batch.ended)
        reach("journal.after_commit")
        if sync:
            self._write_mark()
        return batch

    def _prepare(self, record: Record, batch: Batch) -> None:
        try:
            pieces = (
                encode_pieces(record.pieces) if isinstance(record, RequestEnded) and record.pieces else b""
            )
            row = self.journal.prepare(record)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            # Such as half of a surrogate pair in an engine's text: no reason to stop for everybody.
            logger.exception("a record cannot be encoded, and is left out")
            batch.unwritable.append((record, str(error)))
            return
        if row is not None:
            batch.rows.append(row)
            if isinstance(record, RequestEnded):
                batch.ended[row.sequence] = EncodedEnd(record, pieces)

    def _insert(self, batch: Batch) -> None:
        self.journal.insert(batch.rows)
        if batch.ended:
            self.archive.write(batch.ended)
        reach("journal.after_write")

    def _transact(self, work: Callable[[], None], *, sync: bool) -> None:
        connection = self.connection
        if sync != self._synchronous_full:
            connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            self._synchronous_full = sync
        connection.execute("BEGIN IMMEDIATE")
        try:
            work()
            reach("journal.before_commit")
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors.
            if connection.in_transaction:
                with contextlib.suppress(apsw.Error):
                    connection.execute("ROLLBACK")
            raise
        self._has_unsynced = not sync

    def _write_mark(self) -> None:
        mark = Mark(self._journal_id, self.journal.next_sequence - 1, self.journal.tail_checksum)
        try:
            self._mark.write(mark)
        except OSError as error:
            logger.warning("the journal's mark cannot be written: %s", error, extra={"path": str(self._path)})

    # -- upkeep ------------------------------------------------------------------------------

    def keep_up(self, written_row_count: int) -> bool:
        """Do one small step of what keeps the file in bounds; return whether there is more to do.

        Args:
            written_row_count: Of the batch before: as much is let go of, so that it never piles up.

        Raises:
            apsw.Error: It could not be done; everything is as before.
        """
        more = self._checkpoint_if_due()
        journal = self.journal
        dead_bytes = journal.byte_count - journal.live_byte_count
        if dead_bytes > max(_CLEANING_FROM_BYTES, journal.live_byte_count):
            count = min(_CLEANED_ROW_COUNT_MOST, max(_CLEANED_ROW_COUNT, 2 * written_row_count))
            journal.begin()
            try:
                self._transact(lambda: journal.clean(count, _MOVED_BYTES), sync=False)
            except BaseException:
                journal.undo()
                raise
            journal.cleaned()
            more = True
        now_wall_s = self._wall_clock()
        if self.archive.has_too_much(now_wall_s):
            more = self._let_go_of_ended(now_wall_s) or more
        return more

    def _let_go_of_ended(self, now_wall_s: float) -> bool:
        output_bytes = self.archive.output_bytes
        gone: set[int] = set()
        try:
            self._transact(lambda: gone.update(self.archive.let_go(now_wall_s)), sync=False)
        except BaseException:
            self.archive.undo(output_bytes)
            raise
        self.archive.let_gone(gone)
        return bool(gone) or self.archive.output_bytes != output_bytes

    def _checkpoint_if_due(self) -> bool:
        page_count = self.connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]
        if page_count - self._pages_at_checkpoint < _CHECKPOINT_PAGE_COUNT:
            return False
        self._pages_at_checkpoint = page_count
        self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        return False

    # -- closing -----------------------------------------------------------------------------

    def close(self) -> None:
        """Sync everything, fold the log in, and let go of the file.

        Raises:
            apsw.Error: It could not be synced; it is closed all the same.
        """
        try:
            self.write((), sync=True)
            self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file as it is. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._mark.close()
        self._lock.release()
