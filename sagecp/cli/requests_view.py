"""What the commands about requests ask for and print."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click

from sagecp.cli import render
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.listing import print_list, print_names, sort
from sagecp.cli.output import is_for_programs, print_entry, print_object
from sagecp.cli.request_fields import REQUEST_FIELDS
from sagecp.client import SageClient, convert
from sagecp.core.types import RequestStatus
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import request_pb2
from sagecp.wire.times import time_s

_PAGE_SIZE = 1000
_ACTIVE = ("queued", "dispatched", "running")


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """Which requests are asked for. The server has no filter for those after ``session_id``.

    Attributes:
        states: Names of states, in any case; empty: all.
        priorities: Names of classes, in any case; empty: all.
        created_before_s: Unix seconds.
        created_after_s: Unix seconds.
    """

    states: Sequence[str] = ()
    model: str = ""
    instance_id: str = ""
    user_id: str = ""
    session_id: str = ""
    tenant_id: str = ""
    priorities: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    created_before_s: float | None = None
    created_after_s: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether some requests may be left out."""
        return self != RequestFilter()

    def query(self) -> pb.ListRequestsRequest:
        """Return what the server is asked for."""
        return pb.ListRequestsRequest(
            states=[
                request_pb2.RequestState.Value(f"REQUEST_STATE_{state.upper()}") for state in self.states
            ],
            model=self.model,
            instance_id=self.instance_id,
            user_id=self.user_id,
            session_id=self.session_id,
        )

    def admits(self, message: request_pb2.Request) -> bool:
        """Return whether a request that the server found is meant."""
        created_s = time_s(message.create_time)
        priority = request_pb2.RequestPriority.Name(message.priority).removeprefix("REQUEST_PRIORITY_")
        return (
            (not self.tenant_id or message.tenant_id == self.tenant_id)
            and (not self.priorities or priority in self.priorities)
            and all(message.labels.get(key) == value for key, value in self.labels.items())
            and (self.created_before_s is None or created_s <= self.created_before_s)
            and not self.is_too_old(message)
        )

    def is_too_old(self, message: request_pb2.Request) -> bool:
        """Return whether this request and all that are older were received too early."""
        return self.created_after_s is not None and time_s(message.create_time) < self.created_after_s


def make_filter(
    *,
    states: Sequence[str],
    active: bool,
    model: str,
    instance_id: str,
    user_id: str,
    session_id: str,
    tenant_id: str,
    priorities: Sequence[str],
    labels: Sequence[tuple[str, str]],
    older_than_s: float | None,
    newer_than_s: float | None,
) -> RequestFilter:
    """Return the filter of a command line.

    Raises:
        CliError: The options contradict each other.
    """
    if active and states:
        raise CliError(
            "--active and --state contradict each other",
            hint="--active is --state " + " --state ".join(_ACTIVE),
            exit_code=ExitCode.INVALID,
        )
    now_s = time.time()
    return RequestFilter(
        states=_ACTIVE if active else states,
        model=model,
        instance_id=instance_id,
        user_id=user_id,
        session_id=session_id,
        tenant_id=tenant_id,
        priorities=tuple(name.upper() for name in priorities),
        labels=dict(labels),
        created_before_s=None if older_than_s is None else now_s - older_than_s,
        created_after_s=None if newer_than_s is None else now_s - newer_than_s,
    )


async def fetch(
    client: SageClient, only: RequestFilter, limit: int
) -> tuple[list[request_pb2.Request], bool]:
    """Return requests, newest first, and whether there may be more.

    Args:
        client: Who is asked.
        only: Which ones.
        limit: Most to return; 0: all.
    """
    query = only.query()
    query.page_size = min(_PAGE_SIZE, limit) if limit else _PAGE_SIZE
    messages: list[request_pb2.Request] = []
    while True:
        page = await client.connection.unary(client.connection.inference.ListRequests, query)
        for index, message in enumerate(page.requests):
            if only.is_too_old(message):
                return messages, False
            if only.admits(message):
                messages.append(message)
            if limit and len(messages) == limit:
                return messages, bool(page.next_page_token) or index + 1 < len(page.requests)
        if not page.next_page_token:
            return messages, False
        query.page_token = page.next_page_token
        # What is filtered here may match seldom.
        query.page_size = _PAGE_SIZE


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


def show(
    messages: Sequence[request_pb2.Request],
    output: str,
    *,
    headers: bool,
    sort_by: str,
    reverse: bool,
    more: bool,
) -> None:
    """Print requests."""
    by_id = {message.request_id: message for message in messages}
    statuses = sort(
        [convert.request_status(message) for message in messages], REQUEST_FIELDS, sort_by, reverse=reverse
    )
    if is_for_programs(output):
        for status in statuses:
            print_entry(by_id[status.request_id], output)
        return
    if output == "name":
        print_names([status.request_id for status in statuses])
        return
    if not messages:
        click.echo("no request matches", err=True)
        return
    print_list(statuses, REQUEST_FIELDS, output, headers=headers)
    if more:
        click.echo(f"{len(messages)} shown; there are more: --limit 0 lists all", err=True)


def show_one(message: request_pb2.Request, output: str) -> None:
    """Print one request."""
    if is_for_programs(output):
        print_object(message, output)
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
            ("cost", cost_text(status)),
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


def cost_text(status: RequestStatus) -> str:
    """Return what a request cost so far, and what was predicted; ``""``: no price is known."""
    cost = status.cost
    if cost is None:
        return ""
    parts = []
    if cost.actual_usd is not None:
        parts.append(f"{render.usd(cost.actual_usd)}{'' if status.state.is_terminal else ' so far'}")
    if cost.predicted_p50_usd:
        low, high = render.usd(cost.predicted_p10_usd), render.usd(cost.predicted_p90_usd)
        parts.append(f"predicted {render.usd(cost.predicted_p50_usd)} ({low} to {high})")
    return ", ".join(parts)


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


def show_cancelled(messages: list[pb.CancelRequestResponse], output: str) -> None:
    """Print what became of requests that were to be stopped."""
    for message in messages:
        if is_for_programs(output):
            print_entry(message, output)
            continue
        status = convert.request_status(message.request)
        what = (
            "cancelled" if message.cancelled else f"had ended before: {render.state_text(status.state.name)}"
        )
        click.echo(f"{status.request_id} {what}")
