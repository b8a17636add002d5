"""Shows how far a replay is: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

from sagecp.cli.demo.replay import Outcome

_BAR_WIDTH = 30
_REDRAW_S = 0.1
_LINES = 10


class Progress:
    """A progress bar: rich's where it is installed, else one of characters."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begin_s = time.monotonic()
        self._drawn_s = 0.0
        self._terminal = sys.stderr.isatty()
        self._rich: Any = _rich_progress(total) if self._terminal else None
        self._said = 0

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._terminal:
            click.echo(err=True)

    def update(self, outcomes: list[Outcome], running: int) -> None:
        """Show the state after another request ended."""
        now, done = time.monotonic(), len(outcomes)
        if now - self._drawn_s < _REDRAW_S and done < self._total:
            return
        self._drawn_s = now
        tokens = sum(outcome.token_count for outcome in outcomes)
        rate = tokens / max(0.001, now - self._begin_s)
        state = f"{running} running, {rate:,.0f} tokens/s"
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=done, state=state)
        elif self._terminal:
            filled = done * _BAR_WIDTH // self._total
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            click.echo(f"\r[{bar}] {done}/{self._total}  {state}   ", err=True, nl=False)
        elif done * _LINES // self._total > self._said:
            self._said = done * _LINES // self._total
            click.echo(f"{done}/{self._total} requests, {state}", err=True)


def _rich_progress(total: int) -> Any:  # noqa: ANN401 - rich.progress.Progress, where it is installed
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    progress = RichProgress(
        TextColumn("replaying"),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
    )
    progress.add_task("replay", total=total, state="")
    return progress
