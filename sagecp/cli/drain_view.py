"""What `sagecp drain` asks for, how it waits, and what it prints."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.json_output import print_message
from sagecp.cli.options import ServerOptions
from sagecp.client import ConflictError, Instance, NotFoundError, SageClient, UnavailableError, convert
from sagecp.core.errors import ErrorReason
from sagecp.core.types import InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2

_POLL_S = 0.25
# A control plane that restarts is waited for; one that stays away is not.
_LONGEST_SILENCE_S = 60.0


def run(
    connection: ServerOptions,
    query: fleet_service_pb2.DrainInstanceRequest,
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Order a drain or take it back, wait where that was asked for, and print how the instance is.

    Raises:
        CliError: It was refused, the time passed, or it will never be drained.
    """

    async def conversation(client: SageClient) -> instance_pb2.Instance:
        message = await _order(client, query)
        return await _wait(client, message, connection.timeout_s) if wait else message

    message = talk(connection, conversation)
    if as_json:
        print_message(message)
    else:
        instance = convert.instance(message)
        click.echo(_undone_text(instance) if query.undo else _outcome_text(instance))


def drain_text(instance: Instance) -> str:
    """Return how far the drain of an instance is, in a line; ``""``: it has none."""
    drain = instance.drain
    if drain is None:
        return ""
    parts = [f"for {_whole(time.time() - drain.begin_time_s)}"]
    if instance.in_flight_request_count and drain.grace_end_time_s is not None:
        parts.append(_grace_text(drain.grace_end_time_s))
    if drain.moved_request_count:
        parts.append(f"{render.plural(drain.moved_request_count, 'request')} moved")
    if drain.forced:
        parts.append("forced")
    if drain.cause and drain.cause not in instance.state_reason:
        parts.append(drain.cause)
    return ", ".join(parts)


# -- asking and waiting -----------------------------------------------------------------------------


async def _order(client: SageClient, query: fleet_service_pb2.DrainInstanceRequest) -> instance_pb2.Instance:
    try:
        return (await client.connection.unary(client.connection.fleet.DrainInstance, query)).instance
    except ConflictError as error:
        if error.reason is not ErrorReason.DRAIN_REFUSED:
            raise
        raise CliError(
            error.message,
            hint=f"sagecp drain {query.instance_id} --force drains it all the same; "
            "sagecp instances shows the rest of the fleet",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ) from error


async def _wait(
    client: SageClient, message: instance_pb2.Instance, timeout_s: float | None
) -> instance_pb2.Instance:
    progress = _Progress(message)
    instance_id = message.spec.instance_id
    try:
        async with asyncio.timeout(timeout_s):
            await _follow(client, progress)
    except TimeoutError:
        left = convert.instance(progress.message)
        raise CliError(
            f"{instance_id} is {left.state.name} after {render.duration(timeout_s)}, with "
            f"{render.plural(left.in_flight_request_count, 'request')} in flight; the drain goes on",
            hint=f"sagecp drain {instance_id} --now --wait moves them, --undo takes the drain back",
            exit_code=ExitCode.DEADLINE,
        ) from None
    except asyncio.CancelledError:
        progress.end()
        click.echo(
            f"the drain goes on: sagecp drain {instance_id} --wait, or --undo to take it back", err=True
        )
        raise
    finally:
        progress.end()
    return progress.message


async def _follow(client: SageClient, progress: _Progress) -> None:
    """Look at an instance until it is DRAINED."""
    instance_id = progress.message.spec.instance_id
    query = fleet_service_pb2.GetInstanceRequest(instance_id=instance_id)
    answered_s = time.monotonic()
    while progress.message.state != instance_pb2.INSTANCE_STATE_DRAINED:
        await asyncio.sleep(_POLL_S)
        try:
            response = await client.connection.unary(client.connection.fleet.GetInstance, query)
        except UnavailableError:
            if time.monotonic() - answered_s > _LONGEST_SILENCE_S:
                raise
            progress.note_silence()
            continue
        except NotFoundError as error:
            raise CliError(
                f"{instance_id} left the fleet before it was drained",
                hint="requests that ran there went on, or were tried elsewhere: sagecp requests "
                f"--instance {instance_id}",
                exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
            ) from error
        answered_s = time.monotonic()
        progress.show(response.instance)
        if not response.instance.HasField("drain"):
            raise CliError(
                f"{instance_id} is not drained any more: somebody took the drain back",
                exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
            )


