"""The lines above and below the panels: how the control plane is, and which keys there are. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from sagecp.cli import render
from sagecp.cli.top.model import MetricsView, Picture, StatusView
from sagecp.cli.top.text import Line, as_many_as_fit, dimmed, fit_line, join, plain, width_of
from sagecp.cli.top.trend import bars

_SPARK_WIDTH = 24
# Key, what it does, and whether it changes something, most useful first: the last ones go where the
# terminal is narrow.
KEYS: tuple[tuple[str, str, bool], ...] = (
    ("?", "help", False),
    ("q", "quit", False),
    ("i", "info", False),
    ("d", "drain", True),
    ("r", "resume", True),
    ("P", "policy", True),
    ("e", "why", False),
    ("w", "sleep", True),
    ("/", "filter", False),
    ("s", "sort", False),
    ("z", "zoom", False),
    ("p", "pause", False),
    ("Tab", "panel", False),
)


def header_lines(
    picture: Picture,
    width: int,
    now_s: float,
    *,
    server: str,
    read_only: bool,
    paused_s: float | None,
) -> list[Line]:
    """Return the three lines of the header.

    Args:
        picture: What was read.
        width: In cells.
        now_s: On the console's clock.
        server: Address of the control plane.
        read_only: Whether nothing can be changed from here.
        paused_s: Since when the picture is held; ``None``: it is not.
    """
    first = _first(picture, width, now_s, server=server, read_only=read_only, paused_s=paused_s)
    rest = [_policy(picture.status, width), _figures(picture, width, now_s)]
    return [first, *(dimmed(line) if picture.is_stale else line for line in rest)]


def _first(
    picture: Picture, width: int, now_s: float, *, server: str, read_only: bool, paused_s: float | None
) -> Line:
    if picture.lost_s is not None:
        retry_s = max(0.0, picture.retry_s - now_s)
        text = f" CONNECTION LOST {now_s - picture.lost_s:.0f} s ago"
        seen = time.strftime("%H:%M:%S", time.localtime(picture.read_time_s)) if picture.read_s else ""
        parts: list[Line] = [((text, "bold reverse red"),)]
        if seen:
            parts.append(((f"picture of {seen}", "bold"),))
        parts.append(((f"next try in {retry_s:.0f} s", ""),))
        parts += [((server, ""),), ((plain(picture.lost_reason), "red"),)]
        return fit_line(join(parts), width)
    status = picture.status
    left: list[Line] = [((" sagecp top", "bold cyan"),), ((server, "bold"),)]
    if status is None:
        left.append((("connecting", "dim"),))
    else:
        left += [
            ((f"v{status.version}", ""),),
            ((f"up {_whole(status.uptime_s)}", ""),),
            (("● connected", "green"),)
            if status.accepting
            else (("◐ STOPPING, takes no work", "bold yellow"),),
        ]
    right: list[Line] = []
    if read_only:
        right.append((("READ-ONLY", "bold yellow"),))
    if paused_s is not None:
        right.append(((f"PAUSED {now_s - paused_s:.0f} s", "bold reverse yellow"),))
    tail = join(right)
    head = as_many_as_fit(left, width - width_of(tail) - 1)
    gap = width - width_of(head) - width_of(tail)
    return fit_line((*head, (" " * max(1, gap), ""), *tail), width)


def _whole(seconds: float) -> str:
    """Return a time that passes in front of somebody's eyes."""
    return f"{seconds:.0f} s" if seconds < 99.5 else render.duration(seconds)


def _policy(status: StatusView | None, width: int) -> Line:
    if status is None:
        return fit_line((), width)
    line: list[tuple[str, str]] = [(" policy ", "dim"), (status.order, "bold")]
    if status.in_force and status.in_force != status.order:
        line += [(" > ", "dim"), (status.in_force, "bold")]
    line += [("  placed by ", "dim"), (status.placement, ""), (f"  v{status.config_version}", "dim")]
    if status.reason:
        line += [("  because ", "dim"), (plain(status.reason), "")]
    return fit_line(line, width)


def _figures(picture: Picture, width: int, now_s: float) -> Line:
    status, metrics = picture.status, picture.metrics
    parts: list[Line] = []
    if metrics is not None:
        parts += [_objective(metrics), *_rates(metrics)]
    if status is not None:
        full = status.queue_capacity > 0 and status.queued >= 0.9 * status.queue_capacity
        parts += [
            (("wait ", "dim"), (render.compact(status.queued), "bold red" if full else "bold")),
            (("run ", "dim"), (render.compact(status.active), "bold")),
        ]
    for name, trend in (
        ("tokens/s", picture.tokens),
        ("TTFT p95", picture.ttft),
        ("waiting", picture.queued),
    ):
        parts.append(((f"{name} ", "dim"), (bars(trend.recent(_SPARK_WIDTH, now_s)), "cyan")))
    return fit_line(((" ", ""), *as_many_as_fit(parts, width - 1)), width)


def _objective(metrics: MetricsView) -> Line:
    rate = metrics.slo_compliance
    if rate is None:
        return (("SLO -", "dim"),)
    style = "bold green" if rate >= 0.99 else "bold yellow" if rate >= 0.9 else "bold red"
    word = "" if rate >= 0.9 else " LOW"
    # Not rounded up: 100% is when none was missed.
    return (("SLO ", "dim"), (f"{math.floor(rate * 1000) / 10:g}%{word}", style))


def _rates(metrics: MetricsView) -> list[Line]:
    return [
        ((f"{metrics.requests_per_second:.3g}", "bold"), (" req/s", "dim")),
        ((render.compact(metrics.tokens_per_second), "bold"), (" tok/s", "dim")),
        (
            ("TTFT p50 ", "dim"),
            (render.duration(metrics.ttft_p50_s), "bold"),
            (" p95 ", "dim"),
            (render.duration(metrics.ttft_p95_s), "bold"),
        ),
    ]


def key_line(width: int, *, read_only: bool, keys: Sequence[tuple[str, str, bool]] = KEYS) -> Line:
    """Return the keys that have room in a line; in read-only mode only those that change nothing."""
    parts: list[Line] = [
        ((key, "bold cyan"), (f" {what}", "")) for key, what, changes in keys if not (changes and read_only)
    ]
    return fit_line(((" ", ""), *as_many_as_fit(parts, width - 1, " ")), width)
