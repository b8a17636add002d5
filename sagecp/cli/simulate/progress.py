"""Shows how far the runs are: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import click

_BAR_WIDTH = 30
_REDRAW_S = 0.1


class Progress:
    """A progress bar: rich's where it is installed, else one of characters.

    Args:
        total: Number of runs.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._drawn_s = 0.0
        self._is_terminal = sys.stderr.isatty()
        self._rich: Any = _rich_progress(total) if self._is_terminal else None

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._is_terminal:
            click.echo("\r" + " " * 79 + "\r", err=True, nl=False)

    def update(self, shares: Sequence[float]) -> None:
        """Show the share done of each run."""
        now = time.monotonic()
        if not self._is_terminal or now - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s = now
        ended, done = sum(1 for share in shares if share >= 1.0), sum(shares)
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=done, state=f"{ended}/{self._total}")
        else:
            filled = int(done * _BAR_WIDTH / self._total)
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            click.echo(f"\r[{bar}] {ended}/{self._total} runs  ", err=True, nl=False)


def _rich_progress(total: int) -> Any:  # noqa: ANN401 - rich.progress.Progress, where it is installed
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    progress = RichProgress(
        TextColumn("simulating"),
        BarColumn(bar_width=_BAR_WIDTH),
        TextColumn("{task.fields[state]} runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.add_task("simulate", total=total, state=f"0/{total}")
    return progress
