"""Saving what is whole of a damaged journal into a new one; the damaged files stay, under other names."""

from __future__ import annotations

import contextlib
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import msgspec

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.codec import decode_record
from sagecp.runtime.store.records import InstanceDropped, InstanceKept, Record, RequestAccepted, RequestEnded
from sagecp.runtime.store.sqlite.archive_table import ended_of_row, find_query
from sagecp.runtime.store.sqlite.checksums import JournalRow, is_whole
from sagecp.runtime.store.sqlite.database import (
    PAGE_SIZE_BYTES,
    open_database,
    open_reader,
    translated_errors,
)
from sagecp.runtime.store.sqlite.journal_file import JournalFile
from sagecp.runtime.store.sqlite.journal_table import COLUMNS, ENDED_KIND, NOTHING_KIND
from sagecp.runtime.store.sqlite.side_files import FileLock, MarkFile, side_file, sync_folder
from sagecp.runtime.store.sqlite.wal_file import read_wal

# A whole retention: what was kept stays kept.
_KEEP_EVERYTHING = JournalConfig(
    retention_s=1e12, output_retention_s=1e12, max_ended_count=1 << 62, max_output_bytes=1 << 62
)
_BATCH_RECORD_COUNT = 500
# How far to look for the next readable row where the end is not known.
_BLIND_REACH = 10_000
_REPORTED_ID_COUNT = 1000
# Fields of the file's first page, from "Database File Format", section 1.3:
# https://www.sqlite.org/fileformat2.html#the_database_header
_WRITE_VERSION_OFFSET = 18
_FREELIST_OFFSET = 32
_CHANGE_COUNTER_OFFSET = 24
_VERSION_VALID_FOR_OFFSET = 92


@dataclass(slots=True)
class SalvageReport:
    """What was saved, and what was not.

    Attributes:
        path: The new journal.
        damaged_path: Where the damaged one is now.
        record_count: Records that were whole.
        lost_record_count: Records that were not, or are missing.
        lost_records: Ranges of their numbers, first and last.
        live_request_count: Requests that go on.
        ended_count: Ended requests saved.
        lost_ended_count: Ended requests, or their outputs, that were not whole.
        request_ids: Requests of which something is known to be lost; the first thousand.
    """

    path: str = ""
    damaged_path: str = ""
    record_count: int = 0
    lost_record_count: int = 0
    lost_records: list[tuple[int, int]] = field(default_factory=list)
    live_request_count: int = 0
    ended_count: int = 0
    lost_ended_count: int = 0
    request_ids: list[str] = field(default_factory=list)

    def note_id(self, request_id: object) -> None:
        """Remember a request of which something is lost."""
        known = isinstance(request_id, str) and request_id and request_id not in self.request_ids
        if known and len(self.request_ids) < _REPORTED_ID_COUNT:
            self.request_ids.append(str(request_id))


def salvage_journal(path: Path, *, wall_clock: Callable[[], float] = time.time) -> SalvageReport:
    """Write a new journal with everything of a damaged one that is whole, and put it in its place.

    Frames of the write-ahead log behind a damaged one, which SQLite would drop,
    are read as well. The damaged files are kept as ``PATH.damaged-TIME``.

    Raises:
        StoreError: There is no such journal, a process uses it, or the new one cannot be written.
    """
    if not path.is_file() and not side_file(path, "-wal").is_file():
        raise StoreError(f"there is no journal {path}; give the path of one", path=str(path))
    lock = FileLock(path)
    lock.acquire()
    work, fresh = side_file(path, "-salvage-work"), side_file(path, "-salvaged")
    try:
        _delete(work)
        _delete(fresh)
        with translated_errors(path):
            _lay_out(path, work)
            report = _copy(path, work, fresh, wall_clock)
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall_clock()))
            damaged = side_file(path, f".damaged-{stamp}")
            _swap(path, damaged, fresh)
    finally:
        _delete(work)
        _delete(fresh)
        lock.release()
    report.path, report.damaged_path = str(path), str(damaged)
    return report


def _delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal", "-mark", "-lock", "-ballast"):
        side_file(path, suffix).unlink(missing_ok=True)


