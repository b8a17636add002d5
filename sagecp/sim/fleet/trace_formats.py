"""Reads the lines of a trace file into rows, whatever its format (``docs/simulator-formats.md``)."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagecp.core.types import RequestPriority

_GZIP_MAGIC = b"\x1f\x8b"
_LARGEST_NUMBER = 1e15
_LARGEST_COUNT = 100_000_000
_ID_MASK = (1 << 63) - 1
_REQUIRED = ("t_s", "prompt_tokens", "output_tokens")


class TraceError(ValueError):
    """A trace cannot be used; says which file and line, what is wrong, and what to do.

    Attributes:
        path: The file.
        line_number: Of the bad line, from 1; 0 when it is the file as a whole.
    """

    def __init__(self, path: Path, line_number: int, problem: str) -> None:
        where = f"{path}, line {line_number}" if line_number else str(path)
        super().__init__(f"{where}: {problem}")
        self.path = path
        self.line_number = line_number


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One line of a trace, checked field by field; ``None`` and empty are absent.

    Attributes:
        line_number: In its file, from 1.
        t_s: Seconds since the trace began; in a session's turns since the session's family began.
        turn: Number of the turn in its session. Present in closed-loop traces only.
        think_s: Between the end of the turn before and this one.
        parent: Session that started this one.
        hash_ranges: ``start, count, start, count, ...`` of block ids.
        block_hashes: Ids of the prompt's blocks, each spelled out.
        block_token_count: Tokens in a block.
    """

    line_number: int
    t_s: float
    prompt_token_count: int
    output_token_count: int
    tenant_id: str = ""
    user_id: str = ""
    session_id: str = ""
    model: str = ""
    priority: RequestPriority = RequestPriority.NORMAL
    deadline_ms: float | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    max_tokens: int | None = None
    cost_budget_usd: float | None = None
    turn: int | None = None
    think_s: float = 0.0
    parent: str = ""
    hash_ranges: tuple[int, ...] = ()
    block_hashes: tuple[int, ...] = ()
    block_token_count: int | None = None


def read_rows(path: Path) -> list[TraceRow]:
    """Read every row of a CSV or JSON-lines trace, compressed with gzip or not.

    The format follows from the content, never from the file's name.

    Raises:
        TraceError: The file cannot be read, or a line of it is not as documented.
    """
    text = read_text(path)
    rows = list(_json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text))
    if not rows:
        raise TraceError(path, 0, "has no requests; give a trace with at least one")
    return rows


