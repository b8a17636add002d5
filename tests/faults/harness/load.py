"""Callers of every kind, who go on whatever happens; what they see goes into a ledger."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping

import grpc

from sagecp.v1 import request_pb2
from tests.faults.harness.ledger import Entry, Ledger
from tests.faults.harness.programs import SimEngine

INSIST_S = 90.0
_PRIORITIES = (
    request_pb2.REQUEST_PRIORITY_CRITICAL,
    request_pb2.REQUEST_PRIORITY_NORMAL,
    request_pb2.REQUEST_PRIORITY_BACKGROUND,
)
# Beyond so many, the oldest that have ended are checked and let go.
_KEPT_COUNT = 3_000
_SETTLE_TIMEOUT_S = 180.0


class Load:
    """Callers that hand in requests one after another, each kind in its way.

    Args:
        ledger: Where everything is written down.
        generator: Draws kinds, sizes and delays.
        weights: How often each kind is drawn; see the methods.
        other: A second way to the control plane, which some streams are read over.

    Attributes:
        counts: Requests by kind.
        states: Ends of requests that are not in the ledger any more.
        refusals: Refusals by kind and status code.
    """

    def __init__(
        self,
        ledger: Ledger,
        generator: random.Random,
        weights: Mapping[str, float],
        other: Ledger | None = None,
    ) -> None:
        self._ledger = ledger
        self._random = generator
        self._weights = weights
        self._other = other
        self._number = 0
        self.counts: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    async def run(self, caller_count: int, stop: asyncio.Event) -> None:
        """Let callers call until told to stop; return when each has the end of its last request."""
        await asyncio.gather(*(self._call(stop) for _ in range(caller_count)))

    @contextlib.asynccontextmanager
    async def running(self, caller_count: int, engines: Iterable[SimEngine]) -> AsyncIterator[None]:
        """Let callers call while the context is open; at its end, wait for all they began and check it.

        Violations are left in the ledger.

        Args:
            caller_count: How many call at once.
            engines: Those that must come to rest.
        """
        stop = asyncio.Event()
        calling = asyncio.create_task(self.run(caller_count, stop))
        try:
            yield
            stop.set()
            await calling
            with contextlib.suppress(AssertionError):
                await self._ledger.settle(engines, timeout_s=_SETTLE_TIMEOUT_S)
        finally:
            stop.set()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)

    async def _call(self, stop: asyncio.Event) -> None:
        kinds, weights = list(self._weights), list(self._weights.values())
        while not stop.is_set():
            self._number += 1
            (kind,) = self._random.choices(kinds, weights)
            entry = self._ledger.entry(f"{kind}-{self._number}", token_count=self._random.randint(1, 60))
            entry.spec.priority = self._random.choice(_PRIORITIES)
            self.counts[kind] += 1
            try:
                await getattr(self, f"_{kind}")(entry)
            except grpc.aio.AioRpcError as error:
                self.refusals[f"{kind}: {error.code().name}"] += 1
                if entry.acknowledged:
                    self._ledger.violations.append(
                        f"{entry.request_id}: accepted, and then {error.code().name}"
                    )
            except AssertionError as error:
                self._ledger.violations.append(str(error))
            if not entry.acknowledged:
                del self._ledger.entries[entry.request_id]
            await self._retire()

    async def _retire(self) -> None:
        entries = self._ledger.entries
        if len(entries) <= _KEPT_COUNT:
            return
        oldest = next(iter(entries.values()))
        if oldest.terminal is not None:
            del entries[oldest.request_id]
            await self._ledger.check(oldest)
            self.states[oldest.state] += 1

    async def _plain(self, entry: Entry) -> None:
        """Submit, read to the end."""
        await self._ledger.hand_in(entry, insist_s=INSIST_S)
        await self._ledger.read(entry, timeout_s=INSIST_S)

    async def _elsewhere(self, entry: Entry) -> None:
        """Submit, read over another connection, which may break."""
        await self._ledger.hand_in(entry, insist_s=INSIST_S)
        within = None if self._other is None else self._other.stub
        await self._ledger.read(entry, timeout_s=INSIST_S, within=within)

    async def _repeated(self, entry: Entry) -> None:
        """Submit several times at once; it is one request."""
        answers = await asyncio.gather(
            *(self._ledger.hand_in(entry, insist_s=INSIST_S) for _ in range(3)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(refused) == len(answers):
            raise refused[0]
        created = sum(answer.created for answer in answers if not isinstance(answer, BaseException))
        # None: the answer to the one that created it was lost, and it was repeated.
        assert created <= 1, f"I2: {entry.request_id} was created {created} times"
        await self._ledger.read(entry, timeout_s=INSIST_S)

    async def _cancelled(self, entry: Entry) -> None:
        """Submit, and cancel at some time, perhaps too late."""
        await self._ledger.hand_in(entry, insist_s=INSIST_S)
        reading = asyncio.create_task(self._ledger.read(entry, timeout_s=INSIST_S))
        try:
            await asyncio.sleep(self._random.uniform(0.0, 0.6))
            reply = await self._ledger.cancel(entry, insist_s=INSIST_S)
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert entry.terminal is not None
        assert reply.request.state == entry.terminal.state, f"I2: {entry.request_id}: replies differ"

    async def _hurried(self, entry: Entry) -> None:
        """Submit with a deadline that may pass."""
        entry.spec.objectives.end_to_end_deadline.FromMilliseconds(self._random.randint(100, 3_000))
        await self._plain(entry)

    async def _slow(self, entry: Entry) -> None:
        """Submit, read slowly."""
        await self._ledger.hand_in(entry, insist_s=INSIST_S)
        await self._ledger.read(entry, timeout_s=INSIST_S, delay_s=self._random.uniform(0.01, 0.1))

    async def _generate(self, entry: Entry) -> None:
        """Generate: kept in memory only, so that a crash of the control plane may end it."""
        await self._ledger.generate(entry)
        if entry.terminal is None:
            # Nothing was promised beyond the connection.
            entry.acknowledged = False
        else:
            self.states[entry.state] += 1
            del self._ledger.entries[entry.request_id]
            assert entry.terminal.token_count == len(entry.token_ids), f"I3: {entry.request_id}"
            entry.acknowledged = True
