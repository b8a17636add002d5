"""The charts of a page of plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sagecp.cli.plan import words
from sagecp.cli.plan.label_places import place_labels
from sagecp.sim.fleet.report import words as report_words
from sagecp.sim.fleet.report.svg import (
    Axis,
    EndLabel,
    Plot,
    coordinate,
    drawing,
    nice_top,
    text_width,
)
from sagecp.v1 import parallelism_pb2

Plan = parallelism_pb2.ParallelismPlan

CHART_WIDTH = 520.0
_MOST_LABELS = 14
_ROW_HEIGHT = 21.0
_LOG_FROM_RATIO = 6.0
_COLOURS = 6
_PALE = "b3 h4"
# Bold capitals and digits are wider than the usual text.
_NAME_CHARACTER_WIDTH = 7.8
# Of weights, activations, graphs, runtime and KV cache.
_MEMORY_COLOURS = ("c0", "c1", "c4", "c3", "c2")


@dataclass(frozen=True, slots=True)
class Quantity:
    """What an axis shows.

    Attributes:
        title: With its unit.
        value: Of a plan; not finite or not above 0: the plan is not drawn.
        text: How it is written.
    """

    title: str
    value: Callable[[Plan], float]
    text: Callable[[float], str]


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """How one plan does at several loads.

    Attributes:
        name: Of the plan.
        points: Requests per second, time to first token and time per output token.
    """

    name: str
    points: tuple[tuple[float, float, float], ...]


def quantities(*, has_rate: bool, share: str) -> tuple[Quantity, Quantity, Quantity, Quantity]:
    """Return time to first token, time per token, throughput and price, as plans are compared by them.

    Args:
        has_rate: Whether there is a load to compare them at; else they are compared alone.
        share: Of the requests that stay below the times at a load, for people.
    """
    if has_rate:
        ttft = Quantity(
            f"time to first token, {share} of requests",
            lambda p: p.predicted_ttft_s,
            words.seconds,
        )
        tpot = Quantity(f"time per token, {share} of requests", lambda p: p.predicted_tpot_s, words.seconds)
    else:
        ttft = Quantity(
            "time to first token of a request that is alone",
            lambda p: p.single_ttft_s,
            words.seconds,
        )
        tpot = Quantity("time per token of a request that is alone", lambda p: p.single_tpot_s, words.seconds)
    throughput = Quantity(
        "output tokens per second, saturated", lambda p: p.output_tokens_per_second, report_words.tokens
    )
    price = Quantity(
        "US dollars per million output tokens",
        lambda p: p.usd_per_million_output_tokens,
        lambda value: f"${words.usd(value)}",
    )
    if has_rate:
        # The load is what it is: what a plan could serve beyond it makes it no cheaper.
        price = Quantity(
            "US dollars per hour", lambda p: p.usd_per_hour, lambda value: f"${words.usd(value)}"
        )
    return ttft, tpot, throughput, price


def colours_of(plans: Sequence[Plan]) -> dict[str, str]:
    """Return a colour for each kind of GPU, in the order in which they appear."""
    names = list(dict.fromkeys(plan.gpu_name for plan in plans))
    return {name: f"c{index % _COLOURS}" for index, name in enumerate(names)}


def scatter(plans: Sequence[Plan], x: Quantity, y: Quantity) -> str:
    """Return all plans as points; those of the Pareto front have names, the others are pale.

    Args:
        plans: Best first; the first has a ring.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
    """
    drawn = [plan for plan in plans if _is_drawn(x.value(plan)) and _is_drawn(y.value(plan))]
    if not drawn:
        return '<p class="empty">No plan serves any request within the objectives.</p>'
    plot = Plot(
        _axis(x, [x.value(plan) for plan in drawn]),
        _axis(y, [y.value(plan) for plan in drawn]),
        f"{y.title} against {x.title}, of each plan",
        width=CHART_WIDTH,
        height=340.0,
        left=58.0,
    )
    colours = colours_of(plans)
    front = [plan for plan in drawn if plan.pareto_optimal]
    for plan in drawn:
        if not plan.pareto_optimal:
            plot.dot((x.value(plan), y.value(plan)), _PALE, _detail(plan, x, y))
    for plan in reversed(front):
        plot.dot((x.value(plan), y.value(plan)), colours[plan.gpu_name], _detail(plan, x, y), radius=5.0)
    best = plans[0]
    if best in drawn:
        at_x, at_y = coordinate(plot.px(x.value(best))), coordinate(plot.py(y.value(best)))
        plot.add(f'<circle class="rule" style="stroke-dasharray:none" cx="{at_x}" cy="{at_y}" r="8.5"/>')
    _name_front(plot, front, drawn, colours, x, y)
    return plot.render()


def _name_front(
    plot: Plot,
    front: Sequence[Plan],
    drawn: Sequence[Plan],
    colours: dict[str, str],
    x: Quantity,
    y: Quantity,
) -> None:
    named = list({(plot.px(x.value(plan)), plot.py(y.value(plan))): plan for plan in reversed(front)}.items())
    named = named[::-1][:_MOST_LABELS]
    texts = [words.plan_name(plan) for _, plan in named]
    places = place_labels(
        [point for point, _ in named],
        [_NAME_CHARACTER_WIDTH * len(text) for text in texts],
        (plot.left, plot.top, plot.left + plot.width + 14.0, plot.top + plot.height - 2.0),
        [(plot.px(x.value(plan)), plot.py(y.value(plan))) for plan in drawn],
    )
    for ((at_x, at_y), plan), text, place in zip(named, texts, places, strict=True):
        if place is None:
            continue
        style = colours[plan.gpu_name]
        if place.needs_leader:
            plot.add(
                f'<path class="leader {style}" d="M{coordinate(at_x)} {coordinate(at_y)}'
                f'L{coordinate(place.anchor[0])} {coordinate(place.anchor[1])}"/>'
            )
        plot.text_at(place.x, place.y, text, f"label {style}")


def legend(plans: Sequence[Plan]) -> str:
    """Return which colour is which GPU, where there are several, and what ring and pale mean."""
    colours = colours_of(plans)
    keys = [f'<i class="key {style}"></i>{escape(name)}' for name, style in colours.items()]
    if len(keys) < 2:
        keys = [f'<i class="key {style}"></i>on the Pareto front' for style in colours.values()]
    keys += ['<i class="key b3"></i>beaten by another plan in every respect', "◯ recommended"]
    shown = " &ensp; ".join(f'<span style="white-space:nowrap">{key}</span>' for key in keys)
    return f'<p class="about">{shown}</p>'


def memory_bars(plans: Sequence[Plan], width: float) -> str:
    """Return what the memory of the fullest GPU of each plan is for, one bar each."""
    several = len({plan.gpu_name for plan in plans}) > 1
    names = [words.plan_name(plan, with_gpu=several) for plan in plans]
    left = min(width * 0.4, max(text_width(name) for name in names) + 12.0)
    right = 96.0
    top = 42.0
    most = max(plan.memory.total_bytes for plan in plans) / 2.0**30
    axis = Axis("GiB per GPU", 0.0, most, lambda value: f"{value:.0f}")
    room = width - left - right
    parts: list[str] = _memory_keys(plans[0], left, width)
    for row, (plan, name) in enumerate(zip(plans, names, strict=True)):
        y = top + row * _ROW_HEIGHT
        parts.append(_text(left - 7.0, y + 13.0, name, "tick end"))
        at = 0.0
        for index, (part, size) in enumerate(words.memory_parts(plan.memory)):
            gib = size / 2.0**30
            end = min(most, at + gib)
            x, to = left + axis.place(at) * room, left + axis.place(end) * room
            parts.append(
                f'<rect class="bar {_MEMORY_COLOURS[index]}" x="{coordinate(x)}" y="{coordinate(y)}" '
                f'width="{coordinate(max(0.0, to - x))}" height="{coordinate(_ROW_HEIGHT - 5.0)}">'
                f"<title>{escape(name)}: {escape(part)} {gib:.1f} GiB</title></rect>"
            )
            at = end
        tokens = report_words.tokens(float(plan.key_value_token_capacity))
        parts.append(_text(left + room + 8.0, y + 13.0, f"{tokens} tokens", "tick"))
    bottom = top + len(plans) * _ROW_HEIGHT
    for value in axis.ticks():
        x = left + axis.place(value) * room
        parts.append(f'<path class="axis" d="M{coordinate(x)} {coordinate(bottom)}v4"/>')
        parts.append(_text(x, bottom + 17.0, axis.text(value), "tick middle"))
    parts.append(_text(left + room, bottom + 34.0, axis.title, "axis-title end"))
    return drawing("".join(parts), width, bottom + 40.0, "Memory of the fullest GPU of each plan")


def _memory_keys(plan: Plan, left: float, width: float) -> list[str]:
    parts = []
    x = left if width - left > 420.0 else 0.0
    for index, (name, _) in enumerate(words.memory_parts(plan.memory)):
        parts.append(
            f'<rect class="bar {_MEMORY_COLOURS[index]}" x="{coordinate(x)}" y="10" width="10" height="10"/>'
        )
        parts.append(_text(x + 15.0, 19.0, name, "tick"))
        x += 15.0 + text_width(name) + 16.0
    parts.append(_text(width, 34.0, "KV cache per replica", "tick end"))
    return parts


def load_chart(curves: Sequence[LoadCurve], title: str, index: int, objective_s: float | None) -> str:
    """Return a time against the load, one line per plan.

    Args:
        curves: The plans.
        title: What the vertical axis shows.
        index: Of the time in a curve's points: 1 to the first token, 2 per output token.
        objective_s: Marked; ``None``: there is none.
    """
    values = [point[index] for curve in curves for point in curve.points if math.isfinite(point[index])]
    rates = [point[0] for curve in curves for point in curve.points]
    if not values:
        return '<p class="empty">None of the plans serves any request.</p>'
    high = max(values)
    if objective_s is not None:
        # What is far beyond the objective would squeeze what matters.
        high = min(high, objective_s * 4.0) if min(values) < objective_s else high
        high = max(high, objective_s * 1.3)
    low = min(values) * 0.8
    is_log = high > low * _LOG_FROM_RATIO
    names_width = max(text_width(curve.name, is_bold=True) for curve in curves)
    plot = Plot(
        Axis("requests per second", 0.0, nice_top(max(rates)), report_words.number),
        Axis(title, low if is_log else 0.0, high * 1.1, words.seconds, is_log=is_log),
        f"{title} against requests per second",
        width=CHART_WIDTH,
        right=names_width + 22.0,
        left=58.0,
    )
    if objective_s is not None and objective_s <= high * 1.1:
        plot.horizontal(objective_s, f"objective {words.seconds(objective_s)}")
    labels = []
    for number, curve in enumerate(curves):
        points = [
            (p[0], p[index]) for p in curve.points if math.isfinite(p[index]) and p[index] <= high * 1.1
        ]
        if not points:
            continue
        plot.line(points, f"c{number}")
        labels.append(EndLabel(points[-1][1], curve.name, f"c{number}"))
    plot.end_labels(labels)
    return plot.render()


def _is_drawn(value: float) -> bool:
    return math.isfinite(value) and value > 0.0


def _detail(plan: Plan, x: Quantity, y: Quantity) -> str:
    return (
        f"{words.plan_name(plan, with_gpu=True)}: {y.text(y.value(plan))} {y.title.split(',')[0]}, "
        f"{x.text(x.value(plan))} {x.title.split(',')[0]}; good for {words.number(plan.predicted_goodput)} "
        f"requests/s at ${words.usd(plan.usd_per_hour)} an hour"
    )


def _axis(quantity: Quantity, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if high > low * _LOG_FROM_RATIO:
        return Axis(f"{quantity.title}, log scale", low * 0.85, high * 1.2, quantity.text, is_log=True)
    # Where plans differ little, a scale from 0 would show them as one.
    room = max(0.12 * (high - low), 0.04 * high)
    return Axis(quantity.title, max(0.0, low - room), high + room, quantity.text)


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{coordinate(x)}" y="{coordinate(y)}">{escape(text)}</text>'
