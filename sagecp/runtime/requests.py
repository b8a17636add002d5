"""Requests as the runtime knows them: live ones, and ended ones for as long as they are kept."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterator

import msgspec

from sagecp.core.cost_book import final_cost
from sagecp.core.effects import InterruptAttempt
from sagecp.core.errors import Failure, RequestNotFoundError, TooManyStreamsError
from sagecp.core.request import RequestRecord
from sagecp.core.request_cost import RequestCost
from sagecp.core.types import AttemptRecord, RequestMetadata, RequestState, RequestStatus, Usage
from sagecp.runtime.engines.base import EngineOutcome
from sagecp.runtime.engines.request_body import JSON_ERRORS, not_json
from sagecp.runtime.output import OutputLog
from sagecp.runtime.store.base import StoreError


def fingerprint(metadata: RequestMetadata) -> bytes:
    """Return a hash of what was asked, to tell a repetition from another request with the same id.

    Raises:
        InvalidRequestError: It holds what JSON cannot express.
    """
    bias = metadata.sampling.logit_bias
    if bias:
        # Keys that are numbers have no order in JSON.
        metadata = dataclasses.replace(
            metadata, sampling=dataclasses.replace(metadata.sampling, logit_bias={})
        )
    try:
        content = msgspec.json.encode((metadata, sorted(bias.items())), order="deterministic")
    except JSON_ERRORS as error:
        raise not_json(error) from error
    return hashlib.blake2b(content, digest_size=16).digest()


class OneTimeEvent:
    """An event that is set once, for objects of which there are many: `asyncio.Event` takes 800 bytes."""

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        """Return whether it happened."""
        return self._is_set

    def set(self) -> None:
        """Let everybody know that it happened."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Return once it has happened."""
        if self._is_set:
            return
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()


class Acceptance:
    """Whether a new request survives a restart, for all who wait to know. Settled once."""

    __slots__ = ("_error", "_is_settled", "_waiters")

    def __init__(self) -> None:
        self._is_settled = False
        self._error: StoreError | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def settle(self, error: StoreError | None) -> None:
        """Say that it does, or why it cannot."""
        self._is_settled, self._error = True, error
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return once it is certain.

        Raises:
            StoreError: It cannot be: the request was never accepted.
        """
        if not self._is_settled:
            # One for each who waits: the others still do when one of them is cancelled.
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None:
            raise self._error


class Attempt:
    """One execution, while it may still change. Times are on the core's clock."""

    __slots__ = ("dispatch_s", "end_s", "epoch", "failure", "instance_id")

    def __init__(self, epoch: int, instance_id: str, dispatch_s: float) -> None:
        self.epoch = epoch
        self.instance_id = instance_id
        self.dispatch_s = dispatch_s
        self.end_s: float | None = None
        self.failure: Failure | None = None


class RequestHandle:
    """One request with everything the runtime adds to the core's record.

    Attributes:
        record: The core's record; the authority on state.
        output: What it produced.
        fingerprint: Hash of what was asked.
        sequence: Order of creation, unique; newest highest.
        wall_offset_s: Add to the core's clock to get Unix seconds.
        durable: Whether it survives a restart.
        accepted: Settled when its acceptance survives a restart, or cannot; ``None``: nobody need wait.
        ended: Set when it is in its terminal state, and that is certain.
        refused: It could not be written down and was never accepted.
        suspended: The control plane stops; the request goes on when it starts again.
        task: The present attempt, or ``None``.
        interruption: Why that is being stopped, so that the request goes on elsewhere.
    """

    __slots__ = (
        "accepted",
        "attempts",
        "durable",
        "end_s",
        "ended",
        "failure",
        "fingerprint",
        "interruption",
        "outcome",
        "output",
        "record",
        "refused",
        "sequence",
        "suspended",
        "task",
        "wall_offset_s",
    )

    def __init__(
        self, record: RequestRecord, output: OutputLog, digest: bytes, sequence: int, wall_offset_s: float
    ) -> None:
        self.record = record
        self.output = output
        self.fingerprint = digest
        self.sequence = sequence
        self.wall_offset_s = wall_offset_s
        self.durable = False
        self.accepted: Acceptance | None = None
        self.refused = False
        self.suspended = False
        self.interruption: InterruptAttempt | None = None
        self.attempts: list[Attempt] = []
        self.task: asyncio.Task[None] | None = None
        self.outcome: EngineOutcome | None = None
        self.failure: Failure | None = None
        self.end_s: float | None = None
        self.ended = OneTimeEvent()

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.record.request_id

    @property
    def state(self) -> RequestState:
        """Where it is in its life."""
        return RequestState.QUEUED if self.suspended else self.record.state

    @property
    def finish_reason(self) -> str:
        """Finish reason of the first choice, or ``""``."""
        return self.outcome.finish_reasons[0] if self.outcome and self.outcome.finish_reasons else ""

    def usage(self) -> Usage:
        """Return the tokens so far; the engine's own count once it gave one."""
        outcome = self.outcome
        if outcome is None:
            return Usage(completion_token_count=self.output.token_count)
        counted = outcome.completion_token_count
        return Usage(
            prompt_token_count=outcome.prompt_token_count,
            completion_token_count=self.output.token_count if counted is None else counted,
            cached_prompt_token_count=outcome.cached_token_count,
        )

    def start_attempt(self, now: float) -> None:
        """Note a dispatch."""
        self.attempts.append(Attempt(self.record.epoch, self.record.instance_id, now))

    def end_attempt(self, now: float, failure: Failure | None) -> None:
        """Note the end of the present attempt."""
        if self.attempts and self.attempts[-1].end_s is None:
            self.attempts[-1].end_s = now
            self.attempts[-1].failure = failure

    def status(self, queue_position: int | None, cost: RequestCost | None = None) -> RequestStatus:
        """Return what is known now.

        Args:
            queue_position: Number of requests ahead of it; ``None``: not told.
            cost: What it costs, while it has not ended.
        """
        record = self.record
        metadata = record.metadata

        def wall(time_s: float | None) -> float | None:
            return None if time_s is None else time_s + self.wall_offset_s

        return RequestStatus(
            request_id=record.request_id,
            state=self.state,
            model_name=record.model,
            priority=metadata.priority,
            create_time_s=record.arrival_s + self.wall_offset_s,
            user_id=metadata.user_id,
            session_id=metadata.session_id,
            tenant_id=metadata.tenant_id,
            dispatch_time_s=wall(record.dispatch_s),
            first_token_time_s=wall(record.first_token_s),
            end_time_s=wall(self.end_s),
            deadline_time_s=wall(record.deadline_s),
            instance_id=record.instance_id,
            attempts=tuple(
                AttemptRecord(
                    epoch=attempt.epoch,
                    instance_id=attempt.instance_id,
                    dispatch_time_s=attempt.dispatch_s + self.wall_offset_s,
                    end_time_s=wall(attempt.end_s),
                    failure=attempt.failure,
                )
                for attempt in self.attempts
            ),
            usage=self.usage(),
            finish_reason=self.finish_reason,
            failure=None if self.suspended else self.failure,
            queue_position=queue_position,
            labels=metadata.labels,
            cost=final_cost(record) if self.state.is_terminal else cost,
        )


