"""Times and durations."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_NANOS = 1_000_000_000


def timestamp(time_s: float) -> Timestamp:
    """Return Unix seconds as a Timestamp."""
    seconds = int(time_s // 1)
    return Timestamp(seconds=seconds, nanos=min(_NANOS - 1, int((time_s - seconds) * _NANOS)))


def time_s(value: Timestamp) -> float:
    """Return a Timestamp in Unix seconds."""
    return value.seconds + value.nanos / _NANOS


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration."""
    whole = int(seconds)
    nanos = int((seconds - whole) * _NANOS)
    return Duration(seconds=whole, nanos=max(1 - _NANOS, min(_NANOS - 1, nanos)))


def seconds_of(value: Duration) -> float:
    """Return a Duration in seconds."""
    return value.seconds + value.nanos / _NANOS
