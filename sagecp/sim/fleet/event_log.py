"""Event logs: everything that happened to a scheduler, and what it decided, one JSON object per line.

The first line says what the scheduler was made from, so that a log can be fed
to a fresh one, which then decides the same. ``docs/simulator-formats.md``
describes the lines; :mod:`sagecp.sim.fleet.event_codec` says what of an event
is left out.

The writer is a listener of :class:`SchedulerController`, and of anything else
that feeds a scheduler and tells what it answered.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import SchedulingDecision
from sagecp.sim.fleet.event_codec import decode_event, decode_fields, encode_all_fields, encode_event

FORMAT = "sagecp-event-log"
VERSION = 1

_COMPRESSION_LEVEL = 6
_DIGEST_BYTES = 8


class EventLogError(ValueError):
    """A file is no event log, or not whole; says which file and line, and what is wrong."""


class LoggedStep(NamedTuple):
    """One event with what the scheduler answered.

    Attributes:
        now: Time of the event, seconds on the scheduler's clock.
        event: Equal to the one that was logged, without the text of prompts.
        effects: In short, as :func:`describe_effects` makes them.
    """

    now: float
    event: ev.Event
    effects: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ReplayDifference:
    """A step that a fresh scheduler answered otherwise than the log says.

    Attributes:
        line_number: In the log, from 1.
        event_name: Class of the event.
        recorded: Effects in the log.
        replayed: Effects now.
    """

    line_number: int
    event_name: str
    recorded: tuple[Mapping[str, Any], ...]
    replayed: tuple[Mapping[str, Any], ...]


class EventLogWriter:
    """Writes an event log. Equal events make equal files, byte for byte, compressed or not.

    Args:
        path: Where to; compressed with gzip when it ends in ``.gz``.
        config: What the scheduler was made from.
        about: Further facts for people, such as the name of the trace.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, config: SchedulerConfig, about: Mapping[str, Any] | None = None) -> None:
        self._raw: IO[bytes] = path.open("wb")
        self._stream: IO[bytes] = self._raw
        if path.suffix == ".gz":
            # No name and no time: both would be in the file.
            compressed = gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, self._raw, mtime=0)
            self._stream = io.BufferedWriter(compressed, 1 << 16)  # type: ignore[type-var, unused-ignore]
        header = {"format": FORMAT, "version": VERSION, "config": encode_all_fields(config)}
        self._write({**header, "about": dict(about)} if about else header)

    def __call__(self, now: float, event: ev.Event, effects: Sequence[fx.Effect]) -> None:
        """Write one step: right after the scheduler answered, because effects hold live records."""
        self._write(
            {
                "now": now,
                "event": type(event).__name__,
                "fields": encode_event(event),
                "effects": describe_effects(effects),
            }
        )

    def close(self) -> None:
        """Complete the file."""
        self._stream.close()
        # Compression does not close what it writes to.
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        line = json.dumps(content, separators=(",", ":"), allow_nan=False)
        self._stream.write(line.encode("ascii") + b"\n")


def read_config(path: Path) -> SchedulerConfig:
    """Return what the logged scheduler was made from.

    Raises:
        EventLogError: The file is no event log.
    """
    with _open(path) as stream:
        return _config(path, _lines(path, stream))


def replay(path: Path) -> Iterator[LoggedStep]:
    """Yield the steps of a log, in order.

    Raises:
        EventLogError: The file is no event log, or ends early.
    """
    with _open(path) as stream:
        lines = _lines(path, stream)
        _config(path, lines)
        for number, line in enumerate(lines, start=2):
            yield _step(path, number, line)


def replay_differences(path: Path, scheduler: Scheduler | None = None) -> Iterator[ReplayDifference]:
    """Feed a log to a scheduler, and yield the steps that it answers otherwise; none is as it should be.

    Args:
        path: The log.
        scheduler: A fresh one; ``None``: one made as the log says.

    Raises:
        EventLogError: As :func:`replay`.
        SageError: The scheduler refuses an event that was accepted when it was logged.
    """
    scheduler = scheduler or Scheduler(read_config(path))
    for number, step in enumerate(replay(path), start=2):
        replayed = tuple(describe_effects(scheduler.handle(step.event, step.now)))
        if replayed != step.effects:
            yield ReplayDifference(number, type(step.event).__name__, step.effects, replayed)


# -- effects ---------------------------------------------------------------------


def describe_effects(effects: Sequence[fx.Effect]) -> list[dict[str, Any]]:
    """Return effects in short: what was decided, on which grounds, and not what is in the events already."""
    return [{"effect": type(effect).__name__, **_describe(effect)} for effect in effects]


