"""Charts that hold several contenders, or several loads, against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagecp.sim.fleet.experiment import Contender
from sagecp.sim.fleet.intervals import Interval
from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.charts import percent_axis
from sagecp.sim.fleet.report.page import WIDE_CHART
from sagecp.sim.fleet.report.summary import (
    TARGET_ATTAINMENT,
    Bound,
    BoundsSummary,
    GoodputSummary,
    LoadSummary,
)
from sagecp.sim.fleet.report.svg import Axis, EndLabel, Plot, coordinate, text_width

BOUND_MARKS: Mapping[Bound, str] = {"exact": "", "at_least": "≥ ", "at_most": "≤ ", "unknown": "about "}
_OWN_STYLES = 6
_BASELINE_STYLES = 5
# The interval of two values is so wide that it hides the chart.
_FEWEST_SEEDS_OF_BAND = 3
# More bands than these become one cloud; then intervals are drawn at the points.
_MOST_BANDS = 2
# Longer whiskers are cut, or they would make the bars too short to compare.
_LONGEST_WHISKER = 1.6


def styles(contenders: Sequence[Contender]) -> dict[str, str]:
    """Return the class of each contender: colours for policies, greys with dashes for baselines."""
    found: dict[str, str] = {}
    own = baselines = 0
    for contender in contenders:
        if contender.baseline:
            found[contender.label] = f"b{baselines % _BASELINE_STYLES}"
            baselines += 1
        else:
            found[contender.label] = f"c{own % _OWN_STYLES}"
            own += 1
    return found


def has_bands(contenders: Sequence[Contender]) -> bool:
    """Whether intervals of some contenders are drawn as bands; where they would hide each other, whiskers."""
    return sum(1 for each in contenders if not each.baseline) <= _MOST_BANDS


@dataclass(frozen=True, slots=True)
class LoadChart:
    """What a chart against load shows.

    Attributes:
        metric: Name of a share in the summaries.
        load_title: What the load counts.
        bounds: Drawn above the curves where they are known.
    """

    metric: str
    title: str
    load_title: str
    bounds: tuple[BoundsSummary, ...] = ()
    width: float = WIDE_CHART
    height: float = 430.0


def load_chart(chart: LoadChart, loads: Sequence[LoadSummary], style_of: Mapping[str, str]) -> str:
    """Return a share against the load, with the interval of the mean as a band."""
    curves: dict[str, list[tuple[float, Interval]]] = {}
    for each in loads:
        value = each.figures[chart.metric]
        if value is not None:
            curves.setdefault(each.label, []).append((each.load_per_s.mean, value))
    if not curves:
        return '<p class="empty">Nothing to show.</p>'
    rates = [rate for curve in curves.values() for rate, _ in curve]
    margin = (max(rates) - min(rates)) * 0.03 or 0.1
    lowest = min(
        value.mean if value.low is None else value.low for curve in curves.values() for _, value in curve
    )
    floor = 0.0 if lowest < 0.4 else min(0.8, int(lowest * 10.0 - 0.2) / 10.0)
    labels = [f"{words.shortened(label)} {words.share(curve[-1][1].mean)}" for label, curve in curves.items()]
    plot = Plot(
        Axis(f"{chart.load_title} per second", min(rates) - margin, max(rates) + margin, words.number),
        percent_axis(chart.title, floor, 1.0),
        f"{chart.title} against load",
        width=chart.width,
        height=chart.height,
        right=20.0 + max(text_width(label, is_bold=True) for label in labels),
    )
    plot.horizontal(TARGET_ATTAINMENT, f"{TARGET_ATTAINMENT * 100:.0f} %")
    _draw_bounds(plot, chart.bounds, loads)
    # Policies are drawn over baselines, whose bands would hide each other.
    order = sorted(curves, key=lambda label: not style_of[label].startswith("b"))
    own = [label for label in order if not style_of[label].startswith("b")]
    for label in order:
        band = [
            (rate, value.low, value.high)
            for rate, value in curves[label]
            if value.low is not None and value.high is not None and value.count >= _FEWEST_SEEDS_OF_BAND
        ]
        if style_of[label].startswith("b"):
            continue
        if len(own) <= _MOST_BANDS:
            plot.band(band, style_of[label])
        else:
            for rate, low, high in band:
                plot.whisker(rate, low, high, style_of[label], 5.0 * (own.index(label) - len(own) // 2))
    for label in order:
        style = style_of[label]
        plot.line([(rate, value.mean) for rate, value in curves[label]], style)
        for rate, value in curves[label]:
            detail = f"{label} at {words.rate(rate)}: {words.interval(value, 'share')}"
            plot.dot((rate, value.mean), style, detail, 3.5 if style.startswith("c") else 2.5)
    plot.end_labels(
        [
            EndLabel(curve[-1][1].mean, text, style_of[label])
            for (label, curve), text in zip(curves.items(), labels, strict=True)
        ]
    )
    return plot.render()


def _draw_bounds(plot: Plot, bounds: Sequence[BoundsSummary], loads: Sequence[LoadSummary]) -> None:
    rates = {each.scale: each.load_per_s.mean for each in reversed(loads)}
    points = [
        (rates[each.scale], each.attainment)
        for each in bounds
        if each.attainment is not None and each.scale in rates
    ]
    if points:
        plot.line(points, "limit")
        text = "dotted: no policy can be above"
        plot.text_at(plot.left + plot.width, plot.top - 8.0, text, "note end")


def goodput_chart(
    goodputs: Sequence[GoodputSummary], style_of: Mapping[str, str], load_title: str, width: float
) -> str:
    """Return the goodput of each contender with its interval, the largest first."""
    ordered = sorted(goodputs, key=lambda each: -each.rate.mean)
    is_wide = width >= WIDE_CHART
    rates = {
        each.label: BOUND_MARKS[each.bound]
        + (words.interval(each.rate, "rate") if is_wide else words.rate(each.rate.mean))
        for each in ordered
    }
    ratio = ratio_text if is_wide else factor_text
    ratios = {each.label: ratio(each) if each.ratio is not None else "" for each in ordered}
    left = 16.0 + max(text_width(words.shortened(each.label), is_bold=True) for each in ordered)
    ratio_x = (26.0 if is_wide else 38.0) + max(text_width(text) for text in rates.values())
    right = ratio_x + 8.0 + max(text_width(text, is_bold=True) for text in ratios.values())
    high = max(each.rate.high or each.rate.mean for each in ordered)
    high = min(high, _LONGEST_WHISKER * ordered[0].rate.mean)
    row_height = 26.0
    plot = Plot(
        Axis(
            f"{load_title} per second at {TARGET_ATTAINMENT * 100:.0f} % attainment",
            0.0,
            high * 1.02,
            words.number,
        ),
        Axis("", 0.0, 1.0, str, tick_values=()),
        "Goodput of each contender",
        width=width,
        height=26.0 + row_height * len(ordered) + 42.0,
        left=left,
        right=right,
    )
    for number, each in enumerate(ordered):
        y = plot.top + row_height * (number + 0.5)
        style = style_of[each.label]
        x = plot.px(each.rate.mean)
        plot.add(
            f'<rect class="bar {style}" x="{coordinate(plot.left)}" y="{coordinate(y - 7)}" '
            f'width="{coordinate(x - plot.left)}" height="14"/>'
        )
        if each.rate.low is not None and each.rate.high is not None:
            low_x, high_x = plot.px(each.rate.low), plot.px(each.rate.high)
            plot.add(f'<path class="whisker" d="M{coordinate(low_x)} {coordinate(y)}H{coordinate(high_x)}"/>')
        plot.text_at(plot.left - 8.0, y + 4.0, words.shortened(each.label), f"label end {style}")
        end = plot.left + plot.width
        plot.text_at(end + 14.0, y + 4.0, rates[each.label], "tick")
        plot.text_at(end + ratio_x, y + 4.0, ratios[each.label], f"label {style}")
    return plot.render()


def ratio_text(goodput: GoodputSummary) -> str:
    """Return a ratio to the best baseline with its interval."""
    ratio = goodput.ratio
    if ratio is None:
        return words.UNKNOWN
    text = factor_text(goodput)
    if goodput.ratio_bound != "unknown" and ratio.low is not None and ratio.high is not None:
        text += f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return text


def factor_text(goodput: GoodputSummary) -> str:
    """Return a ratio to the best baseline without its interval."""
    if goodput.ratio is None:
        return words.UNKNOWN
    if goodput.ratio_bound == "unknown":
        return "beyond the loads run"
    return f"{BOUND_MARKS[goodput.ratio_bound]}{goodput.ratio.mean:.2f}×"  # noqa: RUF001 - the sign for times
