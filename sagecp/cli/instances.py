"""`sagecp instances`: the fleet."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.complete import complete_instances, complete_models
from sagecp.cli.options import (
    PAIR,
    DefaultCommandGroup,
    F,
    ServerOptions,
    headers_option,
    interval_option,
    list_format_option,
    list_options,
    one_format_option,
    server_options,
)

_STATES = ["starting", "ready", "draining", "drained", "unhealthy", "lost"]
_instance_argument = click.argument("instance_id", shell_complete=complete_instances)


def _filter_options(function: F) -> F:
    """Add which instances are meant; they arrive as the fields of an `InstanceFilter`."""
    decorated: Any = function
    for option in (
        click.option(
            "--faulty", is_flag=True, help="Only with a faulty GPU (looked for here, not by the server)."
        ),
        click.option(
            "--label",
            "labels",
            multiple=True,
            type=PAIR,
            metavar="K=V",
            help="Only with this label; repeatable.",
        ),
        click.option("--host", "host_id", default="", metavar="ID", help="Only on this host."),
        click.option(
            "--model", default="", help="Only those that serve this model.", shell_complete=complete_models
        ),
        click.option(
            "--state",
            "states",
            multiple=True,
            type=click.Choice(_STATES, case_sensitive=False),
            help="Only these; repeatable.",
        ),
    ):
        decorated = option(decorated)
    result: F = decorated
    return result


@click.group("instances", cls=DefaultCommandGroup)
def instances() -> None:
    """List, watch, register and remove engines. Without a command: list."""


@instances.command("list")
@_filter_options
@list_options
@server_options
def list_(
    connection: ServerOptions,
    output: str,
    headers: bool,
    sort_by: str,
    reverse: bool,
    **filters: Any,  # noqa: ANN401 - fields of an InstanceFilter
) -> None:
    """List the fleet, by instance id.

    TTFT is what was seen here. With -o wide, ENG-TTFT and ENG-ITL are the
    engine's own medians, PRED-TTFT and PRED-STEP what is predicted for now,
    SLOWDOWN how slow it is for its kind, CLOCK how far its clock is ahead.
    """
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk
    from sagecp.cli.instance_fields import INSTANCE_FIELDS
    from sagecp.cli.listing import check_sort_by

    check_sort_by(INSTANCE_FIELDS, sort_by)
    only = instances_view.make_filter(**filters)
    messages = talk(connection, lambda client: instances_view.fetch(client, only))
    instances_view.show(
        messages, output, headers=headers, sort_by=sort_by, reverse=reverse, filtered=only.is_set
    )


@instances.command()
@_instance_argument
@one_format_option
@server_options
def get(connection: ServerOptions, output: str, instance_id: str) -> None:
    """Show one instance: what it is, how it does, its GPUs and what is wrong."""
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk
    from sagecp.cli.instance_details import show_one

    message = talk(connection, lambda client: instances_view.fetch_one(client, instance_id))
    show_one(message, output)


@instances.command()
@click.argument("instance_id", required=False, default="", shell_complete=complete_instances)
@_filter_options
@click.option("--figures", is_flag=True, help="Also tell when load, speed or any other figure changes.")
@interval_option
@headers_option
@list_format_option
@server_options
def watch(
    connection: ServerOptions,
    output: str,
    headers: bool,
    interval_s: float,
    figures: bool,
    instance_id: str,
    **filters: Any,  # noqa: ANN401 - fields of an InstanceFilter
) -> None:
    """List instances, and then each that changes, until Ctrl-C.

    A line tells of a change of state or its reason, of an order, a fault, the
    engine's process or a refused heartbeat. GONE means that an instance is no
    longer registered; as JSON, INSTANCE_STATE_UNSPECIFIED.
    """
    from sagecp.cli import instances_view, instances_watch
    from sagecp.cli.connect import talk
    from sagecp.cli.watch import watch as follow

    only = instances_view.make_filter(**filters)
    if instance_id and only.is_set:
        raise click.UsageError("an instance is named, so there is nothing to filter; leave one out")
    source = instances_watch.source(only, instance_id, figures=figures)
    show = instances_watch.printer(output, headers=headers, figures=figures)
    talk(connection, lambda client: follow(client, source, interval_s, show))


@instances.command()
@click.argument("instance_id")
@click.argument("engine_url")
@click.option("--model", required=True, help="Served model name.")
@click.option("--alias", "aliases", multiple=True, help="A further name of the model; repeatable.")
@click.option(
    "--max-concurrency", type=int, metavar="N", help="Most requests at once.  [the server's default]"
)
@click.option("--max-context", type=int, metavar="N", help="Longest context, in tokens.")
@click.option("--kv-tokens", type=int, metavar="N", help="Tokens that fit the KV cache.")
@click.option("--gpus", type=int, default=0, metavar="N", help="GPUs it uses.")
@click.option("--gpu-name", default="", help="Their kind, as the driver names it.")
@click.option("--gpu-memory-gib", type=float, metavar="GIB", help="Memory of one GPU.")
@click.option("--tensor-parallel-size", type=int, default=1, metavar="N")
@click.option("--pipeline-parallel-size", type=int, default=1, metavar="N")
@click.option("--data-parallel-size", type=int, default=1, metavar="N")
@click.option(
    "--expert-parallel-size",
    type=int,
    default=1,
    metavar="N",
    help="GPUs its experts are spread over; 1 where they are not.",
)
@click.option("--usd-per-gpu-hour", type=float, metavar="USD")
@click.option("--label", "labels", multiple=True, type=PAIR, metavar="K=V", help="Repeatable.")
@one_format_option
@server_options
def register(
    connection: ServerOptions,
    output: str,
    instance_id: str,
    engine_url: str,
    model: str,
    aliases: tuple[str, ...],
    max_concurrency: int | None,
    max_context: int | None,
    kv_tokens: int | None,
    gpus: int,
    gpu_name: str,
    gpu_memory_gib: float | None,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    data_parallel_size: int,
    expert_parallel_size: int,
    usd_per_gpu_hour: float | None,
    labels: tuple[tuple[str, str], ...],
) -> None:
    """Add an engine that has no agent; the control plane probes it itself.

    ENGINE_URL is where the control plane reaches it: http://10.0.0.7:8000.
    """
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk

    spec = instances_view.make_spec(
        instance_id,
        engine_url,
        model_name=model,
        model_aliases=aliases,
        max_concurrent_request_count=max_concurrency,
        max_context_token_count=max_context,
        key_value_token_capacity=kv_tokens,
        gpu_count=gpus,
        gpu_name=gpu_name,
        gpu_memory_gb=gpu_memory_gib,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=data_parallel_size,
        expert_parallel_size=expert_parallel_size,
        usd_per_gpu_hour=usd_per_gpu_hour,
        labels=dict(labels),
    )
    message = talk(connection, lambda client: instances_view.register(client, spec))
    instances_view.show_registered(message, output)


@instances.command()
@_instance_argument
@click.option("--cause", default="", help="Why, for the record.")
@one_format_option
@server_options
def deregister(connection: ServerOptions, output: str, instance_id: str, cause: str) -> None:
    """Take an instance out of the fleet; requests on it go on to their end."""
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk

    message = talk(connection, lambda client: instances_view.deregister(client, instance_id, cause))
    instances_view.show_deregistered(instance_id, message, output)
