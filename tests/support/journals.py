"""Journals for tests of damage and of crashes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.records import Record
from sagecp.runtime.store.sqlite.store import SqliteStore
from tests.support.store_records import Wall

SMALL = JournalConfig(ballast_bytes=0)


@contextlib.asynccontextmanager
async def open_journal(
    path: Path, config: JournalConfig = SMALL
) -> AsyncIterator[tuple[SqliteStore, Sequence[Record]]]:
    """Open a journal, and close it whatever happens."""
    store = SqliteStore(path, config, wall_clock=Wall())
    try:
        yield store, await store.open()
    finally:
        await store.close()


async def write(store: SqliteStore, record: Record, *, sync: bool = True) -> StoreError | None:
    """Append a record, and return what it was answered."""
    answer: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    store.append(record, sync=sync, then=answer.set_result)
    return await answer


def copy_journal(source: Path, target: Path) -> Path:
    """Copy the files of a journal as they are now: what a crash would leave. Return the new path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-mark"):
        found = source.with_name(source.name + suffix)
        if found.exists():
            shutil.copyfile(found, target.with_name(target.name + suffix))
    return target


def flip_bit(path: Path, offset: int, bit: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
