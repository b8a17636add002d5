"""`sagecp drain`: take work off an engine before its host is touched."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances
from sagecp.cli.options import DURATION, ServerOptions, one_format_option, server_options

_EPILOG = """\b
Examples:
  sagecp drain engine-1 --wait               until the last request has ended
  sagecp drain engine-1 --grace 30s --wait   for 30 seconds, then move the rest
  sagecp drain engine-1 --undo               take work again
"""


@click.command("drain", epilog=_EPILOG)
@click.argument("instance_id", shell_complete=complete_instances)
@click.option("--wait", is_flag=True, help="Wait until nothing runs there, and show how far it is.")
@click.option(
    "--grace",
    "grace_s",
    type=DURATION,
    metavar="T",
    help="Move what still runs there after this time: 30s, 5m.  [never: it runs to its end]",
)
@click.option("--now", is_flag=True, help="Move what runs there at once; the same as --grace 0s.")
@click.option("--force", is_flag=True, help="Even if the rest of the fleet could not carry the load.")
@click.option("--undo", is_flag=True, help="Take work again.")
@click.option(
    "--incarnation",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Only this incarnation of the instance.  [whichever is registered]",
)
@click.option("--cause", default="", help="Why, for the record.")
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
    if now and grace_s is not None:
        raise click.UsageError("--now is a grace time of 0 s; give it or --grace, not both")
    if undo and (now or grace_s is not None or force or wait):
        raise click.UsageError("--undo goes with none of --grace, --now, --force and --wait")
    from sagecp.cli import drain_view
    from sagecp.v1 import fleet_service_pb2

    query = fleet_service_pb2.DrainInstanceRequest(
        instance_id=instance_id, undo=undo, force=force, incarnation=incarnation, cause=cause
    )
    if now or grace_s is not None:
        query.grace_period.FromMicroseconds(round((grace_s or 0.0) * 1e6))
    drain_view.run(connection, query, wait=wait, output=output)
