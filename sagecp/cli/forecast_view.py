"""What `sagecp forecast` prints."""

from __future__ import annotations

import time

import click

from sagecp.cli import render
from sagecp.cli.output import is_for_programs, print_object
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.wire.times import seconds_of, time_s

_BAR_WIDTH = 24
_COLUMNS = [
    render.Column("FROM"),
    render.Column("REQUESTS", right=True),
    render.Column("80 % BETWEEN", right=True),
    render.Column("PROMPT TOKENS", right=True, optional=True),
    render.Column("OUTPUT TOKENS", right=True, optional=True),
    render.Column("COST", right=True),
    render.Column("", optional=True),
]


def show(answer: pb.ForecastLoadResponse, output: str) -> None:
    """Print a forecast."""
    if is_for_programs(output):
        print_object(answer, output)
        return
    if not answer.steps:
        click.echo(f"No forecast: {answer.basis}.")
        return
    most = max(step.requests.p50 for step in answer.steps)
    render.print_table(_COLUMNS, [*(_row(step, most) for step in answer.steps), _total(answer.total)])
    click.echo()
    click.echo(render.harmless(f"Basis: {answer.basis}."))
    click.echo(_error_text(answer))


def _row(step: pb.LoadForecast, most: float) -> list[str]:
    start = time.strftime("%a %H:%M", time.localtime(time_s(step.start_time)))
    bar = "█" * round(_BAR_WIDTH * step.requests.p50 / most) if most > 0.0 else ""
    return [start, *_figures(step), bar]


def _total(total: pb.LoadForecast) -> list[str]:
    return ["in all", *_figures(total), ""]


def _figures(span: pb.LoadForecast) -> list[str]:
    return [
        _count(span.requests.p50),
        f"{_count(span.requests.p10)} to {_count(span.requests.p90)}",
        _count(span.prompt_tokens.p50),
        _count(span.output_tokens.p50),
        f"${span.cost_usd.p50:,.2f}" if span.cost_usd.p90 > 0.0 else render.NONE,
    ]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0.0 else f"{value:.1f}"


def _error_text(answer: pb.ForecastLoadResponse) -> str:
    ahead = f"{seconds_of(answer.total.duration) / 3600.0:g} h"
    if not answer.HasField("error"):
        return f"How right forecasts {ahead} ahead are is not known yet."
    error = answer.error
    text = f"Forecasts {ahead} ahead were off by {error.weighted_error:.0%} in the last days"
    if error.coverage > 0.0:
        text += f", and {error.coverage:.0%} came within the bounds"
    return f"{text};\nthat the last hour goes on was off by {error.naive_weighted_error:.0%}."
