"""`--check`: the best plans in the simulator, beside what was predicted of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from sagecp.cli import render
from sagecp.cli.plan import words

if TYPE_CHECKING:
    from sagecp.core.parallelism.estimates import PlanEstimate
    from sagecp.core.parallelism.plan_query import PlanQuery

_BAR_WIDTH = 30
_REQUEST_COUNT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPlan:
    """What was predicted of a plan, and what the simulator did with it at the same rate.

    Attributes:
        plan: Its name.
        gpu_name: Kind of its GPUs.
        request_rate: Requests per second that were offered.
        attainment: Share of them within the objectives, simulated.
        predicted_ttft_s: That the wanted share stays below.
        simulated_ttft_s: Likewise.
        predicted_tpot_s: Likewise.
        simulated_tpot_s: Likewise.
    """

    plan: str
    gpu_name: str
    request_rate: float
    attainment: float
    predicted_ttft_s: float
    simulated_ttft_s: float
    predicted_tpot_s: float
    simulated_tpot_s: float

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON; what is not finite is absent."""
        return {name: value for name, value in asdict(self).items()
                if not isinstance(value, float) or math.isfinite(value)}  # fmt: skip


def check_plans(
    query: PlanQuery, plans: Sequence[PlanEstimate], on_progress: Callable[[int], None]
) -> list[CheckedPlan]:
    """Simulate plans, each at the rate that its times are told at; those without any are left out.

    Args:
        query: What they are for.
        plans: The plans.
        on_progress: Told how many are done.
    """
    from sagecp.core.parallelism.step_model import plan_step_time
    from sagecp.sim.fleet.plan_simulation import PlanSimulation

    checked = []
    for index, plan in enumerate(plans):
        on_progress(index)
        if not (plan.goodput > 0.0 and 0.0 < plan.request_rate < math.inf):
            continue
        options = query.options_of(plan)
        simulation = PlanSimulation(
            plan_step_time(query.model, query.pool_of(plan.gpu_name), plan.config, options),
            plan.memory.key_value_token_capacity,
            plan.config,
            options,
            query.workload,
            query.objectives,
            request_count=_REQUEST_COUNT,
        )
        found = simulation.run(plan.request_rate)
        checked.append(
            CheckedPlan(
                plan=str(plan.config),
                gpu_name=plan.gpu_name,
                request_rate=plan.request_rate,
                attainment=found.attainment,
                predicted_ttft_s=plan.ttft_s,
                simulated_ttft_s=found.ttft_s,
                predicted_tpot_s=plan.tpot_s,
                simulated_tpot_s=found.tpot_s,
            )
        )
    on_progress(len(plans))
    return checked


def show_checked(checked: Sequence[CheckedPlan], wanted: float) -> None:
    """Print predictions beside simulations."""
    click.echo()
    if not checked:
        click.secho(
            "None of the plans serves any request within the objectives: nothing to simulate.", dim=True
        )
        return
    click.secho("The same in the simulator", bold=True)
    columns = [
        render.Column("PLAN"),
        render.Column("REQUESTS/S", right=True),
        render.Column("TTFT", right=True),
        render.Column("SIMULATED", right=True),
        render.Column("TPOT", right=True),
        render.Column("SIMULATED", right=True),
        render.Column("GOOD", right=True),
    ]
    rows = [
        [
            each.plan,
            words.number(each.request_rate),
            words.seconds(each.predicted_ttft_s),
            words.seconds(each.simulated_ttft_s),
            words.seconds(each.predicted_tpot_s),
            words.seconds(each.simulated_tpot_s),
            render.percent(each.attainment),
        ]
        for each in checked
    ]
    render.print_table(columns, rows)
    click.secho(f"GOOD is the share within the objectives; {render.percent(wanted)} is wanted", dim=True)


class CheckProgress:
    """A bar on a terminal, nothing elsewhere.

    Args:
        total: Plans to simulate.
    """

    def __init__(self, total: int) -> None:
        self._total = total

    def __call__(self, done: int) -> None:
        """Show how many are done; the bar goes when all are."""
        if not sys.stderr.isatty() or not self._total:
            return
        if done >= self._total:
            click.echo("\r" + " " * 60 + "\r", err=True, nl=False)
            return
        filled = done * _BAR_WIDTH // self._total
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        click.echo(f"\r[{bar}] simulating plan {done + 1}/{self._total} ", err=True, nl=False)
