"""What `sagecp policy` asks for and prints."""

from __future__ import annotations

import click

from sagecp.cli import render
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.output import is_for_programs, print_entry, print_object
from sagecp.client import ConflictError, SageClient
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.v1 import scheduling_pb2
from sagecp.wire.times import time_s


async def fetch(client: SageClient) -> pb.GetSchedulingConfigResponse:
    """Ask for the configuration in force."""
    return await client.connection.unary(
        client.connection.admin.GetSchedulingConfig, pb.GetSchedulingConfigRequest()
    )


async def update(
    client: SageClient, request: pb.UpdateSchedulingConfigRequest
) -> pb.UpdateSchedulingConfigResponse:
    """Ask for a change.

    Raises:
        CliError: Another version is in force than the one expected, or one is not kept.
    """
    try:
        return await client.connection.unary(
            client.connection.admin.UpdateSchedulingConfig,
            request,
            # A second execution would make another version.
            repeatable=False,
        )
    except ConflictError as error:
        raise CliError(
            error.message,
            hint="sagecp policy get shows the version in force and those that are kept",
            exit_code=ExitCode.NOT_FOUND_OR_CONFLICT,
        ) from error


def show(message: pb.GetSchedulingConfigResponse, *, output: str) -> None:
    """Print the configuration in force and what came before it."""
    if is_for_programs(output):
        print_object(message, output)
        return
    config = message.config
    defaults = {each.name: each.default_value for each in message.parameters}
    render.print_pairs(
        [
            *_names(config, message.policy_in_force),
            # Without a policy that chooses, the reason is the comment.
            ("because", message.policy_reason if message.policy_reason != config.comment else ""),
            *_version(config),
            ("parameters", _parameters(config, defaults)),
        ]
    )
    if message.history:
        click.echo()
        columns = (
            render.Column("VERSION", right=True),
            render.Column("SINCE"),
            render.Column("ORDER", flexible=True),
            render.Column("PLACEMENT", flexible=True),
            render.Column("PARAMETERS", flexible=True, optional=True),
            render.Column("COMMENT", flexible=True),
        )
        render.print_table(columns, [_row(each) for each in message.history])


def show_parameters(message: pb.GetSchedulingConfigResponse, *, output: str) -> None:
    """Print every parameter; as JSON one object each."""
    if is_for_programs(output):
        for each in message.parameters:
            print_entry(each, output)
        return
    columns = (
        render.Column("  NAME"),
        render.Column("VALUE", right=True),
        render.Column("DEFAULT", right=True, optional=True),
        render.Column("RANGE", optional=True),
        render.Column("WHAT IT DOES", flexible=True),
    )
    rows = [
        (
            f"{'*' if each.value != each.default_value else ' '} {each.name}",
            f"{each.value:g}",
            f"{each.default_value:g}",
            f"{each.minimum:g} to {each.maximum:g}",
            each.description,
        )
        for each in message.parameters
    ]
    render.print_table(columns, rows)


def show_updated(message: pb.UpdateSchedulingConfigResponse, *, output: str, dry_run: bool) -> None:
    """Print the configuration after a change."""
    if is_for_programs(output):
        print_object(message, output)
        return
    config = message.config
    if dry_run:
        click.echo(f"valid; it would be version {config.version}, and nothing was changed")
    else:
        click.echo(f"version {config.version} is in force")
    render.print_pairs(
        [*_names(config), ("parameters", _parameters(config, {})), ("comment", config.comment)], indent="  "
    )


def _names(config: scheduling_pb2.SchedulingConfig, policy_in_force: str = "") -> list[tuple[str, str]]:
    order = config.scheduling_policy
    if policy_in_force and policy_in_force != order:
        order += f": {policy_in_force} in force"
    return [("order", order), ("placement", _placement(config))]


def _placement(config: scheduling_pb2.SchedulingConfig) -> str:
    return f"{config.routing_strategy}, {config.load_balancer}"


def _version(config: scheduling_pb2.SchedulingConfig) -> list[tuple[str, str]]:
    since = render.clock_time(time_s(config.update_time))
    return [("version", f"{config.version}, since {since}"), ("comment", config.comment)]


def _parameters(config: scheduling_pb2.SchedulingConfig, defaults: dict[str, float]) -> str:
    lines = []
    for name, value in sorted(config.parameters.fields.items()):
        default = f" (default {defaults[name]:g})" if name in defaults else ""
        lines.append(f"{name} = {value.number_value:g}{default}")
    return "\n".join(lines) or "all at their defaults"


def _row(config: scheduling_pb2.SchedulingConfig) -> tuple[str, ...]:
    changed = ", ".join(
        f"{name}={value.number_value:g}" for name, value in sorted(config.parameters.fields.items())
    )
    return (
        str(config.version),
        render.clock_time(time_s(config.update_time)).partition(".")[0],
        config.scheduling_policy,
        _placement(config),
        changed or render.NONE,
        config.comment,
    )