def read_text(path: Path) -> str:
    """Return a file's text, which may be compressed with gzip.

    Raises:
        TraceError: It cannot be read.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(path, 0, f"is damaged gzip ({error}); fetch or write it again") from error
    except OSError as error:
        raise TraceError(path, 0, f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(path, 0, f"is not UTF-8 text ({error}); a trace is CSV or JSON lines") from error


class _BadValueError(ValueError):
    """A value is not what its field allows; the text says what is allowed."""


def _number(minimum: float) -> Callable[[Any], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _BadValueError(f"a number of at least {minimum:g}")
        if not minimum <= value <= _LARGEST_NUMBER:
            raise _BadValueError(f"a number from {minimum:g} to {_LARGEST_NUMBER:g}")
        return float(value)

    return read


def _count(minimum: int) -> Callable[[Any], int]:
    def read(value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _LARGEST_COUNT:
            raise _BadValueError(f"a whole number from {minimum} to {_LARGEST_COUNT}")
        return value

    return read


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _BadValueError("a text")
    return str(value)


def _priority(value: object) -> RequestPriority:
    if not isinstance(value, str) or value not in RequestPriority.__members__:
        raise _BadValueError(f"one of {', '.join(RequestPriority.__members__)}")
    return RequestPriority[value]


def _whole_numbers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(entry) is int for entry in value):
        raise _BadValueError("a list of whole numbers")
    return value


def _ranges(value: object) -> tuple[int, ...]:
    numbers = _whole_numbers(value)
    if len(numbers) % 2 or any(number < 0 for number in numbers):
        raise _BadValueError("pairs of numbers, start and count, none negative")
    return tuple(numbers)


def _hashes(value: object) -> tuple[int, ...]:
    return tuple([number & _ID_MASK for number in _whole_numbers(value)])


def _ignored(_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Field:
    """How one field is read, and where to; an empty attribute is read and dropped."""

    attribute: str
    read: Callable[[Any], Any]
    is_text: bool = False


_FIELDS = {
    "t_s": _Field("t_s", _number(0)),
    "prompt_tokens": _Field("prompt_token_count", _count(1)),
    "output_tokens": _Field("output_token_count", _count(0)),
    "tenant": _Field("tenant_id", _text, is_text=True),
    "user": _Field("user_id", _text, is_text=True),
    "session": _Field("session_id", _text, is_text=True),
    "model": _Field("model", _text, is_text=True),
    "priority": _Field("priority", _priority, is_text=True),
    "deadline_ms": _Field("deadline_ms", _number(0)),
    "ttft_slo_ms": _Field("ttft_slo_ms", _number(0)),
    "tpot_slo_ms": _Field("tpot_slo_ms", _number(0)),
    "max_tokens": _Field("max_tokens", _count(1)),
    "cost_budget_usd": _Field("cost_budget_usd", _number(0)),
    "turn": _Field("turn", _count(0)),
    "think_s": _Field("think_s", _number(0)),
    "parent": _Field("parent", _text, is_text=True),
    "hash_ranges": _Field("hash_ranges", _ranges),
    "block_hashes": _Field("block_hashes", _hashes),
    "block_tokens": _Field("block_token_count", _count(1)),
    # What an agent's sessions share by their tools; the block ids already say it within a family.
    "shared_prefix_tokens": _Field("", _ignored),
}
_LIST_FIELDS = ("hash_ranges", "block_hashes")


def _json_rows(path: Path, text: str) -> Iterator[TraceRow]:
    # Not splitlines: it also splits at separators that JSON allows inside strings.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise TraceError(
                path, line_number, f"is not JSON ({error}); write one object per line"
            ) from error
        if not isinstance(entry, dict):
            raise TraceError(path, line_number, f"is {type(entry).__name__}, not an object; write {{...}}")
        yield _row(path, line_number, entry)


def _csv_rows(path: Path, text: str) -> Iterator[TraceRow]:
    reader = csv.reader(io.StringIO(text))
    try:
        columns = [name.strip() for name in next(reader, [])]
        missing = [name for name in _REQUIRED if name not in columns]
        if "total_rps" in columns:
            raise TraceError(path, 1, "is a series of rates, not a trace; give it as --rates beside a trace")
        if missing:
            raise TraceError(
                path,
                1,
                f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} (found: "
                f"{', '.join(columns[:8]) or 'nothing'}); a trace is a CSV with a header of t_s, "
                "prompt_tokens, output_tokens, or one JSON object per line",
            )
        for name in columns:
            if name not in _FIELDS or name in _LIST_FIELDS:
                raise TraceError(path, 1, f"has an unknown column {name!r}; {_known(lists=False)}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise TraceError(
                    path, reader.line_num, f"has {len(cells)} cells, but the header names {len(columns)}"
                )
            entry = {
                name: cell if _FIELDS[name].is_text else _cell(cell)
                for name, cell in zip(columns, cells, strict=True)
                if cell
            }
            yield _row(path, reader.line_num, entry)
    except csv.Error as error:
        raise TraceError(path, reader.line_num, f"is not CSV: {error}") from error


def _cell(cell: str) -> int | float | str:
    """Return the number that a cell spells, or the cell itself for the field's check to refuse."""
    try:
        return int(cell)
    except ValueError:
        try:
            return float(cell)
        except ValueError:
            return cell


def _row(path: Path, line_number: int, entry: dict[str, Any]) -> TraceRow:
    values: dict[str, Any] = {}
    for name, value in entry.items():
        field = _FIELDS.get(name)
        if field is None:
            raise TraceError(path, line_number, f"has an unknown field {name!r}; {_known(lists=True)}")
        if value is None:
            continue
        try:
            values[field.attribute] = field.read(value)
        except _BadValueError as error:
            raise TraceError(path, line_number, f"{name} must be {error}, not {value!r:.80}") from None
    for name in _REQUIRED:
        if _FIELDS[name].attribute not in values:
            raise TraceError(path, line_number, f"lacks {name}; every request needs {', '.join(_REQUIRED)}")
    values.pop("", None)
    if "hash_ranges" in values and "block_hashes" in values:
        raise TraceError(path, line_number, "has both hash_ranges and block_hashes; give one of them")
    return TraceRow(line_number=line_number, **values)


def _known(*, lists: bool) -> str:
    return "known are " + ", ".join(name for name in _FIELDS if lists or name not in _LIST_FIELDS)
