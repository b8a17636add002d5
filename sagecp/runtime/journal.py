"""Writes down what happens to durable requests and to instances; the runtime's side of a store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sagecp.core.errors import Failure
from sagecp.core.instance_record import InstanceRecord
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.requests import RequestHandle
from sagecp.runtime.store.base import Store, StoreError, Written
from sagecp.runtime.store.codec import encode_instance, encode_metadata, encode_status, pack_token_ids
from sagecp.runtime.store.records import (
    AttemptDispatched,
    AttemptLost,
    InstanceDropped,
    InstanceKept,
    Moment,
    OutputProduced,
    PromptTokenized,
    RequestAccepted,
    RequestEnded,
)

_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return a name of this run of the machine, or ``""`` where there is none."""
    try:
        return _BOOT_ID_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Journal:
    """What the control loop writes, in the store's records.

    Args:
        store: Where to.
        clock: The core's clock.
        wall_offset_s: Add to that clock to get Unix seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float], wall_offset_s: float) -> None:
        self.store = store
        self._clock = clock
        self._wall_offset_s = wall_offset_s
        # Another clock than the machine's says nothing to the next process.
        self._boot_id = boot_id() if clock is time.monotonic else ""
        self._unwritten: dict[JournaledOutput, None] = {}

    def moment(self, time_s: float) -> Moment:
        """Return a time of the core's clock for another process."""
        return Moment(time_s, time_s + self._wall_offset_s, self._boot_id)

    def time_of(self, moment: Moment) -> float:
        """Return a time that another process wrote, on the core's clock.

        By the machine's monotonic clock where that ran on since, so that nobody who
        sets the clock moves a deadline; else by wall time.
        """
        if self._boot_id and moment.boot_id == self._boot_id:
            return moment.clock_s
        return moment.wall_s - self._wall_offset_s

    # -- requests ------------------------------------------------------------------

    def accepted(self, handle: RequestHandle, then: Written) -> None:
        """Write a new request; ``then`` is called when it survives the loss of power, or cannot."""
        record, metadata = handle.record, handle.record.metadata
        self.store.append(
            RequestAccepted(
                record.request_id,
                metadata.tenant_id,
                handle.sequence,
                handle.fingerprint,
                record.model,
                self.moment(record.arrival_s),
                encode_metadata(metadata, record.digest),
            ),
            sync=True,
            then=then,
        )

    async def dispatched(self, handle: RequestHandle, epoch: int, instance_id: str, incarnation: int) -> None:
        """Write that an attempt is about to be made, and return when that is safe.

        Raises:
            StoreError: It cannot be written.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then(error: StoreError | None) -> None:
            if written.done():
                return
            if error is None:
                written.set_result(None)
            else:
                written.set_exception(error)

        self.store.append(
            AttemptDispatched(handle.request_id, epoch, instance_id, incarnation, self.moment(self._clock())),
            sync=True,
            then=then,
        )
        await written

    def lost(self, handle: RequestHandle, epoch: int, failure: Failure, now: float) -> None:
        """Write that an attempt was lost and the request goes on."""
        record = handle.record
        self.store.append(
            AttemptLost(
                record.request_id,
                epoch,
                self.moment(now),
                failure.reason.name,
                failure.message,
                record.lost_attempt_count,
                record.engine_kill_count,
            )
        )

    def ended(self, handle: RequestHandle, then: Written) -> None:
        """Write how a request ended, with its usage and its output, in one record."""
        status = handle.status(None)
        self.store.append(
            RequestEnded(
                handle.request_id,
                status.tenant_id,
                handle.sequence,
                handle.fingerprint,
                status.end_time_s or 0.0,
                encode_status(status),
                tuple(handle.output.deltas),
            ),
            sync=True,
            then=then,
        )

    # -- output --------------------------------------------------------------------

    def output_of(self, handle: RequestHandle) -> JournaledOutput:
        """Return a sink for an attempt: what it is given is written before readers see it."""
        return JournaledOutput(self, handle)

    def note_unwritten(self, output: JournaledOutput) -> None:
        """Have a sink's pieces written at the end of this turn of the event loop, with all others'."""
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_outputs)
        self._unwritten[output] = None

    def _write_outputs(self) -> None:
        outputs, self._unwritten = self._unwritten, {}
        for output in outputs:
            output.write()

    # -- instances -----------------------------------------------------------------

    def instance_kept(self, record: InstanceRecord) -> None:
        """Write what an instance is now."""
        drain, adapters = record.drain, record.desired_lora_adapters
        self.store.append(
            InstanceKept(
                record.instance_id,
                record.incarnation,
                drain is not None,
                encode_instance(record.spec),
                0 if drain is None else drain.sleep_level,
                None if adapters is None else tuple((each.name, each.path) for each in adapters),
            ),
            sync=True,
        )

    def instance_dropped(self, instance_id: str) -> None:
        """Write that an instance is registered no more."""
        self.store.append(InstanceDropped(instance_id), sync=True)


class JournaledOutput:
    """An attempt's sink: pieces are written first and shown to readers then.

    So a reader never has a token that a restart would not know. Written means that
    it survives the end of this process; output is not worth a sync per token.
    """

    __slots__ = ("_journal", "_log", "_next_index", "_pieces", "_request_id", "_waiter", "_writing")

    def __init__(self, journal: Journal, handle: RequestHandle) -> None:
        self._journal = journal
        self._log = handle.output
        self._request_id = handle.request_id
        self._pieces: list[EngineDelta] = []
        self._next_index = handle.output.token_count
        # Batches on their way to the medium.
        self._writing = 0
        self._waiter: asyncio.Future[None] | None = None

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Take the prompt as the engine reads it."""
        if not self._log.prompt_token_ids:
            self._log.on_prompt(token_ids)
            self._journal.store.append(PromptTokenized(self._request_id, pack_token_ids(token_ids)))

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Take pieces of output."""
        if not self._pieces:
            self._journal.note_unwritten(self)
        self._pieces.extend(deltas)

    def write(self) -> None:
        """Have what was taken written."""
        if not self._pieces:
            return
        pieces, self._pieces = self._pieces, []
        first_index = self._next_index
        self._next_index += sum(piece.token_count for piece in pieces)
        self._writing += 1

        def then(_: StoreError | None) -> None:
            self._writing -= 1
            self._log.on_deltas(pieces)
            if self._waiter is not None and not self._writing:
                if not self._waiter.done():
                    self._waiter.set_result(None)
                self._waiter = None

        self._journal.store.append(
            OutputProduced(self._request_id, self._log.epoch, first_index, tuple(pieces)), then=then
        )

    async def drained(self) -> None:
        """Return when readers can see everything that was taken."""
        self.write()
        if self._writing:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
