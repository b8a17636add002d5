"""`sagecp simulate compare`."""

from __future__ import annotations

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import debug_option, no_color, output_option
from sagecp.cli.simulate.options import (
    CONTENDER_SYNTAX,
    ExperimentOptions,
    check_contenders,
    experiment_options,
    read_contenders,
)

_HELP = f"""Hold policies and baselines against each other.

Every contender sees the same requests, seed by seed. Figures are means over the seeds with 95 % intervals;
goodput@90 is the load at which 90 % of the requests meet their objectives, its ratio to the best baseline
is taken in pairs of one seed. Use several --scales and --seeds.

A contender is written

{CONTENDER_SYNTAX}

and may be quoted for the shell. Examples:

\b
  slo_aware
  slo_aware/locality
  fifo/load_balanced/least_connections
  edf:slo_aware?slo_aware.work_weight=1
  'eager:slo_aware?dispatch.prefill_window_s=9&slo_aware.work_weight=4'
  min_ttft
"""


@click.command("compare", help=_HELP)
@experiment_options
@click.option(
    "--policies",
    multiple=True,
    default=("slo_aware,adaptive,fifo",),
    show_default="slo_aware,adaptive,fifo",
    metavar="LIST",
    help="Policies, separated by commas; may be repeated; none: no policy.",
)
@click.option(
    "--baselines",
    multiple=True,
    default=("min_ttft,llmd_default,least_connections,round_robin",),
    show_default="min_ttft,llmd_default,least_connections,round_robin",
    metavar="LIST",
    help="Baselines, likewise.",
)
@click.option(
    "--bounds/--no-bounds", default=True, show_default=True, help="Work out what no policy exceeds."
)
@output_option
@no_color
@debug_option
def compare(
    experiment: ExperimentOptions,
    policies: tuple[str, ...],
    baselines: tuple[str, ...],
    bounds: bool,
    as_json: bool,
) -> None:
    """Run the comparison."""
    from sagecp.cli.simulate import view
    from sagecp.cli.simulate.execution import run_experiment, write_report
    from sagecp.sim.fleet.report.compare_report import compare_page

    contenders = read_contenders(policies, are_baselines=False) + read_contenders(
        baselines, are_baselines=True
    )
    if not contenders:
        raise CliError(
            "there is nothing to compare", hint="name --policies or --baselines", exit_code=ExitCode.INVALID
        )
    check_contenders(contenders)
    contents = run_experiment(experiment, contenders, with_charts=False, with_bounds=bounds)
    if experiment.out is not None:
        write_report(experiment.out, contents, compare_page)
    if as_json:
        view.show_json(contents, experiment.out)
        return
    view.show_comparison(contents)
    if experiment.out is not None:
        click.echo(f"\nreport: {experiment.out / 'report.html'}", err=True)
