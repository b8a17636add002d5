"""`sagecp help`: commands and topics."""

from __future__ import annotations

import click

from sagecp.cli.exit_codes import ExitCode, table_text
from sagecp.cli.failures import CliError

_ENVIRONMENT = """\
SAGECP_SERVER          address of the control plane, instead of --server
SAGECP_CA_CERT         authority to trust; turns TLS on, as --ca-cert does
SAGECP_CERT            own certificate chain, as --cert
SAGECP_KEY             its private key, as --key
SAGECP_TOKEN           bearer token; only sent over TLS, or to this machine
SAGECP_CONTROL_PLANE   address that `sagecp agent` registers at
SAGECP_ENGINE_API_KEY  key of the engine, for `sagecp agent` and `sagecp engine-sim`
NO_COLOR               no colours, whatever the value"""


@click.command("help")
@click.argument("topics", nargs=-1, metavar="[COMMAND... | exit-codes | environment]")
@click.pass_context
def help_command(context: click.Context, topics: tuple[str, ...]) -> None:
    """Explain a command, or one of the topics exit-codes and environment."""
    root = context.find_root()
    if topics == ("exit-codes",):
        click.echo(table_text())
        click.echo("sagecp check has those of monitoring systems: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN")
    elif topics == ("environment",):
        click.echo(_ENVIRONMENT)
    else:
        command: click.Command = root.command
        current = root
        for name in topics:
            found = command.get_command(current, name) if isinstance(command, click.Group) else None
            if found is None:
                raise CliError(
                    f"there is no help on {' '.join(topics)!r}",
                    hint="sagecp --help lists the commands; topics are exit-codes and environment",
                    exit_code=ExitCode.INVALID,
                )
            current = click.Context(found, info_name=name, parent=current)
            command = found
        click.echo(command.get_help(current))
