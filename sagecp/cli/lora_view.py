"""What `sagecp lora` asks for, how it waits, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.instance_wait import Goal, telling_trouble, wait_for
from sagecp.cli.instances_view import fetch_one
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import Instance, SageClient, convert
from sagecp.v1 import fleet_service_pb2, instance_pb2


def show(connection: ServerOptions, instance_id: str, output: str) -> None:
    """Print the adapters of an instance."""
    _print(talk(connection, lambda client: fetch_one(client, instance_id)), output)


def order(
    connection: ServerOptions,
    instance_id: str,
    adapters: Sequence[tuple[str, str]] | None,
    *,
    wait: bool,
    output: str,
) -> None:
    """Say what should be loaded, wait where that was asked for, and print how it is.

    Args:
        connection: Where and how.
        instance_id: Of which instance.
        adapters: Names and paths of all that should be; ``None``: take the order back.
        wait: Whether to wait until it is so.
        output: Format.

    Raises:
        CliError: It was refused, the time passed, or the order was changed.
    """
    query = fleet_service_pb2.SetLoraAdaptersRequest(instance_id=instance_id)
    if adapters is not None:
        query.adapters.SetInParent()
        for name, path in adapters:
            query.adapters.adapters.add(name=name, path=path)

    async def conversation(client: SageClient) -> instance_pb2.Instance:
        before = (await client.get_status()).last_event_sequence if wait else 0
        message = (await client.connection.unary(client.connection.fleet.SetLoraAdapters, query)).instance
        if not wait:
            return message
        async with telling_trouble(client, instance_id, before):
            return await wait_for(client, message, _goal(query), connection.timeout_s)

    _print(talk(connection, conversation), output)


def _goal(query: fleet_service_pb2.SetLoraAdaptersRequest) -> Goal:
    instance_id = query.instance_id
    names = {adapter.name for adapter in query.adapters.adapters}
    return Goal(
        is_reached=lambda found: names == set(found.engine.loaded_lora_adapters),
        is_off=lambda found: names != {each.name for each in found.desired_lora_adapters.adapters},
        text=_progress_text,
        off=CliError(
            f"somebody ordered other adapters for {instance_id}", exit_code=ExitCode.NOT_FOUND_OR_CONFLICT
        ),
        gone=CliError(
            f"{instance_id} left the fleet before it had the adapters",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ),
        late=lambda left: CliError(
            f"{_progress_text(left)}: not there in time; the order stays",
            hint=f"sagecp events --instance {instance_id} says what went wrong, if anything did",
            exit_code=ExitCode.DEADLINE,
        ),
        on_interrupt=f"the order stays: sagecp lora {instance_id} shows how far it is",
    )


def _progress_text(instance: Instance, now: float | None = None) -> str:
    loaded = set(instance.engine.loaded_lora_adapters) if instance.engine is not None else set()
    wanted = {adapter.name for adapter in instance.desired_lora_adapters or ()}
    parts = [
        f"{text} {', '.join(sorted(names))}"
        for text, names in (("to be loaded:", wanted - loaded), ("to be unloaded:", loaded - wanted))
        if names
    ]
    return f"{instance.instance_id} " + ("; ".join(parts) or "has the adapters")


def _print(message: instance_pb2.Instance, output: str) -> None:
    if is_for_programs(output):
        print_object(message, output)
        return
    instance = convert.instance(message)
    engine, wanted = instance.engine, instance.desired_lora_adapters
    loaded = set(engine.loaded_lora_adapters) if engine is not None else set()
    running = set(engine.running_lora_adapters) if engine is not None else set()
    paths = {adapter.name: adapter.path for adapter in wanted or ()}
    if not (loaded or paths):
        ordered = ", and should have none" if wanted is not None else ""
        click.echo(f"{instance.instance_id} has no LoRA adapters{ordered}")
        return
    render.print_table(
        (
            render.Column("ADAPTER", flexible=True),
            render.Column("LOADED"),
            render.Column("IN USE"),
            render.Column("ORDERED"),
            render.Column("PATH", flexible=True),
        ),
        [
            (
                name,
                "yes" if name in loaded else "not yet",
                "yes" if name in running else "no",
                "-" if wanted is None else "yes" if name in paths else "to be unloaded",
                paths.get(name, render.NONE),
            )
            for name in sorted(loaded | paths.keys())
        ],
    )
