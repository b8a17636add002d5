"""`sagecp check`: one line and an exit code for monitoring systems."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.complete import complete_models
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, PAIR, ServerOptions, one_format_option, server_options

_UNKNOWN = 3

_EPILOG = """\b
Exit codes, as monitoring systems expect them (others than those of all other commands):
  0 OK, 1 WARNING, 2 CRITICAL (also: the server cannot be reached), 3 UNKNOWN

\b
What is looked at, its default thresholds, and what its value is:
  ready              crit 1:    READY instances of the model that has the fewest
  unhealthy  warn 0             UNHEALTHY instances
  lost       warn 0             LOST instances
  gpu_faults warn 0             faults of GPUs
  queue      warn 50 crit 90    share of the queue that is full, %
  queue_wait                    99th percentile of the wait in the queue, s
  ttft                          99th percentile of the time to first token, s
  slo        warn 95: crit 90:  requests with objectives that met them, %
  loop_lag   warn 0.25 crit 1   delay of the server's event loop, s
  drift      warn 2             how many times longer or shorter than predicted
  refused    warn 0             refused heartbeats, told of once a minute

\b
Thresholds say which values are good, and alert outside:
  10      from 0 to 10             10:20   from 10 to 20
  10:     10 and more              @10:20  alert inside, ends included
  ~:10    10 and less, also below 0

\b
Examples:
  sagecp check --crit ready=2: --warn ttft=2 --crit ttft=10
  sagecp check --warn slo= --crit slo=
"""


class _CheckCommand(click.Command):
    """A command whose every failure is UNKNOWN: 1 and 2 mean something else here."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,  # noqa: ANN401 - as in the class above
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            _say_unknown(error.format_message())
        except CliError as error:
            _say_unknown(error.message)
        raise click.exceptions.Exit(_UNKNOWN)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as in the class above
        try:
            return super().invoke(ctx)
        except CliError as error:
            _say_unknown(error.message)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, nothing is known
            _say_unknown(f"{type(error).__name__}: {error}")
        return _UNKNOWN


def _say_unknown(message: str) -> None:
    # A "|" would begin the performance data.
    click.echo(f"SAGECP UNKNOWN: {' '.join(message.split()).replace('|', '/')}")


@click.command("check", cls=_CheckCommand, epilog=_EPILOG)
@click.option(
    "-w", "--warn", multiple=True, type=PAIR, metavar="NAME=RANGE", help="Threshold for WARNING; repeatable."
)
@click.option(
    "-c", "--crit", multiple=True, type=PAIR, metavar="NAME=RANGE", help="Threshold for CRITICAL; repeatable."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model that must be served, even if no instance of it is registered; repeatable.",
    shell_complete=complete_models,
)
@click.option(
    "--window", "window_s", type=DURATION, default="5m", show_default=True, metavar="T", help="1m, 5m or 1h."
)
@click.option("-v", "--verbose", is_flag=True, help="Below the line, one for everything that is looked at.")
@one_format_option
@server_options
def check(
    connection: ServerOptions,
    output: str,
    warn: tuple[tuple[str, str], ...],
    crit: tuple[tuple[str, str], ...],
    models: tuple[str, ...],
    window_s: float,
    verbose: bool,
) -> int:
    """Say in a line how the fleet is, for Nagios, Icinga, Sensu, Zabbix and the like.

    An empty threshold, NAME=, switches one off. Without anything to measure,
    such as requests that had objectives, nothing is wrong. --timeout is 10s.
    """
    from sagecp.cli import check_view

    return check_view.run(
        connection,
        warn=dict(warn),
        crit=dict(crit),
        models=models,
        window_s=window_s,
        verbose=verbose,
        output=output,
    )
