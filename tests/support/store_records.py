"""Short ways to write the records of a store."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.store.codec import pack_token_ids
from sagecp.runtime.store.records import (
    AttemptDispatched,
    AttemptLost,
    Moment,
    OutputProduced,
    PromptTokenized,
    Record,
    RequestAccepted,
    RequestEnded,
)

MOMENT = Moment(12.5, 1000.0, "boot")


class Wall:
    """A wall clock that is set by hand."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def values(records: Sequence[Record | None]) -> list[object]:
    """Return records as plain values, which compare: pieces of output compare by identity."""
    return [msgspec.to_builtins(record) for record in records]


def accepted(
    request_id: str, *, tenant_id: str = "tenant", sequence: int = 1, metadata: bytes = b"metadata"
) -> RequestAccepted:
    return RequestAccepted(request_id, tenant_id, sequence, b"fingerprint", "model", MOMENT, metadata)


def dispatched(request_id: str, epoch: int) -> AttemptDispatched:
    return AttemptDispatched(request_id, epoch, "engine-0", 1, MOMENT)


def prompt(request_id: str) -> PromptTokenized:
    return PromptTokenized(request_id, pack_token_ids([1, 2, 70_000]))


def piece(
    text: str, token_ids: Sequence[int], *, finish_reason: str = "", raw: bytes | None = None
) -> EngineDelta:
    return EngineDelta(0, text, list(token_ids), len(token_ids), finish_reason, "", raw)


def output(request_id: str, first_index: int, count: int, *, epoch: int = 1) -> OutputProduced:
    pieces = tuple(piece(f"t{index} ", [index]) for index in range(first_index, first_index + count))
    return OutputProduced(request_id, epoch, first_index, pieces)


def lost(request_id: str, epoch: int) -> AttemptLost:
    return AttemptLost(request_id, epoch, MOMENT, "ENGINE_UNREACHABLE", "the connection was reset")


def ended(
    request_id: str,
    *,
    tenant_id: str = "tenant",
    end_wall_s: float = 1000.0,
    pieces: tuple[EngineDelta, ...] = (),
) -> RequestEnded:
    return RequestEnded(request_id, tenant_id, 1, b"fingerprint", end_wall_s, b"status", pieces)
