"""What people read: aligned tables, key-value lists, and humanised figures. No dependency but click."""

from __future__ import annotations

import contextlib
import contextvars
import io
import math
import os
import re
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import click

_STATE_COLORS = {
    "READY": "green", "SUCCEEDED": "green", "SERVING": "green",
    "STARTING": "cyan", "RUNNING": "cyan", "DISPATCHED": "cyan",
    "QUEUED": "yellow", "DRAINING": "yellow", "DRAINED": "yellow", "CANCELLED": "yellow",
    "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red", "OK": "green",
    "UNHEALTHY": "red", "LOST": "red", "GONE": "red", "FAILED": "red", "EXPIRED": "red",
}  # fmt: skip
_ELLIPSIS = "…"
_STATE_WIDTH = len("DISPATCHED")
# What others wrote must not steer the terminal: control characters go, colours of our own stay.
_CONTROL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")
# Where what is printed is collected for a screen: how wide its lines may be.
_captured_width: contextvars.ContextVar[int | None] = contextvars.ContextVar("captured_width", default=None)
_GAP = "  "
_LEAST_TEXT_WIDTH = 30
NONE = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its head.
        right: Numbers are aligned to the right.
        state: Whether the cells are states, which have colours.
        flexible: Whether it may be shortened where the terminal is narrow.
        optional: Whether it may be left out there.
        least_width: To which a flexible one is shortened before others are left out.
    """

    title: str
    right: bool = False
    state: bool = False
    flexible: bool = False
    optional: bool = False
    least_width: int = 8


class TablePrinter:
    """Prints rows below each other as they come; the first ones set the widths, longer ones widen them.

    Args:
        columns: What there is.
        headers: Whether the titles are printed, first and when the columns that fit change.
        states_change: Whether columns of states have room for others from the start.
    """

    def __init__(
        self, columns: Sequence[Column], *, headers: bool = True, states_change: bool = False
    ) -> None:
        self._columns = columns
        self._headers = headers
        self._widths = [
            max(
                _width(column.title) if headers else 0,
                _STATE_WIDTH if column.state and states_change else 0,
            )
            for column in columns
        ]
        self._shown: list[int] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no column was left out of what was printed last."""
        return self._shown is None or len(self._shown) == len(self._columns)

    def print(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows; where the terminal is narrow, some columns are left out or shortened."""
        rows = [[harmless(cell).replace("\n", " ") for cell in row] for row in rows]
        for row in rows:
            self._widths = [max(width, _width(cell)) for width, cell in zip(self._widths, row, strict=True)]
        widths = list(self._widths)
        kept = _fit(self._columns, widths)
        columns, widths = [self._columns[i] for i in kept], [widths[i] for i in kept]
        if self._headers and kept != self._shown:
            click.echo(_line([column.title for column in columns], columns, widths, styled=False))
        self._shown = kept
        for row in rows:
            click.echo(_line([row[i] for i in kept], columns, widths, styled=True))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, headers: bool = True) -> None:
    """Print an aligned table; where the terminal is narrow, some columns are left out or shortened."""
    TablePrinter(columns, headers=headers).print(rows)


def _fit(columns: Sequence[Column], widths: list[int]) -> list[int]:
    """Return the columns that stay; their widths are made to fit."""
    kept = list(range(len(columns)))
    room = terminal_width()

    def excess() -> int:
        return sum(widths[i] for i in kept) + len(_GAP) * (len(kept) - 1) - room

    def spare() -> int:
        return sum(max(0, widths[i] - columns[i].least_width) for i in kept if columns[i].flexible)

    for index in [i for i in reversed(kept) if columns[i].optional]:
        if excess() > spare():
            kept.remove(index)
    while excess() > 0 and spare() > 0:
        # Of those with room to spare, so that a long text does not take all from a short one.
        widest = max(
            (i for i in kept if columns[i].flexible and widths[i] > columns[i].least_width),
            key=lambda i: widths[i],
        )
        widths[widest] -= 1
    return kept


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int], *, styled: bool) -> str:
    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        text = _shorten(cell, width)
        pad = " " * (width - _width(text))
        if styled and column.state:
            text = state_text(text)
        elif not styled:
            text = click.style(text, bold=True)
        parts.append(pad + text if column.right else text + pad)
    return _GAP.join(parts).rstrip()


def print_pairs(pairs: Iterable[tuple[str, str]], indent: str = "", least_width: int = 0) -> None:
    """Print names and values below each other; pairs with an empty value are left out."""
    given = [(name, harmless(value)) for name, value in pairs if value]
    width = max((len(name) for name, _ in given), default=0)
    width = max(width, least_width)
    for name, value in given:
        first, *rest = value.split("\n")
        click.echo(f"{indent}{click.style(name, bold=True)}{' ' * (width - len(name))}{_GAP}{first}")
        for line in rest:
            click.echo(f"{indent}{' ' * width}{_GAP}{line}")


def wrapped(text: str, names_width: int) -> str:
    """Return a text in lines that fit beside names of `print_pairs` of a width."""
    room = terminal_width() - names_width - len(_GAP)
    return "\n".join(textwrap.wrap(text, max(_LEAST_TEXT_WIDTH, room), break_on_hyphens=False))


def harmless(text: str) -> str:
    """Return text without control characters, but for tabs, line ends and colours."""
    return _CONTROL.sub("", text)


def state_text(state: str) -> str:
    """Return a state in its colour."""
    color = _STATE_COLORS.get(state.strip())
    return click.style(state, fg=color) if color else state


@contextlib.contextmanager
def captured(width: int) -> Iterator[io.StringIO]:
    """Collect what is printed, with its colours and laid out for a width, instead of printing it.

    Not for concurrent use: what anybody else prints meanwhile is collected as well.
    """
    output = io.StringIO()
    token = _captured_width.set(width)
    try:
        with contextlib.redirect_stdout(output), click.Context(click.Command("captured"), color=True):
            yield output
    finally:
        _captured_width.reset(token)


def terminal_width() -> int:
    """Return how wide lines may be; without a terminal there is no limit."""
    if (width := _captured_width.get()) is not None:
        return width
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return 10_000
    return shutil.get_terminal_size((100, 24)).columns


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def _shorten(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 1:
        text = text[:-1]
    return text + _ELLIPSIS


def duration(seconds: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if seconds is None:
        return NONE
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.009_995:
        return f"{seconds * 1e3:.2f} ms"
    if seconds < 0.099_95:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.999_5:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest_s:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h"


def span(start_s: float | None, end_s: float | None) -> str:
    """Return the time between two moments, where both are known."""
    return NONE if start_s is None or end_s is None else duration(max(0.0, end_s - start_s))


def age(moment_s: float | None) -> str:
    """Return how long ago a moment was, without false precision."""
    if moment_s is None or moment_s <= 0:
        return NONE
    seconds = max(0.0, time.time() - moment_s)
    return f"{seconds:.0f}s" if seconds < 100 else duration(seconds)


def clock_time(moment_s: float | None) -> str:
    """Return a moment in local time."""
    if moment_s is None or moment_s <= 0:
        return NONE
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment_s))
    return f"{text}.{int(moment_s % 1 * 1000):03d}"


def count(number: float | None) -> str:
    """Return a count; thousands are told apart."""
    return NONE if number is None else f"{number:,.0f}"


def compact(number: float | None) -> str:
    """Return a count in few characters: 12.3k, 4.5M."""
    if number is None:
        return NONE
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def usd(value: float | None) -> str:
    """Return US dollars: whole cents, and of less than a dollar three digits that say something."""
    if value is None:
        return NONE
    size = abs(value)
    decimals = 2 if size >= 1.0 or size < 1e-12 else min(12, 2 - math.floor(math.log10(size)))
    return f"${value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """Return a share of one."""
    return NONE if share is None else f"{share * 100:.3g}%"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
