"""The files beside a journal: the lock, the mark of what was promised, and the ballast."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from sagecp.runtime.store.base import StoreError

_SLOT = struct.Struct("<4sqQqI")
_SLOT_MAGIC = b"SGM1"
# On different pages and sectors, so that a write that was cut off spoils one of them.
_SLOT_OFFSETS = (0, 4096)
_ZEROS = bytes(1 << 20)


def side_file(path: Path, suffix: str) -> Path:
    """Return the path of a file beside a journal."""
    return path.with_name(path.name + suffix)


def sync_folder(path: Path) -> None:
    """Have the names in a file's folder, and the folder's own name, survive a loss of power.

    Raises:
        OSError: It cannot be done.
    """
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class FileLock:
    """Keeps a second process from a journal, for as long as this one lives."""

    def __init__(self, path: Path) -> None:
        self._journal = path
        self._path = side_file(path, "-lock")
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StoreError: Another process has it, or the folder cannot be written.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"journal {self._journal} cannot be locked: {error.strerror}: {self._path}; "
                "give a path in a folder that can be written",
                path=str(self._journal),
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreError(
                f"journal {self._journal} is in use by process {holder or 'unknown'}; stop it first, "
                "or give another path",
                path=str(self._journal),
                process_id=holder,
            ) from error
        self._descriptor = descriptor
        # Only for people: a full disk must not keep anybody from starting.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of it. Idempotent. The file stays: deleting it would race with another opener."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True)
class Mark:
    """What was promised last: a synced record.

    Attributes:
        journal_id: Whose.
        sequence: Number of the record.
        checksum: Its checksum.
    """

    journal_id: int
    sequence: int
    checksum: int


class MarkFile:
    """Remembers, apart from the journal, how far it reached, so that a shortened one is noticed.

    Written after each synced commit and never synced itself: after a loss of power
    it may be older than the journal, which hides a loss but never invents one.
    """

    def __init__(self, path: Path) -> None:
        self._path = side_file(path, "-mark")
        self._descriptor = -1
        self._slot = 0

    def read(self) -> Mark | None:
        """Return the newest mark, or ``None`` where there is none that is whole."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        newest = None
        for number, offset in enumerate(_SLOT_OFFSETS):
            mark = _read_slot(data, offset)
            if mark is not None and (newest is None or mark.sequence > newest.sequence):
                newest = mark
                self._slot = 1 - number
        return newest

    def write(self, mark: Mark) -> None:
        """Write a mark over the older of the two that are kept.

        Raises:
            OSError: It cannot be written.
        """
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fields = _SLOT.pack(_SLOT_MAGIC, mark.journal_id, mark.sequence, mark.checksum, 0)[:-4]
        slot = fields + struct.pack("<I", zlib.crc32(fields))
        os.pwrite(self._descriptor, slot, _SLOT_OFFSETS[self._slot])
        self._slot = 1 - self._slot

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _read_slot(data: bytes, offset: int) -> Mark | None:
    raw = data[offset : offset + _SLOT.size]
    if len(raw) < _SLOT.size:
        return None
    magic, journal_id, sequence, checksum, stored = _SLOT.unpack(raw)
    if magic != _SLOT_MAGIC or zlib.crc32(raw[:-4]) != stored:
        return None
    return Mark(journal_id, sequence, checksum)


class Ballast:
    """Room on the disk that is given up when it is full, so that what was promised can be written.

    Attributes:
        held: Whether the room is taken.
    """

    def __init__(self, path: Path, byte_count: int) -> None:
        self._path = side_file(path, "-ballast")
        self._byte_count = byte_count
        self.held = byte_count == 0

    def take(self) -> bool:
        """Take the room if twice as much is free; return whether it is held."""
        if self.held:
            return True
        try:
            if self._path.exists() and self._path.stat().st_blocks * 512 >= self._byte_count:
                self.held = True
                return True
            free = os.statvfs(self._path.parent)
            if free.f_bavail * free.f_frsize < 2 * self._byte_count:
                return False
            self._fill()
        except OSError:
            self.release()
            return False
        self.held = True
        return True

    def _fill(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Zeros that are written, not a hole: they must take up room on every file system.
            for start in range(0, self._byte_count, len(_ZEROS)):
                os.pwrite(descriptor, _ZEROS[: self._byte_count - start], start)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Give the room up. Idempotent."""
        self.held = self._byte_count == 0
        with contextlib.suppress(OSError):
            self._path.unlink()
