"""Lines of styled text: what the panels are made of. Knows no widgets."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from sagecp.cli.render import harmless

# A piece of text and how it looks: words that rich knows, such as "bold red". "" is plain.
Span = tuple[str, str]
Line = tuple[Span, ...]

_ELLIPSIS = "…"
# A mark and a colour for each state. The mark and the word say the same as the colour does.
_STATES = {
    "READY": ("●", "green"),
    "STARTING": ("◌", "cyan"),
    "DRAINING": ("◐", "yellow"),
    "DRAINED": ("○", "yellow"),
    "UNHEALTHY": ("✖", "bold red"),
    "LOST": ("✖", "bold red"),
}


def state_mark(state: str) -> str:
    """Return the mark of an instance's state."""
    return _STATES.get(state, ("?", ""))[0]


def state_style(state: str) -> str:
    """Return the colour of an instance's state."""
    return _STATES.get(state, ("", ""))[1]


def plain(text: str) -> str:
    """Return what a server said as one line that cannot steer the terminal."""
    return harmless(text).replace("\x1b", "").replace("\n", " ").replace("\t", " ")


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Return text in exactly so many cells: padded, or cut with an ellipsis."""
    if width <= 0:
        return ""
    length = len(text) if text.isascii() else cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + _ELLIPSIS
    return " " * (width - length) + text if right else text + " " * (width - length)


def fit_line(line: Sequence[Span], width: int) -> Line:
    """Return a line in exactly so many cells."""
    result: list[Span] = []
    left = width
    for text, style in line:
        length = len(text) if text.isascii() else cell_len(text)
        if length > left:
            result.append((fit(text, left), style))
            left = 0
            break
        result.append((text, style))
        left -= length
    if left > 0:
        result.append((" " * left, ""))
    return tuple(result)


def width_of(line: Sequence[Span]) -> int:
    """Return the cells that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def dimmed(line: Sequence[Span]) -> Line:
    """Return a line as one that may be no longer so."""
    return tuple((text, f"{style} dim".strip()) for text, style in line)


def line_text(line: Sequence[Span]) -> str:
    """Return a line without its styles."""
    return "".join(text for text, _ in line)


def join(parts: Sequence[Line], gap: str = "  ") -> Line:
    """Return several lines as one, with a gap between them."""
    result: list[Span] = []
    for part in parts:
        if not part:
            continue
        if result:
            result.append((gap, ""))
        result += part
    return tuple(result)


def as_many_as_fit(parts: Sequence[Line], width: int, gap: str = "  ") -> Line:
    """Return the first parts that have room beside each other; the first one in any case."""
    kept: list[Line] = []
    left = width
    for part in parts:
        needed = width_of(part) + (len(gap) if kept else 0)
        if kept and needed > left:
            continue
        kept.append(part)
        left -= needed
    return join(kept, gap)


def title(text: str, width: int, *, focused: bool, more: str = "") -> Line:
    """Return the first line of a panel.

    Args:
        text: What the panel is.
        width: Of the panel.
        focused: Whether keys go to it.
        more: Said at the right, where there is room.
    """
    mark = "▶ " if focused else "─ "
    head = f"{mark}{text} "
    room = width - cell_len(head) - (cell_len(more) + 3 if more else 0)
    if room < 0 and more:
        return title(text, width, focused=focused)
    tail = f" {more} ─" if more else ""
    style = "bold cyan" if focused else "bold"
    return fit_line(((head, style), ("─" * max(0, room), "dim"), (tail, "dim")), width)
