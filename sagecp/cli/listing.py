"""Lists of things: which columns there are, in which order the rows come, and how they are printed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import click

from sagecp.cli import render
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

T = TypeVar("T")
SortKey = str | float | None


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """A column of a list, and how a thing fills it.

    Attributes:
        column: How it is printed. Its title, in any case, is its name for ``--sort-by``.
        cell: The text of a thing.
        key: What rows are ordered by; ``None``: unknown, and last either way.
        wide: Whether it is shown only where there is room for more.
        ages: Whether it changes by itself as time passes.
    """

    column: render.Column
    cell: Callable[[T], str]
    key: Callable[[T], SortKey]
    wide: bool = False
    ages: bool = False


def shown_fields(fields: Sequence[Field[T]], output: str) -> list[Field[T]]:
    """Return the fields of an output format; of those of wide tables alone, as many are printed as fit."""
    if output != "wide":
        return [field for field in fields if not field.wide]
    return [
        dataclasses.replace(field, column=dataclasses.replace(field.column, optional=True))
        if field.wide
        else field
        for field in fields
    ]


def check_sort_by(fields: Sequence[Field[T]], name: str) -> None:
    """Check the name of a column.

    Raises:
        CliError: There is no such column; names those that there are.
    """
    if name:
        _find(fields, name)


def _find(fields: Sequence[Field[T]], name: str) -> Field[T]:
    for field in fields:
        if field.column.title.lower() == name.lower():
            return field
    raise CliError(
        f"there is no column {name!r} to sort by",
        hint="there are: " + ", ".join(field.column.title.lower() for field in fields),
        exit_code=ExitCode.INVALID,
    )


def sort(things: Sequence[T], fields: Sequence[Field[T]], name: str, *, reverse: bool) -> list[T]:
    """Return things in the order of a column; without a name, in the order that they have."""
    if not name:
        return list(reversed(things)) if reverse else list(things)
    key = _find(fields, name).key
    known = [thing for thing in things if key(thing) is not None]
    unknown = [thing for thing in things if key(thing) is None]
    # All keys of a column are of one type, so they can be compared.
    return sorted(known, key=key, reverse=reverse) + unknown  # type: ignore[arg-type]


def print_list(things: Sequence[T], fields: Sequence[Field[T]], output: str, *, headers: bool) -> bool:
    """Print a table of things; return whether all columns that there are had room."""
    shown = shown_fields(fields, output)
    table = render.TablePrinter([field.column for field in shown], headers=headers)
    table.print([[field.cell(thing) for field in shown] for thing in things])
    return len(shown) == len(fields) and table.is_whole


def print_names(names: Sequence[str]) -> None:
    """Print names, one a line."""
    for name in names:
        click.echo(name)


class ChangeList(Generic[T]):
    """Prints things below each other as they change, each with the time of day.

    Args:
        fields: The columns beside the time.
        headers: Whether there are titles.
    """

    def __init__(self, fields: Sequence[Field[T]], *, headers: bool) -> None:
        self._fields = fields
        columns = [render.Column("TIME"), *(field.column for field in fields)]
        self._printer = render.TablePrinter(columns, headers=headers, states_change=True)

    def print(self, things: Sequence[tuple[T, bool]]) -> None:
        """Print things that have changed, each with whether it is gone."""
        now = time.strftime("%H:%M:%S")
        self._printer.print(
            [
                [
                    now,
                    *("GONE" if gone and field.column.state else field.cell(thing) for field in self._fields),
                ]
                for thing, gone in things
            ]
        )
