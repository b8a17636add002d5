"""The append-only table of records: its chain, what in it is live, and how the rest is let go of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import apsw
import msgspec

from sagecp.runtime.store.codec import decode_record, encode_record
from sagecp.runtime.store.records import (
    AttemptDispatched,
    AttemptLost,
    InstanceDropped,
    InstanceKept,
    OutputProduced,
    PromptTokenized,
    Record,
    RequestAccepted,
    RequestEnded,
)
from sagecp.runtime.store.sqlite.checksums import JournalRow, is_whole, make_row
from sagecp.runtime.store.sqlite.database import corrupt, read_meta, translated_errors

# Tags of the records, as in the rows; 0 is a row without one.
NOTHING_KIND = 0
KINDS: dict[type, int] = {
    RequestAccepted: 1,
    AttemptDispatched: 2,
    PromptTokenized: 3,
    OutputProduced: 4,
    AttemptLost: 5,
    RequestEnded: 6,
    InstanceKept: 7,
    InstanceDropped: 8,
}
ENDED_KIND = 6
_ACCEPTED, _KEPT, _DROPPED = 1, 7, 8
_INSTANCE_KINDS = {_KEPT, _DROPPED}
# One call of SQLite for so many rows: each call lets go of the interpreter's
# lock, and while the event loop is busy it takes up to 5 ms to get it back.
_ROWS_PER_STATEMENT = 64
# A row's columns but the body, as stored: about.
_ROW_OVERHEAD_BYTES = 64
COLUMNS = "sequence, position, kind, subject, previous, checksum, body"
_INSERTS = {
    count: f"INSERT INTO journal ({COLUMNS}) VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * count)
    for count in range(1, _ROWS_PER_STATEMENT + 1)
}


@dataclass(slots=True)
class _Live:
    """A request or instance that is live.

    Attributes:
        position: Of the record that made it so. Records before it are not its own.
        row_count: Rows that it has.
        byte_count: What they take.
    """

    position: int
    row_count: int = 0
    byte_count: int = 0


@dataclass(frozen=True, slots=True)
class _Tail:
    """What appending changes, so that it can be undone."""

    next_sequence: int
    checksum: int
    row_count: int
    byte_count: int
    live_row_count: int
    live_byte_count: int


class JournalTable:
    """The records, as a chain of rows.

    A transaction is prepared here, then written; what was prepared is undone if
    writing fails. Old rows go from the front: those among them that are live
    are written again at the end, so that the chain has no gap.

    Attributes:
        next_sequence: Of the next row.
        tail_checksum: Of the last row.
        base_sequence: Of the oldest row that is kept.
        row_count: Rows that are kept.
        byte_count: What they take, about.
        live_row_count: Rows that are needed.
        live_byte_count: What they take.
    """

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._requests: dict[str, _Live] = {}
        self._instances: dict[str, _Live] = {}
        self._undo: list[tuple[dict[str, _Live], str, _Live | None]] = []
        self._before: _Tail | None = None
        self.base_sequence = self._next_base = self.next_sequence = 1
        self.tail_checksum = 0
        self.row_count = self.byte_count = self.live_row_count = self.live_byte_count = 0

    @property
    def live_request_count(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def live_instance_count(self) -> int:
        """Instances that are registered."""
        return len(self._instances)

    def replay(self) -> list[Record]:
        """Check every row, and return the records that are live in the order of writing.

        Raises:
            StoreCorruptError: A row is damaged or missing; names the first.
        """
        self._read_base()
        requests: dict[str, list[JournalRow]] = {}
        instances: dict[str, JournalRow] = {}
        for row in self.checked_rows():
            self.row_count += 1
            self.byte_count += _byte_count(row)
            # A row that was moved is live, and adds to what is known; see `clean`.
            if row.kind == ENDED_KIND:
                requests.pop(row.subject, None)
            elif row.kind == _ACCEPTED and row.position == row.sequence:
                requests[row.subject] = [row]
            elif row.kind == _KEPT:
                instances[row.subject] = row
            elif row.kind == _DROPPED:
                instances.pop(row.subject, None)
            elif row.kind != NOTHING_KIND:
                requests.setdefault(row.subject, []).append(row)
        live = [row for rows in requests.values() for row in rows]
        live += instances.values()
        requests.clear()
        instances.clear()
        live.sort(key=lambda row: row.position, reverse=True)
        records: list[Record] = []
        while live:
            # Popped, so that rows and records are not all in memory at once.
            row = live.pop()
            self._count_live(row)
            records.append(self._decoded(row))
        return records

    def _read_base(self) -> None:
        with translated_errors(self._path):
            self.base_sequence = read_meta(self._connection, self._path, "base_sequence")
            self.tail_checksum = read_meta(self._connection, self._path, "base_checksum")
        self.next_sequence = self.base_sequence

    def checked_rows(self) -> Iterator[JournalRow]:
        """Yield every row, and leave the chain's end where it is.

        Raises:
            StoreCorruptError: A row is damaged or missing; names it.
        """
        rows = self._connection.execute(f"SELECT {COLUMNS} FROM journal ORDER BY sequence")
        while True:
            number = self.next_sequence
            try:
                values = next(rows, None)
            except (apsw.CorruptError, UnicodeDecodeError) as error:
                raise corrupt(self._path, f"record {number} cannot be read: {error}", number) from error
            if values is None:
                return
            row = JournalRow._make(values)
            if row.sequence != number:
                raise corrupt(self._path, f"record {number} is missing", number)
            if not is_whole(row):
                raise corrupt(self._path, f"record {number} is not what was written", number)
            if row.previous != self.tail_checksum:
                raise corrupt(self._path, f"record {number} does not follow the one before", number)
            self.next_sequence, self.tail_checksum = number + 1, row.checksum
            yield row

    def _decoded(self, row: JournalRow) -> Record:
        try:
            return decode_record(row.body)
        except msgspec.DecodeError as error:
            raise corrupt(
                self._path, f"record {row.sequence} is unreadable: {error}", row.sequence
            ) from error

    def _count_live(self, row: JournalRow) -> None:
        group = self._instances if row.kind in _INSTANCE_KINDS else self._requests
        live = group.get(row.subject)
        if live is None:
            live = group[row.subject] = _Live(row.position)
        byte_count = _byte_count(row)
        live.row_count += 1
        live.byte_count += byte_count
        self.live_row_count += 1
        self.live_byte_count += byte_count

    # -- appending ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Remember how things are, for :meth:`undo`."""
        self._undo.clear()
        self._before = _Tail(
            self.next_sequence,
            self.tail_checksum,
            self.row_count,
            self.byte_count,
            self.live_row_count,
            self.live_byte_count,
        )

    def undo(self) -> None:
        """Go back to :meth:`begin`: what was prepared since was not written."""
        before = self._before
        if before is None:
            return
        for group, subject, live in reversed(self._undo):
            if live is None:
                group.pop(subject, None)
            else:
                group[subject] = live
        self._undo.clear()
        self.next_sequence, self.tail_checksum = before.next_sequence, before.checksum
        self.row_count, self.byte_count = before.row_count, before.byte_count
        self.live_row_count, self.live_byte_count = before.live_row_count, before.live_byte_count

    def prepare(self, record: Record) -> JournalRow | None:
        """Return the row of a record, or ``None`` for one of something that is not live any more."""
        kind = KINDS[type(record)]
        if isinstance(record, InstanceKept | InstanceDropped):
            group, subject = self._instances, record.instance_id
        else:
            group, subject = self._requests, record.request_id
        live = group.get(subject)
        if live is None and kind not in {_ACCEPTED, ENDED_KIND, _KEPT}:
            return None
        # The archive has all of what has ended; here it says that the rows before are not needed.
        row = self._append(kind, subject, b"" if kind == ENDED_KIND else encode_record(record))
        if kind in {ENDED_KIND, _DROPPED}:
            self._replace(group, subject, live, None)
        elif kind in {_ACCEPTED, _KEPT}:
            self._replace(group, subject, live, _Live(row.sequence, 1, _byte_count(row)))
        elif live is not None:
            added = _Live(live.position, live.row_count + 1, live.byte_count + _byte_count(row))
            self._replace(group, subject, live, added)
        return row

    def prepare_nothing(self) -> JournalRow:
        """Return a row without a record: to have something to sync."""
        return self._append(NOTHING_KIND, "", b"")

    def _append(self, kind: int, subject: str, body: bytes, position: int = 0) -> JournalRow:
        sequence = self.next_sequence
        row = make_row(sequence, position or sequence, kind, subject, self.tail_checksum, body)
        self.next_sequence, self.tail_checksum = sequence + 1, row.checksum
        self.row_count += 1
        self.byte_count += _byte_count(row)
        return row

    def _replace(
        self, group: dict[str, _Live], subject: str, before: _Live | None, after: _Live | None
    ) -> None:
        self._undo.append((group, subject, before))
        if before is not None:
            self.live_row_count -= before.row_count
            self.live_byte_count -= before.byte_count
        if after is None:
            group.pop(subject, None)
        else:
            group[subject] = after
            self.live_row_count += after.row_count
            self.live_byte_count += after.byte_count

    def insert(self, rows: Sequence[JournalRow]) -> None:
        """Write rows, within the caller's transaction."""
        for start in range(0, len(rows), _ROWS_PER_STATEMENT):
            part = rows[start : start + _ROWS_PER_STATEMENT]
            self._connection.execute(_INSERTS[len(part)], [value for row in part for value in row])

    # -- letting go --------------------------------------------------------------------------

    def clean(self, max_row_count: int, max_moved_bytes: int) -> None:
        """Let go of the oldest rows, within the caller's transaction; live ones move to the end.

        Their position stays, so that the order of reading does too.

        Raises:
            StoreCorruptError: A row that would be moved is damaged.
        """
        heads = list(
            self._connection.execute(
                "SELECT sequence, position, kind, subject, length(body) FROM journal "
                "ORDER BY sequence LIMIT ?",
                (max_row_count,),
            )
        )
        moved: list[JournalRow] = []
        moved_bytes = 0
        base = self.base_sequence
        dead_count = dead_bytes = 0
        for sequence, position, kind, subject, body_bytes in heads:
            if self._is_live(kind, subject, position):
                if moved_bytes > max_moved_bytes:
                    break
                moved.append(self._moved(sequence))
                moved_bytes += body_bytes
            dead_count += 1
            dead_bytes += _ROW_OVERHEAD_BYTES + len(subject) + body_bytes
            base = sequence + 1
        self.insert(moved)
        self._connection.execute("DELETE FROM journal WHERE sequence < ?", (base,))
        base_checksum = self.tail_checksum
        for (previous,) in self._connection.execute(
            "SELECT previous FROM journal WHERE sequence = ?", (base,)
        ):
            base_checksum = previous
        for name, value in (("base_sequence", base), ("base_checksum", base_checksum)):
            self._connection.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))
        self.row_count -= dead_count
        self.byte_count -= dead_bytes
        self._next_base = base

    def cleaned(self) -> None:
        """Take note that what :meth:`clean` did is committed."""
        self.base_sequence = self._next_base

    def _is_live(self, kind: int, subject: str, position: int) -> bool:
        if kind == _KEPT:
            instance = self._instances.get(subject)
            return instance is not None and instance.position == position
        if kind in {NOTHING_KIND, ENDED_KIND, _DROPPED}:
            return False
        request = self._requests.get(subject)
        return request is not None and position >= request.position

    def _moved(self, sequence: int) -> JournalRow:
        (values,) = self._connection.execute(f"SELECT {COLUMNS} FROM journal WHERE sequence = ?", (sequence,))
        row = JournalRow._make(values)
        if not is_whole(row):
            raise corrupt(self._path, f"record {sequence} is not what was written", sequence)
        return self._append(row.kind, row.subject, row.body, row.position)


def _byte_count(row: JournalRow) -> int:
    return _ROW_OVERHEAD_BYTES + len(row.subject) + len(row.body)
