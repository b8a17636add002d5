"""`sagecp lora`: the LoRA adapters of an engine."""

from __future__ import annotations

import click

from sagecp.cli.complete import complete_instances
from sagecp.cli.options import PAIR, ServerOptions, one_format_option, server_options

_EPILOG = """\b
Examples:
  sagecp lora engine-1                            what is loaded, and what should be
  sagecp lora engine-1 sql=/adapters/sql --wait   exactly this one
  sagecp lora engine-1 --none                     unload all
  sagecp lora engine-1 --clear                    let it be as it is
"""


@click.command("lora", epilog=_EPILOG)
@click.argument("instance_id", shell_complete=complete_instances)
@click.argument("adapters", nargs=-1, type=PAIR, metavar="[NAME=PATH]...")
@click.option("--none", is_flag=True, help="Unload all adapters.")
@click.option("--clear", is_flag=True, help="Take the order back: what is loaded stays.")
@click.option("--wait", is_flag=True, help="Wait until the engine has what was ordered.")
@one_format_option
@server_options
def lora(
    connection: ServerOptions,
    output: str,
    instance_id: str,
    adapters: tuple[tuple[str, str], ...],
    none: bool,
    clear: bool,
    wait: bool,
) -> None:
    """Say which LoRA adapters an engine should have loaded, or show them.

    Those named are all that it should have: its agent loads what is missing
    and unloads the rest. Requests ask for an adapter by its name, as a model.
    PATH is a folder on the engine's host, or a name in a repository.
    """
    if (bool(adapters), none, clear).count(True) > 1:
        raise click.UsageError("give adapters, --none or --clear, not several of them")
    if wait and not (adapters or none):
        raise click.UsageError("--wait goes with adapters or --none")
    names = [name for name, _ in adapters]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"given twice: {', '.join(doubled)}")
    from sagecp.cli import lora_view

    if not (adapters or none or clear):
        lora_view.show(connection, instance_id, output)
    else:
        wanted = None if clear else list(adapters)
        lora_view.order(connection, instance_id, wanted, wait=wait, output=output)
