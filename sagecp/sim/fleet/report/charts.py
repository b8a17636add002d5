"""The charts of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sagecp.sim.fleet.experiment import InstanceFigures, RunResult
from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.run_charts import CURVE_SHARES, Distribution, LengthBin, Numbers, RunSeries
from sagecp.sim.fleet.report.svg import (
    Axis,
    EndLabel,
    Plot,
    Point,
    coordinate,
    drawing,
    nice_top,
    stepped,
    text_width,
)

_MARKED_SHARES = (0.5, 0.95, 0.99)
_PERCENT_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_LEVELS = 8
_MOST_ROWS = 40
_ROW_HEIGHT = 17.0
_TIMELINE_RIGHT = 64.0
_SHORTEST_S = 1e-4


def percent_axis(title: str, low: float = 0.0, high: float = 1.0) -> Axis:
    """Return an axis of shares of one."""
    ticks = _PERCENT_TICKS if low == 0.0 and high == 1.0 else None
    return Axis(title, low, high, lambda value: f"{value * 100:.0f} %", tick_values=ticks)


def duration_axis(title: str, values_s: Sequence[float]) -> Axis:
    """Return a logarithmic axis that shows all of some durations."""
    known = [max(value, _SHORTEST_S) for value in values_s] or [0.01, 1.0]
    low, high = min(known) * 0.9, max(known) * 1.15
    return Axis(title, low, max(high, low * 3.0), words.seconds, is_log=True)


def distribution_chart(title: str, curves: Sequence[tuple[str, Distribution, str]]) -> str:
    """Return how long something took, as the share of the requests that had it within a time.

    Args:
        title: What took that long.
        curves: Name, distribution and style of each; a single one has its quantiles marked.
    """
    shown = [curve for curve in curves if curve[1].quantiles_s]
    if not shown:
        return '<p class="empty">Nothing was measured.</p>'
    first = shown[0][1]
    values = [value for _, each, _ in shown for value in (each.quantiles_s[2], each.quantiles_s[-2])]
    objectives = [each for each in (first.objective_low_s, first.objective_high_s) if each is not None]
    plot = Plot(
        duration_axis(f"{title}, log scale", [*values, *objectives]),
        percent_axis("of the requests"),
        f"Distribution of {title}",
    )
    if len(objectives) == 2:
        low, high = objectives
        text = f"objective {words.seconds(low)}"
        if high > low * 1.001:
            text = f"objectives {words.seconds(low)} to {words.seconds(high)}, by prompt length"
        plot.vertical_range(low, high, text)
    for index, (name, each, style) in enumerate(shown):
        points = _curve(each)
        plot.line(points, style)
        if len(shown) == 1:
            _mark_quantiles(plot, each, style)
        else:
            share = 0.25 + 0.5 * index / max(1, len(shown) - 1)
            plot.label(points[round(share * 100)], name, f"halo {style}", dx=4.0)
    return plot.render()


def _mark_quantiles(plot: Plot, distribution: Distribution, style: str) -> None:
    """Mark three quantiles, and write them where a curve that rises to the right never is."""
    for number, share in enumerate(reversed(_MARKED_SHARES)):
        value_s = distribution.quantiles_s[CURVE_SHARES.index(share)]
        text = f"p{share * 100:g}  {words.seconds(value_s)}"
        plot.dot((value_s, share * distribution.measured_share), style, text)
        bottom = plot.top + plot.height
        plot.text_at(plot.left + plot.width - 8.0, bottom - 10.0 - 17.0 * number, text, f"label end {style}")


def _curve(distribution: Distribution) -> list[Point]:
    return [
        (max(value, _SHORTEST_S), share * distribution.measured_share)
        for share, value in zip(CURVE_SHARES, distribution.quantiles_s, strict=True)
    ]


def length_chart(bins: Sequence[LengthBin]) -> str:
    """Return the time to the first token against the prompt's length, beside its objective."""
    lines = [
        (name, style, points)
        for name, style, points in (
            ("p95", "c0 thin", _by_length(bins, [each.ttft_p95_s for each in bins])),
            ("median", "c0", _by_length(bins, [each.ttft_p50_s for each in bins])),
            ("objective", "objective", _by_length(bins, [each.objective_s for each in bins])),
        )
        if points
    ]
    if not lines or len(bins) < 2:
        return '<p class="empty">The prompts are of one length.</p>'
    lengths = [point[0] for _, _, points in lines for point in points]
    plot = Plot(
        Axis("prompt tokens, log scale", min(lengths) * 0.85, max(lengths) * 1.1, words.tokens, is_log=True),
        duration_axis("time to first token, log scale", [y for _, _, points in lines for _, y in points]),
        "Time to the first token by prompt length",
        right=74.0,
    )
    for _, style, points in lines:
        plot.line(points, style)
    for each in bins:
        if each.ttft_p50_s is not None and each.ttft_p95_s is not None:
            x = math.sqrt(each.low_token_count * each.high_token_count)
            lengths_text = f"{each.low_token_count:,} to {each.high_token_count:,} prompt tokens"
            times = f"median {words.seconds(each.ttft_p50_s)}, p95 {words.seconds(each.ttft_p95_s)}"
            count = words.plural(each.request_count, "request")
            detail = f"{lengths_text}, {count}: {times}, {words.share(each.attainment)} good"
            plot.dot((x, each.ttft_p50_s), "c0", detail)
            plot.dot((x, each.ttft_p95_s), "c0", detail, 2.5)
    plot.end_labels([EndLabel(points[-1][1], name, style) for name, style, points in lines])
    return plot.render()


