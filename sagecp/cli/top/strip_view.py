"""The two lines under the table: how the chosen instance goes, and what is to be said of it. Pure."""

from __future__ import annotations

from sagecp.cli import render
from sagecp.cli.top.model import InstanceRow, Picture
from sagecp.cli.top.text import Line, fit_line, state_style
from sagecp.cli.top.trend import Trend, bars

_MOST_BARS = 60


def strip_lines(picture: Picture, instance_id: str, width: int, now_s: float) -> list[Line]:
    """Return the lines for an instance; empty ones where there is none."""
    row = picture.instances.get(instance_id)
    trends = picture.trends.get(instance_id)
    if row is None or trends is None:
        return [fit_line((), width)] * 2
    load = row.load / row.limit if row.limit else None
    parts: list[tuple[str, Trend, float | None, str]] = [
        ("load", trends.load, 1.0, _share(load)),
        ("KV", trends.key_value, 1.0, _share(row.key_value_usage)),
        ("TTFT", trends.ttft, None, render.duration(row.ttft_s)),
        ("GPU", trends.gpu, 1.0, _share(row.gpu_utilization)),
    ]
    # What is left of a quarter of the line for the bars, beside a name and a value.
    bar_count = max(4, min(_MOST_BARS, width // 4 - 14))
    line: list[tuple[str, str]] = []
    for name, trend, top, value in parts:
        line += [
            (f" {name} ", "dim"),
            (bars(trend.recent(bar_count, now_s), top), "cyan"),
            (f" {value:<7}", "bold"),
        ]
    return [fit_line(_words(row), width), fit_line(line, width)]


def _share(value: float | None) -> str:
    return render.NONE if value is None else f"{value * 100:.0f}%"


def _words(row: InstanceRow) -> Line:
    spans = [(f" {row.instance_id} ", "bold"), (row.state, state_style(row.state))]
    if row.note:
        spans.append((f"  {row.note}", "yellow"))
    if row.model:
        spans += [("  serves ", "dim"), (row.model, "")]
    if row.host_id:
        spans += [(" on ", "dim"), (row.host_id, "")]
    if row.state_reason and row.state != "READY" and row.state_reason not in row.note:
        spans.append((f"  {row.state_reason}", ""))
    return tuple(spans)
