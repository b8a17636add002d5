"""`sagecp metrics`: how the fleet does."""

from __future__ import annotations

import click

from sagecp.cli.options import DURATION, ServerOptions, output_option, server_options


@click.command("metrics")
@click.option("--window", type=DURATION, metavar="T", help="Of rates and quantiles, at most 1h.  [5m]")
@click.option(
    "--by",
    "group_by",
    type=click.Choice(["model", "instance", "tenant", "priority"]),
    help="Also for each of these: medians (50) and 99th percentiles (99).",
)
@click.option("--model", default="", help="Only this model.")
@click.option("--instance", "instance_id", default="", help="Only this instance.")
@click.option("--tenant", "tenant_id", default="", help="Only this tenant.")
@click.option(
    "--priority",
    type=click.Choice(["critical", "high", "normal", "low", "background"], case_sensitive=False),
    help="Only this class.",
)
@output_option
@server_options
def metrics(
    connection: ServerOptions,
    as_json: bool,
    window: float | None,
    group_by: str | None,
    model: str,
    instance_id: str,
    tenant_id: str,
    priority: str | None,
) -> None:
    """Show latencies, throughput, GPU use and objectives."""
    from sagecp.cli import metrics_view
    from sagecp.cli.connect import talk

    query = metrics_view.query(
        window_s=window,
        group_by=group_by,
        model=model,
        instance_id=instance_id,
        tenant_id=tenant_id,
        priority=priority,
    )
    snapshot = talk(connection, lambda client: metrics_view.fetch(client, query))
    metrics_view.show(snapshot, group_by or "", as_json=as_json)
