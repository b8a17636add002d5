"""Requests that have ended: kept by tenant and id, within bounds, oldest let go of first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec

from sagecp.config import JournalConfig
from sagecp.runtime.store.codec import decode_pieces
from sagecp.runtime.store.records import RequestEnded
from sagecp.runtime.store.sqlite.checksums import checksum_of
from sagecp.runtime.store.sqlite.database import corrupt, translated_errors

_ROWS_PER_STATEMENT = 32
# So many are let go of at once: a step takes about a millisecond.
_STEP_COUNT = 64
_COLUMNS = (
    "tenant_id",
    "request_id",
    "end_order",
    "sequence",
    "fingerprint",
    "end_wall_s",
    "output_bytes",
    "status",
    "checksum",
)
_UPSERTS = {
    count: f"INSERT INTO ended ({', '.join(_COLUMNS)}) VALUES "
    + ", ".join([f"({', '.join('?' * len(_COLUMNS))})"] * count)
    + " ON CONFLICT (tenant_id, request_id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[2:])
    for count in range(1, _ROWS_PER_STATEMENT + 1)
}
_OUTPUT_INSERTS = {
    count: "INSERT INTO ended_output (end_order, checksum, body) VALUES " + ", ".join(["(?, ?, ?)"] * count)
    for count in range(1, _ROWS_PER_STATEMENT + 1)
}
_FIND = (
    f"SELECT {', '.join('e.' + name for name in _COLUMNS)}, o.checksum, o.body "
    "FROM ended e LEFT JOIN ended_output o ON o.end_order = e.end_order "
)


class EncodedEnd(NamedTuple):
    """An ended request, with its output as bytes; empty: it has none."""

    record: RequestEnded
    output: bytes


def archive_key(tenant_id: str, request_id: str) -> int:
    """Return 64 bits that tell requests apart within this process."""
    return hash((tenant_id, request_id))


class ArchiveTable:
    """The ended requests, and their outputs apart from them.

    Attributes:
        keys: Of all that are kept. Only the writer's thread changes them.
        output_bytes: What the outputs take.
    """

    def __init__(self, connection: apsw.Connection, path: Path, config: JournalConfig) -> None:
        self._connection = connection
        self._path = path
        self._config = config
        self.keys: set[int] = set()
        self.output_bytes = 0
        # The oldest of each: (end order, end time, output bytes).
        self._oldest_ended: tuple[int, float, int] | None = None
        self._oldest_output: tuple[int, float, int] | None = None

    def load(self) -> None:
        """Find out what is kept."""
        first_output = next(iter(self._connection.execute("SELECT min(end_order) FROM ended_output")))[0]
        for tenant_id, request_id, end_order, output_bytes in self._connection.execute(
            "SELECT tenant_id, request_id, end_order, output_bytes FROM ended"
        ):
            if not isinstance(end_order, int) or not isinstance(output_bytes, int):
                what = f"the row of the ended request {request_id!r} is not what was written"
                raise corrupt(self._path, what, 0)
            self.keys.add(archive_key(tenant_id, request_id))
            if first_output is not None and end_order >= first_output:
                self.output_bytes += output_bytes
        self._find_oldest()

    def write(self, ended: Mapping[int, EncodedEnd]) -> None:
        """Write ended requests by end order, within the caller's transaction. Ids may be there already."""
        latest = {(each.record.tenant_id, each.record.request_id): order for order, each in ended.items()}
        rows: list[list[Any]] = []
        outputs: list[list[Any]] = []
        for (tenant_id, request_id), end_order in latest.items():
            if archive_key(tenant_id, request_id) in self.keys:
                self._let_output_go(tenant_id, request_id)
            record, body = ended[end_order]
            values = (
                tenant_id,
                request_id,
                end_order,
                record.sequence,
                record.fingerprint,
                float(record.end_wall_s),
                len(body),
                record.status,
            )
            rows.append([*values, checksum_of(*values)])
            if body:
                outputs.append([end_order, checksum_of(end_order, body), body])
                self.output_bytes += len(body)
        for statements, values_of in ((_UPSERTS, rows), (_OUTPUT_INSERTS, outputs)):
            for start in range(0, len(values_of), _ROWS_PER_STATEMENT):
                part = values_of[start : start + _ROWS_PER_STATEMENT]
                self._connection.execute(
                    statements[len(part)],
                    [value for row in part for value in row],
                )

    def written(self, ended: Mapping[int, EncodedEnd]) -> None:
        """Take note that :meth:`write` is committed."""
        self.keys.update(archive_key(each.tenant_id, each.request_id) for each, _output in ended.values())
        for order, (record, output) in ended.items():
            if self._oldest_ended is None:
                self._oldest_ended = (order, record.end_wall_s, 0)
            if self._oldest_output is None and output:
                self._oldest_output = (order, record.end_wall_s, 0)

    def _let_output_go(self, tenant_id: str, request_id: str) -> None:
        for end_order, output_bytes, kept in list(
            self._connection.execute(
                "SELECT e.end_order, e.output_bytes, o.end_order FROM ended e "
                "LEFT JOIN ended_output o ON o.end_order = e.end_order "
                "WHERE e.tenant_id = ? AND e.request_id = ?",
                (tenant_id, request_id),
            )
        ):
            if kept is not None:
                self.output_bytes -= output_bytes
                self._connection.execute("DELETE FROM ended_output WHERE end_order = ?", (end_order,))

    # -- bounds ------------------------------------------------------------------------------

    def has_too_much(self, now_wall_s: float) -> bool:
        """Return whether anything is to be let go of."""
        return self._too_many(now_wall_s) or self._too_large(now_wall_s)

    def _too_many(self, now_wall_s: float) -> bool:
        if self._oldest_ended is None:
            return False
        is_old = self._oldest_ended[1] < now_wall_s - self._config.retention_s
        return is_old or len(self.keys) > self._config.max_ended_count

    def _too_large(self, now_wall_s: float) -> bool:
        if self._oldest_output is None:
            return False
        is_old = self._oldest_output[1] < now_wall_s - self._config.output_retention_s
        return is_old or self.output_bytes > self._config.max_output_bytes

    def let_go(self, now_wall_s: float) -> set[int]:
        """Let go of a few of the oldest, within the caller's transaction; return their keys."""
        gone: set[int] = set()
        if self._too_many(now_wall_s):
            excess = len(self.keys) - self._config.max_ended_count
            last_order = 0
            for tenant_id, request_id, end_order, end_wall_s in self._connection.execute(
                "SELECT tenant_id, request_id, end_order, end_wall_s FROM ended ORDER BY end_order LIMIT ?",
                (_STEP_COUNT,),
            ):
                if excess <= len(gone) and end_wall_s >= now_wall_s - self._config.retention_s:
                    break
                gone.add(archive_key(tenant_id, request_id))
                last_order = end_order
            self._delete_outputs(last_order)
            self._connection.execute("DELETE FROM ended WHERE end_order <= ?", (last_order,))
        if self._too_large(now_wall_s):
            last_order, freed_bytes = 0, 0
            for end_order, end_wall_s, output_bytes in self._outputs(_STEP_COUNT):
                fits = self.output_bytes - freed_bytes <= self._config.max_output_bytes
                if fits and end_wall_s >= now_wall_s - self._config.output_retention_s:
                    break
                last_order = end_order
                freed_bytes += output_bytes
            self._delete_outputs(last_order)
        self._find_oldest()
        return gone

    def let_gone(self, keys: set[int]) -> None:
        """Take note that :meth:`let_go` is committed."""
        self.keys -= keys

    def undo(self, output_bytes: int) -> None:
        """Go back: the transaction was not written.

        Args:
            output_bytes: What :attr:`output_bytes` was before it.
        """
        self.output_bytes = output_bytes
        self._find_oldest()

    def _outputs(self, count: int) -> Iterator[tuple[int, float, int]]:
        return self._connection.execute(
            "SELECT o.end_order, e.end_wall_s, e.output_bytes FROM ended_output o "
            "JOIN ended e ON e.end_order = o.end_order ORDER BY o.end_order LIMIT ?",
            (count,),
        )

    def _delete_outputs(self, last_order: int) -> None:
        for (freed_bytes,) in list(
            self._connection.execute(
                "SELECT sum(e.output_bytes) FROM ended_output o JOIN ended e ON e.end_order = o.end_order "
                "WHERE o.end_order <= ?",
                (last_order,),
            )
        ):
            self.output_bytes -= freed_bytes or 0
        self._connection.execute("DELETE FROM ended_output WHERE end_order <= ?", (last_order,))

    def _find_oldest(self) -> None:
        self._oldest_ended = next(
            iter(
                self._connection.execute(
                    "SELECT end_order, end_wall_s, output_bytes FROM ended ORDER BY end_order LIMIT 1"
                )
            ),
            None,
        )
        self._oldest_output = next(self._outputs(1), None)


