"""`sagecp metrics`: how the fleet does."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances, complete_models
from sagecp.cli.options import (
    DURATION,
    DurationType,
    ServerOptions,
    headers_option,
    one_format_option,
    server_options,
)


@click.command("metrics")
@click.option("--window", type=DURATION, metavar="T", help="Of rates and quantiles: 1m, 5m or 1h.  [5m]")
@click.option(
    "--by",
    "group_by",
    type=click.Choice(["model", "instance", "tenant", "priority"]),
    help="Also for each of these: medians (50) and 99th percentiles (99).",
)
@click.option("--model", default="", help="Only this model.", shell_complete=complete_models)
@click.option(
    "--instance", "instance_id", default="", help="Only this instance.", shell_complete=complete_instances
)
@click.option("--tenant", "tenant_id", default="", help="Only this tenant.")
@click.option(
    "--priority",
    type=click.Choice(["critical", "high", "normal", "low", "background"], case_sensitive=False),
    help="Only this class.",
)
@click.option("-W", "--watch", is_flag=True, help="A line at every interval, until Ctrl-C.")
@click.option(
    "--interval",
    "interval_s",
    type=DurationType(least_s=0.1),
    default="5s",
    show_default=True,
    metavar="T",
    help="Of --watch.",
)
@headers_option
@one_format_option
@server_options
def metrics(
    connection: ServerOptions,
    output: str,
    window: float | None,
    group_by: str | None,
    model: str,
    instance_id: str,
    tenant_id: str,
    priority: str | None,
    watch: bool,
    interval_s: float,
    headers: bool,
) -> None:
    """Show latencies, throughput, GPU use and objectives."""
    from sagecp.cli import metrics_view, metrics_watch
    from sagecp.cli.connect import talk

    query = metrics_view.query(
        window_s=window,
        group_by=group_by,
        model=model,
        instance_id=instance_id,
        tenant_id=tenant_id,
        priority=priority,
    )
    if watch:
        show = metrics_watch.printer(group_by or "", output, headers=headers)
        metrics_watch.run(connection, query, interval_s, show)
        return
    snapshot = talk(connection, lambda client: metrics_view.fetch(client, query))
    metrics_view.show(snapshot, group_by or "", output)
