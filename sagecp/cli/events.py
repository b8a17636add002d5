"""`sagecp events`: what happened to the fleet."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances
from sagecp.cli.options import (
    DURATION,
    ServerOptions,
    format_option,
    headers_option,
    server_options,
)

_SEVERITIES = ["info", "warning", "error"]
# As the contract names them; a test compares.
_KINDS = [
    "instance_registered", "instance_state_changed", "instance_removed", "instance_ordered", "gpu_fault",
    "gpu_fault_cleared", "engine_process_changed", "heartbeat_refused", "clock_skew", "scheduling_configured",
    "policy_switched", "overload", "request_failed", "control_plane_trouble", "control_plane_state_changed",
    "prediction_drift",
]  # fmt: skip


@click.command("events")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Most to list, the latest ones; 0: all that are kept.",
)
@click.option("--since", "since_s", type=DURATION, metavar="T", help="Only of this time: 10m, 1h.")
@click.option(
    "--after",
    "after_sequence",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only those after this sequence number (-o wide and json show them).",
)
@click.option(
    "--severity",
    type=click.Choice(_SEVERITIES, case_sensitive=False),
    help="Only this severity and above.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(_KINDS, case_sensitive=False),
    metavar="KIND",
    help="Only this kind; repeatable. Kinds: " + ", ".join(_KINDS) + ".",
)
@click.option(
    "--instance",
    "instance_id",
    default="",
    help="Only of this instance.",
    shell_complete=complete_instances,
)
@headers_option
@format_option("table", "wide", "json", "yaml")
@server_options
def events(
    connection: ServerOptions,
    output: str,
    headers: bool,
    follow: bool,
    limit: int,
    since_s: float | None,
    after_sequence: int | None,
    severity: str | None,
    kinds: tuple[str, ...],
    instance_id: str,
) -> None:
    """List what happened to the fleet, the latest last.

    The server keeps the latest 10,000 events, in memory. With --follow, what
    happens while the server cannot be reached comes when it is back.
    """
    from sagecp.cli import events_view

    only = events_view.EventFilter(
        severity=severity or "", kinds=kinds, instance_id=instance_id, after_sequence=after_sequence or 0
    )
    show = events_view.printer(output, headers=headers)
    events_view.run(connection, only, show, limit=limit, since_s=since_s, follow=follow)