def _swap(path: Path, damaged: Path, fresh: Path) -> None:
    """Put the new journal in the place of the damaged one, whose files all have their new names before."""
    for suffix in ("", "-wal", "-mark"):
        with contextlib.suppress(FileNotFoundError):
            _also_call(side_file(path, suffix), side_file(damaged, suffix))
    sync_folder(path)
    # The log first: it must never be beside the new file. The mark last: until then nobody starts.
    for suffix in ("-wal", "-shm"):
        side_file(path, suffix).unlink(missing_ok=True)
    for suffix in ("", "-mark"):
        side_file(fresh, suffix).replace(side_file(path, suffix))
    sync_folder(path)


def _also_call(path: Path, name: Path) -> None:
    try:
        name.hardlink_to(path)
    except FileNotFoundError:
        raise
    except OSError:
        # A file system without links.
        shutil.copy2(path, name)


def _lay_out(path: Path, work: Path) -> None:
    """Make one plain file of a journal and its log, damaged pages included: their rows are checked."""
    if path.is_file():
        shutil.copyfile(path, work)
    else:
        work.touch()
    wal_path = side_file(path, "-wal")
    log = read_wal(wal_path, PAGE_SIZE_BYTES)
    commits = [index for index, frame in enumerate(log.frames) if frame.database_page_count]
    frames = log.frames[: commits[-1] + 1] if commits else ()
    page_count = max(
        [
            work.stat().st_size // PAGE_SIZE_BYTES,
            *(each.database_page_count for each in frames if each.follows),
        ]
    )
    with work.open("r+b") as target:
        if frames and log.page_size_bytes == PAGE_SIZE_BYTES:
            with wal_path.open("rb") as source:
                for frame in frames:
                    if 1 <= frame.page_number <= page_count:
                        source.seek(frame.offset + 24)
                        target.seek((frame.page_number - 1) * PAGE_SIZE_BYTES)
                        target.write(source.read(PAGE_SIZE_BYTES))
        # Not in the log's mode any more, and with nothing believed that the tables do not need.
        target.seek(_WRITE_VERSION_OFFSET)
        target.write(b"\x01\x01")
        target.flush()
        if not _has_tables(work):
            target.seek(0)
            target.write(_first_page(work))


def _has_tables(work: Path) -> bool:
    try:
        connection = open_reader(work)
    except apsw.Error:
        return False
    try:
        names = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        }
    except (apsw.Error, UnicodeDecodeError):
        return False
    finally:
        connection.close()
    return {"meta", "journal", "ended", "ended_output"} <= names


def _first_page(work: Path) -> bytes:
    """Return the first page of an empty journal: every journal has its tables in the same places."""
    template = side_file(work, "-template")
    try:
        connection = open_database(template)
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        connection.close()
        page = bytearray(template.read_bytes()[:PAGE_SIZE_BYTES])
    finally:
        _delete(template)
    page[_WRITE_VERSION_OFFSET : _WRITE_VERSION_OFFSET + 2] = b"\x01\x01"
    page[_FREELIST_OFFSET : _FREELIST_OFFSET + 8] = bytes(8)
    # Different from the change counter: the number of pages is then taken from the file's size.
    (counter,) = struct.unpack_from(">I", page, _CHANGE_COUNTER_OFFSET)
    struct.pack_into(">I", page, _VERSION_VALID_FOR_OFFSET, (counter + 1) & 0xFFFFFFFF)
    return bytes(page)


def _copy(path: Path, work: Path, fresh: Path, wall_clock: Callable[[], float]) -> SalvageReport:
    report = SalvageReport()
    mark = MarkFile(path).read()
    source = open_reader(work)
    target = JournalFile(fresh, _KEEP_EVERYTHING, wall_clock)
    try:
        ended: set[tuple[str, str, int]] = set()

        def kept() -> Iterator[RequestEnded]:
            for each in _ended(source, path, report):
                ended.add((each.tenant_id, each.request_id, each.sequence))
                yield each

        _write(target, kept())
        rows = list(_whole_rows(source, mark.sequence if mark is not None else 0, report))
        live = _live_records(rows, ended, report)
        _write(target, iter(live))
        report.live_request_count = target.journal.live_request_count
        target.close()
    finally:
        target.abandon()
        source.close()
    return report


def _write(target: JournalFile, records: Iterator[Record]) -> None:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH_RECORD_COUNT:
            target.write(batch, sync=False)
            batch.clear()
    target.write(batch, sync=True)


