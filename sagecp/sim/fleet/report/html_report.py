"""The page of one contender's runs, at one load or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape

from sagecp.sim.fleet.experiment import InstanceFigures, RunResult
from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.about import configuration, describe, reading_guide
from sagecp.sim.fleet.report.charts import distribution_chart, length_chart, timeline
from sagecp.sim.fleet.report.comparison_charts import LoadChart, load_chart, styles
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.report.page import (
    Cell,
    Row,
    Tile,
    in_two_widths,
    note,
    page,
    section,
    side_by_side,
    table,
    tiles,
)
from sagecp.sim.fleet.report.run_charts import RunCharts
from sagecp.sim.fleet.report.summary import (
    METRICS_BY_NAME,
    TARGET_ATTAINMENT,
    LoadSummary,
    summarise_bounds,
    summarise_loads,
    told_columns,
)

_LOAD_COLUMNS = (
    "attainment",
    "token_weighted_attainment",
    "long_attainment",
    "goodput_per_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "tpot_p95_s",
    "prefix_hit_share",
    "rejected_share",
    "failed_share",
    "usd_per_1000_good",
)
_TILES = (
    ("attainment", "met every objective"),
    ("goodput_per_s", "good requests"),
    ("ttft_p50_s", "median time to first token"),
    ("ttft_p99_s", "p99 of the time to first token"),
    ("tpot_p95_s", "p95 of the time per further token"),
    ("prefix_hit_share", "of prompt tokens were cached"),
    ("usd_per_1000_good", "per 1,000 good requests"),
)
_MOST_ROWS = 12
_DISTRIBUTIONS = (
    "The share of the requests that had their token within a time: the further left a curve rises, the "
    "better. Shaded or dashed is the objective."
)
_OVER_TIME = (
    "What arrived; what the scheduler held back; how those fared that arrived at each moment; and how many "
    "requests each instance held. Rows of one shade are balanced, a dark patch is a hot spot."
)
_BY_LENGTH = (
    "Prompts of similar length together, beside their objective (dashed). Where p95 is above it, more than "
    "one in twenty of that length misses."
)
_BY_INSTANCE = (
    "Busy is the share of the run in which an engine computed; cached, the share of its prompt tokens that "
    "it had computed before."
)


def run_page(contents: ReportContents) -> str:
    """Return the page of a report with one contender."""
    contender = contents.contenders[0]
    loads = summarise_loads(contents)
    focus = _focus(loads)
    title = f"{contender.label} on {contents.trace_name}"
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(contents, focus))}</p></header>",
        tiles(
            [
                Tile(words.text_of(value.mean, METRICS_BY_NAME[name].kind), note, name == "attainment")
                for name, note in _TILES
                if (value := focus.figures[name]) is not None
            ]
        ),
    ]
    if len(contents.scales) > 1:
        parts.append(_against_load(contents, loads))
    for each in [focus, *(load for load in loads if load is not focus)]:
        run = contents.runs_of(contender.label, each.scale)[0]
        details = _details(run)
        if each is focus:
            parts.append(section(_load_name(contents, run), _load_note(contents, run), details))
        else:
            name = escape(_load_name(contents, run))
            parts.append(f"<details><summary>{name}</summary>{details}</details>")
    parts += [configuration(contents), reading_guide(contents)]
    return page(title, "\n".join(parts))


def _focus(loads: tuple[LoadSummary, ...]) -> LoadSummary:
    """Return the load that is shown first: the highest that meets the target, or else the lowest."""
    met = [
        load
        for load in loads
        if (value := load.figures["attainment"]) is not None and value.mean >= TARGET_ATTAINMENT
    ]
    return max(met, key=lambda load: load.scale) if met else min(loads, key=lambda load: load.scale)


def _subtitle(contents: ReportContents, focus: LoadSummary) -> str:
    contender = contents.contenders[0]
    text = f"{contents.workload.fleet}, {words.number(focus.load_per_s.mean)} {contents.load_unit} per second"
    if len(contents.scales) > 1:
        text += f" (scale {focus.scale:g})"
    return f"{text}; {describe(contender)}"


def _load_name(contents: ReportContents, run: RunResult) -> str:
    return f"At {words.number(run.load_per_s)} {contents.load_unit} per second, scale {run.scale:g}"


def _load_note(contents: ReportContents, run: RunResult) -> str:
    seed = f" Charts are of seed {run.seed}." if len(contents.seeds) > 1 else ""
    return (
        f"{words.plural(run.statistics.request_count, 'request')} arrived in "
        f"{words.seconds(run.statistics.duration_s)}; the last ended after {words.seconds(run.end_s)}.{seed}"
    )


def _against_load(contents: ReportContents, loads: tuple[LoadSummary, ...]) -> str:
    style_of = styles(contents.contenders)
    chart = LoadChart(
        "attainment", "met every objective", contents.load_unit, summarise_bounds(contents), height=340.0
    )
    columns = told_columns(_LOAD_COLUMNS, loads)
    rows = [
        Row(
            (
                Cell(f"{load.scale:g}"),
                Cell(words.number(load.load_per_s.mean)),
                *(_figure(load, name) for name in columns),
            )
        )
        for load in loads
    ]
    titles = ["Scale", "Per second", *(METRICS_BY_NAME[name].title for name in columns)]
    first = [contents.runs_of(load.label, load.scale)[0] for load in loads]
    # The heavier the load, the stronger the line.
    curves = [
        (f"{run.scale:g}", run.charts, f"l{round(5 * index / (len(first) - 1))}")
        for index, run in enumerate(first)
        if run.charts is not None
    ]
    return section(
        "Against load",
        "How many requests still meet every objective as more arrive.",
        in_two_widths(lambda width: load_chart(dataclasses.replace(chart, width=width), loads, style_of)),
        table(titles, rows),
        side_by_side(
            (
                "Time to first token by scale",
                distribution_chart(
                    "time to first token", [(name, each.ttft, style) for name, each, style in curves]
                ),
            ),
            (
                "Time per further token by scale",
                distribution_chart(
                    "time per further token", [(name, each.tpot, style) for name, each, style in curves]
                ),
            ),
        ),
    )


def _figure(load: LoadSummary, name: str) -> Cell:
    metric, value = METRICS_BY_NAME[name], load.figures[name]
    is_bar = metric.kind == "share" and value is not None and name not in {"rejected_share", "failed_share"}
    share = value.mean if is_bar and value is not None else None
    return Cell(words.interval(value, metric.kind), share)


def _details(run: RunResult) -> str:
    parts: list[str] = []
    if run.charts is not None:
        parts.append(_distributions(run.charts))
        parts += ["<h3>Over time</h3>", note(_OVER_TIME), in_two_widths(lambda width: timeline(run, width))]
        parts.append(note(_BY_LENGTH))
        parts.append(
            side_by_side(
                ("Time to first token by prompt length", length_chart(run.charts.by_length)),
                ("By prompt length", _length_table(run)),
            )
        )
    parts.append(_priority_table(run))
    parts.append(_tenant_table(run))
    parts += ["<h3>By instance</h3>", note(_BY_INSTANCE), _instance_table(run.instances)]
    return "".join(parts)


def _distributions(charts: RunCharts) -> str:
    ttft_met, tpot_met = charts.ttft.objective_met_share, charts.tpot.objective_met_share
    return note(_DISTRIBUTIONS) + side_by_side(
        (
            f"Time to first token: {words.share(ttft_met)} met the objective",
            distribution_chart("time to first token", [("", charts.ttft, "c0")]),
        ),
        (
            f"Time per further token: {words.share(tpot_met)} met the objective",
            distribution_chart("time per further token", [("", charts.tpot, "c0")]),
        ),
    )


def _length_table(run: RunResult) -> str:
    rows: list[Row] = []
    shortest = 0
    for name, each in run.statistics.attainment_by_length.items():
        if not each.request_count:
            continue
        longest = f"{each.longest_prompt_token_count:,} tokens"
        bounds = f"{name}: {shortest:,} to {longest}" if shortest else f"{name}: up to {longest}"
        shortest = each.longest_prompt_token_count + 1
        rows.append(
            Row(
                (
                    Cell(bounds),
                    Cell(words.count(each.request_count)),
                    Cell(words.share(each.attainment), each.attainment),
                )
            )
        )
    return table(("Prompt", "Requests", "Met objectives"), rows)


def _priority_table(run: RunResult) -> str:
    by_priority = run.statistics.by_priority
    if len(by_priority) < 2:
        return ""
    rows = [
        Row(
            (
                Cell(name),
                Cell(words.count(each.request_count)),
                Cell(words.share(each.attainment), each.attainment),
                Cell(words.seconds(each.ttft.p50_s)),
                Cell(words.seconds(each.ttft.p95_s)),
                Cell(words.seconds(each.ttft.p99_s)),
            )
        )
        for name, each in by_priority.items()
    ]
    titles = ("Class", "Requests", "Met objectives", "TTFT p50", "p95", "p99")
    return "<h3>By class</h3>" + table(titles, rows)


def _tenant_table(run: RunResult) -> str:
    tenants = run.statistics.tenants
    if len(tenants) < 2:
        return ""
    rows = [
        Row(
            (
                Cell(each.tenant_id or "(none)"),
                Cell(words.count(each.request_count)),
                Cell(words.share(each.attainment), each.attainment),
                Cell(words.seconds(each.ttft.p50_s)),
                Cell(words.seconds(each.ttft.p99_s)),
                Cell(words.number(each.served_over_fair_share)),
                Cell(words.count(each.rejected_count)),
            )
        )
        for each in tenants
    ]
    titles = ("Tenant", "Requests", "Met objectives", "TTFT p50", "p99", "Served / fair share", "Rejected")
    fairness = f"Jain's index {words.number(run.statistics.jain_index)}; largest demand first."
    return "<h3>By tenant</h3>" + note(fairness) + _folded(titles, rows, "smaller tenant")


def _instance_table(instances: tuple[InstanceFigures, ...]) -> str:
    rows = [
        Row(
            (
                Cell(each.instance_id),
                Cell(words.count(each.request_count)),
                Cell(words.count(each.prompt_token_count)),
                Cell(words.count(each.output_token_count)),
                Cell(
                    words.share(each.cached_token_count / each.prompt_token_count)
                    if each.prompt_token_count
                    else words.UNKNOWN
                ),
                Cell(words.seconds(each.ttft_p50_s)),
                Cell(words.seconds(each.ttft_p99_s)),
                Cell(words.share(each.busy_share), min(1.0, each.busy_share)),
                Cell(words.usd(each.usd_per_hour)),
            )
        )
        for each in instances
    ]
    titles = (
        "Instance", "Requests", "Tokens in", "Tokens out", "Cached", "TTFT p50", "p99", "Busy", "Per hour"
    )  # fmt: skip
    return _folded(titles, rows, "further instance")


def _folded(titles: Sequence[str], rows: Sequence[Row], rest: str) -> str:
    """Return a table; of a long one, only its beginning is shown at once."""
    if len(rows) <= _MOST_ROWS + 2:
        return table(titles, rows)
    name = words.plural(len(rows) - _MOST_ROWS, rest)
    return (
        table(titles, rows[:_MOST_ROWS])
        + f"<details><summary>{name}</summary>{table(titles, rows[_MOST_ROWS:])}</details>"
    )
