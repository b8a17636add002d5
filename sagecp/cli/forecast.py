"""`sagecp forecast`: the load and the cost of the next hours."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_models
from sagecp.cli.options import DurationType, ServerOptions, one_format_option, server_options


@click.command("forecast")
@click.option("--model", default="", help="Only this model.", shell_complete=complete_models)
@click.option("--tenant", "tenant_id", default="", help="Only this tenant.")
@click.option(
    "--horizon",
    "horizon_s",
    type=DurationType(least_s=300.0),
    default="1h",
    show_default=True,
    metavar="T",
    help="How far ahead: 5m to 24h.",
)
@one_format_option
@server_options
def forecast(connection: ServerOptions, output: str, model: str, tenant_id: str, horizon_s: float) -> None:
    """Say what load and what cost the next hours will probably bring, and how right that has been.

    It rests on the load of up to two weeks, in buckets of five minutes. The bounds are those
    that four of five cases should lie between.
    """
    from sagecp.cli import forecast_view
    from sagecp.cli.connect import talk

    answer = talk(connection, lambda client: client.forecast_load(model, tenant_id, horizon_s))
    forecast_view.show(answer, output)
