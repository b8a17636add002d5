"""`sagecp dev` itself: starts the stack, says what to try, and waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, debug_option, no_color

if TYPE_CHECKING:
    from sagecp.cli.dev.stack import Stack

_PREFIX_COLORS = ("cyan", "magenta", "blue", "yellow", "green")
_PREFIX_WIDTH = len("control-plane")
# Time, level, event and logger as the processes print them, far too wide for a terminal with a prefix.
_LOG_LINE = re.compile(r"^\S+T(?P<time>\d\d:\d\d:\d\d)\S* \[(?P<level>\w+) *\] (?P<event>.*?) \[[\w.]+\] ?")


@click.command("dev")
@click.option(
    "-n",
    "--engines",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="Simulated engines to start.",
)
@click.option("--model", default="sim-8b", show_default=True, help="Name of the model they serve.")
@click.option(
    "--profile",
    default="",
    metavar="NAME",
    help="Timing of the engines: a model and GPU; sagecp engine-sim --help lists them.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Of the control plane; 0 takes a free one.  [50051 where it is free]",
)
@click.option("--engine-options", default="", metavar="TEXT", help="More options for every engine-sim.")
@click.option("--serve-options", default="", metavar="TEXT", help="More options for serve.")
@click.option("--ready-file", metavar="FILE", help="Write the addresses there, as JSON, once all is ready.")
@click.option(
    "--ready-timeout",
    type=DURATION,
    default="60s",
    show_default=True,
    metavar="T",
    help="Give up when not all is ready by then.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not show the logs of the processes.")
@no_color
@debug_option
def dev(
    engines: int,
    model: str,
    profile: str,
    port: int | None,
    engine_options: str,
    serve_options: str,
    ready_file: str | None,
    ready_timeout: float,
    quiet: bool,
) -> int:
    """Run a control plane, simulated engines and their agents on this machine.

    No GPU is needed. Prints what to try; Ctrl-C stops everything.
    """
    from sagecp.cli.dev.stack import Stack, StackPlan

    plan = StackPlan(
        engine_count=engines,
        model=model,
        port=port,
        profile=profile,
        engine_options=_split("--engine-options", engine_options),
        serve_options=_split("--serve-options", serve_options),
    )
    stack = Stack(plan, _ignore if quiet else _Printer())
    path = Path(ready_file) if ready_file else None
    try:
        return asyncio.run(_run(stack, path, ready_timeout))
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _split(name: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise CliError(f"{name} {text!r}: {error}", exit_code=ExitCode.INVALID) from None


def _ignore(_name: str, _line: str) -> None:
    """Print nothing."""


def _short_log_line(match: re.Match[str]) -> str:
    level = "" if match["level"] == "info" else f"{match['level'].upper()} "
    return f"{match['time']} {level}{match['event'].rstrip()}  "


class _Printer:
    """Prints lines of several processes, each with its name in a colour of its own; on a terminal, cut."""

    def __init__(self) -> None:
        self._colors: dict[str, str] = {}
        self._width = shutil.get_terminal_size().columns - _PREFIX_WIDTH - 3 if sys.stderr.isatty() else 0

    def __call__(self, name: str, line: str) -> None:
        color = self._colors.setdefault(name, _PREFIX_COLORS[len(self._colors) % len(_PREFIX_COLORS)])
        if self._width:
            line = _LOG_LINE.sub(_short_log_line, line)
        if 0 < self._width < len(line):
            line = line[: self._width - 1] + "…"
        click.echo(f"{click.style(name.ljust(_PREFIX_WIDTH), fg=color)} | {line}", err=True)


async def _run(stack: Stack, ready_file: Path | None, ready_timeout_s: float) -> int:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            stack.kill()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        return await _serve(stack, asked, ready_file, ready_timeout_s)
    finally:
        await stack.stop()


async def _serve(stack: Stack, asked: asyncio.Event, ready_file: Path | None, ready_timeout_s: float) -> int:
    starting = asyncio.create_task(_start(stack, ready_timeout_s))
    stopping = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return ExitCode.OK
        starting.result()
        _announce(stack)
        if ready_file is not None:
            _write_ready_file(stack, ready_file)
        return await _watch(stack, stopping)
    finally:
        for task in (starting, stopping):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, CliError):
                await task


async def _start(stack: Stack, ready_timeout_s: float) -> None:
    from sagecp.cli.dev.children import ChildEndedError

    try:
        await stack.start(ready_timeout_s)
    except ChildEndedError as error:
        lines = "\n".join(f"  {line}" for line in error.child.last_lines) or "  (it printed nothing)"
        raise CliError(
            f"{error.child.name} ended with status {error.child.returncode}; its last lines:\n{lines}",
            exit_code=ExitCode.UNREACHABLE,
        ) from error
    except TimeoutError:
        lines = "\n".join(
            f"  {child.name}: {child.last_lines[-1] if child.last_lines else 'no output'}"
            for child in stack.children()
        )
        raise CliError(
            f"not everything was ready within {ready_timeout_s:g} s; last lines:\n{lines}",
            hint="--ready-timeout allows more",
            exit_code=ExitCode.UNREACHABLE,
        ) from None


async def _watch(stack: Stack, stopping: asyncio.Task[bool]) -> int:
    """Wait for the signal to stop; say it when a process ends by itself."""
    running = {asyncio.create_task(child.ended()): child for child in stack.children()}
    try:
        while True:
            done, _ = await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                click.echo("stopping", err=True)
                return ExitCode.OK
            for task in done:
                child = running.pop(task)
                click.echo(f"{child.name} (pid {child.pid}) ended with status {child.returncode}", err=True)
                if child is stack.control_plane:
                    raise CliError("the control plane ended; nothing is left to try")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _announce(stack: Stack) -> None:
    from sagecp.cli import render

    address, engines = stack.address, stack.engines
    what = f"{render.plural(len(engines), 'engine')} serving {stack.plan.model}"
    click.secho(f"sagecp dev is ready: control plane on {address}, {what}", bold=True)
    click.echo()
    pid = stack.control_plane.pid if stack.control_plane else 0
    render.print_table(
        (render.Column("  PROCESS"), render.Column("ADDRESS"), render.Column("PID", right=True)),
        [
            ("  control-plane", address, str(pid)),
            *((f"  {each.instance_id}", each.url, str(each.process.pid)) for each in engines),
        ],
    )
    status_url = f"http://{address}/sagecp.v1.AdminService/GetStatus"
    export = [] if address == "127.0.0.1:50051" else [f"export SAGECP_SERVER={address}"]
    commands = [
        *export,
        "sagecp instances",
        'sagecp generate "Tell me a story" --max-tokens 64 --stats',
        'sagecp submit "Tell me another" --max-tokens 64     # then: sagecp stream ID',
        "sagecp requests",
        "sagecp metrics --by instance",
        f"kill -9 {engines[0].process.pid}     # one engine dies; the others go on",
        f"buf curl --protocol grpc --http2-prior-knowledge -d '{{}}' \\\n      {status_url}",
    ]
    click.echo("\nTry in another terminal:\n")
    for command in commands:
        click.echo(f"    {command}")
    click.echo("\nCtrl-C stops everything.")


def _write_ready_file(stack: Stack, path: Path) -> None:
    """Write the addresses; whoever sees the file sees all of it."""
    content = {
        "control_plane": stack.address,
        "control_plane_pid": stack.control_plane.pid if stack.control_plane else 0,
        "model": stack.plan.model,
        "engines": [
            {
                "instance_id": engine.instance_id,
                "url": engine.url,
                "pid": engine.process.pid,
                "agent_pid": engine.agent.pid if engine.agent else 0,
            }
            for engine in stack.engines
        ],
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}", exit_code=ExitCode.INVALID) from error