def _by_length(bins: Sequence[LengthBin], values_s: Sequence[float | None]) -> list[Point]:
    return [
        (math.sqrt(each.low_token_count * each.high_token_count), max(value_s, _SHORTEST_S))
        for each, value_s in zip(bins, values_s, strict=True)
        if value_s is not None
    ]


# -- over time -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stack:
    """What charts that are stacked have in common.

    Attributes:
        x: Their axis of time.
        left: Room left of the plots.
    """

    series: RunSeries
    x: Axis
    left: float
    width: float

    def plot(self, y: Axis, height: float) -> Plot:
        """Return an empty chart of the stack."""
        return Plot(
            self.x,
            y,
            y.title,
            width=self.width,
            height=height,
            left=self.left,
            right=_TIMELINE_RIGHT,
            with_x_ticks=False,
        )


def timeline(run: RunResult, width: float) -> str:
    """Return what arrived, waited and ran over time: stacked charts with one horizontal axis."""
    charts = run.charts
    if charts is None or not charts.series.arrivals_per_s:
        return ""
    series = charts.series
    left = max(96.0, 14.0 + max(text_width(each, is_bold=True) for each in series.instance_ids[:_MOST_ROWS]))
    end_s = series.bin_s * len(series.arrivals_per_s)
    stack = _Stack(series, _time_axis(end_s), left, width)
    strips = [
        _strip(stack, series.arrivals_per_s, "requests per second that arrive", "c2"),
        _strip(stack, series.queued_count, "requests that wait in the scheduler", "c1"),
        _attainment_strip(stack),
        _heat(stack, run.instances),
    ]
    return '<div class="stack">' + "".join(strips) + "</div>"


def _time_axis(end_s: float) -> Axis:
    if end_s > 240.0:
        step = next((each for each in (1, 2, 5, 10, 20, 30, 60, 120, 240) if end_s / 60.0 / each <= 12), 480)
        ticks = tuple(60.0 * step * index for index in range(int(end_s / 60.0 / step) + 1))
        return Axis("minutes", 0.0, end_s, lambda value: f"{value / 60:g}", tick_values=ticks)
    return Axis("seconds", 0.0, end_s, lambda value: f"{value:g}")


def _strip(stack: _Stack, values: Numbers, title: str, style: str) -> str:
    most = max((value for value in values if value is not None), default=0.0)
    top = nice_top(most) if most else 1.0
    plot = stack.plot(Axis(title, 0.0, top, words.number, tick_values=(0.0, top)), 92.0)
    bin_s = stack.series.bin_s
    points = [(index * bin_s, value or 0.0) for index, value in enumerate(values)]
    points.append((len(values) * bin_s, points[-1][1]))
    corners = stepped(points)
    plot.area(corners, style)
    plot.line(corners, f"thin {style}")
    return plot.render()


