"""The page that holds several policies and baselines against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.about import configuration, reading_guide
from sagecp.sim.fleet.report.comparison_charts import (
    BOUND_MARKS,
    LoadChart,
    factor_text,
    goodput_chart,
    has_bands,
    load_chart,
    ratio_text,
    styles,
)
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.report.page import (
    Cell,
    Row,
    Tile,
    in_two_widths,
    page,
    section,
    side_by_side,
    table,
    tiles,
)
from sagecp.sim.fleet.report.summary import (
    METRICS_BY_NAME,
    TARGET_ATTAINMENT,
    BoundsSummary,
    GoodputSummary,
    LoadSummary,
    best_baseline,
    summarise_bounds,
    summarise_goodput,
    summarise_loads,
    told_columns,
)

_TABLE_COLUMNS = (
    "attainment",
    "token_weighted_attainment",
    "long_attainment",
    "worst_tenant_attainment",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p95_s",
    "prefix_hit_share",
    "rejected_share",
    "failed_share",
    "usd_per_1000_good",
)
_PERCENT = f"{TARGET_ATTAINMENT * 100:.0f} %"


def compare_page(contents: ReportContents) -> str:
    """Return the page of a report with several contenders."""
    loads = summarise_loads(contents)
    goodputs = summarise_goodput(contents)
    style_of = styles(contents.contenders)
    title = f"Policies compared on {contents.trace_name}"
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(contents))}</p></header>",
        tiles(_headline(contents, loads, goodputs)),
        _attainment_section(contents, loads, style_of),
    ]
    if len(contents.scales) > 1:
        parts.append(
            section(
                f"Goodput at {_PERCENT}",
                f"The largest load at which {_PERCENT} of the requests still meet every objective: "
                f"interpolated between those that were run, seed by seed{_ratio_note(contents, goodputs)}",
                in_two_widths(lambda width: goodput_chart(goodputs, style_of, contents.load_unit, width)),
            )
        )
    parts += [
        _other_charts(contents, loads, style_of),
        section(
            "Every load",
            "The best of each load by attainment is bold.",
            _load_tables(contents, loads, style_of),
        ),
    ]
    if contents.bounds:
        parts.append(_bounds_section(summarise_bounds(contents)))
    parts += [configuration(contents), reading_guide(contents)]
    return page(title, "\n".join(parts))


def _subtitle(contents: ReportContents) -> str:
    own = sum(1 for each in contents.contenders if not each.baseline)
    baselines = len(contents.contenders) - own
    who = words.plural(own, "policy").replace("policys", "policies")
    if baselines:
        who += f" and {words.plural(baselines, 'baseline')}"
    runs = words.plural(len(contents.runs), "run")
    seeds = words.plural(len(contents.seeds), "seed")
    return (
        f"{who} on {contents.workload.fleet}, {words.plural(len(contents.scales), 'load')}, {seeds}: {runs}"
    )


def _headline(
    contents: ReportContents, loads: Sequence[LoadSummary], goodputs: Sequence[GoodputSummary]
) -> list[Tile]:
    baselines = {each.label for each in contents.contenders if each.baseline}
    own = [each for each in goodputs if each.label not in baselines]
    leader = max(own or goodputs, key=lambda each: each.rate.mean)
    top = max(contents.scales)
    entries = []
    if len(contents.scales) > 1:
        rate = f"{BOUND_MARKS[leader.bound]}{words.rate(leader.rate.mean)}"
        entries.append(Tile(rate, f"{leader.label}: load with {_PERCENT} within objectives", is_lead=True))
        reference = best_baseline(contents, goodputs)
        if reference is not None and leader.ratio is not None and leader.ratio_bound != "unknown":
            interval = ratio_text(leader).removeprefix(factor_text(leader)).strip()
            entries.append(
                Tile(factor_text(leader), f"of the best baseline, {reference.label} {interval}".strip())
            )
    at_top = {load.label: load.figures["attainment"] for load in loads if load.scale == top}
    known = {label: value.mean for label, value in at_top.items() if value is not None}
    shown = _best_of(known, [each.label for each in own]) + _best_of(known, sorted(baselines))
    return entries + [
        Tile(
            words.share(known[label]),
            f"best baseline there: {label}"
            if label in baselines
            else f"{label}: met objectives at the highest load, scale {top:g}",
        )
        for label in shown
    ]


def _best_of(values: Mapping[str, float], labels: Sequence[str]) -> list[str]:
    found = [label for label in labels if label in values]
    return [max(found, key=lambda label: values[label])] if found else []


def _ratio_note(contents: ReportContents, goodputs: Sequence[GoodputSummary]) -> str:
    reference = best_baseline(contents, goodputs)
    text = "."
    if reference is not None:
        text = f"; then the ratio to the best baseline, {reference.label}, in pairs of one seed."
    limits = [each.limit_per_s for each in summarise_bounds(contents) if each.limit_per_s is not None]
    if limits:
        # Hits follow from the order of arrival, not its speed: every scale has the same limit.
        leader = max(goodputs, key=lambda each: each.rate.mean)
        share = words.share(leader.rate.mean / limits[0])
        text += (
            f" With an ideal cache, every engine would be busy all the time at {words.rate(limits[0])}: "
            f"{leader.label} reaches {BOUND_MARKS[leader.bound]}{share} of that."
        )
    return text


def _attainment_section(
    contents: ReportContents, loads: Sequence[LoadSummary], style_of: Mapping[str, str]
) -> str:
    about = "The share of requests that meet every objective, as more arrive."
    if len(contents.seeds) > 1:
        marks = "bands" if has_bands(contents.contenders) else "whiskers"
        about += f" Figures are means over {len(contents.seeds)} seeds, {marks} 95 % intervals of the mean."
    chart = LoadChart("attainment", "met every objective", contents.load_unit, summarise_bounds(contents))
    drawn = in_two_widths(lambda width: load_chart(dataclasses.replace(chart, width=width), loads, style_of))
    return section("Against load", about, drawn)


def _other_charts(contents: ReportContents, loads: Sequence[LoadSummary], style_of: Mapping[str, str]) -> str:
    charts = []
    for metric, title, axis in (
        ("token_weighted_attainment", "Weighted by prompt tokens", "of the prompt tokens"),
        ("long_attainment", "The third with the longest prompts", "of the longest third"),
    ):
        chart = LoadChart(metric, axis, contents.load_unit, width=560.0, height=360.0)
        charts.append((title, load_chart(chart, loads, style_of)))
    return section(
        "Who pays",
        "A policy can count more good requests by letting long ones wait; here is what that costs.",
        side_by_side(*charts),
    )


def _load_tables(contents: ReportContents, loads: Sequence[LoadSummary], style_of: Mapping[str, str]) -> str:
    columns = told_columns(_TABLE_COLUMNS, loads)
    rows: list[Row] = []
    for scale in contents.scales:
        here = [load for load in loads if load.scale == scale]
        attainments = {
            load.label: value.mean for load in here if (value := load.figures["attainment"]) is not None
        }
        best = _best_of(attainments, list(attainments))
        for number, load in enumerate(here):
            heading = (
                f"scale {scale:g}: {words.number(load.load_per_s.mean)} per second" if number == 0 else ""
            )
            cells = [
                Cell(load.label, style=style_of[load.label]),
                *(_figure(load, name) for name in columns),
            ]
            rows.append(Row(tuple(cells), load.label in best, heading))
    return table(["", *(METRICS_BY_NAME[name].title for name in columns)], rows)


def _figure(load: LoadSummary, name: str) -> Cell:
    metric, value = METRICS_BY_NAME[name], load.figures[name]
    is_bar = name.endswith("attainment") and value is not None
    return Cell(words.interval(value, metric.kind), value.mean if is_bar and value is not None else None)


def _bounds_section(bounds: Sequence[BoundsSummary]) -> str:
    rows = [
        Row(
            (
                Cell(f"{each.scale:g}"),
                Cell(words.share(each.attainment)),
                Cell(words.share(each.infinite_hit_share)),
                Cell(words.share(each.belady_hit_share)),
                Cell(words.share(each.pooled_lru_hit_share)),
                Cell(words.rate(each.limit_per_s)),
            )
        )
        for each in bounds
    ]
    return section(
        "What no policy can exceed",
        "The attainment bound takes the least work that each request could need, with everything cached "
        "that could be, and lets the fleet do the smallest first: it is loose. Hit shares are of one cache "
        "for the whole fleet: endless; of the fleet's size with knowledge of the future (Belady); and of "
        "that size with LRU, as engines evict. At the rate of the last column, all engines are busy with the "
        "work that Belady's cache leaves; beyond it, some requests must go unserved, or wait for the end.",
        table(
            ("Scale", "Attainment", "Hits, endless", "Hits, Belady", "Hits, pooled LRU", "All busy at"),
            rows,
        ),
    )
