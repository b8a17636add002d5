"""What the commands about the fleet ask for and print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import click

from sagecp.cli import render
from sagecp.cli.drain_view import drain_text
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.instance_fields import INSTANCE_FIELDS
from sagecp.cli.listing import print_list, print_names, sort
from sagecp.cli.output import is_for_programs, print_entry, print_object
from sagecp.client import SageClient, convert
from sagecp.client.values import Instance
from sagecp.core.types import ExecutionInstance, InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2

_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class InstanceFilter:
    """Which instances are asked for.

    Attributes:
        states: Names of states, in any case; empty: all.
        faulty: Only those with a faulty GPU. The server has no such filter; it is applied here.
    """

    states: Sequence[str] = ()
    model: str = ""
    host_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    faulty: bool = False

    @property
    def is_set(self) -> bool:
        """Whether some instances may be left out."""
        return bool(self.states or self.model or self.host_id or self.labels or self.faulty)


def make_filter(
    states: Sequence[str], model: str, host_id: str, labels: Sequence[tuple[str, str]], faulty: bool
) -> InstanceFilter:
    """Return the filter of a command line."""
    return InstanceFilter(states, model, host_id, dict(labels), faulty)


async def fetch(client: SageClient, only: InstanceFilter) -> list[instance_pb2.Instance]:
    """Return the instances that match, however many pages they take."""
    query = fleet_service_pb2.ListInstancesRequest(
        page_size=_PAGE_SIZE,
        model=only.model,
        host_id=only.host_id,
        labels=only.labels,
        states=[instance_pb2.InstanceState.Value(f"INSTANCE_STATE_{state.upper()}") for state in only.states],
    )
    messages: list[instance_pb2.Instance] = []
    while True:
        page = await client.connection.unary(client.connection.fleet.ListInstances, query)
        messages += (message for message in page.instances if message.gpu_faults or not only.faulty)
        if not page.next_page_token:
            return messages
        query.page_token = page.next_page_token


async def fetch_one(client: SageClient, instance_id: str) -> instance_pb2.Instance:
    """Return one instance."""
    query = fleet_service_pb2.GetInstanceRequest(instance_id=instance_id)
    return (await client.connection.unary(client.connection.fleet.GetInstance, query)).instance


async def register(
    client: SageClient, spec: instance_pb2.InstanceSpec
) -> fleet_service_pb2.RegisterInstanceResponse:
    """Add an instance without an agent."""
    query = fleet_service_pb2.RegisterInstanceRequest(spec=spec)
    return await client.connection.unary(client.connection.fleet.RegisterInstance, query)


async def deregister(
    client: SageClient, instance_id: str, cause: str
) -> fleet_service_pb2.DeregisterInstanceResponse:
    """Remove an instance."""
    query = fleet_service_pb2.DeregisterInstanceRequest(instance_id=instance_id, cause=cause)
    return await client.connection.unary(client.connection.fleet.DeregisterInstance, query, repeatable=False)


def make_spec(instance_id: str, engine_url: str, **fields: Any) -> instance_pb2.InstanceSpec:  # noqa: ANN401
    """Return what the command line says of an instance.

    Raises:
        CliError: The URL or a number is not usable.
    """
    from sagecp.cli.failures import from_client_error
    from sagecp.client import ClientError

    try:
        url = urlsplit(engine_url)
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    except ValueError:
        port = 0
    if not port or not url.hostname or url.path not in {"", "/"} or url.query:
        raise CliError(
            f"{engine_url!r} is not the URL of an engine",
            hint="give http or https, a host and a port, such as http://10.0.0.7:8000",
            exit_code=ExitCode.INVALID,
        )
    instance = ExecutionInstance(
        instance_id=instance_id, host=url.hostname, port=port, scheme=url.scheme, **fields
    )
    try:
        return convert.instance_spec(instance)
    except ClientError as error:
        raise from_client_error(error) from error


def show(
    messages: Sequence[instance_pb2.Instance],
    output: str,
    *,
    headers: bool,
    sort_by: str,
    reverse: bool,
    filtered: bool,
) -> None:
    """Print the fleet."""
    by_id = {message.spec.instance_id: message for message in messages}
    fleet = sort(
        [convert.instance(message) for message in messages], INSTANCE_FIELDS, sort_by, reverse=reverse
    )
    if is_for_programs(output):
        for instance in fleet:
            print_entry(by_id[instance.instance_id], output)
    elif output == "name":
        print_names([instance.instance_id for instance in fleet])
    elif not fleet:
        click.echo("no instance matches" if filtered else "no instance is registered", err=True)
        if not filtered:
            click.echo(
                "start an engine and beside it: sagecp agent --engine URL --control-plane ADDR", err=True
            )
    else:
        is_whole = print_list(fleet, INSTANCE_FIELDS, output, headers=headers)
        if headers and not is_whole:
            _show_notes(fleet)


def _show_notes(fleet: Sequence[Instance]) -> None:
    """Print what a narrow table has no room for: why instances are out, and what is wrong with GPUs."""
    for instance in fleet:
        if instance.state is not InstanceState.READY and instance.state_reason:
            drain = drain_text(instance)
            more = f" ({drain})" if drain else ""
            click.echo(
                render.harmless(
                    f"{instance.instance_id} {instance.state.name}: {instance.state_reason}{more}"
                )
            )
        for fault in instance.gpu_faults:
            if fault.message not in instance.state_reason:
                click.echo(
                    render.harmless(
                        f"{instance.instance_id} GPU {fault.gpu_index} {fault.kind.name}: {fault.message}"
                    )
                )


def show_registered(message: fleet_service_pb2.RegisterInstanceResponse, output: str) -> None:
    """Print the outcome of a registration."""
    if is_for_programs(output):
        print_object(message, output)
        return
    state = InstanceState(message.instance.state).name
    click.echo(f"registered {message.instance.spec.instance_id}, {render.state_text(state)}")


def show_deregistered(
    instance_id: str, message: fleet_service_pb2.DeregisterInstanceResponse, output: str
) -> None:
    """Print the outcome of a removal."""
    if is_for_programs(output):
        print_object(message, output)
        return
    left = message.in_flight_request_count
    rest = f"; {render.plural(left, 'request')} on it go on to their end" if left else ""
    click.echo(f"deregistered {instance_id}{rest}")
