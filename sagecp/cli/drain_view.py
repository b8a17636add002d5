"""What `sagecp drain` asks for, how it waits, and what it prints."""

from __future__ import annotations

import time

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.instance_wait import Goal, wait_for
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import ConflictError, Instance, SageClient, convert
from sagecp.core.errors import ErrorReason
from sagecp.core.types import InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2


def run(
    connection: ServerOptions,
    query: fleet_service_pb2.DrainInstanceRequest,
    *,
    wait: bool,
    output: str,
) -> None:
    """Order a drain or take it back, wait where that was asked for, and print how the instance is.

    Raises:
        CliError: It was refused, the time passed, or it will never be drained.
    """

    async def conversation(client: SageClient) -> instance_pb2.Instance:
        message = await _order(client, query)
        return await _wait(client, message, connection.timeout_s) if wait else message

    message = talk(connection, conversation)
    if is_for_programs(output):
        print_object(message, output)
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
        raise with_force_hint(error, f"sagecp drain {query.instance_id}", "drains") from error


def with_force_hint(error: ConflictError, command: str, does: str) -> Exception:
    """Return a refusal with the way past it, where the rest of the fleet was the reason.

    Args:
        error: The refusal.
        command: What was refused.
        does: What the command does all the same, with ``--force``.
    """
    if error.reason is not ErrorReason.DRAIN_REFUSED:
        return error
    return CliError(
        error.message,
        hint=f"{command} --force {does} it all the same; sagecp instances shows the rest of the fleet",
        exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
    )


async def _wait(
    client: SageClient, message: instance_pb2.Instance, timeout_s: float | None
) -> instance_pb2.Instance:
    instance_id = message.spec.instance_id

    def late(left: Instance) -> CliError:
        return CliError(
            f"{instance_id} is {left.state.name} after {render.duration(timeout_s)}, with "
            f"{render.plural(left.in_flight_request_count, 'request')} in flight; the drain goes on",
            hint=f"sagecp drain {instance_id} --now --wait moves them, --undo takes the drain back",
            exit_code=ExitCode.DEADLINE,
        )

    goal = Goal(
        is_reached=lambda found: found.state == instance_pb2.INSTANCE_STATE_DRAINED,
        is_off=lambda found: not found.HasField("drain"),
        text=_progress_text,
        off=CliError(
            f"{instance_id} is not drained any more: somebody took the drain back",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ),
        gone=CliError(
            f"{instance_id} left the fleet before it was drained",
            hint="requests that ran there went on, or were tried elsewhere: sagecp requests "
            f"--instance {instance_id}",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ),
        late=late,
        on_interrupt=f"the drain goes on: sagecp drain {instance_id} --wait, or --undo to take it back",
    )
    return await wait_for(client, message, goal, timeout_s)


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
