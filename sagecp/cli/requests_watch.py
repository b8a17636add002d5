"""What `sagecp requests watch` watches and prints."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from sagecp.cli.listing import ChangeList, print_names, shown_fields
from sagecp.cli.output import is_for_programs, print_entry
from sagecp.cli.request_fields import REQUEST_FIELDS
from sagecp.cli.requests_view import RequestFilter, fetch, fetch_one
from sagecp.cli.watch import Source
from sagecp.client import SageClient, convert
from sagecp.v1 import request_pb2


def source(only: RequestFilter, request_id: str, limit: int, *, figures: bool) -> Source[request_pb2.Request]:
    """Return what is watched: one request, or the newest that match.

    Args:
        only: Which ones.
        request_id: Or this one.
        limit: How many of the newest are looked at.
        figures: Whether more tokens are told as well.
    """

    async def one(client: SageClient) -> list[request_pb2.Request]:
        return [await fetch_one(client, request_id)]

    async def several(client: SageClient) -> list[request_pb2.Request]:
        # Told in the order in which they came.
        return (await fetch(client, only, limit))[0][::-1]

    def news(message: request_pb2.Request) -> Hashable:
        tokens = message.usage.completion_token_count if figures else 0
        return message.state, message.instance_id, len(message.attempts), tokens

    return Source(
        fetch=one if request_id else several,
        fetch_one=fetch_one,
        identify=lambda message: message.request_id,
        news=news,
        is_over=lambda message: convert.request_state(message.state).is_terminal,
        gone=_gone,
        ends=bool(request_id),
    )


def _gone(message: request_pb2.Request) -> request_pb2.Request:
    left = request_pb2.Request()
    left.CopyFrom(message)
    left.state = request_pb2.REQUEST_STATE_UNSPECIFIED
    return left


def printer(output: str, *, headers: bool) -> Callable[[Sequence[request_pb2.Request]], None]:
    """Return what prints requests that have changed."""
    fields = [field for field in shown_fields(REQUEST_FIELDS, output) if not field.ages]
    table = ChangeList(fields, headers=headers)

    def show(messages: Sequence[request_pb2.Request]) -> None:
        if is_for_programs(output):
            for message in messages:
                print_entry(message, output)
        elif output == "name":
            print_names([message.request_id for message in messages])
        else:
            table.print(
                [
                    (convert.request_status(message), message.state == request_pb2.REQUEST_STATE_UNSPECIFIED)
                    for message in messages
                ]
            )

    return show
