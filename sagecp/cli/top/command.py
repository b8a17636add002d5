"""`sagecp top` itself."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DurationType, ServerOptions, server_options

_EPILOG = """\b
Keys:
  arrows, Tab   choose an instance, go to another panel
  i             everything about it         e   explain a request
  d r w         drain, resume, sleep        P   change the policy
  s / z p       sort, filter, zoom, pause   ? q help, quit
"""


@click.command("top", epilog=_EPILOG)
@click.option("--read-only", is_flag=True, help="Refuse every key that changes something.")
@click.option(
    "--interval",
    "interval_s",
    type=DurationType(least_s=0.2),
    default="1s",
    show_default=True,
    metavar="T",
    help="Between two looks; a large fleet is read in pieces.",
)
@click.option("--no-mouse", is_flag=True, help="Leave the mouse to the terminal, to select text.")
@server_options
@click.pass_context
def top(
    context: click.Context, connection: ServerOptions, read_only: bool, interval_s: float, no_mouse: bool
) -> int:
    """Watch the fleet on a full screen, and act on it.

    Instances with their load, caches, latencies and GPUs, what waits, and what
    happens. Works in 80x24 and grows with the terminal; `?` explains the keys.
    Without a terminal use: sagecp status, instances, metrics, events.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CliError(
            "sagecp top needs a terminal",
            hint="for programs: sagecp status -o json, sagecp instances -o json",
            exit_code=ExitCode.INVALID,
        )
    # First of all, so that a missing package is said before anything else.
    from sagecp.cli.connect import talk
    from sagecp.cli.top.app import TopApp
    from sagecp.cli.top.source import CALL_TIMEOUT_S
    from sagecp.client import SageClient

    async def run(client: SageClient) -> int:
        # A wrong address is better said in a line than on a full screen.
        await client.get_status()
        app = TopApp(client, read_only=read_only, interval_s=interval_s)
        code = ExitCode.OK

        def stop() -> None:
            nonlocal code
            code = ExitCode.INTERRUPTED
            app.exit()

        # Also when the connection to the terminal is gone.
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        await app.run_async(mouse=not no_mouse)
        if app.failure is not None:
            raise app.failure
        return code

    if context.color is False:
        os.environ["NO_COLOR"] = "1"
    if connection.timeout_s is None:
        connection = dataclasses.replace(connection, timeout_s=CALL_TIMEOUT_S)
    return talk(connection, run)
