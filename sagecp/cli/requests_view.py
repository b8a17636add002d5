"""What the commands about requests ask for and print."""

from __future__ import annotations

from collections.abc import Mapping

import click

from sagecp.cli import render
from sagecp.cli.json_output import print_message
from sagecp.client import SageClient, convert
from sagecp.core.types import RequestStatus
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import request_pb2

_PAGE_SIZE = 1000
_COLUMNS = (
    render.Column("REQUEST"),
    render.Column("STATE", state=True),
    render.Column("MODEL", flexible=True, optional=True),
    render.Column("PRIORITY", optional=True),
    render.Column("AGE", right=True),
    render.Column("TTFT", right=True),
    render.Column("TOTAL", right=True),
    render.Column("IN", right=True),
    render.Column("OUT", right=True),
    render.Column("INSTANCE", flexible=True),
)


async def fetch(
    client: SageClient, states: tuple[str, ...], limit: int, filters: Mapping[str, str]
) -> tuple[list[request_pb2.Request], bool]:
    """Return requests, newest first, and whether there are more."""
    query = pb.ListRequestsRequest(
        states=[request_pb2.RequestState.Value(f"REQUEST_STATE_{state.upper()}") for state in states],
    )
    for name, value in filters.items():
        setattr(query, name, value)
    messages: list[request_pb2.Request] = []
    while True:
        query.page_size = min(_PAGE_SIZE, limit - len(messages)) if limit else _PAGE_SIZE
        page = await client.connection.unary(client.connection.inference.ListRequests, query)
        messages += page.requests
        if not page.next_page_token or (limit and len(messages) >= limit):
            return messages, bool(page.next_page_token)
        query.page_token = page.next_page_token


async def fetch_one(client: SageClient, request_id: str) -> request_pb2.Request:
    """Return one request."""
    query = pb.GetRequestRequest(request_id=request_id)
    response = await client.connection.unary(
        client.connection.inference.GetRequest, query, request_id=request_id
    )
    return response.request


async def cancel(
    client: SageClient, request_ids: tuple[str, ...], cause: str
) -> list[pb.CancelRequestResponse]:
    """Stop requests, one after the other."""
    return [
        await client.connection.unary(
            client.connection.inference.CancelRequest,
            pb.CancelRequestRequest(request_id=request_id, cause=cause),
            request_id=request_id,
        )
        for request_id in request_ids
    ]


def show(messages: list[request_pb2.Request], *, more: bool, as_json: bool) -> None:
    """Print requests."""
    if as_json:
        for message in messages:
            print_message(message)
        return
    if not messages:
        click.echo("no request matches", err=True)
        return
    render.print_table(_COLUMNS, [_row(convert.request_status(message)) for message in messages])
    if more:
        click.echo(f"{len(messages)} shown; there are more: --limit 0 lists all", err=True)


def _row(status: RequestStatus) -> list[str]:
    return [
        status.request_id,
        status.state.name,
        status.model_name or render.NONE,
        status.priority.name,
        render.age(status.create_time_s),
        render.span(status.create_time_s, status.first_token_time_s),
        render.span(status.create_time_s, status.end_time_s),
        render.compact(status.usage.prompt_token_count),
        render.compact(status.usage.completion_token_count),
        status.instance_id or render.NONE,
    ]


def show_one(message: request_pb2.Request, *, as_json: bool) -> None:
    """Print one request."""
    if as_json:
        print_message(message)
        return
    status = convert.request_status(message)
    created = status.create_time_s
    place = status.queue_position
    render.print_pairs(
        [
            ("request", status.request_id),
            ("state", render.state_text(status.state.name)),
            ("why", status.failure.message if status.failure else ""),
            ("reason", status.failure.reason.name if status.failure else ""),
            ("ahead in queue", "" if place is None else render.count(place)),
            ("model", status.model_name),
            ("priority", status.priority.name),
            ("user", status.user_id),
            ("session", status.session_id),
            ("instance", status.instance_id),
            ("tokens", usage_text(status)),
            ("finish reason", status.finish_reason),
            ("created", f"{render.clock_time(created)}, {render.age(created)} ago"),
            ("dispatched", _after(created, status.dispatch_time_s)),
            ("first token", _after(created, status.first_token_time_s)),
            ("ended", _after(created, status.end_time_s)),
            ("deadline", _after(created, status.deadline_time_s)),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(status.labels.items()))),
            ("attempts", _attempts(status)),
        ]
    )


def usage_text(status: RequestStatus) -> str:
    """Return what a request took and gave."""
    used = status.usage
    cached = used.cached_prompt_token_count
    hit = f" ({render.count(cached)} from the prefix cache)" if cached else ""
    return f"{render.count(used.prompt_token_count)} in{hit}, {render.count(used.completion_token_count)} out"


def _after(start_s: float, moment_s: float | None) -> str:
    return "" if moment_s is None else f"after {render.duration(max(0.0, moment_s - start_s))}"


def _attempts(status: RequestStatus) -> str:
    if len(status.attempts) < 2 and not any(attempt.failure for attempt in status.attempts):
        return ""
    return "\n".join(
        f"{attempt.epoch} on {attempt.instance_id}: "
        + (attempt.failure.message if attempt.failure else "ended well" if attempt.end_time_s else "runs")
        for attempt in status.attempts
    )


def show_cancelled(messages: list[pb.CancelRequestResponse], *, as_json: bool) -> None:
    """Print what became of requests that were to be stopped."""
    for message in messages:
        if as_json:
            print_message(message)
            continue
        status = convert.request_status(message.request)
        what = (
            "cancelled" if message.cancelled else f"had ended before: {render.state_text(status.state.name)}"
        )
        click.echo(f"{status.request_id} {what}")
