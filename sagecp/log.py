"""Structured logs: one line per event, the same keys everywhere.

Both structlog loggers and the standard library's end up on standard error in
one shape: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``event``, and the
facts given with the event. JSON unless a person is watching.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "console", "auto")

# What every record carries; the rest was given as `extra`.
_RECORD_KEYS = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
}
_encoder = msgspec.json.Encoder(enc_hook=str)


def configure_logging(level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for this process. Call once, before the first event.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``; quieter events cost next to nothing.
        log_format: ``json``, ``console``, or ``auto``: console on a terminal, else JSON.
        stream: Where lines go; default: standard error.

    Raises:
        ValueError: The level or the format is not known.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    if log_format not in FORMATS:
        raise ValueError(f"log format {log_format!r} is unknown; choose one of {', '.join(FORMATS)}")
    target = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not target.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        _render_json
        if as_json
        # No pretty tracebacks: they print local variables, which may hold prompts and secrets.
        else structlog.dev.ConsoleRenderer(
            colors=target.isatty(),
            timestamp_key="time",
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        )
    )
    chain: list[structlog.typing.Processor] = [structlog.contextvars.merge_contextvars, _add_time_and_level]
    if as_json:
        chain.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*chain, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(target),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(_RecordFormatter(renderer, as_json=as_json))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)


def get_logger(name: str, **facts: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose events carry ``facts``. Call after :func:`configure_logging`.

    Args:
        name: Goes into ``logger``, as with the standard library's loggers.
        **facts: Such as ``instance_id``.
    """
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger().bind(logger=name, **facts)
    return logger


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _add_time_and_level(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event["time"] = _now()
    event["level"] = "warning" if method == "warn" else method
    return event


def _render_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    # The four keys first, in this order, so that lines can be read by eye.
    ordered = {key: event.pop(key) for key in ("time", "level", "logger", "event") if key in event}
    return _encoder.encode({**ordered, **event}).decode()


class _RecordFormatter(logging.Formatter):
    """Gives the standard library's records the same shape."""

    def __init__(self, renderer: structlog.typing.Processor, *, as_json: bool) -> None:
        super().__init__()
        self._renderer = renderer
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        event: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        event.update((key, value) for key, value in vars(record).items() if key not in _RECORD_KEYS)
        if record.exc_info and record.exc_info[0] is not None:
            event["exception" if self._as_json else "exc_info"] = (
                self.formatException(record.exc_info) if self._as_json else record.exc_info
            )
        return str(self._renderer(None, record.levelname.lower(), event))
