"""The page of a report: one file that needs no network and no scripts, for light and dark screens."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE_CHART = 1080.0
"""Width of a chart over the whole page, in units of the drawing."""
NARROW_CHART = 520.0
"""Width of a chart on a phone, or of one of two side by side."""

# Units that an interval has once, after its spread; below the mean they are wanted twice.
_UNITS = (" %", "/s")
# Nothing may be fetched, whatever a trace or a label holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        body: Markup.
    """
    style = (importlib.resources.files("sagecp.sim.fleet.report") / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline figure.

    Attributes:
        note: What it is, below it.
        is_lead: It is what the page is about.
    """

    figure: str
    note: str
    is_lead: bool = False


def tiles(entries: Sequence[Tile]) -> str:
    """Return headline figures side by side."""
    cells = "".join(
        f'<div class="tile{" lead" if each.is_lead else ""}"><b>{escape(each.figure)}</b>'
        f"<span>{escape(each.note)}</span></div>"
        for each in entries
    )
    return f'<div class="tiles">{cells}</div>'


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        share: Drawn as a bar behind the text; ``None``: none is.
        style: Class of a coloured mark before the text; empty: no mark.
    """

    text: str
    share: float | None = None
    style: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        is_best: Of its group.
        heading: Written above it, over the whole width; empty: nothing is.
    """

    cells: tuple[Cell, ...]
    is_best: bool = False
    heading: str = ""


def table(titles: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table; its first column is text, the others are figures."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(_row(row) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Row) -> str:
    kind = ' class="best"' if row.is_best else ""
    cells = f"<tr{kind}>{''.join(_cell(cell) for cell in row.cells)}</tr>"
    if not row.heading:
        return cells
    return f'<tr class="group"><td colspan="{len(row.cells)}">{escape(row.heading)}</td></tr>{cells}'


def _cell(cell: Cell) -> str:
    mark = f'<i class="key {cell.style}"></i>' if cell.style else ""
    # Of a mean with its interval, the mean is what is read first.
    mean, sign, spread = escape(cell.text).partition(" ± ")
    unit = next((each for each in _UNITS if spread.endswith(each)), "")
    text = f"{mark}{mean}{unit}<small> ± {spread}</small>" if sign else f"{mark}{mean}"
    if cell.share is None:
        return f"<td>{text}</td>"
    return f'<td class="share" style="--v:{cell.share * 100:.1f}%">{text}</td>'


def pairs(entries: Sequence[tuple[str, str]]) -> str:
    """Return names with values; entries without a value are left out."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries if value)
    return f"<dl>{rows}</dl>"


def note(text: str) -> str:
    """Return a sentence that says how to read what follows."""
    return f'<p class="about">{escape(text)}</p>'


def section(title: str, about: str, *content: str) -> str:
    """Return a section: a heading, a sentence that says how to read it, and what it shows."""
    reading = note(about) if about else ""
    return f"<section><h2>{escape(title)}</h2>{reading}{''.join(content)}</section>"


def in_two_widths(draw: Callable[[float], str]) -> str:
    """Return a chart drawn for a wide screen and for a phone, of which each shows one.

    Args:
        draw: Makes the chart in a width.
    """
    return f'<div class="for-wide">{draw(WIDE_CHART)}</div><div class="for-narrow">{draw(NARROW_CHART)}</div>'


def side_by_side(*figures: tuple[str, str]) -> str:
    """Return charts with their titles beside each other where there is room."""
    return (
        '<div class="pair">'
        + "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in figures)
        + "</div>"
    )
