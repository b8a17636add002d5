"""What `sagecp simulate` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sagecp.cli import render

if TYPE_CHECKING:
    from pathlib import Path

    from sagecp.sim.fleet.report.contents import ReportContents
    from sagecp.sim.fleet.report.summary import LoadSummary

_RUN_COLUMNS = (
    ("attainment", "ATTAINMENT"),
    ("token_weighted_attainment", "BY TOKENS"),
    ("goodput_per_s", "GOOD/S"),
    ("ttft_p50_s", "TTFT P50"),
    ("ttft_p99_s", "P99"),
    ("tpot_p95_s", "TPOT P95"),
    ("prefix_hit_share", "CACHED"),
    ("rejected_share", "REJECTED"),
    ("failed_share", "FAILED"),
    ("usd_per_1000_good", "$/1K GOOD"),
)
_COMPARE_COLUMNS = (
    ("attainment", "ATTAINMENT"),
    ("token_weighted_attainment", "BY TOKENS"),
    ("long_attainment", "LONGEST"),
    ("worst_tenant_attainment", "WORST TENANT"),
    ("prefix_hit_share", "CACHED"),
    ("usd_per_1000_good", "$/1K GOOD"),
)
# The least telling ones are left out first where the terminal is narrow.
_OPTIONAL = {"FAILED", "REJECTED", "$/1K GOOD", "CACHED", "TPOT P95", "WORST TENANT", "LONGEST"}


def show_run(contents: ReportContents) -> None:
    """Print one line per load."""
    from sagecp.sim.fleet.report import words
    from sagecp.sim.fleet.report.summary import summarise_loads

    loads = summarise_loads(contents)
    columns = _told(_RUN_COLUMNS, loads)
    rows = [
        [f"{load.scale:g}", words.number(load.load_per_s.mean), *_figures(load, columns)] for load in loads
    ]
    _print(("SCALE", "PER S", *(title for _, title in columns)), rows, text_columns=0)
    _show_bounds(contents)


def show_comparison(contents: ReportContents) -> None:
    """Print one line per contender and load, then the goodput of each contender, then the bounds."""
    from sagecp.sim.fleet.report import words
    from sagecp.sim.fleet.report.comparison_charts import BOUND_MARKS, ratio_text
    from sagecp.sim.fleet.report.summary import TARGET_ATTAINMENT, summarise_goodput, summarise_loads

    loads = summarise_loads(contents)
    columns = _told(_COMPARE_COLUMNS, loads)
    rows = [
        [
            load.label,
            f"{scale:g}",
            words.number(load.load_per_s.mean),
            *_figures(load, columns),
        ]
        for scale in contents.scales
        for load in loads
        if load.scale == scale
    ]
    _print(("CONTENDER", "SCALE", "PER S", *(title for _, title in columns)), rows, text_columns=1)
    if len(contents.scales) > 1:
        click.echo()
        goodputs = sorted(summarise_goodput(contents), key=lambda each: -each.rate.mean)
        rows = [
            [
                each.label,
                f"{BOUND_MARKS[each.bound]}{words.interval(each.rate, 'rate')}",
                ratio_text(each) if each.ratio is not None else render.NONE,
            ]
            for each in goodputs
        ]
        _print(
            ("CONTENDER", f"GOODPUT@{TARGET_ATTAINMENT * 100:.0f}", "OF BEST BASELINE"), rows, text_columns=1
        )
    _show_bounds(contents)


def _show_bounds(contents: ReportContents) -> None:
    from sagecp.sim.fleet.report import words
    from sagecp.sim.fleet.report.summary import summarise_bounds

    if not contents.bounds:
        return
    click.echo()
    rows = [
        [
            f"{each.scale:g}",
            words.share(each.attainment),
            words.share(each.infinite_hit_share),
            words.share(each.belady_hit_share),
            words.share(each.pooled_lru_hit_share),
            words.number(each.limit_per_s),
        ]
        for each in summarise_bounds(contents)
    ]
    _print(("SCALE", "BOUND", "HITS, ENDLESS", "BELADY", "POOLED LRU", "ALL BUSY AT"), rows, text_columns=0)


def _told(columns: Sequence[tuple[str, str]], loads: Sequence[LoadSummary]) -> list[tuple[str, str]]:
    """Return the columns that tell something: attainment, and what is known and other than 0."""
    from sagecp.sim.fleet.report.summary import told_columns

    told = told_columns([name for name, _ in columns], loads)
    return [column for column in columns if column[0] == "attainment" or column[0] in told]


def _figures(load: LoadSummary, columns: Sequence[tuple[str, str]]) -> list[str]:
    from sagecp.sim.fleet.report import words
    from sagecp.sim.fleet.report.summary import METRICS_BY_NAME

    return [words.interval(load.figures[name], METRICS_BY_NAME[name].kind) for name, _ in columns]


def _print(titles: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> None:
    from sagecp.sim.fleet.report import words

    columns = [
        render.Column(title, right=number >= text_columns, optional=title in _OPTIONAL)
        for number, title in enumerate(titles)
    ]
    plain = [[render.NONE if cell == words.UNKNOWN else cell for cell in row] for row in rows]
    render.print_table(columns, plain)


def show_json(contents: ReportContents, out: Path | None) -> None:
    """Print the figures over all seeds as one line."""
    from sagecp.sim.fleet.report.json_report import report_object

    report = report_object(contents)
    kept = ("command", "scales", "seeds", "contenders", "summary", "goodput", "bounds")
    found = {name: report[name] for name in kept}
    click.echo(json.dumps({**found, "out": str(out) if out else None}, ensure_ascii=False))
