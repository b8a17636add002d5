"""A store that keeps everything in memory: for tests, and for whoever needs no durability."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import StoreError, StoreStatus, Written
from sagecp.runtime.store.codec import approximate_byte_count
from sagecp.runtime.store.records import (
    InstanceDropped,
    InstanceKept,
    Record,
    RequestAccepted,
    RequestEnded,
)


class MemoryStore:
    """Keeps records as long as this object lives: closed and opened again, it has them still.

    Nothing can fail here, and what is given is safe at once, as far as that goes.
    """

    def __init__(
        self, config: JournalConfig | None = None, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config or JournalConfig()
        self._wall_clock = wall_clock
        self._requests: dict[str, list[tuple[int, Record]]] = {}
        self._instances: dict[str, tuple[int, Record]] = {}
        # Oldest first; what a record takes is counted for its output.
        self._ended: dict[tuple[str, str], RequestEnded] = {}
        self._output_bytes_of: dict[tuple[str, str], int] = {}
        self._output_bytes = 0
        self._position = 0
        self._written_count = 0
        self._is_open = self._was_opened = False

    async def open(self) -> Sequence[Record]:
        """Return what is live."""
        if self._is_open:
            raise RuntimeError("the store is open already")
        self._is_open = self._was_opened = True
        placed = [each for records in self._requests.values() for each in records]
        placed += self._instances.values()
        return [record for _position, record in sorted(placed, key=lambda each: each[0])]

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        """Keep a record; see the port."""
        del sync
        if not self._was_opened:
            raise RuntimeError("the store is not open")
        if not self._is_open:
            if then is not None:
                asyncio.get_running_loop().call_soon(then, StoreError("the store is closed"))
            return
        self._position += 1
        self._written_count += 1
        self._keep(record)
        self._let_go()
        if then is not None:
            asyncio.get_running_loop().call_soon(then, None)

    def _keep(self, record: Record) -> None:
        placed = (self._position, record)
        if isinstance(record, InstanceKept):
            self._instances[record.instance_id] = placed
        elif isinstance(record, InstanceDropped):
            self._instances.pop(record.instance_id, None)
        elif isinstance(record, RequestAccepted):
            self._requests[record.request_id] = [placed]
        elif isinstance(record, RequestEnded):
            self._requests.pop(record.request_id, None)
            self._archive(record)
        elif record.request_id in self._requests:
            self._requests[record.request_id].append(placed)

    def _archive(self, record: RequestEnded) -> None:
        key = (record.tenant_id, record.request_id)
        self._ended.pop(key, None)
        self._output_bytes -= self._output_bytes_of.pop(key, 0)
        self._ended[key] = record
        if record.pieces:
            self._output_bytes_of[key] = approximate_byte_count(record)
            self._output_bytes += self._output_bytes_of[key]

    def _let_go(self) -> None:
        now_wall_s, config = self._wall_clock(), self._config
        while self._ended:
            key, record = next(iter(self._ended.items()))
            is_old = record.end_wall_s < now_wall_s - config.retention_s
            if not is_old and len(self._ended) <= config.max_ended_count:
                break
            del self._ended[key]
            self._output_bytes -= self._output_bytes_of.pop(key, 0)
        while self._output_bytes_of:
            key = next(iter(self._output_bytes_of))
            record = self._ended[key]
            is_old = record.end_wall_s < now_wall_s - config.output_retention_s
            if not is_old and self._output_bytes <= config.max_output_bytes:
                break
            self._output_bytes -= self._output_bytes_of.pop(key)
            self._ended[key] = without_output(record)

    def may_have_ended(self, tenant_id: str, request_id: str) -> bool:
        """Return whether an ended request under this id is kept."""
        return (tenant_id, request_id) in self._ended

    async def find_ended(self, tenant_id: str, request_id: str) -> RequestEnded | None:
        """Return an ended request that is kept."""
        return self._ended.get((tenant_id, request_id))

    def status(self) -> StoreStatus:
        """Return how the store does."""
        return StoreStatus(
            accepting=self._is_open, written_count=self._written_count, commit_count=self._written_count
        )

    async def flush(self) -> None:
        """Return once the callbacks of everything given so far were called."""
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Take nothing more, once the callbacks were called. Idempotent."""
        self._is_open = False
        await asyncio.sleep(0)


def without_output(record: RequestEnded) -> RequestEnded:
    """Return an ended request without its output."""
    return RequestEnded(
        request_id=record.request_id,
        tenant_id=record.tenant_id,
        sequence=record.sequence,
        fingerprint=record.fingerprint,
        end_wall_s=record.end_wall_s,
        status=record.status,
        pieces=(),
    )
