"""The thread that writes: takes everything that waits, commits it, and says so to the event loop.

It alone touches the connection that writes. What goes wrong is of two kinds:

* **No room** (or a write that failed, which may work again): new requests are
  refused, everything else waits in memory and is tried again each second. A
  ballast file is given up first, so that there is room for what was promised.
* **Anything else**, a failed fsync above all: after one, nobody can know what
  is on the disk. Nothing is written any more until a restart has read it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import apsw

from sagecp.config import JournalConfig
from sagecp.runtime.failpoints import reach
from sagecp.runtime.store.base import StoreError, Written
from sagecp.runtime.store.records import Record, RequestAccepted
from sagecp.runtime.store.sqlite.journal_file import JournalFile
from sagecp.runtime.store.sqlite.side_files import Ballast

logger = logging.getLogger(__name__)

# Bounds of one transaction.
_BATCH_RECORD_COUNT = 1024
_BATCH_BYTES = 8 << 20
# Between attempts while there is no room; also what clients are told.
RETRY_INTERVAL_S = 1.0
# Between looks at the clock while nothing is written, for what is kept for a time only.
_IDLE_INTERVAL_S = 5.0
_PASSING_IO_ERRORS = {
    apsw.SQLITE_IOERR_WRITE,
    apsw.SQLITE_IOERR_SHMSIZE,
    apsw.SQLITE_IOERR_SHMMAP,
}


class Waiting(NamedTuple):
    """A record that waits to be written; without one, somebody waits for all before it to be synced."""

    record: Record | None
    sync: bool
    then: Written | None
    byte_count: int


@dataclass(slots=True)
class Outcome:
    """What became of a batch, for the event loop.

    Attributes:
        answers: Who is to be told what, in order.
        released: What waits no more.
        trouble: Why new requests are refused; ``""``: they are not.
        is_final: Whether only a restart can help.
        written_count: Records written so far.
        commit_count: Transactions so far.
        commit_s: Time that they took together.
    """

    answers: list[tuple[Written, StoreError | None]] = field(default_factory=list)
    released: list[Waiting] = field(default_factory=list)
    trouble: str = ""
    is_final: bool = False
    written_count: int = 0
    commit_count: int = 0
    commit_s: float = 0.0


class JournalWriter:
    """Owns the thread. :meth:`give` and :meth:`stop` may be called from the event loop only."""

    def __init__(
        self,
        path: Path,
        config: JournalConfig,
        wall_clock: Callable[[], float],
        tell: Callable[[Outcome], None],
    ) -> None:
        """Set up; :meth:`start` begins.

        Args:
            path: The journal.
            config: Its bounds.
            wall_clock: Unix seconds.
            tell: Called on the event loop with what became of each batch.
        """
        self._path = path
        self._config = config
        self._wall_clock = wall_clock
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._given: queue.SimpleQueue[list[Waiting] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._opened: asyncio.Future[JournalFile] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._ballast = Ballast(path, config.ballast_bytes)
        # In order: read from the queue and not written yet.
        self._waiting: list[Waiting] = []
        # So many of them, from the front, were told to go on already.
        self._answered_count = 0
        self._stopping = False
        self._trouble = ""
        self._is_final = False
        self._retry_s = 0.0
        self._written_count = self._commit_count = 0
        self._commit_s = 0.0

    async def start(self) -> JournalFile:
        """Open the journal, in the thread.

        Raises:
            StoreError: As `JournalFile` does.
        """
        self._thread.start()
        return await self._opened

    def give(self, waiting: list[Waiting]) -> None:
        """Hand records over, in order."""
        self._given.put(waiting)

    async def stop(self) -> None:
        """Write what waits, close the journal, and end the thread."""
        self._given.put(None)
        await self._stopped
        self._thread.join()

    # -- in the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            file = self._open()
        except BaseException as error:  # noqa: BLE001 - whoever opens is told
            self._call(_succeed, self._stopped, None)
            self._call(_fail, self._opened, error)
            return
        if not self._ballast.take():
            self._trouble = self._no_room("no room for the ballast")
        self._call(self._tell, self._outcome())
        self._call(_succeed, self._opened, file)
        try:
            self._serve(file)
        except BaseException as error:
            # A defect: nobody may wait for ever because of it.
            logger.exception("journal writer crashed")
            self._give_up(f"the journal's writer failed: {error}")
            self._serve_nobody()
        self._close(file)

    def _open(self) -> JournalFile:
        try:
            return JournalFile(self._path, self._config, self._wall_clock)
        except StoreError as error:
            if not isinstance(error.__cause__, apsw.FullError | apsw.IOError):
                raise
        # A full disk: what is there must be readable all the same.
        self._ballast.release()
        return JournalFile(self._path, self._config, self._wall_clock)

    def _serve(self, file: JournalFile) -> None:
        written_row_count = 0
        has_upkeep = False
        while True:
            self._take(has_upkeep)
            if self._is_final:
                self._answer_without_writing()
            elif self._trouble:
                self._answer_without_writing()
                self._try_again(file)
            elif self._waiting:
                written_row_count = self._write(file)
            if self._stopping and (not self._waiting or self._trouble):
                return
            has_upkeep = not self._trouble and self._keep_up(file, written_row_count)

    def _take(self, has_upkeep: bool) -> None:
        """Wait for records, unless there is other work, and take all that are there."""
        if self._stopping or (self._waiting and not self._trouble) or has_upkeep:
            timeout_s = 0.0
        elif self._trouble and not self._is_final:
            timeout_s = max(0.0, self._retry_s - time.monotonic())
        else:
            timeout_s = _IDLE_INTERVAL_S
        try:
            given = self._given.get(timeout=timeout_s) if timeout_s else self._given.get_nowait()
            while True:
                if given is None:
                    self._stopping = True
                    # The last attempt, if there is trouble.
                    self._retry_s = 0.0
                else:
                    self._waiting += given
                given = self._given.get_nowait()
        except queue.Empty:
            return

    def _write(self, file: JournalFile) -> int:
        """Write one batch of what waits; return how many rows it had."""
        batch = self._next_batch()
        records = [each.record for each in batch if each.record is not None]
        begin_s = time.monotonic()
        try:
            written = file.write(records, sync=any(each.sync for each in batch))
        except apsw.Error as error:
            self._take_note(error)
            self._answer_without_writing()
            return 0
        del self._waiting[: len(batch)]
        self._answered_count = max(0, self._answered_count - len(batch))
        if written.rows:
            self._commit_count += 1
            self._commit_s += time.monotonic() - begin_s
        self._written_count += len(records)
        reach("journal.before_ack")
        outcome = self._outcome()
        unwritable = {
            id(record): StoreError(f"the record cannot be encoded: {why}")
            for record, why in written.unwritable
        }
        outcome.answers = [
            (each.then, unwritable.get(id(each.record))) for each in batch if each.then is not None
        ]
        outcome.released = batch
        self._call(self._tell, outcome)
        return len(written.rows)

    def _next_batch(self) -> list[Waiting]:
        byte_count = 0
        for number, each in enumerate(self._waiting[:_BATCH_RECORD_COUNT]):
            byte_count += each.byte_count
            if byte_count > _BATCH_BYTES and number:
                return self._waiting[:number]
        return self._waiting[:_BATCH_RECORD_COUNT]

    def _keep_up(self, file: JournalFile, written_row_count: int) -> bool:
        try:
            return file.keep_up(written_row_count)
        except StoreError as error:
            logger.error("%s", error)
            self._give_up("the journal is damaged; the server's log says where")
        except apsw.Error as error:
            self._take_note(error)
        self._call(self._tell, self._outcome())
        return False

    # -- trouble -----------------------------------------------------------------------------

    def _take_note(self, error: apsw.Error) -> None:
        if isinstance(error, apsw.FullError):
            self._make_room("the disk is full")
        elif isinstance(error, apsw.BusyError | apsw.LockedError):
            self._make_room(f"another program holds the file: {error}")
        elif isinstance(error, apsw.IOError) and getattr(error, "extendedresult", 0) in _PASSING_IO_ERRORS:
            self._make_room(f"writing failed: {error}")
        else:
            self._give_up(f"the journal cannot be written: {error}; the server must be restarted")

    def _make_room(self, why: str) -> None:
        self._ballast.release()
        if not self._trouble:
            # At once: there is room now for what was promised.
            self._retry_s = time.monotonic()
            logger.error("journal refuses new requests: %s", why, extra={"path": str(self._path)})
        self._trouble = self._no_room(why)

    def _no_room(self, why: str) -> str:
        # Clients are told: no paths.
        return f"the journal takes no new requests: {why}; it goes on by itself once that is over"

    def _give_up(self, trouble: str) -> None:
        self._trouble, self._is_final = trouble, True
        logger.critical("journal writes no more: %s", trouble, extra={"path": str(self._path)})

    def _answer_without_writing(self) -> None:
        """Refuse the new requests that came; tell all others to go on, and keep their records."""
        arrived = self._waiting[self._answered_count :]
        if not arrived:
            return
        del self._waiting[self._answered_count :]
        outcome = self._outcome()
        for each in arrived:
            is_refused = each.record is None or isinstance(each.record, RequestAccepted)
            if each.then is not None:
                outcome.answers.append((each.then, self._refusal() if is_refused else None))
            if is_refused:
                outcome.released.append(each)
            else:
                self._waiting.append(each._replace(then=None))
        self._answered_count = len(self._waiting)
        self._call(self._tell, outcome)

    def _refusal(self) -> StoreError:
        return StoreError(
            self._trouble,
            retry_after_s=None if self._is_final else RETRY_INTERVAL_S,
        )

    def _try_again(self, file: JournalFile) -> None:
        if time.monotonic() < self._retry_s:
            return
        while self._waiting and not self._is_final:
            before = len(self._waiting)
            self._write(file)
            if len(self._waiting) == before:
                break
        if not self._waiting and not self._is_final and self._has_room(file):
            self._trouble = ""
            logger.warning("journal takes new requests again", extra={"path": str(self._path)})
            self._call(self._tell, self._outcome())
        self._retry_s = time.monotonic() + RETRY_INTERVAL_S

    def _has_room(self, file: JournalFile) -> bool:
        try:
            file.probe()
        except apsw.Error as error:
            self._take_note(error)
            return False
        return self._ballast.take()

    def _serve_nobody(self) -> None:
        """Answer whoever comes until the end."""
        while not self._stopping:
            self._answer_without_writing()
            self._take(has_upkeep=False)

    # -- the end -----------------------------------------------------------------------------

    def _close(self, file: JournalFile) -> None:
        if self._waiting:
            logger.error(
                "journal is closed with records that could not be written",
                extra={"path": str(self._path), "record_count": len(self._waiting)},
            )
        try:
            if self._is_final:
                file.abandon()
            else:
                file.close()
        except (apsw.Error, OSError) as error:
            logger.error("journal could not be synced at its end: %s", error, extra={"path": str(self._path)})
        self._call(_succeed, self._stopped, None)

    def _outcome(self) -> Outcome:
        return Outcome(
            trouble=self._trouble,
            is_final=self._is_final,
            written_count=self._written_count,
            commit_count=self._commit_count,
            commit_s=self._commit_s,
        )

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop has ended without closing the store: nobody is there to be told.
            self._stopping = True


def _succeed(future: asyncio.Future[object], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[object], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def answer(answers: Sequence[tuple[Written, StoreError | None]]) -> None:
    """Call everybody who waits; one that fails keeps nobody else from being called."""
    for then, error in answers:
        try:
            then(error)
        except Exception:
            logger.exception("what was to follow a written record failed")
