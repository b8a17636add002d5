"""Numbers for people, in reports."""

from __future__ import annotations

from sagecp.sim.fleet.intervals import Interval

UNKNOWN = "–"  # noqa: RUF001 - an en dash, as printers use it
# More characters squeeze the chart that they stand beside.
_LONGEST_LABEL = 30


def share(value: float | None) -> str:
    """Return a share of one in percent, with more digits where they tell something."""
    if value is None:
        return UNKNOWN
    percent = value * 100.0
    return f"{percent:.2f} %" if 99.0 <= percent < 100.0 or 0.0 < percent < 1.0 else f"{percent:.1f} %"


def seconds(value: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if value is None:
        return UNKNOWN
    if value == 0.0:
        return "0 s"
    if value < 0.0995:
        return f"{value * 1000.0:.3g} ms"
    if value < 0.9995:
        return f"{value * 1000.0:.0f} ms"
    if value < 299.5:
        return f"{value:.3g} s"
    minutes, rest_s = divmod(round(value), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 100 else f"{value / 3600.0:.3g} h"


def rate(value: float | None) -> str:
    """Return a number per second."""
    return UNKNOWN if value is None else f"{number(value)}/s"


def usd(value: float | None) -> str:
    """Return US dollars."""
    if value is None:
        return UNKNOWN
    return f"${value:,.0f}" if value >= 1000.0 else f"${value:.3g}"


def number(value: float | None) -> str:
    """Return a number with three digits, or all of its whole part."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100.0 else f"{value:.3g}"


def count(value: float | None) -> str:
    """Return a count; thousands are told apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def tokens(value: float) -> str:
    """Return a count of tokens in few characters, as axes need it."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def text_of(value: float | None, kind: str) -> str:
    """Return a value as its kind is written: ``share``, ``seconds``, ``rate``, ``usd`` or ``number``."""
    return {"share": share, "seconds": seconds, "rate": rate, "usd": usd, "number": number}[kind](value)


def interval(value: Interval | None, kind: str) -> str:
    """Return a mean with half the width of its interval, both in the kind's unit."""
    if value is None:
        return UNKNOWN
    mean = text_of(value.mean, kind)
    if value.high is None:
        return mean
    half_width = value.high - value.mean
    if kind == "share":
        return f"{mean.removesuffix(' %')} ± {half_width * 100.0:.1f} %"
    if kind == "rate":
        return f"{number(value.mean)} ± {rate(half_width)}"
    return f"{mean} ± {text_of(half_width, kind).removeprefix('$')}"


def plural(value: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def shortened(label: str) -> str:
    """Return a label as charts have room for it: one that carries parameters may be long."""
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"
