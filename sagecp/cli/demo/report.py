"""What a replay adds up to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import click

from sagecp.cli import render
from sagecp.cli.demo.replay import WAYS, Outcome

_SHOWN_FAILURES = 5
_QUANTILES = (("P50", 0.5), ("P90", 0.9), ("P95", 0.95), ("P99", 0.99), ("MAX", 1.0))
_LATE_S = 0.1


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values, between neighbours where it falls there."""
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def known(values: Iterable[float | None]) -> list[float]:
    """Return what is known of the values, sorted."""
    return sorted(value for value in values if value is not None)


def figures(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Return the report for programs. Times in seconds."""
    good = [outcome for outcome in outcomes if not outcome.error]
    tokens = sum(outcome.token_count for outcome in outcomes)
    return {
        "succeeded_count": len(good),
        "failed_count": len(outcomes) - len(good),
        "wall_s": wall_s,
        "prompt_token_count": sum(outcome.prompt_token_count for outcome in good),
        "output_token_count": tokens,
        "tokens_per_second": tokens / wall_s,
        "ttft": _summary(known(outcome.ttft_s for outcome in good)),
        "tpot": _summary(known(outcome.tpot_s for outcome in good)),
        "end_to_end": _summary(known(outcome.end_to_end_s for outcome in good)),
        "request_count_by_instance": dict(sorted(Counter(outcome.instance_id for outcome in good).items())),
        "request_count_by_way": dict(Counter(outcome.way for outcome in good)),
        "failures": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
    }


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    named = {f"{name.lower()}_s": quantile(values, share) for name, share in _QUANTILES}
    return {"mean_s": sum(values) / len(values), **named}


def show(outcomes: Sequence[Outcome], wall_s: float, *, as_json: bool) -> None:
    """Print the report."""
    if as_json:
        click.echo(json.dumps(figures(outcomes, wall_s)))
        return
    good = [outcome for outcome in outcomes if not outcome.error]
    failed = len(outcomes) - len(good)
    tokens = sum(outcome.token_count for outcome in outcomes)
    click.echo(
        f"{render.plural(len(good), 'request')} succeeded, {failed} failed, in {render.duration(wall_s)}; "
        f"{render.count(sum(outcome.prompt_token_count for outcome in good))} tokens in, "
        f"{render.count(tokens)} out ({tokens / wall_s:,.0f}/s)"
    )
    late_s = max((outcome.lateness_s for outcome in outcomes), default=0.0)
    if late_s > _LATE_S:
        click.echo(
            f"this machine was busy: requests were sent up to {render.duration(late_s)} late", err=True
        )
    click.echo()
    _show_latencies(good)
    _show_instances(good)
    _show_ways(good)
    failures = Counter(outcome.error for outcome in outcomes if outcome.error)
    for error, number in failures.most_common(_SHOWN_FAILURES):
        click.echo(f"{number} failed: {error}", err=True)


def _show_latencies(good: Sequence[Outcome]) -> None:
    rows = []
    for name, values in (
        ("time to first token", known(outcome.ttft_s for outcome in good)),
        ("time per output token", known(outcome.tpot_s for outcome in good)),
        ("end to end", known(outcome.end_to_end_s for outcome in good)),
    ):
        if values:
            cells = [sum(values) / len(values), *(quantile(values, share) for _, share in _QUANTILES)]
            rows.append([name, *map(render.duration, cells)])
    titles = ("MEAN", *(title for title, _ in _QUANTILES))
    render.print_table(
        (render.Column("LATENCY"), *(render.Column(title, right=True) for title in titles)), rows
    )
    click.echo()


def _show_instances(good: Sequence[Outcome]) -> None:
    titles = ("REQUESTS", "TOKENS IN", "TOKENS OUT", "TTFT P50", "TTFT P99", "TPOT P50")
    rows = []
    for instance_id in sorted({outcome.instance_id for outcome in good}):
        mine = [outcome for outcome in good if outcome.instance_id == instance_id]
        rows.append(
            [
                instance_id,
                render.count(len(mine)),
                render.count(sum(outcome.prompt_token_count for outcome in mine)),
                render.count(sum(outcome.token_count for outcome in mine)),
                *_median_and_tail(mine),
            ]
        )
    render.print_table(
        (
            render.Column("INSTANCE", flexible=True),
            *(render.Column(title, right=True) for title in titles),
        ),
        rows,
    )
    click.echo()


def _median_and_tail(outcomes: Sequence[Outcome]) -> list[str]:
    ttft = known(outcome.ttft_s for outcome in outcomes)
    tpot = known(outcome.tpot_s for outcome in outcomes)
    return [
        render.duration(quantile(ttft, 0.5)) if ttft else render.NONE,
        render.duration(quantile(ttft, 0.99)) if ttft else render.NONE,
        render.duration(quantile(tpot, 0.5)) if tpot else render.NONE,
    ]


def _show_ways(good: Sequence[Outcome]) -> None:
    rows = []
    for way in WAYS:
        mine = [outcome for outcome in good if outcome.way == way]
        if mine:
            rows.append([way, render.count(len(mine)), *_median_and_tail(mine)])
    titles = ("REQUESTS", "TTFT P50", "TTFT P99", "TPOT P50")
    render.print_table(
        (render.Column("ASKED THROUGH"), *(render.Column(title, right=True) for title in titles)), rows
    )
