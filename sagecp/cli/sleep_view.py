"""What `sagecp sleep` and `sagecp wake` ask for, how they wait, and what they print."""

from __future__ import annotations

import time

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.drain_view import with_force_hint
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.instance_wait import Goal, telling_trouble, wait_for
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import ConflictError, Instance, SageClient, convert
from sagecp.core.types import InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2


def run(
    connection: ServerOptions, query: fleet_service_pb2.SleepInstanceRequest, *, wait: bool, output: str
) -> None:
    """Order an engine to sleep or to wake up, wait where that was asked for, and print how it is.

    Raises:
        CliError: It was refused, the time passed, or it will never be so.
    """

    async def conversation(client: SageClient) -> instance_pb2.Instance:
        before = (await client.get_status()).last_event_sequence if wait else 0
        try:
            response = await client.connection.unary(client.connection.fleet.SleepInstance, query)
        except ConflictError as error:
            raise with_force_hint(error, f"sagecp sleep {query.instance_id}", "puts to sleep") from error
        message = response.instance
        if not wait:
            return message
        goal = _awake_goal(query.instance_id) if query.wake else _asleep_goal(query.instance_id)
        async with telling_trouble(client, query.instance_id, before):
            return await wait_for(client, message, goal, connection.timeout_s)

    message = talk(connection, conversation)
    if is_for_programs(output):
        print_object(message, output)
    else:
        instance = convert.instance(message)
        click.echo(render.harmless(_awake_text(instance) if query.wake else _asleep_text(instance)))


def _asleep_goal(instance_id: str) -> Goal:
    return Goal(
        is_reached=lambda found: found.HasField("sleep") and found.sleep.asleep,
        is_off=lambda found: not found.HasField("sleep"),
        text=_progress_text,
        off=CliError(
            f"{instance_id} is not to sleep any more: somebody took the order back",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ),
        gone=_gone(instance_id, "it slept"),
        late=lambda left: _late(left, "the order to sleep stays", f"sagecp wake {instance_id} takes it back"),
        on_interrupt=f"the order to sleep stays: sagecp sleep {instance_id} --wait, "
        f"or sagecp wake {instance_id} to take it back",
    )


def _awake_goal(instance_id: str) -> Goal:
    return Goal(
        is_reached=lambda found: found.state == instance_pb2.INSTANCE_STATE_READY,
        is_off=lambda found: found.HasField("sleep"),
        text=_progress_text,
        off=CliError(
            f"{instance_id} is to sleep again: somebody ordered it", exit_code=ExitCode.NOT_FOUND_OR_CONFLICT
        ),
        gone=_gone(instance_id, "it was awake"),
        late=lambda left: _late(
            left, "it goes on waking up", f"sagecp instances get {instance_id} says more"
        ),
        on_interrupt=f"it goes on waking up: sagecp wake {instance_id} --wait",
    )


def _gone(instance_id: str, before: str) -> CliError:
    return CliError(f"{instance_id} left the fleet before {before}", exit_code=ExitCode.NOT_FOUND_OR_CONFLICT)


def _late(left: Instance, rest: str, hint: str) -> CliError:
    return CliError(
        f"{_progress_text(left)}: not there in time; {rest}", hint=hint, exit_code=ExitCode.DEADLINE
    )


# -- texts ------------------------------------------------------------------------------------------


def _progress_text(instance: Instance, now: float | None = None) -> str:
    """Return how far it is. With ``now``, in Unix seconds, also for how long it takes."""
    text = f"{instance.instance_id} {instance.state.name}"
    if count := instance.in_flight_request_count:
        text += f", {render.plural(count, 'request')} in flight"
    if instance.sleep is None:
        return text if instance.state is InstanceState.READY else f"{text}: {instance.state_reason}"
    text += ", asleep" if instance.sleep.asleep else ", not yet asleep"
    return text if now is None else f"{text}, for {max(0.0, now - instance.sleep.begin_time_s):.0f} s"


def _asleep_text(instance: Instance) -> str:
    head = f"{instance.instance_id} {render.state_text(instance.state.name)}"
    order = instance.sleep
    if order is not None and order.asleep:
        return f"{head}: the engine sleeps, level {order.level}"
    count = instance.in_flight_request_count
    if not count:
        return f"{head}: the engine is told to sleep"
    drain = instance.drain
    moved = ""
    if drain is not None and drain.grace_end_time_s is not None:
        rest_s = drain.grace_end_time_s - time.time()
        moved = " or moved at once" if rest_s <= 0 else f" or moved in {rest_s:.0f} s"
    verb = "is" if count == 1 else "are"
    return f"{head}: sleeps once {render.plural(count, 'request')} in flight {verb} finished{moved}"


def _awake_text(instance: Instance) -> str:
    head = f"{instance.instance_id} {render.state_text(instance.state.name)}"
    if instance.state is InstanceState.READY:
        return f"{head}: takes work"
    return f"{head}: is told to wake up; {instance.state_reason}"
