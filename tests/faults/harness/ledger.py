"""The ledger: everything that was promised and delivered to callers, and whether it adds up.

The invariants of the fault matrix, as :meth:`Ledger.settle` asserts them:

* I1: no acknowledged request is lost; each is known and reaches a terminal state.
* I2: there is one terminal state; looking again shows the same.
* I3: token indices are contiguous and unique; read again from 0, the output is the same.
* I4: what is charged is what was delivered.
* I5: five seconds after the end no engine works on anything.

Greedy output of the simulated engine is a function of the tokens before it, so that a spliced
output is known in advance: it must equal an unbroken one.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from sagecp.sim import tokenizer
from sagecp.sim.token_source import TokenSource
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import inference_service_pb2_grpc, request_pb2
from tests.faults.harness.programs import CHANNEL_OPTIONS, MODEL, SimEngine
from tests.faults.harness.waiting import WAIT_S, becomes

T = TypeVar("T")

IDLE_WITHIN_S = 5.0
STREAM_CHANNEL_COUNT = 4
_CALL_TIMEOUT_S = 10.0
_TERMINAL = frozenset(
    request_pb2.RequestState.Value(f"REQUEST_STATE_{name}")
    for name in ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
)
# What a caller does about a failed call: nothing is wrong with the request itself.
_CODE = grpc.StatusCode
_TRY_AGAIN = frozenset({_CODE.UNAVAILABLE, _CODE.DEADLINE_EXCEEDED, _CODE.UNKNOWN, _CODE.CANCELLED})


@dataclass
class Entry:
    """One request as its caller knows it.

    Attributes:
        spec: What was asked.
        expected_ids: What an unbroken run gives; ``None``: not known.
        acknowledged: Whether Submit answered, or Generate opened.
        token_ids: What was received, in order.
        text: Likewise.
        epochs: The attempts that produced it.
        token_times_s: When each token was received.
        connection_count: Streams that were opened to read it.
        failovers: Notices of attempts that were lost.
        draining: Notices that the server goes away.
        terminal: How it ended, as its reader was told; ``None``: not told.
    """

    spec: request_pb2.RequestSpec
    expected_ids: tuple[int, ...] | None = None
    acknowledged: bool = False
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    epochs: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    connection_count: int = 0
    failovers: list[Any] = field(default_factory=list)
    draining: list[Any] = field(default_factory=list)
    terminal: pb.StreamTerminal | None = None

    @property
    def request_id(self) -> str:
        """Its id."""
        return self.spec.request_id

    @property
    def state(self) -> str:
        """How it ended, by name; empty before."""
        return "" if self.terminal is None else state_name(self.terminal.state)

    def longest_gap_s(self) -> float:
        """Return the longest time between two tokens."""
        pairs = itertools.pairwise(self.token_times_s)
        return max((after - before for before, after in pairs), default=0.0)

    def take(self, chunk: pb.TokenChunk, *, first: bool) -> None:
        """Add what a chunk brings.

        The first chunk of a stream may begin before the index asked for, if its pieces are not to be
        told apart; what came before must then come again unchanged.

        Raises:
            AssertionError: There is a gap or a repetition, or the past has changed.
        """
        ids = list(chunk.token_ids)
        assert len(ids) == chunk.token_count, f"{self.request_id}: {chunk.token_count} tokens, {len(ids)} ids"
        known = len(self.token_ids) - chunk.first_token_index
        assert known >= 0, (
            f"I3: {self.request_id}: gap before token {chunk.first_token_index}, have {len(self.token_ids)}"
        )
        assert first or not known, f"I3: {self.request_id}: token {chunk.first_token_index} came twice"
        overlap = self.token_ids[chunk.first_token_index :][: len(ids)]
        assert ids[: len(overlap)] == overlap, (
            f"I3: {self.request_id}: token {chunk.first_token_index} changed"
        )
        new = ids[known:]
        now = time.monotonic()
        self.token_ids += new
        self.text += chunk.text if not known else tokenizer.decode(new)
        self.epochs += [chunk.epoch] * len(new)
        self.token_times_s += [now] * len(new)


class Ledger:
    """Calls a control plane and writes down what it answers.

    Args:
        address: Host and port of the control plane, or of a proxy before it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.entries: dict[str, Entry] = {}
        self.violations: list[str] = []
        self._channels: list[grpc.aio.Channel] = []
        self._stream_number = 0

    @property
    def stub(self) -> Any:
        """Stub of the inference service, over a channel that comes back soon after its server."""
        return self._stub(0)

    def _stub(self, number: int) -> Any:
        while len(self._channels) <= number:
            self._channels.append(grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS))
        return inference_service_pb2_grpc.InferenceServiceStub(self._channels[number])

    def _stream_stub(self) -> Any:
        """Return a stub for a stream: a connection holds a thousand, and then other calls wait."""
        self._stream_number += 1
        return self._stub(1 + self._stream_number % STREAM_CHANNEL_COUNT)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    def entry(self, request_id: str, *, token_count: int = 20, prompt: str = "", **fields: Any) -> Entry:
        """Return a new entry for a greedy request of so many tokens."""
        text = prompt or f"tell me about {request_id}"
        fields.setdefault("model", MODEL)
        fields.setdefault(
            "sampling",
            request_pb2.SamplingParameters(max_tokens=token_count, temperature=0.0, ignore_eos=True),
        )
        spec = request_pb2.RequestSpec(request_id=request_id, prompt=request_pb2.Prompt(text=text), **fields)
        source = TokenSource(0, tokenizer.encode(text))
        expected = tuple(source.next_token(may_end=False) for _ in range(token_count))
        entry = Entry(spec, expected)
        assert request_id not in self.entries
        self.entries[request_id] = entry
        return entry

    async def submit(self, request_id: str, *, insist_s: float = 0.0, **fields: Any) -> Entry:
        """Submit a request; where there is no answer, again for ``insist_s`` seconds."""
        entry = self.entry(request_id, **fields)
        await self.hand_in(entry, insist_s=insist_s)
        return entry

    async def hand_in(self, entry: Entry, *, insist_s: float = 0.0) -> pb.SubmitResponse:
        """Submit what an entry asks for; that may be a repetition."""

        async def call() -> pb.SubmitResponse:
            answer: pb.SubmitResponse = await self.stub.Submit(
                pb.SubmitRequest(spec=entry.spec), timeout=_CALL_TIMEOUT_S
            )
            return answer

        answer = await insist(call, insist_s)
        entry.acknowledged = True
        return answer

    async def read(
        self, entry: Entry, *, timeout_s: float = WAIT_S, delay_s: float = 0.0, within: Any = None
    ) -> Entry:
        """Read a request's output to its end, over as many connections as it takes.

        Args:
            entry: The request.
            timeout_s: For all of it.
            delay_s: After each piece: a slow reader.
            within: A stub to read over; default: the ledger's own.
        """
        end_s = time.monotonic() + timeout_s
        while entry.terminal is None:
            remaining_s = end_s - time.monotonic()
            assert remaining_s > 0, (
                f"I1: {entry.request_id} did not end; {len(entry.token_ids)} tokens so far"
            )
            query = pb.StreamRequest(request_id=entry.request_id, from_token_index=len(entry.token_ids))
            await self._follow(
                entry, (within or self._stream_stub()).Stream(query, timeout=remaining_s), delay_s
            )
            if entry.terminal is None:
                await asyncio.sleep(0.05)
        return entry

    async def generate(self, entry: Entry, *, detach: bool = False, timeout_s: float = WAIT_S) -> Entry:
        """Submit and read in one call, until that ends."""
        query = pb.GenerateRequest(spec=entry.spec, detach_on_disconnect=detach)
        await self._follow(entry, self._stream_stub().Generate(query, timeout=timeout_s), 0.0)
        return entry

    async def _follow(self, entry: Entry, call: Any, delay_s: float) -> None:
        entry.connection_count += 1
        first = True
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                kind = message.WhichOneof("event")
                if kind == "chunk":
                    entry.take(message.chunk, first=first)
                    first = False
                    if delay_s:
                        await asyncio.sleep(delay_s)
                elif kind == "opened":
                    entry.acknowledged = True
                elif kind == "terminal":
                    assert entry.terminal is None, f"I2: {entry.request_id} ended twice"
                    entry.terminal = message.terminal
                elif message.notice.HasField("failover"):
                    entry.failovers.append(message.notice.failover)
                else:
                    entry.draining.append(message.notice.draining)
        except grpc.aio.AioRpcError as error:
            if entry.terminal is None and error.code() not in _TRY_AGAIN:
                raise
        finally:
            call.cancel()

    async def cancel(self, entry: Entry, *, insist_s: float = WAIT_S) -> pb.CancelRequestResponse:
        """Cancel a request."""

        async def call() -> pb.CancelRequestResponse:
            answer: pb.CancelRequestResponse = await self.stub.CancelRequest(
                pb.CancelRequestRequest(request_id=entry.request_id), timeout=_CALL_TIMEOUT_S
            )
            return answer

        return await insist(call, insist_s)

    async def look(self, request_id: str) -> request_pb2.Request:
        """Return what is known of a request, even if the control plane is only about to come back."""

        async def call() -> request_pb2.Request:
            answer = await self.stub.GetRequest(
                pb.GetRequestRequest(request_id=request_id), timeout=_CALL_TIMEOUT_S
            )
            found: request_pb2.Request = answer.request
            return found

        return await insist(call, WAIT_S)

    def acknowledged(self) -> list[Entry]:
        """Return the requests that were accepted."""
        return [entry for entry in self.entries.values() if entry.acknowledged]

    def states(self) -> Counter[str]:
        """Count how the accepted requests ended."""
        return Counter(entry.state for entry in self.acknowledged())

    async def settle(self, engines: Iterable[SimEngine] = (), *, timeout_s: float = WAIT_S) -> None:
        """Wait for the end of everything accepted, and assert every invariant.

        Args:
            engines: Those that run, and must come to rest.
            timeout_s: For requests that have not ended.
        """
        end_s = time.monotonic() + timeout_s
        gate = asyncio.Semaphore(64)

        async def check(entry: Entry) -> None:
            async with gate:
                await self.check(entry, timeout_s=max(1.0, end_s - time.monotonic()))

        await asyncio.gather(*(check(entry) for entry in self.acknowledged()))
        for engine in engines:
            try:
                await becomes(
                    engine.work_count, lambda n: n == 0, f"I5: {engine.name} is idle", timeout_s=IDLE_WITHIN_S
                )
            except AssertionError as error:
                self.violations.append(str(error))
        shown = "\n".join(self.violations[:10])
        assert not self.violations, f"{len(self.violations)} violations, such as:\n{shown}"

    async def check(self, entry: Entry, *, timeout_s: float = WAIT_S) -> None:
        """Wait for the end of a request, compare everything, and write down what does not add up."""
        try:
            await self.read(entry, timeout_s=timeout_s)
            await self._compare(entry)
        except (AssertionError, grpc.aio.AioRpcError) as error:
            lost = isinstance(error, grpc.aio.AioRpcError) and error.code() is _CODE.NOT_FOUND
            self.violations.append(f"{'I1: ' * lost}{entry.request_id}: {error}")

    async def _compare(self, entry: Entry) -> None:
        terminal = entry.terminal
        assert terminal is not None
        assert terminal.state in _TERMINAL, f"I2: {entry.state} is no end"
        known = await self.look(entry.request_id)
        assert known.state == terminal.state, f"I2: was {entry.state}, is {state_name(known.state)}"
        assert known.usage == terminal.usage, f"I4: charged {terminal.usage}, now {known.usage}"
        again = Entry(entry.spec)
        await self.read(again, timeout_s=_CALL_TIMEOUT_S)
        assert again.terminal is not None
        assert again.terminal.state == terminal.state, f"I2: was {entry.state}, is {again.state}"
        assert again.token_ids == entry.token_ids, (
            f"I3: {len(entry.token_ids)} tokens, {len(again.token_ids)} when read again"
        )
        assert again.text == entry.text, "I3: the text is another when read again"
        count = len(entry.token_ids)
        assert terminal.token_count == count, f"I3: {terminal.token_count} tokens, {count} delivered"
        charged = terminal.usage.completion_token_count
        assert charged == count, f"I4: {charged} tokens charged, {count} delivered"
        if entry.expected_ids is not None:
            expected = entry.expected_ids[:count] if entry.state != "SUCCEEDED" else entry.expected_ids
            assert tuple(entry.token_ids) == expected, "I3: the output is not that of an unbroken run"
            assert entry.text == tokenizer.decode(entry.token_ids), "I3: the text is not that of the tokens"


async def insist(call: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Repeat a call that got no answer, for so long.

    Raises:
        grpc.aio.AioRpcError: It was refused, or there was no answer in time.
    """
    end_s = time.monotonic() + seconds
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in _TRY_AGAIN or time.monotonic() > end_s:
                raise
            await asyncio.sleep(0.05)


def state_name(state: int) -> str:
    """Return the name of a state without its prefix."""
    return request_pb2.RequestState.Name(request_pb2.RequestState.ValueType(state)).removeprefix(
        "REQUEST_STATE_"
    )
