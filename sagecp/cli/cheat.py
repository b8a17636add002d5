"""`sagecp cheat`: the commands that are needed most, on a screen."""

from __future__ import annotations

from collections.abc import Mapping

import click

# One screen: within 80 columns, and 24 lines with the prompt. A test runs every command through the parser.
SHEET: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Try it": (
        ("sagecp dev", "everything here, no GPU"),
        ('sagecp generate "Tell me a story" -m 64 --stats', "tokens as they are made"),
    ),
    "Look, and find out why": (
        ("sagecp status", "the control plane"),
        ("sagecp top", "the fleet, live"),
        ("sagecp instances -o wide --sort-by load --reverse", "the busiest engines first"),
        ("sagecp instances get engine-1", "one of them, with its GPUs"),
        ("sagecp requests --active --older-than 30s", "what takes long"),
        ("sagecp explain REQUEST_ID", "why it went where it went"),
        ("sagecp metrics --by model --window 1m", "latencies and objectives"),
        ("sagecp events --severity warning -f", "what goes wrong"),
    ),
    "Act": (
        ("sagecp drain engine-1 --grace 30s --wait", "before its host is touched"),
        ("sagecp drain engine-1 --undo", "take work again"),
        ("sagecp sleep engine-1 --wait", "free its GPU memory"),
        ("sagecp wake engine-1 --wait", "and take it again"),
        ("sagecp cancel REQUEST_ID", "stop a request"),
        ("sagecp policy set slo_aware --dry-run", "another order: what if"),
    ),
    "For scripts": (
        ("sagecp requests --state queued -o name", "ids alone, for xargs"),
        ("sagecp check --crit ready=2: --warn ttft=2", "for Nagios and the like"),
        ("sagecp completion bash", "complete commands and ids"),
    ),
}


@click.command("cheat")
def cheat() -> None:
    """Show the most useful commands, by what they are for."""
    width = max(len(command) for commands in SHEET.values() for command, _ in commands)
    for title, commands in SHEET.items():
        click.secho(title, bold=True)
        for command, what in commands:
            click.echo(f"  {command:<{width}}  {click.style(what, dim=True)}")
