"""Axes and marks of charts as inline SVG. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_FONT_HEIGHT = 13.0
_CHARACTER_WIDTH = 6.3
_BOLD_CHARACTER_WIDTH = 7.2
_NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def text_width(text: str, *, is_bold: bool = False) -> float:
    """Return about how wide a label is, in the widest of usual fonts."""
    return len(text) * (_BOLD_CHARACTER_WIDTH if is_bold else _CHARACTER_WIDTH)


def nice_top(value: float) -> float:
    """Return the least round value that is not below a value above 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        step * power for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if step * power >= value
    )


def stepped(points: Sequence[Point]) -> list[Point]:
    """Return the corners of a line that keeps each value until the next point."""
    corners: list[Point] = []
    for point in points:
        if corners:
            corners.append((point[0], corners[-1][1]))
        corners.append(point)
    return corners


def coordinate(value: float) -> str:
    """Return a coordinate in as few characters as show no difference."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: What it shows, with its unit.
        low: Smallest value shown; above 0 where ``is_log``.
        high: Largest value shown.
        text: How a tick is written.
        is_log: Equal factors are equal distances.
        tick_values: Where ticks are; ``None``: at round values.
    """

    title: str
    low: float
    high: float
    text: Callable[[float], str]
    is_log: bool = False
    tick_values: tuple[float, ...] | None = None

    def place(self, value: float) -> float:
        """Return where a value is, 0 at the low end and 1 at the high end; what is beyond is at the end."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[float, ...]:
        """Return where ticks are."""
        if self.tick_values is not None:
            return self.tick_values
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    raw = (high - low) / 5.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(each * power for each in _NICE_STEPS if each * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(number * step for number in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    mantissas = (1.0,) if span > 3.5 else (1.0, 3.0) if span > 1.8 else (1.0, 2.0, 5.0)
    values = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
    return tuple(value for value in values if low * 0.999 <= value <= high * 1.001)


@dataclass(frozen=True, slots=True)
class EndLabel:
    """A label right of the plot, at the height of what it names.

    Attributes:
        value: On the vertical axis; moved where labels would overlap.
        style: Class of its colour.
        detail: Shown when the pointer rests on it.
    """

    value: float
    text: str
    style: str
    detail: str = ""


class Plot:
    """One chart: axes first, then marks in the order in which they are added.

    Args:
        x: Horizontal axis.
        y: Vertical axis.
        about: What the chart shows, for those who cannot see it.
        width: Units of the drawing, about pixels.
        height: Likewise.
        right: Room right of the plot, for labels.
        left: Room left of it.
        with_x_ticks: Whether the horizontal axis is written below; not where charts are stacked.
    """

    def __init__(
        self,
        x: Axis,
        y: Axis,
        about: str,
        *,
        width: float = 520.0,
        height: float = 300.0,
        right: float = 16.0,
        left: float = 52.0,
        with_x_ticks: bool = True,
    ) -> None:
        self.x, self.y = x, y
        self._about = about
        self._size = (width, height)
        top = 26.0
        bottom = 42.0 if with_x_ticks else 8.0
        self.left, self.top = left, top
        self.width, self.height = width - left - right, height - top - bottom
        self._parts: list[str] = []
        self._draw_axes(with_x_ticks=with_x_ticks)

    def px(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return self.left + self.x.place(value) * self.width

    def py(self, value: float) -> float:
        """Return the vertical place of a value."""
        return self.top + (1.0 - self.y.place(value)) * self.height

    def line(self, points: Sequence[Point], style: str) -> None:
        """Draw a line through points."""
        if points:
            self._parts.append(f'<path class="line {style}" d="{self._path(points)}"/>')

    def area(self, points: Sequence[Point], style: str) -> None:
        """Fill what is below a line."""
        if points:
            base = [(points[-1][0], self.y.low), (points[0][0], self.y.low)]
            self._parts.append(f'<path class="band {style}" d="{self._path([*points, *base])}Z"/>')

    def band(self, ranges: Sequence[tuple[float, float, float]], style: str) -> None:
        """Fill between a lower and an upper line, given as (x, low, high)."""
        if len(ranges) > 1:
            outline = [(x, high) for x, _, high in ranges]
            outline += [(x, low) for x, low, _ in reversed(ranges)]
            self._parts.append(f'<path class="band {style}" d="{self._path(outline)}Z"/>')

    def whisker(self, x: float, low: float, high: float, style: str, dx: float = 0.0) -> None:
        """Draw an interval of the vertical axis, a little beside its point."""
        place, top, bottom = self.px(x) + dx, self.py(high), self.py(low)
        self._parts.append(
            f'<path class="interval {style}" d="M{coordinate(place)} {coordinate(top)}V{coordinate(bottom)}'
            f'M{coordinate(place - 3)} {coordinate(top)}h6M{coordinate(place - 3)} {coordinate(bottom)}h6"/>'
        )

    def dot(self, point: Point, style: str, detail: str = "", radius: float = 3.5) -> None:
        """Draw a point; the detail is shown when the pointer rests on it."""
        x, y = coordinate(self.px(point[0])), coordinate(self.py(point[1]))
        title = f"<title>{escape(detail)}</title>" if detail else ""
        self._parts.append(f'<circle class="dot {style}" cx="{x}" cy="{y}" r="{radius:g}">{title}</circle>')

    def vertical_range(self, low: float, high: float, text: str) -> None:
        """Mark a value of the horizontal axis, or a range of it."""
        x, end = self.px(low), self.px(high)
        if end - x > 1.5:
            self._parts.append(
                f'<rect class="zone" x="{coordinate(x)}" y="{coordinate(self.top)}" '
                f'width="{coordinate(end - x)}" height="{coordinate(self.height)}"/>'
            )
        else:
            self._rule(x, self.top, x, self.top + self.height)
        middle = (x + end) / 2.0
        half = text_width(text) / 2.0
        middle = min(max(middle, self.left + half), self.left + self.width - half)
        self.text_at(middle, self.top - 8.0, text, "note middle")

    def horizontal(self, value: float, text: str) -> None:
        """Mark a value of the vertical axis, with its label inside at the left."""
        y = self.py(value)
        self._rule(self.left, y, self.left + self.width, y)
        self.text_at(self.left + 6.0, y - 5.0, text, "note")

    def text_at(self, x: float, y: float, text: str, style: str) -> None:
        """Write at a place of the drawing."""
        self._parts.append(
            f'<text class="{style}" x="{coordinate(x)}" y="{coordinate(y)}">{escape(text)}</text>'
        )

    def label(self, point: Point, text: str, style: str, *, dx: float = 7.0, dy: float = 4.0) -> None:
        """Write beside a point."""
        self.text_at(self.px(point[0]) + dx, self.py(point[1]) + dy, text, f"label {style}")

    def end_labels(self, labels: Sequence[EndLabel]) -> None:
        """Write labels right of the plot, moved apart where they would overlap."""
        ordered = sorted(labels, key=lambda label: -label.value)
        places = _apart([self.py(label.value) for label in ordered], self.top + self.height)
        right = self.left + self.width
        for label, place in zip(ordered, places, strict=True):
            at = self.py(label.value)
            self._parts.append(
                f'<path class="leader {label.style}" d="M{coordinate(right + 2)} {coordinate(at)}'
                f'L{coordinate(right + 10)} {coordinate(place)}"/>'
            )
            title = f"<title>{escape(label.detail)}</title>" if label.detail else ""
            self._parts.append(
                f'<text class="label {label.style}" x="{coordinate(right + 13)}" y="{coordinate(place + 4)}">'
                f"{escape(label.text)}{title}</text>"
            )

    def add(self, markup: str) -> None:
        """Add marks of the caller's own."""
        self._parts.append(markup)

    def render(self) -> str:
        """Return the chart."""
        return drawing("".join(self._parts), *self._size, self._about)

    def _path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{coordinate(self.px(x))} {coordinate(self.py(y))}" for x, y in points)

    def _rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self._parts.append(
            f'<path class="rule" d="M{coordinate(x1)} {coordinate(y1)}L{coordinate(x2)} {coordinate(y2)}"/>'
        )

    def _draw_axes(self, *, with_x_ticks: bool) -> None:
        left, right, bottom = self.left, self.left + self.width, self.top + self.height
        for value in self.y.ticks():
            y = coordinate(self.py(value))
            self._parts.append(f'<path class="grid" d="M{coordinate(left)} {y}H{coordinate(right)}"/>')
            self.text_at(left - 7.0, self.py(value) + 4.0, self.y.text(value), "tick end")
        self._parts.append(
            f'<path class="axis" d="M{coordinate(left)} {coordinate(bottom)}H{coordinate(right)}"/>'
        )
        self.text_at(0.0, 12.0, self.y.title, "axis-title")
        if not with_x_ticks:
            return
        for value in self.x.ticks():
            x = self.px(value)
            self._parts.append(f'<path class="axis" d="M{coordinate(x)} {coordinate(bottom)}v4"/>')
            self.text_at(x, bottom + 17.0, self.x.text(value), "tick middle")
        self.text_at(right, bottom + 35.0, self.x.title, "axis-title end")


def drawing(content: str, width: float, height: float, about: str) -> str:
    """Return an SVG element with some content."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(about)}" '
        f'style="max-width:{width * 1.15:g}px">{content}</svg>'
    )


def _apart(places: Sequence[float], bottom: float) -> list[float]:
    """Return places, given from the top, moved so far apart that labels of one line do not overlap."""
    moved = list(places)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + _FONT_HEIGHT)
    # Those pushed out below come back up, and push the ones above them.
    limit = bottom
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - _FONT_HEIGHT
    return moved