class _Progress:
    """Says on standard error how far a drain is: a line that changes on a terminal, else a line per change.

    Attributes:
        message: The instance as it was last seen.
    """

    def __init__(self, message: instance_pb2.Instance) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._shown: tuple[object, ...] = ()
        self._is_open = False
        self.message = message
        self.show(message)

    def show(self, message: instance_pb2.Instance) -> None:
        """Say how the instance is now."""
        self.message = message
        instance = convert.instance(message)
        drain = instance.drain
        moved_count = drain.moved_request_count if drain is not None else 0
        news = (instance.state, instance.in_flight_request_count, moved_count)
        if self._on_terminal:
            self._overwrite(_progress_text(instance, time.time()))
        elif news != self._shown and instance.state is not InstanceState.DRAINED:
            click.echo(_progress_text(instance), err=True)
        self._shown = news

    def note_silence(self) -> None:
        """Say that the control plane does not answer."""
        text = f"{self.message.spec.instance_id}: the control plane does not answer; trying again"
        if self._on_terminal:
            self._overwrite(text)
        elif self._shown:
            click.echo(text, err=True)
        self._shown = ()

    def end(self) -> None:
        """Clear the line that changes."""
        if self._is_open:
            self._overwrite("")
            self._is_open = False

    def _overwrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        # Not by click, which takes what clears the rest of a line for a colour.
        sys.stderr.write(f"\r{render.harmless(text)[: width - 1]}\x1b[K")
        sys.stderr.flush()
        self._is_open = True


# -- texts ------------------------------------------------------------------------------------------


def _progress_text(instance: Instance, now: float | None = None) -> str:
    """Return the state and what is left. With ``now``, in Unix seconds, also for how long it takes."""
    count = instance.in_flight_request_count
    text = f"{instance.instance_id} {instance.state.name}: {render.plural(count, 'request')} in flight"
    drain = instance.drain
    if drain is None:
        return text
    if drain.moved_request_count:
        text += f", {drain.moved_request_count} moved"
    grace_end_s = drain.grace_end_time_s
    if now is not None:
        text += f", for {_whole(now - drain.begin_time_s)}"
        if grace_end_s is not None and count:
            text += f"; {_grace_text(grace_end_s)}"
    return text


def _outcome_text(instance: Instance) -> str:
    drain, count = instance.drain, instance.in_flight_request_count
    head = f"{instance.instance_id} {render.state_text(instance.state.name)}"
    moved_count = drain.moved_request_count if drain is not None else 0
    moved = f"; {render.plural(moved_count, 'request')} moved" if moved_count else ""
    if instance.state is InstanceState.DRAINED:
        return f"{head}: nothing is in flight{moved}"
    if instance.state is InstanceState.LOST:
        return f"{head}: it gets no work, and drains when its agent is back; {count} in flight{moved}"
    if drain is not None and drain.grace_end_time_s is not None:
        rest_s = drain.grace_end_time_s - time.time()
        when = "at once" if rest_s <= 0 else f"in {_whole(rest_s)}"
        rest = f"finish there or are moved {when}" if count != 1 else f"finishes there or is moved {when}"
    else:
        rest = "finish there" if count != 1 else "finishes there"
    return f"{head}: {render.plural(count, 'request')} in flight {rest}{moved}"


def _undone_text(instance: Instance) -> str:
    state = render.state_text(instance.state.name)
    if instance.state is InstanceState.READY:
        return f"{instance.instance_id} {state}: takes work"
    return f"{instance.instance_id} {state}: no drain holds it back; {instance.state_reason}"


def _grace_text(grace_end_s: float) -> str:
    rest_s = grace_end_s - time.time()
    return f"moved in {_whole(rest_s)}" if rest_s > 0 else "the grace time is over"


def _whole(seconds: float) -> str:
    """Return a time that passes in front of somebody's eyes."""
    return f"{max(0.0, seconds):.0f} s" if seconds < 99.5 else render.duration(seconds)
