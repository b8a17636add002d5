"""What commands print, as lines for a screen: the console says what `sagecp instances get` says."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from sagecp.cli import render
from sagecp.cli.top.text import Line


def printed_lines(width: int, show: Callable[[], None]) -> list[Line]:
    """Return what a function prints, laid out for a width.

    Args:
        width: In cells.
        show: Prints with `click.echo`.
    """
    with render.captured(width) as output:
        show()
    lines: list[Line] = []
    for line in Text.from_ansi(output.getvalue()).split("\n", allow_blank=True):
        spans = [(piece.plain, str(piece.style)) for piece in _pieces(line)]
        lines.append(tuple(spans))
    return lines


def _pieces(line: Text) -> list[Text]:
    """Return a line in pieces of one style each."""
    ends = sorted({0, len(line), *(span.start for span in line.spans), *(span.end for span in line.spans)})
    pieces = []
    for piece in line.divide(ends[1:-1]):
        style = piece.spans[0].style if piece.spans else ""
        pieces.append(Text(piece.plain, style))
    return pieces
