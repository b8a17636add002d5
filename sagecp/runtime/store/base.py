"""The port to a store: what the runtime needs of whatever keeps its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sagecp.core.errors import ErrorReason, SageError
from sagecp.runtime.store.records import Record, RequestEnded

Written = Callable[["StoreError | None"], None]
"""Called on the event loop once a record is safe, or with the reason why it will not be."""


class StoreError(SageError):
    """A record cannot be written now; nothing of it was."""

    reason = ErrorReason.JOURNAL_UNAVAILABLE


class StoreCorruptError(StoreError):
    """What is stored is not what was written. Says where, and what can be done.

    Attributes:
        path: The file.
        position: Number of the record, or offset in the file, as ``where`` says.
    """

    def __init__(self, message: str, *, path: str = "", position: int = 0) -> None:
        super().__init__(message, path=path, position=str(position))
        self.path = path
        self.position = position


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a store does.

    Attributes:
        accepting: Whether new requests can be written.
        trouble: Why not, in a sentence; ``""`` while all is well.
        pending_count: Records that wait to be written.
        written_count: Records written since the start.
        pending_bytes: What those take.
        commit_count: Transactions since the start: fewer than records, because many share one.
        commit_s: Time that those took together, from the first row to the medium.
        size_bytes: What it takes on its medium; 0 where that is memory.
    """

    accepting: bool = True
    trouble: str = ""
    pending_count: int = 0
    pending_bytes: int = 0
    written_count: int = 0
    commit_count: int = 0
    commit_s: float = 0.0
    size_bytes: int = 0


class Store(Protocol):
    """Keeps records in the order in which they are given.

    One event loop owns a store; all methods are called on it.

    A record of a request belongs to the one that was accepted last under its
    id. Records of requests that have ended, and of instances that were
    dropped, are let go of by the store itself. Ended requests are kept apart,
    by tenant and id, for as long as the configuration says.
    """

    async def open(self) -> Sequence[Record]:
        """Open, check everything, and return what is live: in the order of writing.

        Of live requests every record, of registered instances the last one.

        Raises:
            StoreCorruptError: What is stored was damaged; names where.
            StoreError: It cannot be opened, or is in use by another process.
        """

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        """Have a record written, with whatever else waits, as soon as the medium is free.

        Records are written in order. A record that is written survives the end
        of this process; one with ``sync``, and all before it, survive the loss
        of power.

        A :class:`~sagecp.runtime.store.records.RequestAccepted` that cannot be
        written fails with :class:`StoreError`: the caller is told, and nothing
        was promised. Every other record is about a promise made already: while
        the medium takes nothing, such records wait here, and ``then`` is called
        as though they were safe, so that running requests can finish.
        """

    def may_have_ended(self, tenant_id: str, request_id: str) -> bool:
        """Whether an ended request under this id may be kept; ``False`` is certain."""

    async def find_ended(self, tenant_id: str, request_id: str) -> RequestEnded | None:
        """Return an ended request that is kept; its ``pieces`` are empty once its output was let go.

        Raises:
            StoreCorruptError: It is damaged.
        """

    def status(self) -> StoreStatus:
        """Return how the store does."""

    async def flush(self) -> None:
        """Return when everything given so far is synced.

        Raises:
            StoreError: It cannot be, for now.
        """

    async def close(self) -> None:
        """Write what waits, and let go of everything. Idempotent."""
