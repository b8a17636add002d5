"""`sagecp instances`: the fleet."""

from __future__ import annotations

import click

from sagecp.cli.options import PAIR, DefaultCommandGroup, ServerOptions, output_option, server_options

_STATES = ["starting", "ready", "draining", "drained", "unhealthy", "lost"]


@click.group("instances", cls=DefaultCommandGroup)
def instances() -> None:
    """List, register and remove engines. Without a command: list."""


@instances.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(_STATES, case_sensitive=False),
    help="Only these; repeatable.",
)
@click.option("--model", default="", help="Only instances that serve this model.")
@output_option
@server_options
def list_(connection: ServerOptions, as_json: bool, states: tuple[str, ...], model: str) -> None:
    """List the fleet, by instance id."""
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk

    messages = talk(connection, lambda client: instances_view.fetch(client, states, model))
    instances_view.show(messages, as_json=as_json, filtered=bool(states or model))


@instances.command()
@click.argument("instance_id")
@output_option
@server_options
def get(connection: ServerOptions, as_json: bool, instance_id: str) -> None:
    """Show one instance: what it is, and how it does."""
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk

    message = talk(connection, lambda client: instances_view.fetch_one(client, instance_id))
    instances_view.show_one(message, as_json=as_json)


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
@click.option("--gpu-memory-gib", type=float, metavar="GIB", help="Memory of one GPU.")
@click.option("--tensor-parallel-size", type=int, default=1, metavar="N")
@click.option("--pipeline-parallel-size", type=int, default=1, metavar="N")
@click.option("--data-parallel-size", type=int, default=1, metavar="N")
@click.option("--usd-per-gpu-hour", type=float, metavar="USD")
@click.option("--label", "labels", multiple=True, type=PAIR, metavar="K=V", help="Repeatable.")
@output_option
@server_options
def register(
    connection: ServerOptions,
    as_json: bool,
    instance_id: str,
    engine_url: str,
    model: str,
    aliases: tuple[str, ...],
    max_concurrency: int | None,
    max_context: int | None,
    kv_tokens: int | None,
    gpus: int,
    gpu_memory_gib: float | None,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    data_parallel_size: int,
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
        gpu_memory_gb=gpu_memory_gib,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=data_parallel_size,
        usd_per_gpu_hour=usd_per_gpu_hour,
        labels=dict(labels),
    )
    message = talk(connection, lambda client: instances_view.register(client, spec))
    instances_view.show_registered(message, as_json=as_json)


@instances.command()
@click.argument("instance_id")
@click.option("--cause", default="", help="Why, for the record.")
@output_option
@server_options
def deregister(connection: ServerOptions, as_json: bool, instance_id: str, cause: str) -> None:
    """Take an instance out of the fleet; requests on it go on to their end."""
    from sagecp.cli import instances_view
    from sagecp.cli.connect import talk

    message = talk(connection, lambda client: instances_view.deregister(client, instance_id, cause))
    instances_view.show_deregistered(instance_id, message, as_json=as_json)
