"""Where names of points go in a chart, so that none lies on another or on a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_HEIGHT = 13.0
# Distances from the point that are tried, in units of the drawing, and directions: right, left,
# above, below, then the corners.
_DISTANCES = (8.0, 12.0, 20.0, 30.0, 42.0, 56.0, 72.0, 90.0)
_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
_DOT_RADIUS, _RING_RADIUS = 5.0, 9.5
_STEP_COUNT = 16


@dataclass(frozen=True, slots=True)
class LabelPlace:
    """Where a name is written.

    Attributes:
        x: Left end of the text.
        y: Its baseline.
        needs_leader: Whether it is so far from its point that a line should lead to it.
        anchor: Where that line ends.
    """

    x: float
    y: float
    needs_leader: bool
    anchor: Point


def place_labels(
    points: Sequence[Point],
    widths: Sequence[float],
    bounds: Box,
    obstacles: Sequence[Point] = (),
) -> list[LabelPlace | None]:
    """Return a place per point, in their order; ``None``: there is no room for it.

    Args:
        points: What is named, most important first: those find the better places, and the
            first may have a ring around it.
        widths: Of the names.
        bounds: What they must stay within.
        obstacles: Further points that no name may cover.
    """
    taken = [_around(point, _DOT_RADIUS) for point in (*points, *obstacles)]
    taken += [_around(point, _RING_RADIUS) for point in points[:1]]
    found: list[LabelPlace | None] = []
    # Boxes of names, and pieces of the lines that lead to them.
    names: list[Box] = []
    for point, width in zip(points, widths, strict=True):
        place = _place(point, width, bounds, taken, names)
        found.append(place)
        if place is not None:
            names.append(_box(place.x, place.y, width))
            if place.needs_leader:
                names += [_around(step, 1.0) for step in _steps(point, place.anchor)]
    return found


def _place(
    point: Point, width: float, bounds: Box, dots: Sequence[Box], names: Sequence[Box]
) -> LabelPlace | None:
    for distance in _DISTANCES:
        for dx, dy in _DIRECTIONS:
            x = point[0] + dx * distance - (0.0 if dx > 0 else width if dx < 0 else width / 2.0)
            y = point[1] + dy * distance + _HEIGHT * 0.3
            box = _box(x, y, width)
            if not (
                box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            ):
                continue
            if any(_overlap(box, other) for other in (*dots, *names)):
                continue
            anchor = min(max(point[0], x), x + width), min(max(point[1], box[1]), box[3])
            needs_leader = distance > _DISTANCES[1]
            # A line over another name would strike it out, one over another dot would be its.
            others = [dot for dot in dots if not _overlap(dot, _around(point, 0.5))]
            if needs_leader and any(
                _overlap(_around(step, 0.5), other)
                for step in _steps(point, anchor)
                for other in (*names, *others)
            ):
                continue
            return LabelPlace(x, y, needs_leader, anchor)
    return None


def _steps(start: Point, end: Point) -> list[Point]:
    """Return points along a line."""
    return [
        (
            start[0] + (end[0] - start[0]) * part / _STEP_COUNT,
            start[1] + (end[1] - start[1]) * part / _STEP_COUNT,
        )
        for part in range(1, _STEP_COUNT)
    ]


def _around(point: Point, radius: float) -> Box:
    return point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius


def _box(x: float, y: float, width: float) -> Box:
    return x - 1.0, y - _HEIGHT * 0.8, x + width + 1.0, y + _HEIGHT * 0.25


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