def find_ended(
    connection: apsw.Connection, path: Path, tenant_id: str, request_id: str
) -> RequestEnded | None:
    """Return an ended request that is expected to be there, or ``None`` if it is not.

    Raises:
        StoreCorruptError: It is damaged.
        StoreError: It cannot be read.
    """
    with translated_errors(path):
        key = (tenant_id, request_id)
        rows = list(connection.execute(find_query("e.tenant_id = ? AND e.request_id = ?"), key))
        if not rows:
            # Let go of just now; or the index is damaged, which is told by reading without it.
            rows = list(connection.execute(find_query("+e.tenant_id = ? AND +e.request_id = ?"), key))
    return ended_of_row(rows[0], path) if rows else None


def find_query(condition: str) -> str:
    """Return the statement for the rows of ended requests, ``e``, under a condition."""
    return f"{_FIND} WHERE {condition}"


def all_ended(connection: apsw.Connection) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of everything that is kept, oldest first, for :func:`ended_of_row`."""
    return connection.execute(_FIND + "ORDER BY e.end_order")


def ended_of_row(row: tuple[Any, ...], path: Path) -> RequestEnded:
    """Return the ended request of a row.

    Raises:
        StoreCorruptError: The row, or its output, is damaged.
    """
    *values, checksum, output_checksum, body = row
    tenant_id, request_id, end_order, sequence, fingerprint, end_wall_s, _output_bytes, status = values
    what = f"the ended request {request_id!r} (number {end_order})"
    try:
        if checksum_of(*values) != checksum:
            raise corrupt(path, f"{what} is not what was written", _number(end_order))
        if body is not None and checksum_of(end_order, body) != output_checksum:
            raise corrupt(path, f"the output of {what} is not what was written", _number(end_order))
        pieces = decode_pieces(body) if isinstance(body, bytes) else ()
        return RequestEnded(
            request_id=request_id,
            tenant_id=tenant_id,
            sequence=sequence,
            fingerprint=fingerprint,
            end_wall_s=end_wall_s,
            status=status,
            pieces=pieces,
        )
    except (TypeError, ValueError, msgspec.DecodeError) as error:
        raise corrupt(path, f"{what} is unreadable: {error}", _number(end_order)) from error


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
