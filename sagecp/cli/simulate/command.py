"""`sagecp simulate` itself."""

from __future__ import annotations

import dataclasses

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DefaultCommandGroup, debug_option, no_color, output_option
from sagecp.cli.simulate.compare import compare
from sagecp.cli.simulate.execution import ARGUMENTS
from sagecp.cli.simulate.options import (
    SETTING,
    ExperimentOptions,
    check_contenders,
    experiment_options,
    read_contenders,
)
from sagecp.cli.simulate.replay import replay

_EPILOG = """\b
Example: four loads, with a report to look at:
  sagecp simulate --trace bench/traces/mooncake_conversation.jsonl --fleet 4x70b-h100-tp4 \\
      --scale 1,1.5,2,3 --out simulation
"""


class SimulateGroup(DefaultCommandGroup):
    """A group that runs a simulation unless another of its commands is named, and helps with both."""

    default_command = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words of the command line, for reports."""
        ctx.find_root().meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options of a simulation, then the other commands."""
        run.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    "simulate",
    cls=SimulateGroup,
    subcommand_metavar="--trace FILE --fleet FLEET [OPTIONS] | compare ... | replay LOG",
    epilog=_EPILOG,
)
def simulate() -> None:
    """Run a trace through the production scheduler and a simulated fleet, on a virtual clock.

    Prints how many requests meet their objectives, and why not all do; with
    --out also a page with charts.
    """


@simulate.command("run", hidden=True)
@experiment_options
@click.option("--policy", default="slo_aware", show_default=True, help="Scheduling policy.")
@click.option("--routing", default="load_balanced", show_default=True, help="Routing strategy.")
@click.option("--load-balancer", default="predicted_latency", show_default=True, help="Load balancer.")
@click.option(
    "--set", "settings", type=SETTING, multiple=True, metavar="NAME=VALUE",
    help="A parameter of them, such as slo_aware.work_weight=2; may be repeated.",
)  # fmt: skip
@click.option(
    "--baseline", default="", metavar="NAME", help="Simulate a baseline instead, as `compare` writes them."
)
@click.option("--bounds", is_flag=True, help="Work out what no policy exceeds.")
@click.option(
    "--event-log", is_flag=True, help="Write every event and decision to events-SEED.jsonl.gz in --out."
)
@output_option
@no_color
@debug_option
def run(
    experiment: ExperimentOptions,
    policy: str,
    routing: str,
    load_balancer: str,
    settings: tuple[tuple[str, float], ...],
    baseline: str,
    bounds: bool,
    event_log: bool,
    as_json: bool,
) -> None:
    """Simulate one policy, at one load or several."""
    from sagecp.cli.simulate import view
    from sagecp.cli.simulate.execution import run_experiment, write_report
    from sagecp.sim.fleet.report.html_report import run_page

    if bounds and experiment.workload.trace(experiment.scales[0], experiment.seeds[0]).is_closed_loop:
        raise CliError(
            "--bounds: a trace of sessions has none: what arrives depends on the fleet's speed",
            exit_code=ExitCode.INVALID,
        )
    if event_log and (experiment.out is None or baseline):
        problem = "--event-log needs --out DIR" if experiment.out is None else "a baseline has no event log"
        raise CliError(problem, exit_code=ExitCode.INVALID)
    contenders = read_contenders(
        (baseline or "/".join((policy, routing, load_balancer)),), are_baselines=bool(baseline)
    )
    if len(contenders) != 1:
        raise CliError(
            "one policy or baseline at a time",
            hint="sagecp simulate compare takes several",
            exit_code=ExitCode.INVALID,
        )
    (contender,) = contenders
    label = contender.label if baseline else policy
    contender = dataclasses.replace(
        contender, label=label, parameters={**contender.parameters, **dict(settings)}
    )
    check_contenders([contender])
    contents = run_experiment(
        experiment,
        [contender],
        with_charts=experiment.out is not None,
        with_bounds=bounds,
        with_event_log=event_log,
    )
    if experiment.out is not None:
        write_report(experiment.out, contents, run_page)
    if as_json:
        view.show_json(contents, experiment.out)
        return
    view.show_run(contents)
    if experiment.out is not None:
        click.echo(f"\nreport: {experiment.out / 'report.html'}", err=True)


simulate.add_command(compare)
simulate.add_command(replay)
