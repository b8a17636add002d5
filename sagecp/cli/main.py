"""`sagecp`: one entry for everything. Imports nothing but click until a command is known."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sagecp.cli.exit_codes import ExitCode, table_text
from sagecp.cli.failures import CliError, print_error

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that is imported when it is called.

    Attributes:
        path: Module and attribute of the click command.
        summary: One line for `sagecp --help`.
        extra: What of the package it needs beside the base.
    """

    path: str
    summary: str
    extra: str = ""


SECTIONS: Mapping[str, Mapping[str, Entry]] = {
    "Ask for tokens": {
        "generate": Entry(
            "sagecp.cli.generate:generate", "Send a prompt and print the answer as it is made."
        ),
        "submit": Entry("sagecp.cli.generate:submit", "Hand in a request and print its id."),
        "stream": Entry("sagecp.cli.generate:stream", "Print the output of a request handed in before."),
        "cancel": Entry("sagecp.cli.requests:cancel", "Stop requests."),
        "requests": Entry("sagecp.cli.requests:requests", "List, watch and look at requests."),
        "explain": Entry("sagecp.cli.explain:explain", "Say why a request went where it went."),
    },
    "Operate": {
        "top": Entry("sagecp.cli.top.command:top", "Watch the fleet on a full screen, and act on it.", "tui"),
        "instances": Entry(
            "sagecp.cli.instances:instances", "List, watch, look at, register and remove engines."
        ),
        "events": Entry("sagecp.cli.events:events", "List what happened to the fleet, and follow it."),
        "drain": Entry("sagecp.cli.drain:drain", "Give an engine no new work, and wait until it is empty."),
        "sleep": Entry("sagecp.cli.sleep:sleep", "Have an engine sleep, so that its GPUs are free."),
        "wake": Entry("sagecp.cli.sleep:wake", "Wake an engine up."),
        "lora": Entry("sagecp.cli.lora:lora", "Say which LoRA adapters an engine should have."),
        "status": Entry("sagecp.cli.status:status", "Show the state of the control plane."),
        "policy": Entry("sagecp.cli.policy:policy", "Show and change how requests are ordered and placed."),
        "metrics": Entry("sagecp.cli.metrics:metrics", "Show latencies, throughput and objectives."),
        "forecast": Entry("sagecp.cli.forecast:forecast", "Say what load and cost the next hours bring."),
        "check": Entry("sagecp.cli.check:check", "A line and an exit code for monitoring systems."),
        "journal": Entry(
            "sagecp.cli.journal:journal", "Check or salvage a stopped server's journal.", "server"
        ),
    },
    "Run": {
        "serve": Entry("sagecp.cli.serve:serve", "Run the control plane.", "server"),
        "agent": Entry(
            "sagecp.cli.agent:agent", "Run beside an engine: register it, report its state.", "agent"
        ),
        "engine-sim": Entry(
            "sagecp.sim.engine_cli:engine_sim", "Run a simulated vLLM, without a GPU.", "sim"
        ),
        "simulate": Entry(
            "sagecp.cli.simulate.command:simulate", "Try a policy on a trace, on a virtual clock.", "sim"
        ),
        "plan": Entry(
            "sagecp.cli.plan.command:plan", "Say how to spread a model over GPUs, and what that costs."
        ),
        "dev": Entry("sagecp.cli.dev.command:dev", "Run all of it on this machine, to try things.", "all"),
        "demo": Entry("sagecp.cli.demo.command:demo", "Replay a real trace and report the latencies.", "all"),
    },
    "More": {
        "cheat": Entry("sagecp.cli.cheat:cheat", "Show the most useful commands."),
        "completion": Entry("sagecp.cli.completion:completion", "Have the shell complete commands and ids."),
        "version": Entry("sagecp.cli.version:version", "Print versions."),
        "help": Entry("sagecp.cli.help:help_command", "Explain a command, or exit-codes, environment."),
    },
}
COMMANDS: Mapping[str, Entry] = {
    name: entry for section in SECTIONS.values() for name, entry in section.items()
}

_EPILOG = (
    "\b\nExit codes:\n" + table_text() + "\n\n"
    "`sagecp COMMAND --help` says more, `sagecp help environment` names the variables. "
    "`sagecp dev` is the place to start."
)


class _ReaderGoneError(Exception):
    """Nobody reads standard output any more."""


class LazyGroup(click.Group):
    """A group whose commands are imported on use, and whose failures are lines, not tracebacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every command, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.path.partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            _raise_missing_package(error, cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.path} is no command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; for an unknown one suggest those that look alike."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS and not ctx.resilient_parsing:
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else "sagecp --help lists the commands"
            raise CliError(f"there is no command {name!r}", hint=hint, exit_code=ExitCode.INVALID)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the commands, without importing them."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=entry.summary)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as in the class above
        """Run the command; whoever stops reading its output ends it."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Not for click, which would exit with 1.
            raise _ReaderGoneError from None
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by what they are for, without importing them."""
        width = max(len(name) for name in COMMANDS)
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in section.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # noqa: ANN401 - as in the class above
    ) -> Any:  # noqa: ANN401 - as in the class above
        """Run a command, turn failures into lines, and exit."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(self._run(args, prog_name or "sagecp", complete_var))

    def _run(self, args: Sequence[str] | None, prog_name: str, complete_var: str | None) -> int:
        arguments = list(sys.argv[1:] if args is None else args)
        # What the gRPC core has to say is said better below.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            result = super().main(arguments, prog_name, complete_var, standalone_mode=False)
        except _ReaderGoneError:
            # The reader, such as `head`, has seen enough. Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ExitCode.OK
        except (click.Abort, KeyboardInterrupt):
            return ExitCode.INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the last resort: a line instead of a traceback
            return _report(error, arguments)
        return result if isinstance(result, int) else ExitCode.OK


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Print a failure and return the exit code."""
    if "--debug" in arguments:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, CliError):
        error.show()
        return error.code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "sagecp"
        print_error(error.format_message(), f"{command} --help")
        return ExitCode.INVALID
    if isinstance(error, click.ClickException):
        print_error(error.format_message())
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("sagecp"):
        command = next((each for each in arguments if each in COMMANDS), "")
        try:
            _raise_missing_package(error, command)
        except CliError as missing:
            missing.show()
            return missing.code
    print_error(
        f"unexpected failure: {type(error).__name__}: {error}",
        "this is a defect; run again with --debug and report what it prints",
    )
    return ExitCode.UNEXPECTED


def _raise_missing_package(error: ModuleNotFoundError, command: str) -> NoReturn:
    extra = COMMANDS[command].extra if command in COMMANDS else ""
    if (error.name or "").startswith("sagecp.") or not extra:
        raise error
    raise CliError(
        f"sagecp {command} needs the Python package {error.name}, which is not installed",
        hint=f"pip install 'sagecp[{extra}]'",
        exit_code=ExitCode.INVALID,
    ) from None


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from sagecp.version import __version__

        click.echo(f"sagecp {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def main() -> None:
    """A control plane for fleets of vLLM servers."""


if __name__ == "__main__":
    main()
