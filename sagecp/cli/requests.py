"""`sagecp requests` and `sagecp cancel`."""

from __future__ import annotations

import click

from sagecp.cli.options import DefaultCommandGroup, ServerOptions, output_option, server_options

_STATES = ["queued", "dispatched", "running", "succeeded", "failed", "cancelled", "expired"]


@click.group("requests", cls=DefaultCommandGroup)
def requests() -> None:
    """List requests, or look at one. Without a command: list."""


@requests.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(_STATES, case_sensitive=False),
    help="Only these; repeatable.",
)
@click.option("--model", default="", help="Only this model.")
@click.option("--instance", "instance_id", default="", help="Only this instance.")
@click.option("--user", "user_id", default="", help="Only this user.")
@click.option("--session", "session_id", default="", help="Only this session.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Most to list, newest first; 0: all.",
)
@output_option
@server_options
def list_(
    connection: ServerOptions,
    as_json: bool,
    states: tuple[str, ...],
    model: str,
    instance_id: str,
    user_id: str,
    session_id: str,
    limit: int,
) -> None:
    """List requests, newest first."""
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk

    filters = {"model": model, "instance_id": instance_id, "user_id": user_id, "session_id": session_id}
    messages, more = talk(connection, lambda client: requests_view.fetch(client, states, limit, filters))
    requests_view.show(messages, more=more, as_json=as_json)


@requests.command()
@click.argument("request_id")
@output_option
@server_options
def get(connection: ServerOptions, as_json: bool, request_id: str) -> None:
    """Show one request: its life so far, and why it ended."""
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk

    message = talk(connection, lambda client: requests_view.fetch_one(client, request_id))
    requests_view.show_one(message, as_json=as_json)


@click.command("cancel")
@click.argument("request_ids", nargs=-1, required=True, metavar="REQUEST_ID...")
@click.option("--cause", default="", help="Why, for the record.")
@output_option
@server_options
def cancel(connection: ServerOptions, as_json: bool, request_ids: tuple[str, ...], cause: str) -> None:
    """Stop requests, and the engines' work for them."""
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk

    messages = talk(connection, lambda client: requests_view.cancel(client, request_ids, cause))
    requests_view.show_cancelled(messages, as_json=as_json)