def _ended(source: apsw.Connection, path: Path, report: SalvageReport) -> Iterator[RequestEnded]:
    """Yield every ended request that is whole, one by one, so that one bad page costs its rows only."""
    last = 0
    with contextlib.suppress(apsw.Error):
        ((last,),) = source.execute("SELECT coalesce(max(rowid), 0) FROM ended")
    # Read from the table, not from its indexes: those hold nothing that is needed.
    places = _readable(source, "SELECT rowid, end_order FROM ended NOT INDEXED WHERE rowid >= ?", 1, last)
    for row_id, _end_order in sorted(places, key=lambda each: (str(type(each[1])), each[1])):
        record = None
        try:
            row = next(iter(source.execute(find_query("e.rowid = ?"), (row_id,))))
        except (apsw.Error, UnicodeDecodeError, StopIteration):
            report.lost_ended_count += 1
            continue
        for attempt in (row, (*row[:-2], None, None)):
            try:
                record = ended_of_row(attempt, path)
                break
            except StoreError:
                report.note_id(row[1])
        if record is None or attempt is not row:
            report.lost_ended_count += 1
        if record is not None:
            report.ended_count += 1
            yield record


def _whole_rows(source: apsw.Connection, promised: int, report: SalvageReport) -> Iterator[JournalRow]:
    """Yield every row of the journal that is what was written, and count the others."""
    base, last = 1, promised
    with contextlib.suppress(apsw.Error):
        for (value,) in source.execute("SELECT value FROM meta WHERE name = 'base_sequence'"):
            base = value if isinstance(value, int) else 1
    is_end_known = promised > 0
    with contextlib.suppress(apsw.Error):
        for (value,) in source.execute("SELECT max(sequence) FROM journal"):
            if isinstance(value, int):
                last, is_end_known = max(last, value), True
    expected = base
    query = f"SELECT {COLUMNS} FROM journal WHERE sequence >= ?"
    for values in _readable(source, query, base, last if is_end_known else base + _BLIND_REACH):
        row = JournalRow._make(values)
        if not is_whole(row):
            report.note_id(row.subject)
            continue
        _note_lost(report, expected, row.sequence - 1)
        expected = row.sequence + 1
        report.record_count += 1
        yield row
    if is_end_known:
        _note_lost(report, expected, last)


def _note_lost(report: SalvageReport, first: int, last: int) -> None:
    if first <= last:
        report.lost_records.append((first, last))
        report.lost_record_count += last - first + 1


def _readable(source: apsw.Connection, query: str, first: int, last: int) -> Iterator[tuple[Any, ...]]:
    """Yield rows in the order of their number, which comes first; where reading fails, go on behind it.

    Args:
        source: The database.
        query: With one parameter: the number to begin at.
        first: Lowest number.
        last: Highest number.
    """
    number = first
    while number <= last:
        try:
            for values in source.execute(f"{query} ORDER BY 1", (number,)):
                # Damage may lead anywhere, even back.
                if not isinstance(values[0], int) or not number <= values[0] <= last:
                    break
                number = values[0] + 1
                yield values
            else:
                return
        except (apsw.Error, UnicodeDecodeError):
            pass
        number += 1


def _live_records(
    rows: Sequence[JournalRow], ended: set[tuple[str, str, int]], report: SalvageReport
) -> list[Record]:
    """Return the records that are live, in order; of requests whose acceptance is lost there are none."""
    requests: dict[str, list[tuple[int, Record]]] = {}
    instances: dict[str, tuple[int, Record]] = {}
    for row in rows:
        if row.kind == ENDED_KIND:
            requests.pop(row.subject, None)
            continue
        if row.kind == NOTHING_KIND:
            continue
        try:
            record = decode_record(row.body)
        except msgspec.DecodeError:
            report.note_id(row.subject)
            continue
        if isinstance(record, InstanceKept):
            instances[row.subject] = (row.position, record)
        elif isinstance(record, InstanceDropped):
            instances.pop(row.subject, None)
        elif isinstance(record, RequestAccepted) and row.position == row.sequence:
            requests[row.subject] = [(row.position, record)]
        else:
            requests.setdefault(row.subject, []).append((row.position, record))
    live = list(instances.values())
    for request_id, placed in requests.items():
        placed.sort(key=lambda each: each[0])
        first = placed[0][1]
        if not isinstance(first, RequestAccepted):
            report.note_id(request_id)
        elif (first.tenant_id, request_id, first.sequence) not in ended:
            live += placed
    live.sort(key=lambda each: each[0])
    return [record for _position, record in live]
