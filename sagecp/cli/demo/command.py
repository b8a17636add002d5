"""`sagecp demo` itself."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError, from_client_error
from sagecp.cli.options import debug_option, no_color, output_option

if TYPE_CHECKING:
    from sagecp.cli.demo.trace import Trace
    from sagecp.client import SageClient

_READY_TIMEOUT_S = 90.0
# Longer than any prompt of the traces with its answer.
_CONTEXT_TOKENS = "131072"


@click.command("demo")
@click.option(
    "--trace",
    "trace_name",
    default="azure",
    show_default=True,
    metavar="NAME|FILE",
    help="azure, mooncake (long prompts that share prefixes), or a file.",
)
@click.option(
    "--requests",
    "request_count",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="How many of the trace to replay.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="How many times faster than it happened.",
)
@click.option(
    "-n",
    "--engines",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="Simulated engines to start.",
)
@click.option(
    "--profile",
    default="8b-h100",
    show_default=True,
    metavar="NAME",
    help="Timing of the engines; sagecp engine-sim --help lists them.",
)
@click.option(
    "-s", "--server", default="", metavar="ADDR", help="Use a running control plane instead of starting one."
)
@click.option("--model", default="", help="Served name.  [the only one]")
@output_option
@no_color
@debug_option
def demo(
    trace_name: str,
    request_count: int,
    speed: float,
    engines: int,
    profile: str,
    server: str,
    model: str,
    as_json: bool,
) -> int:
    """Replay a slice of a real production trace, and report the latencies.

    Starts a control plane with simulated engines, sends the requests when
    their time has come, in turn through Generate, through Submit and Stream,
    and with a stream that is resumed half way.
    """
    from sagecp.cli.demo.trace import load_trace

    trace = load_trace(trace_name, request_count)
    try:
        return asyncio.run(_run(trace, speed, engines, profile, server, model, as_json=as_json))
    except asyncio.CancelledError:  # By SIGTERM.
        return ExitCode.INTERRUPTED


async def _run(
    trace: Trace, speed: float, engines: int, profile: str, server: str, model: str, *, as_json: bool
) -> int:
    from sagecp.cli.demo import report
    from sagecp.cli.demo.progress import Progress
    from sagecp.cli.demo.replay import replay
    from sagecp.client import ClientError, SageClient

    task = asyncio.current_task()
    if task is not None:
        # Like Ctrl-C: everything is stopped in order.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with contextlib.AsyncExitStack() as exits:
        where = f"on {server}"
        if not server:
            where = f"on {engines} simulated engines ({profile})"
            click.echo(f"starting a control plane and {engines} simulated engines", err=True)
            server = await exits.enter_async_context(_stack(engines, profile))
        span = f"{speed:g} times as fast, in {trace.rows[-1].arrival_s / speed:.0f} s"
        click.echo(
            f"replaying {len(trace.rows)} requests of {trace.title}, {span}, {where}",
            err=True,
        )
        client = await exits.enter_async_context(SageClient(server))
        try:
            await _warm_up(client, model)
            begin_s = time.monotonic()
            with Progress(len(trace.rows)) as progress:
                outcomes = await replay(client, trace, speed=speed, model=model, on_progress=progress.update)
        except ClientError as error:
            raise from_client_error(error, server=server) from error
        wall_s = time.monotonic() - begin_s
        click.echo(err=True)
        report.show(outcomes, wall_s, as_json=as_json)
    return ExitCode.REQUEST_FAILED if any(outcome.error for outcome in outcomes) else ExitCode.OK


async def _warm_up(client: SageClient, model: str) -> None:
    """Send one request first: connections are open, and what is wrong is said at once."""
    await client.complete("warm up", model=model, max_tokens=1)


@contextlib.asynccontextmanager
async def _stack(engine_count: int, profile: str) -> AsyncIterator[str]:
    """Run what `sagecp dev` runs, and yield the address of its control plane."""
    from sagecp.cli.dev.children import ChildEndedError
    from sagecp.cli.dev.stack import Stack, StackPlan

    plan = StackPlan(
        engine_count=engine_count,
        port=0,
        profile=profile,
        engine_options=("--max-model-len", _CONTEXT_TOKENS),
        serve_options=("--log-level", "info"),
    )
    stack = Stack(plan, lambda _name, _line: None)
    try:
        try:
            await stack.start(_READY_TIMEOUT_S)
        except ChildEndedError as error:
            lines = "\n".join(f"  {line}" for line in error.child.last_lines)
            raise CliError(
                f"{error.child.name} ended with status {error.child.returncode}; its last lines:\n{lines}",
                exit_code=ExitCode.UNREACHABLE,
            ) from error
        except TimeoutError:
            raise CliError(
                f"the engines were not ready within {_READY_TIMEOUT_S:g} s",
                hint="sagecp dev shows what they say",
                exit_code=ExitCode.UNREACHABLE,
            ) from None
        yield stack.address
    finally:
        await stack.stop()
