"""Ways in which a simulated engine can fail on purpose.

Faults of streams count the tokens of one stream (of all its choices together)
and fire once that many were sent. They hit every stream that starts or runs
while the switch is set, or the first ``stream_fault_limit`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_MAX_TOKENS = 10**9


class MisbehaviourError(ValueError):
    """A switch is unknown, or its value makes no sense; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """The switches, all off by default.

    Attributes:
        die_after_tokens: The process exits at once when any stream has sent so many tokens.
        cut_after_tokens: The connection is reset.
        eof_after_tokens: The connection is closed in an orderly way, inside the answer.
        done_after_tokens: ``[DONE]`` is sent without a finish reason.
        error_after_tokens: An error event is sent inside the stream, then ``[DONE]``.
        abort_after_tokens: The answer ends with finish reason ``abort``.
        hang_after_tokens: Nothing more is sent, and ``/health`` stays 200; 0 hangs before the first token.
        garbage_after_tokens: Bytes that are no event are sent, then the stream goes on.
        bad_json_after_tokens: An event that is no JSON is sent, then the stream goes on.
        stream_fault_limit: Only so many streams are hit; ``None`` is all.
        stream_fault_marker: Only streams whose prompt contains this text are hit;
            with ``die_after_tokens`` that is a poisonous request.
        reject_status: The HTTP status of rejected requests, 400 to 599.
        reject_rate: Share of generation requests that are rejected, 0 to 1.
        reject_first: So many generation requests are rejected, from when it is set.
        slow_factor: Factor on the duration of every engine step.
        silent_health: ``/health`` accepts the request and never answers.
        stalled: No request makes any progress, and ``/health`` stays 200; undone, all go on.
        refuse_connections_s: For so long from when it is set connections are
            refused, and those that were open are reset.
    """

    die_after_tokens: int | None = None
    cut_after_tokens: int | None = None
    eof_after_tokens: int | None = None
    done_after_tokens: int | None = None
    error_after_tokens: int | None = None
    abort_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    garbage_after_tokens: int | None = None
    bad_json_after_tokens: int | None = None
    stream_fault_limit: int | None = None
    stream_fault_marker: str | None = None
    reject_status: int = 500
    reject_rate: float = 0.0
    reject_first: int = 0
    slow_factor: float = 1.0
    silent_health: bool = False
    stalled: bool = False
    refuse_connections_s: float = 0.0

    def __post_init__(self) -> None:
        for name in (*STREAM_FAULTS, "stream_fault_limit"):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, 0, _MAX_TOKENS, " or null")
        _check_integer("reject_status", self.reject_status, 400, 599)
        _check_integer("reject_first", self.reject_first, 0, _MAX_TOKENS)
        _check_number("reject_rate", self.reject_rate, 0.0, 1.0)
        _check_number("slow_factor", self.slow_factor, 0.001, 1e6)
        _check_number("refuse_connections_s", self.refuse_connections_s, 0.0, 86_400.0)
        for name in ("silent_health", "stalled"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise MisbehaviourError(f"{name} must be true or false, not {value!r}")
        marker = self.stream_fault_marker
        if marker is not None and (not isinstance(marker, str) or not marker):
            raise MisbehaviourError(f"stream_fault_marker must be a text or null, not {marker!r}")

    def changed(self, changes: Mapping[str, Any]) -> Misbehaviour:
        """Return these switches with some set anew; ``None`` turns one off.

        Raises:
            MisbehaviourError: A name is unknown or a value makes no sense.
        """
        unknown = sorted(str(name) for name in changes if name not in KNOWN_SWITCHES)
        if unknown:
            raise MisbehaviourError(
                f"unknown: {', '.join(unknown)}; the switches are: {', '.join(KNOWN_SWITCHES)}"
            )
        values = {name: _DEFAULTS[name] if value is None else value for name, value in changes.items()}
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Return every switch by name."""
        return asdict(self)

    def stream_faults(self) -> list[tuple[int, str]]:
        """Return the stream faults that are on, as (tokens, kind), the earliest first."""
        chosen = [(getattr(self, name), kind) for name, kind in STREAM_FAULTS.items()]
        return sorted((tokens, kind) for tokens, kind in chosen if tokens is not None)


STREAM_FAULTS: dict[str, str] = {
    "die_after_tokens": "die",
    "cut_after_tokens": "cut",
    "eof_after_tokens": "eof",
    "done_after_tokens": "done",
    "error_after_tokens": "error",
    "abort_after_tokens": "abort",
    "hang_after_tokens": "hang",
    "garbage_after_tokens": "garbage",
    "bad_json_after_tokens": "bad_json",
}
"""The faults that fire inside a stream: switch to kind."""

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Misbehaviour)}

KNOWN_SWITCHES: tuple[str, ...] = tuple(_DEFAULTS)
"""The names of all switches."""


def _check_integer(name: str, value: object, low: int, high: int, or_else: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MisbehaviourError(f"{name} must be an integer from {low} to {high}{or_else}, not {value!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (valid and isinstance(value, int | float) and low <= value <= high):
        raise MisbehaviourError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
