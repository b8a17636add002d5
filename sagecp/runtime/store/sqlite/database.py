"""The SQLite file: its tables, how it is opened, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import apsw

from sagecp.runtime.store.base import StoreCorruptError, StoreError

# Tells our files from others ("SGCP"), and their layouts apart.
APPLICATION_ID = 0x53474350
SCHEMA_VERSION = 1
# Rows of a few KiB leave half of a smaller page unused; a larger one makes single commits dearer.
PAGE_SIZE_BYTES = 8192
_CACHE_KIB = 16 * 1024
_STATEMENT_CACHE_COUNT = 256
_BUSY_TIMEOUT_MS = 5000

# PostgreSQL takes the same with BIGINT PRIMARY KEY and BYTEA; SQLite's INTEGER PRIMARY KEY
# is its 64-bit row number, which saves an index.
_SCHEMA = """
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);
CREATE TABLE journal (
    sequence INTEGER PRIMARY KEY,
    position BIGINT NOT NULL,
    kind INTEGER NOT NULL,
    subject TEXT NOT NULL,
    previous BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE ended (
    tenant_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    end_order BIGINT NOT NULL UNIQUE,
    sequence BIGINT NOT NULL,
    fingerprint BLOB NOT NULL,
    end_wall_s DOUBLE PRECISION NOT NULL,
    output_bytes BIGINT NOT NULL,
    status BLOB NOT NULL,
    checksum BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, request_id)
);
CREATE TABLE ended_output (
    end_order INTEGER PRIMARY KEY,
    checksum BIGINT NOT NULL,
    body BLOB NOT NULL
);
"""


def salvage_hint(path: Path) -> str:
    """Return what can be done about a damaged journal."""
    return f"save what is whole with: sagecp journal salvage {path}"


def corrupt(path: Path, what: str, position: int) -> StoreCorruptError:
    """Return the error for a damaged journal, with what can be done."""
    return StoreCorruptError(
        f"journal {path} is damaged: {what}; {salvage_hint(path)}", path=str(path), position=position
    )


@contextlib.contextmanager
def translated_errors(path: Path, position: int = 0) -> Iterator[None]:
    """Turn SQLite's errors into ours.

    Raises:
        StoreCorruptError: SQLite finds the file damaged.
        StoreError: It cannot be read or written.
    """
    try:
        yield
    except (apsw.CorruptError, apsw.SQLError, UnicodeDecodeError) as error:
        # Our statements are right: where SQLite does not know a table or column, its schema is damaged.
        raise corrupt(path, f"SQLite says {error}", position) from error
    except apsw.NotADBError as error:
        raise corrupt(path, "its beginning is not that of a SQLite file", 0) from error
    except (apsw.Error, OSError) as error:
        raise StoreError(f"journal {path} cannot be used: {error}", path=str(path)) from error


def open_database(path: Path) -> apsw.Connection:
    """Open a journal to read and write it, for its owner only; an empty file gets its tables.

    Raises:
        StoreError: It is something else, or of a later version.
        apsw.Error: See :func:`translated_errors`.
    """
    # SQLite gives its other files the permissions of this one.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    connection = apsw.Connection(
        os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=_STATEMENT_CACHE_COUNT
    )
    try:
        # Closing would fold the sound part of a damaged log into the file, and delete the rest of it.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.wal_autocheckpoint(0)
        for setting in ("synchronous = FULL", f"cache_size = -{_CACHE_KIB}", "cell_size_check = ON"):
            connection.execute(f"PRAGMA {setting}")
        if connection.pragma("application_id") == 0 and connection.pragma("schema_version") == 0:
            _make_tables(connection)
        check_version(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> apsw.Connection:
    """Open a journal that exists, to read it.

    Raises:
        apsw.Error: See :func:`translated_errors`.
    """
    connection = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def check_version(connection: apsw.Connection, path: Path) -> None:
    """Check that a file is a journal that this version can read.

    Raises:
        StoreError: It is not; says what it is.
    """
    if connection.pragma("application_id") != APPLICATION_ID:
        raise StoreError(f"{path} is a SQLite file and no sagecp journal; give another path", path=str(path))
    version = connection.pragma("user_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"journal {path} has layout {version}, and this sagecp reads layout {SCHEMA_VERSION}; "
            "use the version of sagecp that wrote it",
            path=str(path),
        )


def _make_tables(connection: apsw.Connection) -> None:
    with connection:
        connection.execute(_SCHEMA)
        # Tells the marks of one journal from those of another.
        journal_id = int.from_bytes(os.urandom(8), "little", signed=True)
        for name, value in (("journal_id", journal_id), ("base_sequence", 1), ("base_checksum", 0)):
            connection.execute("INSERT INTO meta (name, value) VALUES (?, ?)", (name, value))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def read_meta(connection: apsw.Connection, path: Path, name: str) -> int:
    """Return a number of the journal's own.

    Raises:
        StoreCorruptError: It is missing.
    """
    for (value,) in connection.execute("SELECT value FROM meta WHERE name = ?", (name,)):
        return int(value)
    raise corrupt(path, f"its table meta has no {name}", 0)
