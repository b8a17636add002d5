"""`sagecp status`: the control plane at a glance."""

from __future__ import annotations

import click

from sagecp.cli.options import ServerOptions, one_format_option, server_options


@click.command("status")
@one_format_option
@server_options
def status(connection: ServerOptions, output: str) -> None:
    """Show the state of the control plane: fleet, queue, scheduling, loops and recent faults."""
    from sagecp.cli import status_view
    from sagecp.cli.connect import talk

    status_view.show(talk(connection, status_view.fetch), connection.server, output)
