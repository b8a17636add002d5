"""`sagecp policy`: how requests are ordered and placed, looked at and changed while the server runs."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.complete import complete_load_balancers, complete_policies, complete_routing
from sagecp.cli.options import (
    NUMBER_PAIR,
    DefaultCommandGroup,
    ServerOptions,
    one_format_option,
    server_options,
)

_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be; change nothing.")
_if_version = click.option(
    "--if-version",
    "expected_version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Refuse unless this version is in force.",
)


class _PolicyGroup(DefaultCommandGroup):
    default_command = "get"


@click.group("policy", cls=_PolicyGroup)
def policy() -> None:
    """Show and change how requests are ordered and placed. Without a command: get.

    Changes apply at once: waiting requests are put in the new order, none is
    lost. Every change is a version that can be gone back to. A restart of the
    server goes back to its configuration file.
    """


@policy.command()
@one_format_option
@server_options
def get(connection: ServerOptions, output: str) -> None:
    """Show what is in force and why, the parameters that were changed, and earlier versions."""
    from sagecp.cli import policy_view
    from sagecp.cli.connect import talk

    policy_view.show(talk(connection, policy_view.fetch), output=output)


@policy.command()
@one_format_option
@server_options
def parameters(connection: ServerOptions, output: str) -> None:
    """List every parameter: value, default, range, and what it does. `*` marks changed ones."""
    from sagecp.cli import policy_view
    from sagecp.cli.connect import talk

    policy_view.show_parameters(talk(connection, policy_view.fetch), output=output)


@policy.command("set")
@click.argument(
    "scheduling_policy", metavar="[POLICY]", required=False, default="", shell_complete=complete_policies
)
@click.option(
    "--routing", default="", metavar="NAME", help="Routing strategy.", shell_complete=complete_routing
)
@click.option(
    "--load-balancer",
    default="",
    metavar="NAME",
    help="Load balancer.",
    shell_complete=complete_load_balancers,
)
@click.option(
    "--set",
    "values",
    multiple=True,
    type=NUMBER_PAIR,
    metavar="NAME=NUMBER",
    help="A parameter; repeatable. `sagecp policy parameters` lists them.",
)
@click.option("--reset", is_flag=True, help="Put every parameter not named here back to its default.")
@click.option(
    "--comment", default="", metavar="TEXT", help="Who changes what, and why; at most 256 characters."
)
@_if_version
@_dry_run
@one_format_option
@server_options
def set_(
    connection: ServerOptions,
    output: str,
    scheduling_policy: str,
    routing: str,
    load_balancer: str,
    values: tuple[tuple[str, float], ...],
    reset: bool,
    comment: str,
    expected_version: int | None,
    dry_run: bool,
) -> None:
    """Change what is named, all of it or nothing; the rest stays as it is.

    POLICY orders waiting requests: fifo, priority, slo_aware, cost_optimized or
    adaptive.
    """
    from sagecp.cli.exit_codes import ExitCode
    from sagecp.cli.failures import CliError
    from sagecp.v1 import admin_service_pb2 as pb
    from sagecp.v1 import scheduling_pb2

    if not (scheduling_policy or routing or load_balancer or values or reset):
        raise CliError(
            "nothing to change",
            hint="name a policy, or give --routing, --load-balancer, --set or --reset",
            exit_code=ExitCode.INVALID,
        )
    config = scheduling_pb2.SchedulingConfig(
        scheduling_policy=scheduling_policy,
        routing_strategy=routing,
        load_balancer=load_balancer,
        comment=comment,
    )
    for name, number in values:
        config.parameters.fields[name].number_value = number
    request = pb.UpdateSchedulingConfigRequest(
        config=config, reset_parameters=reset, expected_version=expected_version or 0, validate_only=dry_run
    )
    _update(connection, request, output=output)


@policy.command()
@click.argument("version", type=click.IntRange(min=1))
@_if_version
@_dry_run
@one_format_option
@server_options
def revert(
    connection: ServerOptions, output: str, version: int, expected_version: int | None, dry_run: bool
) -> None:
    """Go back to an earlier version, as a new version. `sagecp policy` lists those that are kept."""
    from sagecp.v1 import admin_service_pb2 as pb

    request = pb.UpdateSchedulingConfigRequest(
        revert_to_version=version, expected_version=expected_version or 0, validate_only=dry_run
    )
    _update(connection, request, output=output)


def _update(connection: ServerOptions, request: Any, *, output: str) -> None:  # noqa: ANN401 - imported late
    from sagecp.cli import policy_view
    from sagecp.cli.connect import talk

    config = talk(connection, lambda client: policy_view.update(client, request))
    policy_view.show_updated(config, output=output, dry_run=request.validate_only)
