"""What the commands about the fleet ask for and print."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import click

from sagecp.cli import render
from sagecp.cli.drain_view import drain_text
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.json_output import print_message
from sagecp.client import SageClient, convert
from sagecp.client.values import Instance
from sagecp.core.types import ExecutionInstance, GpuReading, InstanceState
from sagecp.v1 import fleet_service_pb2, instance_pb2

_COLUMNS = (
    render.Column("INSTANCE", flexible=True),
    render.Column("STATE", state=True),
    render.Column("MODEL", flexible=True),
    render.Column("LOAD", right=True),
    render.Column("KV", right=True),
    render.Column("GPU", right=True),
    render.Column("TTFT", right=True),
    render.Column("DONE", right=True),
    render.Column("LOST", right=True),
    render.Column("BEAT", right=True),
)


async def fetch(client: SageClient, states: tuple[str, ...], model: str) -> list[instance_pb2.Instance]:
    """Return the instances, however many pages they take."""
    query = fleet_service_pb2.ListInstancesRequest(
        page_size=1000,
        model=model,
        states=[instance_pb2.InstanceState.Value(f"INSTANCE_STATE_{state.upper()}") for state in states],
    )
    messages: list[instance_pb2.Instance] = []
    while True:
        page = await client.connection.unary(client.connection.fleet.ListInstances, query)
        messages += page.instances
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


def show(messages: list[instance_pb2.Instance], *, as_json: bool, filtered: bool) -> None:
    """Print the fleet."""
    if as_json:
        for message in messages:
            print_message(message)
        return
    if not messages:
        click.echo("no instance matches" if filtered else "no instance is registered", err=True)
        if not filtered:
            click.echo(
                "start an engine and beside it: sagecp agent --engine URL --control-plane ADDR", err=True
            )
        return
    fleet = [convert.instance(message) for message in messages]
    render.print_table(_COLUMNS, [_row(instance) for instance in fleet])
    for instance in fleet:
        if instance.state is not InstanceState.READY and instance.state_reason:
            drain = drain_text(instance)
            more = f" ({drain})" if drain else ""
            click.echo(
                render.harmless(
                    f"{instance.instance_id} {instance.state.name}: {instance.state_reason}{more}"
                )
            )


def _row(instance: Instance) -> list[str]:
    return [
        instance.instance_id,
        instance.state.name,
        instance.spec.model_name,
        f"{instance.in_flight_request_count}/{instance.max_concurrent_request_count}",
        render.percent(instance.engine.key_value_cache_usage if instance.engine else None),
        render.percent(_gpu_utilization(instance)),
        render.duration(instance.mean_ttft_s),
        render.compact(instance.completed_request_count),
        render.compact(instance.failed_attempt_count),
        render.age(instance.heartbeat_time_s),
    ]


def _gpu_utilization(instance: Instance) -> float | None:
    known = [gpu.utilization for gpu in instance.gpus if gpu.utilization is not None]
    return sum(known) / len(known) if known else None


def show_one(message: instance_pb2.Instance, *, as_json: bool) -> None:
    """Print one instance."""
    if as_json:
        print_message(message)
        return
    instance = convert.instance(message)
    spec = instance.spec
    lease = instance.lease_expire_time_s
    state = render.state_text(instance.state.name)
    sizes = (
        ("tensor", spec.tensor_parallel_size),
        ("pipeline", spec.pipeline_parallel_size),
        ("data", spec.data_parallel_size),
        ("expert", spec.expert_parallel_size),
    )
    render.print_pairs(
        [
            ("instance", instance.instance_id),
            ("state", f"{state}{'; ' + instance.state_reason if instance.state_reason else ''}"),
            ("drain", drain_text(instance)),
            ("model", ", ".join(spec.served_models)),
            ("engine", f"{spec.engine_url}  {spec.engine_kind} {spec.engine_version}".rstrip()),
            ("host", spec.host_id),
            (
                "load",
                f"{instance.in_flight_request_count} of at most {instance.max_concurrent_request_count}",
            ),
            ("parallel", ", ".join(f"{name} {size}" for name, size in sizes if size > 1)),
            ("context", _tokens(spec.max_context_token_count)),
            ("KV capacity", _tokens(spec.key_value_token_capacity)),
            ("completed", render.count(instance.completed_request_count)),
            ("lost attempts", render.count(instance.failed_attempt_count)),
            ("mean TTFT", render.duration(instance.mean_ttft_s)),
            ("registered", render.clock_time(instance.register_time_s)),
            (
                "heartbeat",
                f"{render.age(instance.heartbeat_time_s)} ago" if instance.heartbeat_time_s else "no agent",
            ),
            ("lease", f"until {render.clock_time(lease)}" if lease else ""),
            ("price", f"{spec.usd_per_gpu_hour:g} USD per GPU and hour" if spec.usd_per_gpu_hour else ""),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(spec.labels.items()))),
            ("engine says", _gauges_text(instance)),
            ("GPUs", "\n".join(map(_gpu_text, instance.gpus)) or instance.gpu_absent_reason),
        ]
    )


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number:,} tokens"


def _gauges_text(instance: Instance) -> str:
    gauges = instance.engine
    if gauges is None:
        return "nothing yet"
    lines = []
    lines.append(
        f"running {render.count(gauges.running_request_count)}, "
        f"waiting {render.count(gauges.waiting_request_count)}, "
        f"KV cache {render.percent(gauges.key_value_cache_usage)}"
    )
    queries, hits = gauges.prefix_cache_query_token_count, gauges.prefix_cache_hit_token_count
    if queries and hits is not None:
        lines.append(f"prefix hits {render.percent(hits / queries)} of {render.compact(queries)} tokens")
    lines.append(
        f"tokens in {render.compact(gauges.prompt_token_count)}, "
        f"out {render.compact(gauges.generation_token_count)}, "
        f"preemptions {render.count(gauges.preemption_count)}"
    )
    return "\n".join(lines)


def _gpu_text(gpu: GpuReading) -> str:
    parts = [f"{gpu.index}: {gpu.name or 'GPU'}"]
    if gpu.utilization is not None:
        parts.append(render.percent(gpu.utilization))
    if gpu.used_memory_bytes is not None and gpu.total_memory_bytes is not None:
        parts.append(f"{gpu.used_memory_bytes / 2**30:.1f} of {gpu.total_memory_bytes / 2**30:.1f} GiB")
    if gpu.temperature_celsius is not None:
        parts.append(f"{gpu.temperature_celsius:.0f} C")
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W")
    return ", ".join(parts)


def show_registered(message: fleet_service_pb2.RegisterInstanceResponse, *, as_json: bool) -> None:
    """Print the outcome of a registration."""
    if as_json:
        print_message(message)
        return
    state = InstanceState(message.instance.state).name
    click.echo(f"registered {message.instance.spec.instance_id}, {render.state_text(state)}")


def show_deregistered(
    instance_id: str, message: fleet_service_pb2.DeregisterInstanceResponse, *, as_json: bool
) -> None:
    """Print the outcome of a removal."""
    if as_json:
        print_message(message)
        return
    left = message.in_flight_request_count
    rest = f"; {render.plural(left, 'request')} on it go on to their end" if left else ""
    click.echo(f"deregistered {instance_id}{rest}")
