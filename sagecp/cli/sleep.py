"""`sagecp sleep` and `sagecp wake`: free the GPUs of an engine, and take them again."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances
from sagecp.cli.options import ServerOptions, one_format_option, server_options
from sagecp.cli.order_options import check_grace, grace_options, record_options, set_grace

_instance_argument = click.argument("instance_id", shell_complete=complete_instances)


@click.command("sleep")
@_instance_argument
@click.option(
    "--level",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="1: weights go to the host's memory. 2: they are dropped, and waking takes longer.",
)
@click.option("--wait", is_flag=True, help="Wait until the engine sleeps, and show how far it is.")
@click.option("--wake", is_flag=True, help="The opposite, as sagecp wake.")
@grace_options
@record_options
@one_format_option
@server_options
def sleep(
    connection: ServerOptions,
    output: str,
    instance_id: str,
    level: int,
    wait: bool,
    wake: bool,
    grace_s: float | None,
    now: bool,
    force: bool,
    incarnation: int,
    cause: str,
) -> None:
    """Drain an engine and have it sleep, so that its GPU memory is free.

    It stays registered and is back within seconds: sagecp wake ID. Engines can
    sleep that were started for it, such as vllm serve --enable-sleep-mode, and
    have an agent. With --wait, --timeout bounds the wait; the order stays.
    """
    check_grace(grace_s, now=now)
    if wake and (now or grace_s is not None or force):
        raise click.UsageError("--wake goes with none of --grace, --now and --force")
    from sagecp.cli import sleep_view
    from sagecp.v1 import fleet_service_pb2

    query = fleet_service_pb2.SleepInstanceRequest(
        instance_id=instance_id,
        wake=wake,
        level=0 if wake else level,
        force=force,
        incarnation=incarnation,
        cause=cause,
    )
    set_grace(query.grace_period, grace_s, now=now)
    sleep_view.run(connection, query, wait=wait, output=output)


@click.command("wake")
@_instance_argument
@click.option("--wait", is_flag=True, help="Wait until the instance takes work again.")
@record_options
@one_format_option
@server_options
def wake(
    connection: ServerOptions, output: str, instance_id: str, wait: bool, incarnation: int, cause: str
) -> None:
    """Wake an engine up that was ordered to sleep; it takes work again."""
    from sagecp.cli import sleep_view
    from sagecp.v1 import fleet_service_pb2

    query = fleet_service_pb2.SleepInstanceRequest(
        instance_id=instance_id, wake=True, incarnation=incarnation, cause=cause
    )
    sleep_view.run(connection, query, wait=wait, output=output)
