"""The page of plans: one file that needs no network and no scripts."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from sagecp.cli import render
from sagecp.cli.plan import view, words
from sagecp.cli.plan.charts import (
    CHART_WIDTH,
    LoadCurve,
    Plan,
    legend,
    load_chart,
    memory_bars,
    quantities,
    scatter,
)
from sagecp.sim.fleet.report import page as report
from sagecp.version import __version__

if TYPE_CHECKING:
    from sagecp.cli.plan.workload_source import WorkloadSource
    from sagecp.core.parallelism.estimates import PlanEstimate, PlanningResult
    from sagecp.core.parallelism.plan_query import PlanQuery
    from sagecp.v1 import admin_service_pb2

_BAR_COUNT = 12
_TABLE_COUNT = 30
_CURVE_COUNT = 4
_CURVE_LOADS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97, 1.0, 1.05, 1.1, 1.2, 1.3)


def plan_page(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    workload: WorkloadSource,
    local: tuple[PlanQuery, PlanningResult] | None,
) -> str:
    """Return the whole page; there is at least one plan.

    Args:
        request: What was asked.
        response: The answer.
        workload: The traffic, for people.
        local: Question and result where it was planned here: curves over the load need both.
    """
    best = response.plans[0]
    title = f"{response.model.name}: {words.plan_name(best, with_gpu=True)}"
    traffic = f"{view.workload_text(workload)}; objectives: {view.objectives_text(request)}"
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(traffic)}</p></header>",
        report.tiles(_tiles(best)),
        f"<p>{escape(response.summary)}</p>",
        _front_section(request, response),
    ]
    if local is not None:
        parts.append(_load_section(*local))
    parts += [
        _memory_section(response.plans[:_BAR_COUNT]),
        _table_section(response.plans),
        _commands_section(best),
        _about_section(request, response, workload),
    ]
    return report.page(title, "\n".join(part for part in parts if part))


def plan_drawing(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
) -> str:
    """Return both charts of the Pareto front as one drawing of its own."""
    style = (importlib.resources.files("sagecp.sim.fleet.report") / "style.css").read_text(encoding="utf-8")
    first, second = _front_charts(request, response)
    width, height = 2 * CHART_WIDTH + 40.0, 340.0
    placed = "".join(
        chart.replace("<svg ", f'<svg x="{x:g}" y="0" width="{CHART_WIDTH:g}" height="{height:g}" ', 1)
        for chart, x in ((first, 0.0), (second, CHART_WIDTH + 40.0))
        if chart.startswith("<svg ")
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -10 {width + 20:g} {height + 20:g}" '
        f'width="{width + 20:g}" height="{height + 20:g}" role="img" aria-label="Plans">'
        # Charts have no ground of their own on a page.
        f"<style>{style}\nsvg svg{{width:auto;margin:0}}</style>"
        f'<rect x="-10" y="-10" width="100%" height="100%" style="fill:var(--ground)"/>{placed}</svg>\n'
    )


def _tiles(best: Plan) -> list[report.Tile]:
    price = best.usd_per_million_output_tokens
    return [
        report.Tile(words.number(best.predicted_goodput), "good requests per second", is_lead=True),
        report.Tile(words.seconds(best.predicted_ttft_s), "to the first token at that rate"
                    if best.request_rate == best.predicted_goodput else "to the first token at the load"),
        report.Tile(words.seconds(best.predicted_tpot_s), "per further token"),
        report.Tile(f"${words.usd(best.usd_per_hour)}", f"per hour, {render.plural(best.gpu_count, 'GPU')}"),
        report.Tile(f"${words.usd(price)}" if price else render.NONE, "per million output tokens"),
    ]  # fmt: skip


def _front_charts(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
) -> tuple[str, str]:
    share = render.percent(request.attainment or view.DEFAULT_ATTAINMENT)
    ttft, tpot, throughput, price = quantities(has_rate=request.workload.request_rate > 0.0, share=share)
    return scatter(response.plans, throughput, ttft), scatter(response.plans, price, tpot)


def _front_section(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
) -> str:
    first, second = _front_charts(request, response)
    about = (
        "Each point is a plan; rest the pointer on it for its figures. Named ones are on the Pareto front: "
        "no other plan is as good in all of first token, further tokens, throughput and price. Lower is "
        "better, and so is further right on the left chart, further left on the right one."
    )
    charts = report.side_by_side(("First token and throughput", first), ("Further tokens and price", second))
    return report.section("Plans", about, legend(response.plans), charts)


def _load_section(query: PlanQuery, result: PlanningResult) -> str:
    curves = load_curves(query, result.plans)
    if not curves:
        return ""
    share = render.percent(query.objectives.attainment)
    charts = report.side_by_side(
        ("First token", load_chart(curves, f"{share} of requests stay below", 1, query.objectives.ttft_s)),
        ("Further tokens", load_chart(curves, f"{share} of requests stay below", 2, query.objectives.tpot_s)),
    )
    return report.section(
        "What more load does",
        "The best plans of different sizes, all replicas together, up to the load that they keep up with.",
        charts,
    )


def load_curves(query: PlanQuery, plans: Sequence[PlanEstimate]) -> list[LoadCurve]:
    """Return how the best plans of different sizes do at several loads."""
    from sagecp.core.parallelism.serving import estimate_plan

    chosen: dict[tuple[object, ...], PlanEstimate] = {}
    for plan in plans:
        if plan.goodput > 0.0:
            chosen.setdefault((plan.gpu_name, *plan.config.sizes[:4]), plan)
    drawn = list(chosen.values())[:_CURVE_COUNT]
    several = len({plan.gpu_name for plan in drawn}) > 1
    curves = []
    for plan in drawn:
        points = []
        for load in _CURVE_LOADS:
            rate = plan.goodput * load
            at_load = estimate_plan(
                query.model,
                query.pool_of(plan.gpu_name),
                plan.config,
                query.options_of(plan),
                dataclasses.replace(query.workload, request_rate=rate),
                query.objectives,
            )
            if not math.isfinite(at_load.ttft_s):
                break
            points.append((rate, at_load.ttft_s, at_load.tpot_s))
        name = f"{plan.config}, {words.gpu_kind(plan.gpu_name)}" if several else str(plan.config)
        curves.append(LoadCurve(name, tuple(points)))
    return curves


def _memory_section(plans: Sequence[Plan]) -> str:
    return report.section(
        "Memory",
        "Of the fullest GPU of each plan. What the KV cache gets decides how many requests run at a time.",
        report.in_two_widths(lambda width: memory_bars(plans, width)),
    )


def _table_section(plans: Sequence[Plan]) -> str:
    titles = (
        "plan",
        "GPUs",
        "TTFT",
        "TPOT",
        "good requests/s",
        "tokens/s",
        "$/h",
        "$/1M tokens",
        "limited by",
    )
    several = len({plan.gpu_name for plan in plans}) > 1
    best = max(plan.predicted_goodput for plan in plans) or 1.0
    rows = [
        report.Row(
            (
                report.Cell(words.plan_name(plan, with_gpu=several) + (" ★" if plan.pareto_optimal else "")),
                report.Cell(str(plan.gpu_count)),
                report.Cell(words.seconds(plan.predicted_ttft_s)),
                report.Cell(words.seconds(plan.predicted_tpot_s)),
                report.Cell(words.number(plan.predicted_goodput), share=plan.predicted_goodput / best),
                report.Cell(words.number(plan.output_tokens_per_second)),
                report.Cell(words.usd(plan.usd_per_hour)),
                report.Cell(words.usd(plan.usd_per_million_output_tokens)),
                report.Cell(plan.limited_by),
            ),
            is_best=index == 0,
        )
        for index, plan in enumerate(plans[:_TABLE_COUNT])
    ]
    about = "Best first. ★: on the Pareto front."
    if len(plans) > _TABLE_COUNT:
        about += f" The best {_TABLE_COUNT} of {len(plans)}; sagecp plan --all lists them all."
    return report.section("All figures", about, report.table(titles, rows))


def _commands_section(best: Plan) -> str:
    text = "\n\n".join(view.folded(command) for command in best.commands)
    return report.section(
        "Start it", "One command per process, for vLLM.", f"<pre>{escape(text)}</pre>"
    ) if text else ""  # fmt: skip


def _about_section(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    workload: WorkloadSource,
) -> str:
    possible = response.considered_plan_count - response.rejected_plan_count
    entries = report.pairs(
        [
            ("model", view.model_text(response.model)),
            ("GPUs", "; ".join(view.pool_text(pool) for pool in request.gpu_pools)),
            ("workload", view.workload_text(workload)),
            ("objectives", view.objectives_text(request)),
            ("looked at", f"{response.considered_plan_count:,} plans, of which {possible:,} can be"),
            ("made by", f"sagecp {__version__}"),
        ]
    )
    notes = [*workload.notes, *response.warnings]
    listed = "".join(f"<li>{escape(text)}</li>" for text in notes)
    reading = f"<h3>What to know before trusting it</h3><ul>{listed}</ul>" if notes else ""
    return report.section("What was asked", "", entries, reading)
