"""What waits, by class, tenant and model. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.cli import render
from sagecp.cli.top.model import Picture
from sagecp.cli.top.text import Line, fit, fit_line, plain, title

_CLASSES = ("CRITICAL", "HIGH", "NORMAL", "LOW", "BACKGROUND")
# A name and how many wait; a heading has no number.
_Entry = tuple[str, int | None]
_CLASS_WIDTH = 16
_LEAST_TENANT_WIDTH = 12


def queue_lines(picture: Picture, width: int, height: int, *, focused: bool, top: int = 0) -> list[Line]:
    """Return what waits, by class at the left, and by tenant, then by model, at the right.

    Where that is too narrow, all of it is one list.

    Args:
        picture: What was read.
        width: In cells.
        height: In lines, with the title.
        focused: Whether keys go to it.
        top: Entries that are scrolled past: of the right, or of the one list.
    """
    status = picture.status
    queued = status.queued if status else 0
    capacity = f" of {render.count(status.queue_capacity)}" if status and status.queue_capacity else ""
    lines = [title(f"Waiting {queued:,}{capacity}", width, focused=focused)]
    if status is None:
        return lines
    classes: list[_Entry] = [(name, status.queued_by_class.get(name, 0)) for name in _CLASSES]
    rest = _rest(status.queued_by_tenant, status.queued_by_model)
    room = width - _CLASS_WIDTH - 2
    if room < _LEAST_TENANT_WIDTH:
        # No room beside each other: below each other, to be scrolled.
        both = classes + rest
        return lines + [_line(entry, width) for entry in _window(both, top, height - 1)]
    shown = _window(rest, top, height - 1)
    for index in range(height - 1):
        left = _line(classes[index], _CLASS_WIDTH) if index < len(classes) else ((" " * _CLASS_WIDTH, ""),)
        right = ((" │", "dim"), *_line(shown[index], room)) if index < len(shown) else ()
        lines.append(fit_line((*left, *right), width))
    return lines


def _window(entries: list[_Entry], top: int, height: int) -> list[_Entry]:
    top = max(0, min(top, len(entries) - height))
    return entries[top : top + height]


def _rest(tenants: Mapping[str, int], models: Mapping[str, int]) -> list[_Entry]:
    """Return headings (without a number) and entries, those with the most first."""
    result: list[_Entry] = [("by tenant", None)]
    result += _largest_first(tenants) or [("nobody waits", None)]
    if models:
        result += [("by model", None), *_largest_first(models)]
    return result


def _largest_first(counts: Mapping[str, int]) -> list[_Entry]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(plain(name) or "(none)", number) for name, number in ordered if number]


def _line(entry: _Entry, width: int) -> Line:
    name, number = entry
    if number is None:
        return fit_line(((f" {name}", "dim"),), width)
    text = render.compact(number)
    return (
        (" " + fit(name, width - len(text) - 2) + " ", "" if number else "dim"),
        (text, "bold yellow" if number else "dim"),
    )