class RequestTable:
    """Every request that can still be asked about.

    Live requests are bounded by the core's queue and the fleet's limits. Ended
    ones are bounded here by number, by bytes of output and by age; the oldest
    go first.

    Args:
        max_ended_count: Most ended requests to keep.
        max_ended_bytes: Most bytes of output to keep for them.
        retention_s: How long to keep one.
    """

    def __init__(self, max_ended_count: int, max_ended_bytes: int, retention_s: float) -> None:
        self._handles: dict[str, RequestHandle] = {}
        self._ended: dict[str, RequestHandle] = {}
        self._ended_bytes = 0
        self._max_ended_count = max_ended_count
        self._max_ended_bytes = max_ended_bytes
        self._retention_s = retention_s

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handle: RequestHandle) -> None:
        """Keep a new request."""
        self._handles[handle.request_id] = handle

    def find(self, request_id: str) -> RequestHandle | None:
        """Return a request, or ``None``."""
        return self._handles.get(request_id)

    def get(self, request_id: str) -> RequestHandle:
        """Return a request.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = self._handles.get(request_id)
        if handle is None:
            raise RequestNotFoundError(request_id)
        return handle

    def forget(self, handle: RequestHandle) -> None:
        """Drop a request that was never accepted."""
        self._handles.pop(handle.request_id, None)
        if self._ended.pop(handle.request_id, None) is not None:
            self._ended_bytes -= handle.output.size_bytes

    def note_ended(self, handle: RequestHandle, now: float) -> None:
        """Start the retention of a request that has just ended, and let the oldest go.

        What was asked is dropped at once; only what came out is kept.
        """
        record = handle.record
        record.metadata = dataclasses.replace(
            record.metadata,
            prompt=None,
            messages=(),
            tools=(),
            tool_choice=None,
            prompt_token_ids=(),
            openai_body=b"",
        )
        final_cost(record)
        self._ended[handle.request_id] = handle
        self._ended_bytes += handle.output.size_bytes
        self.drop_old(now)

    def drop_old(self, now: float) -> None:
        """Forget ended requests beyond the bounds."""
        while self._ended:
            request_id, oldest = next(iter(self._ended.items()))
            if (
                len(self._ended) <= self._max_ended_count
                and self._ended_bytes <= self._max_ended_bytes
                and now - (oldest.end_s or 0.0) <= self._retention_s
            ):
                break
            del self._ended[request_id]
            del self._handles[request_id]
            self._ended_bytes -= oldest.output.size_bytes

    def newest_first(self) -> Iterator[RequestHandle]:
        """Yield every request, the newest first."""
        yield from reversed(self._handles.values())

    def live(self) -> list[RequestHandle]:
        """Return the requests that have not ended."""
        return [handle for handle in self._handles.values() if not handle.state.is_terminal]


class Reading:
    """Counts one reader of a request while it is open."""

    def __init__(self, handle: RequestHandle, limit: int) -> None:
        if handle.output.reader_count >= limit:
            raise TooManyStreamsError(
                f"request {handle.request_id!r} is read by {limit} streams already, the limit; "
                "close one first"
            )
        self._output = handle.output

    def __enter__(self) -> None:
        self._output.reader_count += 1

    def __exit__(self, *exception: object) -> None:
        self._output.reader_count -= 1
