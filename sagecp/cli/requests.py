"""`sagecp requests` and `sagecp cancel`."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.complete import complete_instances, complete_models, complete_requests
from sagecp.cli.options import (
    DURATION,
    PAIR,
    DefaultCommandGroup,
    F,
    ServerOptions,
    headers_option,
    interval_option,
    list_format_option,
    list_options,
    one_format_option,
    server_options,
)

_STATES = ["queued", "dispatched", "running", "succeeded", "failed", "cancelled", "expired"]
_PRIORITIES = ["critical", "high", "normal", "low", "background"]


def _filter_options(function: F) -> F:
    """Add which requests are meant; they arrive as the arguments of `requests_view.make_filter`."""
    decorated: Any = function
    for option in (
        click.option(
            "--older-than", "older_than_s", type=DURATION, metavar="T", help="Received longer ago: 30s, 5m. *"
        ),
        click.option(
            "--newer-than", "newer_than_s", type=DURATION, metavar="T", help="Received since then: 30s, 5m. *"
        ),
        click.option(
            "--label",
            "labels",
            multiple=True,
            type=PAIR,
            metavar="K=V",
            help="Only with this label; repeatable. *",
        ),
        click.option(
            "--priority",
            "priorities",
            multiple=True,
            type=click.Choice(_PRIORITIES, case_sensitive=False),
            help="Only this class; repeatable. *",
        ),
        click.option("--tenant", "tenant_id", default="", help="Only this tenant. *"),
        click.option("--session", "session_id", default="", help="Only this session."),
        click.option("--user", "user_id", default="", help="Only this user."),
        click.option(
            "--instance",
            "instance_id",
            default="",
            help="Only this instance.",
            shell_complete=complete_instances,
        ),
        click.option("--model", default="", help="Only this model.", shell_complete=complete_models),
        click.option("--active", is_flag=True, help="Only those that have not ended."),
        click.option(
            "--state",
            "states",
            multiple=True,
            type=click.Choice(_STATES, case_sensitive=False),
            help="Only these; repeatable.",
        ),
    ):
        decorated = option(decorated)
    result: F = decorated
    return result


@click.group("requests", cls=DefaultCommandGroup)
def requests() -> None:
    """List and watch requests, or look at one. Without a command: list."""


@requests.command("list")
@_filter_options
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Most to list, the newest ones; 0: all.",
)
@list_options
@server_options
def list_(
    connection: ServerOptions,
    output: str,
    headers: bool,
    sort_by: str,
    reverse: bool,
    limit: int,
    **filters: Any,  # noqa: ANN401 - see make_filter
) -> None:
    """List requests, newest first.

    Options with a * are looked for here, not by the server: where few of many
    requests match, all of them are fetched to find those.
    """
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk
    from sagecp.cli.listing import check_sort_by
    from sagecp.cli.request_fields import REQUEST_FIELDS

    check_sort_by(REQUEST_FIELDS, sort_by)
    only = requests_view.make_filter(**filters)
    messages, more = talk(connection, lambda client: requests_view.fetch(client, only, limit))
    requests_view.show(messages, output, headers=headers, sort_by=sort_by, reverse=reverse, more=more)


@requests.command()
@click.argument("request_id", shell_complete=complete_requests)
@one_format_option
@server_options
def get(connection: ServerOptions, output: str, request_id: str) -> None:
    """Show one request: its life so far, and why it ended."""
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk

    message = talk(connection, lambda client: requests_view.fetch_one(client, request_id))
    requests_view.show_one(message, output)


@requests.command()
@click.argument("request_id", required=False, default="", shell_complete=complete_requests)
@_filter_options
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1000),
    default=100,
    show_default=True,
    help="Look at the newest ones, so many at a time.",
)
@click.option("--figures", is_flag=True, help="Also tell when the tokens of a request grow in number.")
@interval_option
@headers_option
@list_format_option
@server_options
def watch(
    connection: ServerOptions,
    output: str,
    headers: bool,
    interval_s: float,
    figures: bool,
    limit: int,
    request_id: str,
    **filters: Any,  # noqa: ANN401 - see make_filter
) -> None:
    """List requests, and then each that is new or changes its state, until Ctrl-C.

    With the id of one: until that has ended. A request that begins and ends
    between two looks is told once. Options with a * are looked for here, among
    the newest.
    """
    from sagecp.cli import requests_view, requests_watch
    from sagecp.cli.connect import talk
    from sagecp.cli.watch import watch as follow

    only = requests_view.make_filter(**filters)
    if request_id and only.is_set:
        raise click.UsageError("a request is named, so there is nothing to filter; leave one out")
    source = requests_watch.source(only, request_id, limit, figures=figures)
    show = requests_watch.printer(output, headers=headers)
    talk(connection, lambda client: follow(client, source, interval_s, show))


@click.command("cancel")
@click.argument(
    "request_ids", nargs=-1, required=True, metavar="REQUEST_ID...", shell_complete=complete_requests
)
@click.option("--cause", default="", help="Why, for the record.")
@one_format_option
@server_options
def cancel(connection: ServerOptions, output: str, request_ids: tuple[str, ...], cause: str) -> None:
    """Stop requests, and the engines' work for them."""
    from sagecp.cli import requests_view
    from sagecp.cli.connect import talk

    messages = talk(connection, lambda client: requests_view.cancel(client, request_ids, cause))
    requests_view.show_cancelled(messages, output)
