"""Is a journal whole? Its chain from the first row to the last, and what was promised by its mark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import apsw

from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.records import Record
from sagecp.runtime.store.sqlite.archive_table import all_ended, ended_of_row
from sagecp.runtime.store.sqlite.database import (
    PAGE_SIZE_BYTES,
    check_version,
    corrupt,
    open_reader,
    read_meta,
    translated_errors,
)
from sagecp.runtime.store.sqlite.journal_table import JournalTable
from sagecp.runtime.store.sqlite.side_files import FileLock, Mark, MarkFile, side_file
from sagecp.runtime.store.sqlite.wal_file import WalLog, read_wal


def replay_checked(
    connection: apsw.Connection, path: Path, journal: JournalTable, log: WalLog, mark: Mark | None
) -> list[Record]:
    """Read a journal from its first row to its last, and return what is live.

    Args:
        connection: To the journal.
        path: Its file.
        journal: Its table, not read yet.
        log: Its write-ahead log as it was before SQLite opened it.
        mark: What was promised last, where that is known.

    Raises:
        StoreCorruptError: A row is damaged, or one that was promised is missing; names it, and
            the offset in the log where that is damaged.
        StoreError: The mark is another journal's.
    """
    with translated_errors(path, journal.next_sequence):
        records = journal.replay()
        journal_id = read_meta(connection, path, "journal_id")
    if mark is None:
        return records
    if mark.journal_id != journal_id:
        raise StoreError(
            f"{path}-mark belongs to another journal than {path}; bring the right one back, "
            "or delete it if the journal is a copy that is meant to be used",
            path=str(path),
        )
    where = ""
    if log.damage_offset is not None:
        where = f"; {path}-wal is damaged from offset {log.damage_offset} on"
    elif log.frames:
        where = f"; {path}-wal is sound up to offset {log.end_offset}"
    last = journal.next_sequence - 1
    if mark.sequence > last:
        what = f"records {last + 1} to {mark.sequence} were promised and are missing{where}"
        raise corrupt(path, what, last + 1)
    in_reach = mark.sequence >= journal.base_sequence - 1
    if in_reach and _checksum_at(connection, path, journal, mark.sequence) != mark.checksum:
        what = f"record {mark.sequence} is not the one that was promised{where}"
        raise corrupt(path, what, mark.sequence)
    return records


def _checksum_at(connection: apsw.Connection, path: Path, journal: JournalTable, sequence: int) -> int | None:
    with translated_errors(path, sequence):
        if sequence == journal.base_sequence - 1:
            return read_meta(connection, path, "base_checksum")
        for (checksum,) in connection.execute("SELECT checksum FROM journal WHERE sequence = ?", (sequence,)):
            return int(checksum)
    return None


@dataclass(frozen=True, slots=True)
class JournalReport:
    """What is in a journal.

    Attributes:
        path: The file.
        size_bytes: It and its log.
        record_count: Rows, those not needed any more included.
        live_record_count: Rows that are needed.
        live_request_count: Requests that have not ended.
        instance_count: Registered instances.
        ended_count: Ended requests that are kept.
        output_bytes: What their outputs take.
        first_record: Number of the oldest row.
        last_record: Number of the newest row.
        promised_record: Number of the last one that was promised; 0: not known.
    """

    path: str
    size_bytes: int
    record_count: int
    live_record_count: int
    live_request_count: int
    instance_count: int
    ended_count: int
    output_bytes: int
    first_record: int
    last_record: int
    promised_record: int


def inspect_journal(path: Path, *, thoroughly: bool = False) -> JournalReport:
    """Check a journal that no process uses, change nothing, and say what is in it.

    Args:
        path: The file.
        thoroughly: Check every ended request and SQLite's own structures as well.

    Raises:
        StoreCorruptError: It is damaged; names where.
        StoreError: It cannot be read, or is in use.
    """
    if not path.is_file():
        raise StoreError(f"there is no journal {path}; give the path of one", path=str(path))
    lock = FileLock(path)
    lock.acquire()
    try:
        with translated_errors(path):
            wal_path = side_file(path, "-wal")
            log = read_wal(wal_path, PAGE_SIZE_BYTES)
            size_bytes = path.stat().st_size + (wal_path.stat().st_size if wal_path.exists() else 0)
            mark = MarkFile(path).read()
            connection = open_reader(path)
        try:
            return _inspect(connection, path, log, mark, size_bytes, thoroughly=thoroughly)
        finally:
            connection.close()
    finally:
        lock.release()


def _inspect(
    connection: apsw.Connection,
    path: Path,
    log: WalLog,
    mark: Mark | None,
    size_bytes: int,
    *,
    thoroughly: bool,
) -> JournalReport:
    with translated_errors(path):
        check_version(connection, path)
    journal = JournalTable(connection, path)
    replay_checked(connection, path, journal, log, mark)
    with translated_errors(path):
        if thoroughly:
            for row in all_ended(connection):
                ended_of_row(row, path)
            for (finding,) in connection.execute("PRAGMA integrity_check(1)"):
                if finding != "ok":
                    raise corrupt(path, f"SQLite says {finding}", 0)
        ((ended_count,),) = connection.execute("SELECT count(*) FROM ended")
        ((output_bytes,),) = connection.execute("SELECT sum(length(body)) FROM ended_output")
    return JournalReport(
        path=str(path),
        size_bytes=size_bytes,
        record_count=journal.row_count,
        live_record_count=journal.live_row_count,
        live_request_count=journal.live_request_count,
        instance_count=journal.live_instance_count,
        ended_count=ended_count,
        output_bytes=output_bytes or 0,
        first_record=journal.base_sequence,
        last_record=journal.next_sequence - 1,
        promised_record=mark.sequence if mark is not None else 0,
    )
