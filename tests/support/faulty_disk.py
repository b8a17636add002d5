"""A disk for SQLite that fails when it is told to, below every connection of this process."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw


class FaultyDisk:
    """What the next calls of the disk do.

    Attributes:
        is_full: Whether writing finds no room.
        fails_to_sync: Whether syncing fails.
        fails_to_write: Whether writing fails for another reason than room.
        may_sync: Syncing waits while this is not set.
        sync_count: Syncs that have succeeded.
        platter: Folder that gets every file as it is whenever it is synced: what a loss
            of power leaves at the worst.
    """

    def __init__(self) -> None:
        self.is_full = False
        self.fails_to_sync = False
        self.fails_to_write = False
        self.may_sync = threading.Event()
        self.may_sync.set()
        self.waits_to_sync = threading.Event()
        self.sync_count = 0
        self.platter: Path | None = None

    def write(self) -> None:
        if self.is_full:
            raise apsw.FullError("database or disk is full")
        if self.fails_to_write:
            raise _io_error(apsw.SQLITE_IOERR_WRITE)

    def sync(self, name: str) -> None:
        if not self.may_sync.is_set():
            self.waits_to_sync.set()
            assert self.may_sync.wait(30)
        if self.fails_to_sync:
            raise _io_error(apsw.SQLITE_IOERR_FSYNC)
        self.sync_count += 1
        if self.platter is not None:
            shutil.copyfile(name, self.platter / Path(name).name)


def _io_error(code: int) -> apsw.IOError:
    error = apsw.IOError("disk I/O error")
    # As the library does on its own errors; its stubs do not know.
    vars(error).update(result=code & 0xFF, extendedresult=code)
    return error


@contextlib.contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """Have every connection that is opened meanwhile write to a faulty disk."""
    disk = FaultyDisk()

    class File(apsw.VFSFile):
        def __init__(self, name: Any, flags: list[int]) -> None:
            super().__init__("unix", name, flags)
            self.name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
            if flags[0] & apsw.SQLITE_OPEN_WAL and not self.name.endswith("-wal"):
                # The library gives the name of the database for its log.
                self.name += "-wal"

        def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802 - named by SQLite
            disk.write()
            super().xWrite(data, offset)

        def xSync(self, flags: int) -> None:  # noqa: N802 - named by SQLite
            super().xSync(flags)
            disk.sync(self.name)

    class Disk(apsw.VFS):
        def __init__(self) -> None:
            super().__init__("faulty", "unix", makedefault=True)

        def xDelete(self, name: str, sync_folder: bool) -> None:  # noqa: N802 - named by SQLite
            super().xDelete(name, sync_folder)
            if disk.platter is not None:
                (disk.platter / Path(name).name).unlink(missing_ok=True)

        def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802 - named by SQLite
            return File(name, flags)

    vfs = Disk()
    try:
        yield disk
    finally:
        disk.may_sync.set()
        vfs.unregister()
