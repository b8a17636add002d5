"""Follows a request and prints what it produces."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.json_output import print_message
from sagecp.cli.options import ServerOptions
from sagecp.cli.requests_view import usage_text
from sagecp.client import (
    NO_RETRY,
    ClientError,
    RequestFailedError,
    RetryPolicy,
    SageClient,
    StreamEnd,
    convert,
)
from sagecp.client.streaming import EventStream, StreamEvent, stream_end
from sagecp.core.types import RequestStatus
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import request_pb2

_CANCEL_TIMEOUT_S = 2.0
# What a model wrote must not steer the terminal: control characters other than tab and newline go.
_HARMLESS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Output:
    """Prints events: text as it arrives, or JSON, and at the end what it took.

    Args:
        as_json: Every event as one line of JSON.
        stats: Say at the end what it took.
        choice_count: More than one: collected, and printed one after the other.
    """

    def __init__(self, *, as_json: bool, stats: bool, choice_count: int) -> None:
        self._as_json = as_json
        self._stats = stats
        self._live = choice_count == 1
        self._on_terminal = sys.stdout.isatty()
        self._choices: dict[int, list[str]] = {}
        self._begin_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._begin_s
        self._token_count = 0
        self._ends_with_newline = True

    def take(self, event: StreamEvent) -> None:
        """Print an event, or remember it."""
        kind = event.WhichOneof("event")
        if kind == "chunk":
            self._last_s = time.monotonic()
            if self._first_s is None:
                self._first_s = self._last_s
            self._token_count += event.chunk.token_count
        if self._as_json:
            print_message(event)
            sys.stdout.flush()
        elif kind == "chunk":
            self._take_text(event.chunk)
        elif kind == "notice":
            self._take_notice(event.notice)

    def _take_text(self, chunk: pb.TokenChunk) -> None:
        text = chunk.text.translate(_HARMLESS) if self._on_terminal else chunk.text
        if self._live and chunk.choice_index == 0:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._ends_with_newline = text.endswith("\n") if text else self._ends_with_newline
        else:
            self._choices.setdefault(chunk.choice_index, []).append(text)

    def _take_notice(self, notice: pb.StreamNotice) -> None:
        if notice.HasField("failover"):
            click.echo(f"[attempt {notice.failover.epoch}: {notice.failover.failure.message}]", err=True)
        elif notice.HasField("draining"):
            click.echo("[the control plane is shutting down; this stream goes on]", err=True)

    def finish_text(self) -> None:
        """End the last line, and print the choices that were collected."""
        if self._as_json:
            return
        if self._live and self._first_s is not None and not self._ends_with_newline:
            click.echo()
        for index, pieces in sorted(self._choices.items()):
            click.secho(f"--- choice {index} ---", bold=True)
            click.echo("".join(pieces))
        self._choices.clear()

    def finish(self, end: StreamEnd) -> None:
        """Say what it took, where that was asked for."""
        self.finish_text()
        if not self._stats:
            return
        count = self._token_count
        line = f"{render.plural(count, 'token')} in {render.duration(self._last_s - self._begin_s)}"
        if self._first_s is not None:
            line += f": first after {render.duration(self._first_s - self._begin_s)}"
            rest_s = self._last_s - self._first_s
            if count > 1 and rest_s > 0:
                each_s = rest_s / (count - 1)
                line += f", then {render.duration(each_s)} each ({1 / each_s:.0f} tokens/s)"
        click.echo(line, err=True)
        click.echo(
            f"{usage_text(end.status)}; finish reason {end.finish_reason}; on {end.instance_id}; "
            f"request {end.request_id}",
            err=True,
        )


async def _follow(stream: EventStream, output: Output | None) -> StreamEnd:
    """Print a stream to its end; a request that did not succeed raises."""
    terminal: pb.StreamTerminal | None = None
    async with contextlib.aclosing(stream.events()) as events:
        async for event in events:
            if output is not None:
                output.take(event)
            if event.WhichOneof("event") == "terminal":
                terminal = event.terminal
    if terminal is None:
        raise RuntimeError("a stream ended without its terminal message and without an error")
    return stream_end(terminal, stream.request_id)


def follow_generate(
    connection: ServerOptions, spec: request_pb2.RequestSpec, output: Output, *, detach: bool
) -> int:
    """Start a request and print its output."""

    async def conversation(client: SageClient) -> None:
        stream = EventStream(
            client.connection,
            spec.request_id,
            spec=spec,
            survive=detach,
            timeout_s=connection.timeout_s,
        )
        try:
            output.finish(await _follow(stream, output))
        except asyncio.CancelledError:
            output.finish_text()
            if detach:
                _say_goes_on(stream)
            else:
                await _cancel(client, stream.request_id)
            raise
        except ClientError:
            output.finish_text()
            raise

    talk(connection, conversation, retry=RetryPolicy() if detach else NO_RETRY)
    return ExitCode.OK


def follow_stream(
    connection: ServerOptions,
    request_id: str,
    output: Output,
    *,
    from_token_index: int,
    cancel_on_exit: bool,
) -> int:
    """Print the output of a request that exists."""

    async def conversation(client: SageClient) -> None:
        stream = EventStream(
            client.connection,
            request_id,
            from_token_index=from_token_index,
            cancel_on_disconnect=cancel_on_exit,
            timeout_s=connection.timeout_s,
        )
        try:
            output.finish(await _follow(stream, output))
        except asyncio.CancelledError:
            output.finish_text()
            if cancel_on_exit:
                await _cancel(client, request_id)
            else:
                _say_goes_on(stream)
            raise
        except ClientError:
            output.finish_text()
            raise

    talk(connection, conversation, retry=RetryPolicy())
    return ExitCode.OK


def hand_in(connection: ServerOptions, spec: request_pb2.RequestSpec, *, as_json: bool, wait: bool) -> int:
    """Submit a request, print its id, and wait for its end where that was asked for."""

    async def conversation(client: SageClient) -> None:
        response = await client.connection.unary(
            client.connection.inference.Submit,
            pb.SubmitRequest(spec=spec),
            request_id=spec.request_id,
            admission=True,
        )
        if as_json:
            if not wait:
                print_message(response)
        else:
            click.echo(response.request.request_id)
            sys.stdout.flush()
        if not response.created:
            click.echo("this request was handed in before", err=True)
        if not wait:
            return
        stream = EventStream(client.connection, spec.request_id, timeout_s=connection.timeout_s)
        try:
            status = (await _follow(stream, None)).status
        except asyncio.CancelledError:
            _say_goes_on(stream)
            raise
        except RequestFailedError as error:
            if as_json:
                await _print_request(client, error.request_id)
            raise
        if as_json:
            await _print_request(client, status.request_id)
        else:
            click.echo(_summary(status), err=True)

    talk(connection, conversation, retry=RetryPolicy() if wait else NO_RETRY)
    return ExitCode.OK


async def _print_request(client: SageClient, request_id: str) -> None:
    message = await client.connection.unary(
        client.connection.inference.GetRequest,
        pb.GetRequestRequest(request_id=request_id),
        request_id=request_id,
    )
    print_message(message.request)


def _summary(status: RequestStatus) -> str:
    took = render.span(status.create_time_s, status.end_time_s)
    state = render.state_text(status.state.name)
    how = f"finish reason {status.finish_reason}; on {status.instance_id}"
    return f"{state} after {took}: {usage_text(status)}; {how}"


def _say_goes_on(stream: EventStream) -> None:
    request_id = stream.request_id
    where = f" --from {stream.next_token_index}" if stream.next_token_index else ""
    click.echo(
        f"\nthe request goes on: sagecp stream {request_id}{where}, or sagecp cancel {request_id}",
        err=True,
    )


async def _cancel(client: SageClient, request_id: str) -> None:
    """Cancel a request because the user interrupted; the server is told within a bounded time."""
    query = pb.CancelRequestRequest(request_id=request_id, cause="interrupted by the user")
    try:
        response = await client.connection.unary(
            client.connection.inference.CancelRequest,
            query,
            timeout_s=_CANCEL_TIMEOUT_S,
            request_id=request_id,
        )
    except ClientError as error:
        # Leaving the stream has cancelled it as well, unless the server was not reached at all.
        click.echo(f"\nthe request could not be cancelled: {error.message}", err=True)
        return
    state = convert.request_state(response.request.state).name
    click.echo(f"\nrequest {request_id} {render.state_text(state)}", err=True)
