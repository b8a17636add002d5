"""What `sagecp plan` prints for people."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from sagecp.cli import render
from sagecp.cli.plan import words

if TYPE_CHECKING:
    from sagecp.cli.plan.workload_source import WorkloadSource
    from sagecp.v1 import admin_service_pb2, parallelism_pb2

    Plan = parallelism_pb2.ParallelismPlan

DEFAULT_ATTAINMENT = 0.9
"""Share of the requests that must meet the objectives, where nobody says."""

_MOST_WIDTH = 100
_MOST_COMMANDS = 16
_MOST_GROUPS = 12
_MOST_EXAMPLES = 4
_FRONT = "★"

_COLUMNS = (
    render.Column(""),
    render.Column("#", right=True),
    render.Column("PLAN"),
    render.Column("GPUS", flexible=True, least_width=6),
    render.Column("IDLE", right=True, optional=True),
    render.Column("KV TOKENS", right=True, optional=True),
    render.Column("TTFT", right=True),
    render.Column("TPOT", right=True),
    render.Column("GOOD/S", right=True),
    render.Column("$/H", right=True),
    render.Column("$/1M OUT", right=True),
    render.Column("LIMITED BY", optional=True),
)
_WIDE_COLUMNS = (
    render.Column("TYPE", optional=True),
    render.Column("TOKENS/S", right=True, optional=True),
    render.Column("ALONE TTFT", right=True, optional=True),
    render.Column("TPOT", right=True, optional=True),
    render.Column("AT A TIME", right=True, optional=True),
    render.Column("WEIGHTS", right=True, optional=True),
    render.Column("ACTIV.", right=True, optional=True),
    render.Column("GRAPHS", right=True, optional=True),
    render.Column("RUNTIME", right=True, optional=True),
    render.Column("KV GIB", right=True, optional=True),
)


def show(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    workload: WorkloadSource,
    *,
    limit: int,
    wide: bool = False,
) -> None:
    """Print the answer: what was asked, the plans, why the first, and how to start it."""
    show_question(request, response, workload)
    click.echo()
    if not response.plans:
        _paragraph(response.summary, fg="red")
        _warnings(response.warnings)
        return
    shown = response.plans[:limit]
    _table(shown, wide=wide)
    _below_table(request, response, shown)
    click.echo()
    _paragraph(response.summary)
    _warnings(response.warnings)
    best = response.plans[0]
    _memory(best)
    _commands(best)


def show_question(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    workload: WorkloadSource,
) -> None:
    """Print what was taken for the model, the GPUs, the traffic and the objectives."""
    room = _width() - len("objectives") - 2
    pairs = [
        ("model", model_text(response.model)),
        ("GPUs", "; ".join(pool_text(pool) for pool in request.gpu_pools)),
        ("workload", workload_text(workload)),
        ("objectives", objectives_text(request)),
    ]
    render.print_pairs((name, "\n".join(textwrap.wrap(text, room))) for name, text in pairs)


def model_text(model: parallelism_pb2.ModelSummary) -> str:
    """Return what a model is in a line."""
    text = f"{model.name}: {words.parameters(model.parameter_count)} parameters"
    if model.active_parameter_count < 0.95 * model.parameter_count:
        text += f" ({words.parameters(model.active_parameter_count)} active)"
    text += f", {words.gib(model.weight_bytes)} GiB in {model.weight_format}"
    cache = f"KV cache {model.key_value_bytes_per_token / 1024:,.4g} KiB per token"
    return f"{text}; {cache}; context {model.max_context_token_count:,}"


def pool_text(pool: parallelism_pb2.GpuPool) -> str:
    """Return GPUs in a few words."""
    text = f"{pool.gpus_per_node_count} x {pool.gpu_name}"
    if pool.node_count > 1:
        text = f"{pool.node_count} nodes of {text}"
    return f"{text} at ${pool.usd_per_gpu_hour:g}" if pool.usd_per_gpu_hour else text


def workload_text(workload: WorkloadSource) -> str:
    """Return the traffic in a few words."""
    text = workload.description
    if workload.samples:
        weight = sum(each.weight for each in workload.samples)
        prompt = sum(each.prompt_token_count * each.weight for each in workload.samples) / weight
        cached = sum(each.cached_token_count * each.weight for each in workload.samples) / weight
        output = sum(each.output_token_count * each.weight for each in workload.samples) / weight
        text += f": {prompt:,.0f} tokens in"
        text += f" ({cached / prompt:.0%} cached)" if cached else ""
        text += f", {output:,.0f} out on average"
    if workload.request_rate is None:
        return f"{text}; as many requests as can be"
    return f"{text}; {workload.request_rate:.3g} requests/s"


def objectives_text(request: admin_service_pb2.PlanParallelismRequest) -> str:
    """Return the objectives and the goal in a few words."""
    from sagecp.v1 import parallelism_pb2
    from sagecp.wire.times import seconds_of

    parts = []
    if request.objectives.HasField("time_to_first_token"):
        parts.append(f"TTFT {words.seconds(seconds_of(request.objectives.time_to_first_token))}")
    if request.objectives.HasField("time_per_output_token"):
        parts.append(f"TPOT {words.seconds(seconds_of(request.objectives.time_per_output_token))}")
    goal = parallelism_pb2.PlanGoal.Name(request.goal).removeprefix("PLAN_GOAL_").lower()
    text = " and ".join(parts) or "none"
    if parts:
        text += f" for {render.percent(request.attainment or DEFAULT_ATTAINMENT)} of the requests"
    return f"{text}; wanted: {words.GOAL_WORDS.get(goal, goal)}"


# -- the table -------------------------------------------------------------------------


def _table(plans: Sequence[Plan], *, wide: bool) -> None:
    columns = (*_COLUMNS, *_WIDE_COLUMNS) if wide else _COLUMNS
    several = len({plan.gpu_name for plan in plans}) > 1
    rows = [_row(rank, plan, several, wide=wide) for rank, plan in enumerate(plans, 1)]
    # What is the same of all tells nothing.
    told = [
        index
        for index, column in enumerate(columns)
        if column.title != "IDLE" or any(row[index] != render.NONE for row in rows)
    ]
    render.print_table([columns[i] for i in told], [[row[i] for i in told] for row in rows])


def _row(rank: int, plan: Plan, several: bool, *, wide: bool) -> list[str]:
    good = plan.predicted_goodput > 0.0
    cells = [
        _FRONT if plan.pareto_optimal else "",
        str(rank),
        words.plan_name(plan),
        f"{plan.gpu_count} {words.gpu_kind(plan.gpu_name)}" if several else str(plan.gpu_count),
        str(plan.idle_gpu_count) if plan.idle_gpu_count else render.NONE,
        render.compact(plan.key_value_token_capacity * plan.replica_count),
        words.seconds(plan.predicted_ttft_s) if good else render.NONE,
        words.seconds(plan.predicted_tpot_s) if good else render.NONE,
        words.number(plan.predicted_goodput) if good else "none",
        words.usd(plan.usd_per_hour),
        words.usd(plan.usd_per_million_output_tokens),
        plan.limited_by + ("" if plan.carries_load else "; too slow"),
    ]
    if wide:
        cells += [
            _type_name(plan),
            words.number(plan.output_tokens_per_second),
            words.seconds(plan.single_ttft_s),
            words.seconds(plan.single_tpot_s),
            words.number(plan.concurrent_request_count),
            *(words.gib(part) for _, part in words.memory_parts(plan.memory)),
        ]
    return cells


def _type_name(plan: Plan) -> str:
    from sagecp.v1 import parallelism_pb2

    return parallelism_pb2.ParallelismType.Name(plan.type).removeprefix("PARALLELISM_TYPE_").lower()


def _below_table(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    shown: Sequence[Plan],
) -> None:
    possible = response.considered_plan_count - response.rejected_plan_count
    notes = []
    if any(plan.pareto_optimal for plan in shown):
        notes.append(f"{_FRONT} no plan is better in TTFT, TPOT, throughput and price at once")
    if possible > len(shown):
        notes.append(f"{possible - len(shown)} more plans: --all")
    if response.rejected_plan_count and not request.include_rejected:
        notes.append(f"{response.rejected_plan_count} cannot be: --rejected")
    rates = {round(plan.request_rate, 6) for plan in shown}
    if len(rates) > 1:
        notes.insert(0, "TTFT and TPOT are at each plan's GOOD/S")
    elif rates:
        notes.insert(0, f"TTFT and TPOT are at {words.number(shown[0].request_rate)} requests/s")
    for line in textwrap.wrap(". ".join(notes), _width()):
        click.secho(line, dim=True)


# -- below it --------------------------------------------------------------------------


def _memory(plan: Plan) -> None:
    parts = words.memory_parts(plan.memory)
    text = ", ".join(f"{name} {words.gib(size)}" for name, size in parts)
    click.echo()
    _title("Memory of the fullest GPU, GiB")
    _paragraph(f"{text}; together {words.gib(plan.memory.total_bytes)}")


def _commands(plan: Plan) -> None:
    if not plan.commands:
        return
    click.echo()
    count = len(plan.commands)
    _title("Start it with" if count == 1 else f"Start it with these {count} processes")
    for command in plan.commands[:_MOST_COMMANDS]:
        click.echo(folded(command))
    if count > _MOST_COMMANDS:
        click.secho(f"... and {count - _MOST_COMMANDS} more: -o json has them all", dim=True)


def folded(command: str, width: int = _MOST_WIDTH) -> str:
    """Return a command in lines that can be copied as they are, the options of each within a width."""
    comment, newline, line = command.rpartition("\n")
    if line.startswith("#"):
        return command
    pieces = re.split(r" (?=--)", line)
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    text = " \\\n".join(lines)
    # A quoted text that has such a place in it would have more spaces now: it must stay whole.
    is_same = shlex.split(text.replace("\\\n", "")) == shlex.split(line)
    return f"{comment}{newline}{text if is_same else line}"


def show_rejected(rejected: Sequence[parallelism_pb2.RejectedPlan], total_count: int) -> None:
    """Print the plans that cannot be, by reason: those of one reason are one entry."""
    click.echo()
    _title(f"{render.plural(total_count, 'plan')} cannot be")
    groups: dict[str, list[tuple[str, str]]] = {}
    several = len({each.gpu_name for each in rejected}) > 1
    for each in rejected:
        name = words.sizes_text(each.sizes, each.replica_count)
        name = f"{name}, {words.gpu_kind(each.gpu_name)}" if several else name
        for reason in each.reasons:
            # Reasons that differ in figures alone are one.
            groups.setdefault(re.sub(r"\d[\d,.]*", "#", reason), []).append((name, reason))
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    width = len(str(max(map(len, ordered), default=0)))
    for group in ordered[:_MOST_GROUPS]:
        names = list(dict.fromkeys(name for name, _ in group))
        more = f" and {len(names) - _MOST_EXAMPLES} more" if len(names) > _MOST_EXAMPLES else ""
        reason = min((text for _, text in group), key=len)
        lines = textwrap.wrap(reason, max(40, _width() - width - 2))
        click.echo(f"{len(group):>{width}}  {lines[0]}")
        for line in lines[1:]:
            click.echo(f"{' ' * width}  {line}")
        for line in textwrap.wrap("; ".join(names[:_MOST_EXAMPLES]) + more, max(40, _width() - width - 2)):
            click.secho(f"{' ' * width}  {line}", dim=True)
    if len(ordered) > _MOST_GROUPS:
        click.secho(f"and {len(ordered) - _MOST_GROUPS} rarer reasons: -o json has them all", dim=True)


def _title(text: str) -> None:
    click.secho(text, bold=True)


def _paragraph(text: str, fg: str | None = None) -> None:
    for line in textwrap.wrap(render.harmless(text), _width(), break_on_hyphens=False):
        click.secho(line, fg=fg)


def _warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        lines = textwrap.wrap(render.harmless(warning), _width() - len("note: "), break_on_hyphens=False)
        click.echo(click.style("note: ", fg="yellow") + "\n      ".join(lines))


def _width() -> int:
    return max(60, min(_MOST_WIDTH, render.terminal_width()))