def _attainment_strip(stack: _Stack) -> str:
    title = "of the requests that arrived then, met every objective"
    y = Axis(title, 0.0, 1.0, lambda value: f"{value * 100:.0f} %", tick_values=(0.0, 0.5, 1.0))
    plot = stack.plot(y, 104.0)
    series = stack.series
    pieces: list[list[Point]] = [[]]
    for index, value in enumerate(series.attainment):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(((index + 0.5) * series.bin_s, value))
    for piece in pieces:
        plot.line(piece, "c0")
    return plot.render()


def _heat(stack: _Stack, instances: Sequence[InstanceFigures]) -> str:
    """Return requests on each instance over time as shades, one row per instance or group of them."""
    series, x, left = stack.series, stack.x, stack.left
    rows = _grouped(series, instances)
    most = max((value for _, values, _ in rows for value in values), default=0.0) or 1.0
    top = 26.0
    height = top + _ROW_HEIGHT * len(rows) + 42.0
    width = stack.width - left - _TIMELINE_RIGHT
    title = f"requests on each instance; strongest: {words.number(most)}"
    parts = [f'<text class="axis-title" x="0" y="12">{escape(title)}</text>']
    parts.append(f'<text class="tick end" x="{coordinate(stack.width)}" y="12">busy</text>')
    for number, (name, values, busy_share) in enumerate(rows):
        y = top + number * _ROW_HEIGHT
        for end_x, text in ((left - 7.0, name), (stack.width, f"{busy_share * 100:.0f} %")):
            place = f'x="{coordinate(end_x)}" y="{coordinate(y + 12)}"'
            parts.append(f'<text class="tick end" {place}>{escape(text)}</text>')
        parts += _heat_row(values, most, series.bin_s, x, left, width, y)
    bottom = top + _ROW_HEIGHT * len(rows)
    for value in x.ticks():
        at = coordinate(left + x.place(value) * width)
        parts.append(f'<path class="axis" d="M{at} {coordinate(bottom + 2)}v4"/>')
        parts.append(
            f'<text class="tick middle" x="{at}" y="{coordinate(bottom + 19)}">{x.text(value)}</text>'
        )
    parts.append(
        f'<text class="axis-title end" x="{coordinate(left + width)}" y="{coordinate(bottom + 36)}">'
        f"{x.title}</text>"
    )
    return drawing("".join(parts), stack.width, height, "Requests on each instance over time")


def _grouped(series: RunSeries, instances: Sequence[InstanceFigures]) -> list[tuple[str, list[float], float]]:
    """Return name, load over time and busy share of each row; large fleets have rows of several instances."""
    size = -(-len(series.instance_ids) // _MOST_ROWS)
    rows: list[tuple[str, list[float], float]] = []
    for start in range(0, len(series.instance_ids), size):
        chosen = range(start, min(start + size, len(series.instance_ids)))
        loads = zip(*(series.in_flight_count[index] for index in chosen), strict=True)
        values = [sum(value or 0.0 for value in column) / len(chosen) for column in loads]
        busy_share = sum(instances[index].busy_share for index in chosen) / len(chosen)
        name = series.instance_ids[start]
        rows.append((name if len(chosen) == 1 else f"{name} and {len(chosen) - 1} more", values, busy_share))
    return rows


def _heat_row(
    values: Sequence[float], most: float, bin_s: float, x: Axis, left: float, width: float, y: float
) -> list[str]:
    """Return the cells of a row; neighbours of one shade are one cell."""
    levels = [0 if value <= 0.0 else max(1, math.ceil(value / most * _LEVELS - 1e-9)) for value in values]
    parts: list[str] = []
    start = 0
    for index in range(1, len(levels) + 1):
        if index < len(levels) and levels[index] == levels[start]:
            continue
        if levels[start]:
            from_x = left + x.place(start * bin_s) * width
            to_x = left + x.place(index * bin_s) * width
            mean = sum(values[start:index]) / (index - start)
            parts.append(
                f'<rect class="heat h{levels[start]}" x="{coordinate(from_x)}" y="{coordinate(y + 1)}" '
                f'width="{coordinate(to_x - from_x)}" height="{coordinate(_ROW_HEIGHT - 2)}">'
                f"<title>{words.seconds(start * bin_s)} to {words.seconds(index * bin_s)}: "
                f"{words.number(mean)}</title></rect>"
            )
        start = index
    return parts
