"""`sagecp completion`: have the shell complete commands, options, ids and names."""

from __future__ import annotations

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

_EPILOG = """\b
To have it always:
  bash  echo 'source <(sagecp completion bash)' >> ~/.bashrc
  zsh   echo 'source <(sagecp completion zsh)' >> ~/.zshrc    (after compinit)
  fish  sagecp completion fish > ~/.config/fish/completions/sagecp.fish
"""


@click.command("completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes this command line in a shell.

    Ids of instances and requests, models and policies come from the server of
    the command line, or SAGECP_SERVER, if it answers within a second. Bash must
    be 4.4 or later.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise CliError(f"there is no completion for {shell}", exit_code=ExitCode.INVALID)
    script = kind(ctx.find_root().command, {}, "sagecp", "_SAGECP_COMPLETE")
    # Not source(), which runs bash to learn its version, and bash may be elsewhere.
    click.echo(script.source_template % script.source_vars())
