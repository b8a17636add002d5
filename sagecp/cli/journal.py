"""`sagecp journal`: look at a journal that no server uses, check it, save what is whole of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

if TYPE_CHECKING:
    from sagecp.runtime.store.sqlite.checking import JournalReport
    from sagecp.runtime.store.sqlite.salvage import SalvageReport

_SHOWN_COUNT = 20

_path_argument = click.argument("path", required=False, metavar="[PATH]", default="")
_output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="table or json."
)


@click.group("journal")
def journal() -> None:
    """Look at the journal of a server that is stopped, check it, or save what is whole of it.

    PATH is the journal's file; without it, the one that `sagecp serve` uses on
    its usual port. A journal that a running server uses is refused.
    """


@journal.command("status")
@_path_argument
@_output_option
def status(path: str, output: str) -> None:
    """Say what is in a journal. Its records are checked on the way; nothing is changed."""
    _show(_inspect(path, thoroughly=False), output)


@journal.command("verify")
@_path_argument
@_output_option
def verify(path: str, output: str) -> None:
    """Check every record, every ended request, and the file itself; nothing is changed.

    Exits 0 if all of it is whole, else 1, and names the first record that is not.
    """
    report = _inspect(path, thoroughly=True)
    _show(report, output)
    if output == "table":
        click.echo("all of it is what was written")


@journal.command("salvage")
@_path_argument
@_output_option
def salvage(path: str, output: str) -> None:
    """Put a new journal in the place of a damaged one, with everything that is whole.

    The damaged files are kept beside it. Says what was lost, in counts and,
    where they can still be read, by request ids.
    """
    from sagecp.runtime.store.sqlite.salvage import salvage_journal

    with _failures():
        report = salvage_journal(_path(path))
    if output == "json":
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _show_salvage(report)


def _path(path: str) -> Path:
    from sagecp.config import DEFAULT_PORT, JournalConfig
    from sagecp.runtime.store.open_store import journal_path

    return journal_path(JournalConfig(path=path), DEFAULT_PORT)


def _inspect(path: str, *, thoroughly: bool) -> JournalReport:
    from sagecp.runtime.store.sqlite.checking import inspect_journal

    with _failures():
        return inspect_journal(_path(path), thoroughly=thoroughly)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn a store's errors into lines and exit codes."""
    from sagecp.runtime.store.base import StoreCorruptError, StoreError

    try:
        yield
    except StoreCorruptError as error:
        raise CliError(str(error), exit_code=ExitCode.UNEXPECTED) from error
    except StoreError as error:
        raise CliError(str(error), exit_code=ExitCode.NOT_FOUND_OR_CONFLICT) from error


def _show(report: JournalReport, output: str) -> None:
    from sagecp.cli import render

    if output == "json":
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    count: Callable[[Any], str] = render.count
    records = f"{count(report.record_count)} ({count(report.live_record_count)} needed)"
    render.print_pairs(
        [
            ("file", f"{report.path} ({report.size_bytes / (1 << 20):.1f} MiB)"),
            ("live requests", count(report.live_request_count)),
            ("instances", count(report.instance_count)),
            (
                "ended requests",
                f"{count(report.ended_count)} (output: {report.output_bytes / (1 << 20):.1f} MiB)",
            ),
            (
                "records",
                f"{records}, number {report.first_record} to {report.last_record}",
            ),
            (
                "promised",
                f"up to number {report.promised_record}" if report.promised_record else "not known: no mark",
            ),
        ]
    )


def _show_salvage(report: SalvageReport) -> None:
    from sagecp.cli import render

    ranges = [str(first) if first == last else f"{first} to {last}" for first, last in report.lost_records]
    ended = render.count(report.ended_count)
    if report.lost_ended_count:
        ended += f"; of {render.count(report.lost_ended_count)} more, the output or all is lost"
    render.print_pairs(
        [
            ("new journal", report.path),
            ("damaged one", report.damaged_path),
            ("records saved", render.count(report.record_count)),
            ("records lost", render.count(report.lost_record_count)),
            ("their numbers", _some(ranges)),
            ("live requests", render.count(report.live_request_count)),
            ("ended requests", ended),
            ("with losses", _some(report.request_ids)),
        ]
    )


def _some(texts: list[str]) -> str:
    more = len(texts) - _SHOWN_COUNT
    return ", ".join(texts[:_SHOWN_COUNT]) + (f", and {more} more" if more > 0 else "")
