"""From a store's records back to requests and instances."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.events import RestoredRequest
from sagecp.core.prediction.cost import CostQuantiles
from sagecp.core.prompt_size import payload_size_bytes
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestMetadata, RequestStatus
from sagecp.runtime.attempts import why_not_resumed
from sagecp.runtime.engines.base import EngineDelta, EngineOutcome
from sagecp.runtime.journal import Journal
from sagecp.runtime.output import OutputLog
from sagecp.runtime.requests import Attempt, RequestHandle
from sagecp.runtime.store.codec import decode_metadata, decode_status
from sagecp.runtime.store.records import (
    AttemptDispatched,
    AttemptLost,
    InstanceKept,
    OutputProduced,
    PromptTokenized,
    Record,
    RequestAccepted,
    RequestEnded,
)

_GAP = "part of its output is missing in the journal"


@dataclass(slots=True)
class StoredRequest:
    """The records of one live request."""

    accepted: RequestAccepted
    dispatches: dict[int, AttemptDispatched] = field(default_factory=dict)
    losses: dict[int, AttemptLost] = field(default_factory=dict)
    prompt_token_ids: bytes = b""
    outputs: list[OutputProduced] = field(default_factory=list)


def sort_records(records: Iterable[Record]) -> tuple[list[StoredRequest], list[InstanceKept]]:
    """Return the live requests, oldest first, and the instances that records tell of."""
    requests: dict[str, StoredRequest] = {}
    instances: dict[str, InstanceKept] = {}
    rest: list[Record] = []
    for record in records:
        if isinstance(record, RequestAccepted):
            requests[record.request_id] = StoredRequest(record)
        elif isinstance(record, InstanceKept):
            instances[record.instance_id] = record
        else:
            rest.append(record)
    for record in rest:
        request = requests.get(getattr(record, "request_id", ""))
        if request is None:
            continue
        if isinstance(record, OutputProduced):
            request.outputs.append(record)
        elif isinstance(record, AttemptDispatched):
            request.dispatches[record.epoch] = record
        elif isinstance(record, AttemptLost):
            request.losses[record.epoch] = record
        elif isinstance(record, PromptTokenized):
            request.prompt_token_ids = record.token_ids
    return sorted(requests.values(), key=lambda each: each.accepted.sequence), list(instances.values())


class Restorer:
    """Tells the core of stored requests, and makes their handles when it has taken them.

    Args:
        journal: Places the records' times on the core's clock.
        wall_offset_s: Add to the core's clock to get Unix seconds.
        now: The time on the core's clock.
    """

    def __init__(self, journal: Journal, wall_offset_s: float, now: float) -> None:
        self._journal = journal
        self._wall_offset_s = wall_offset_s
        self._now = now
        self._waiting: dict[str, tuple[StoredRequest, OutputLog]] = {}

    def event_of(self, stored: StoredRequest, output: OutputLog) -> RestoredRequest:
        """Return what the core is told of a request; ``output`` is given what it has produced."""
        accepted = stored.accepted
        metadata = decode_metadata(accepted.metadata)
        if stored.dispatches:
            self._fill(output, stored)
        lost = [each for epoch, each in sorted(stored.losses.items()) if epoch in stored.dispatches]
        self._waiting[accepted.request_id] = (stored, output)
        return RestoredRequest(
            metadata,
            accepted.model,
            self._journal.time_of(accepted.moment),
            payload_size_bytes(metadata),
            epoch=max(stored.dispatches, default=0),
            lost_instance_ids=tuple(
                dict.fromkeys(stored.dispatches[each.epoch].instance_id for each in lost)
            ),
            lost_attempt_count=max((each.lost_attempt_count for each in lost), default=0),
            engine_kill_count=max((each.engine_kill_count for each in lost), default=0),
            has_output=bool(output.deltas),
            output_token_count=output.token_count,
            cannot_continue=why_not_resumed(metadata, output) if output.deltas else "",
        )

    def handle_of(self, record: RequestRecord) -> RequestHandle:
        """Return the handle of a request that the core has taken."""
        stored, output = self._waiting.pop(record.request_id)
        accepted = stored.accepted
        handle = RequestHandle(record, output, accepted.fingerprint, accepted.sequence, self._wall_offset_s)
        handle.durable = True
        for epoch in sorted(stored.dispatches):
            handle.attempts.append(self._attempt(stored, epoch))
        return handle

    @staticmethod
    def _fill(output: OutputLog, stored: StoredRequest) -> None:
        output.prompt_token_ids = stored.prompt_token_ids
        pieces: list[EngineDelta] = []
        next_index = 0
        epoch = 0
        for record in sorted(stored.outputs, key=lambda each: each.first_index):
            if record.first_index > next_index:
                output.gap = _GAP
                break
            if record.epoch != epoch:
                output.preload(pieces, epoch)
                pieces, epoch = [], record.epoch
            pieces.extend(record.pieces)
            next_index = record.first_index + sum(piece.token_count for piece in record.pieces)
        output.preload(pieces, epoch)

    def _attempt(self, stored: StoredRequest, epoch: int) -> Attempt:
        dispatched = stored.dispatches[epoch]
        attempt = Attempt(epoch, dispatched.instance_id, self._journal.time_of(dispatched.moment))
        lost = stored.losses.get(epoch)
        if lost is None:
            attempt.end_s = self._now
            attempt.failure = Failure(ErrorReason.SHUTTING_DOWN, "the control plane was restarted")
        else:
            attempt.end_s = self._journal.time_of(lost.moment)
            attempt.failure = Failure(ErrorReason[lost.reason], lost.message)
        return attempt


def ended_handle(ended: RequestEnded, wall_offset_s: float) -> RequestHandle:
    """Return a request that ended, as the store kept it."""
    status = decode_status(ended.status)
    record = RequestRecord(
        _metadata_of(status, ended.tenant_id), status.model_name, 0, status.create_time_s - wall_offset_s
    )
    record.machine.state = status.state
    record.instance_id = status.instance_id
    record.epoch = max((attempt.epoch for attempt in status.attempts), default=0)
    record.dispatch_s = _clock(status.dispatch_time_s, wall_offset_s)
    record.first_token_s = _clock(status.first_token_time_s, wall_offset_s)
    record.deadline_s = _clock(status.deadline_time_s, wall_offset_s)
    if status.cost is not None:
        record.spent_usd = status.cost.actual_usd
        predicted = CostQuantiles(
            status.cost.predicted_p10_usd, status.cost.predicted_p50_usd, status.cost.predicted_p90_usd
        )
        record.predicted_cost = predicted if any(predicted) else None
    output = OutputLog(lambda: None)
    output.preload(list(ended.pieces), record.epoch)
    if not ended.pieces:
        output.let_go(status.usage.completion_token_count)
    output.close()
    handle = RequestHandle(record, output, ended.fingerprint, ended.sequence, wall_offset_s)
    handle.durable = True
    handle.end_s = _clock(status.end_time_s, wall_offset_s)
    handle.failure = status.failure
    usage = status.usage
    handle.outcome = EngineOutcome(
        (status.finish_reason,) if status.finish_reason else (),
        usage.prompt_token_count,
        usage.completion_token_count,
        usage.cached_prompt_token_count,
    )
    for known in status.attempts:
        attempt = Attempt(known.epoch, known.instance_id, known.dispatch_time_s - wall_offset_s)
        attempt.end_s = _clock(known.end_time_s, wall_offset_s)
        attempt.failure = known.failure
        handle.attempts.append(attempt)
    handle.ended.set()
    return handle


def _metadata_of(status: RequestStatus, tenant_id: str) -> RequestMetadata:
    return RequestMetadata(
        request_id=status.request_id,
        model_name=status.model_name,
        priority=status.priority,
        user_id=status.user_id,
        session_id=status.session_id,
        tenant_id=tenant_id,
        labels=status.labels,
    )


def _clock(wall_s: float | None, wall_offset_s: float) -> float | None:
    return None if wall_s is None else wall_s - wall_offset_s


def first_sequence() -> int:
    """Return a number above every sequence that an earlier process gave: microseconds since 1970."""
    return time.time_ns() // 1000
