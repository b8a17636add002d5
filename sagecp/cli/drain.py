"""`sagecp drain`: take work off an engine before its host is touched."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances
from sagecp.cli.options import ServerOptions, one_format_option, server_options
from sagecp.cli.order_options import check_grace, grace_options, record_options, set_grace

_EPILOG = """\b
Examples:
  sagecp drain engine-1 --wait               until the last request has ended
  sagecp drain engine-1 --grace 30s --wait   for 30 seconds, then move the rest
  sagecp drain engine-1 --undo               take work again
"""


@click.command("drain", epilog=_EPILOG)
@click.argument("instance_id", shell_complete=complete_instances)
@click.option("--wait", is_flag=True, help="Wait until nothing runs there, and show how far it is.")
@grace_options
@click.option("--undo", is_flag=True, help="Take work again.")
@record_options
@one_format_option
@server_options
def drain(
    connection: ServerOptions,
    output: str,
    instance_id: str,
    wait: bool,
    grace_s: float | None,
    now: bool,
    force: bool,
    undo: bool,
    incarnation: int,
    cause: str,
) -> None:
    """Give an engine no new work, so that it can be stopped once it is empty.

    Requests that run there finish there, or are moved to other engines after
    the grace time and go on where they were. It is DRAINED when nothing is in
    flight. Repeating the command changes the grace time; without one nothing
    is moved. With --wait, --timeout bounds the wait; the drain goes on after it.
    """
    check_grace(grace_s, now=now)
    if undo and (now or grace_s is not None or force or wait):
        raise click.UsageError("--undo goes with none of --grace, --now, --force and --wait")
    from sagecp.cli import drain_view
    from sagecp.v1 import fleet_service_pb2

    query = fleet_service_pb2.DrainInstanceRequest(
        instance_id=instance_id, undo=undo, force=force, incarnation=incarnation, cause=cause
    )
    set_grace(query.grace_period, grace_s, now=now)
    drain_view.run(connection, query, wait=wait, output=output)