def _describe(effect: fx.Effect) -> dict[str, Any]:
    match effect:
        case fx.RequestAccepted():
            return {"request_id": effect.record.request_id}
        case fx.RequestRejected():
            error = effect.error
            found: dict[str, Any] = {
                "request_id": effect.request_id,
                "reason": error.reason.name,
                "message": error.message,
            }
            return (
                found
                if error.retry_after_s is None
                else {**found, "retry_after_s": _number(error.retry_after_s)}
            )
        case fx.DispatchAttempt():
            return {"request_id": effect.record.request_id, "receipt": _receipt(effect.decision)}
        case fx.AbortAttempt() | fx.InterruptAttempt():
            return {
                "request_id": effect.request_id,
                "epoch": effect.epoch,
                "instance_id": effect.instance_id,
            }
        case fx.RequestRequeued():
            return {"request_id": effect.record.request_id, "reason": effect.failure.reason.name}
        case fx.RequestEnded():
            reason = {} if effect.failure is None else {"reason": effect.failure.reason.name}
            return {"request_id": effect.record.request_id, "state": effect.state.name, **reason}
        case fx.InstanceChanged():
            previous = None if effect.previous is None else effect.previous.name
            return {
                "instance_id": effect.instance_id,
                "state": effect.state.name,
                "previous": previous,
                "reason": effect.reason,
            }
        case fx.InstanceRemoved():
            return {"instance_id": effect.instance_id, "reason": effect.reason}
        case fx.GpuFaultBegan() | fx.GpuFaultCleared():
            fault = effect.fault
            return {"instance_id": effect.instance_id, "kind": fault.kind.name, "message": fault.message}
        case fx.EngineProcessChanged():
            return {"instance_id": effect.instance_id, "state": effect.process.state.name}
        case fx.ClockSkewChanged():
            return {"instance_id": effect.instance_id, "skewed": effect.skewed}
        case fx.OrderTroubled():
            return {"instance_id": effect.instance_id, "trouble": effect.trouble}
        case fx.ProbeEngine():
            return {"instance_id": effect.instance_id}
        case fx.FailStaticChanged():
            return {"active": effect.active, "why": effect.why}
        case fx.SettingsChanged():
            settings = effect.settings
            return {
                "version": settings.version,
                "scheduling_policy": settings.scheduling_policy,
                "routing_strategy": settings.routing_strategy,
                "load_balancer": settings.load_balancer,
                "parameters": dict(settings.parameters),
            }
        case fx.EvaluatePolicies():
            replay = effect.replay
            return {
                "evaluation_id": replay.evaluation_id,
                "candidates": list(replay.candidates),
                "arrival_count": len(replay.arrivals),
                "instance_ids": [each.instance_id for each in replay.instances],
            }
        case fx.PolicySwitched():
            return {"previous": effect.previous, "policy": effect.policy, "why": effect.why}


def _receipt(decision: SchedulingDecision) -> dict[str, Any]:
    """Return a decision with its scores; its inputs are a digest, because they would be most of the log."""
    inputs = decision.inputs
    found = {
        "epoch": decision.epoch,
        "instance_id": decision.instance_id,
        "queue_wait_s": decision.queue_wait_s,
        "scheduling_policy": decision.policy_in_force or decision.scheduling_policy,
        "routing_strategy": decision.routing_strategy,
        "load_balancer": decision.load_balancer,
        "config_version": decision.config_version,
        "reason": decision.reason,
        "candidates": [[each.instance_id, _number(each.score)] for each in decision.candidates],
        "candidate_count": decision.candidate_count,
    }
    if inputs is not None:
        # The parameters follow from the version; the rest is numbers and names, whose texts are exact.
        # Each candidate is scored from its own row alone, so their order is no input.
        rows = repr((inputs.request, sorted(inputs.candidates))).encode()
        found["inputs_digest"] = hashlib.blake2b(rows, digest_size=_DIGEST_BYTES).hexdigest()
    return found


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


# -- reading ---------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise EventLogError(f"{path}: cannot be read: {error.strerror or error}") from error
    is_compressed = stream.peek(2)[:2] == b"\x1f\x8b"
    return gzip.GzipFile(fileobj=stream, mode="rb") if is_compressed else stream  # type: ignore[return-value]


def _lines(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, gzip.BadGzipFile) as error:
        raise EventLogError(f"{path}: ends early: {error}; its writer was not closed") from error


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise EventLogError(f"{path}:{number}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise EventLogError(f"{path}:{number}: is no JSON object")
    return content


def _config(path: Path, lines: Iterator[bytes]) -> SchedulerConfig:
    header = _object(path, 1, next(lines, b""))
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise EventLogError(
            f"{path}: is no event log of version {VERSION}; its first line must say "
            f'"format": "{FORMAT}", "version": {VERSION}'
        )
    try:
        config: SchedulerConfig = decode_fields(SchedulerConfig, header["config"])
    except (ValueError, KeyError) as error:
        raise EventLogError(f"{path}:1: config: {error}") from error
    return config


def _step(path: Path, number: int, line: bytes) -> LoggedStep:
    content = _object(path, number, line)
    try:
        event = decode_event(content["event"], content["fields"])
        return LoggedStep(content["now"], event, tuple(content["effects"]))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise EventLogError(f"{path}:{number}: {type(error).__name__}: {error}") from error
