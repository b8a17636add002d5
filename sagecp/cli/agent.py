"""`sagecp agent`: the daemon beside an engine."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, PAIR, debug_option

_EPILOG = """\b
Exit codes: 0 stopped by a signal; 2 bad usage, or refused as invalid;
3 engine or control plane not reached in time; 4 not permitted;
5 another agent owns the instance id; 130 interrupted twice.

\b
Examples:
  sagecp agent --engine http://127.0.0.1:8000
  sagecp agent --engine http://127.0.0.1:8000 --advertise http://gpu7:8000 \\
      --control-plane cp.example.com:50051 --ca-cert ca.pem --cert gpu7.pem --key gpu7.key
"""


def _parse_gpus(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    if value is None:
        return None
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    for entry in entries:
        if not (entry.isascii() and (entry.isdigit() or entry.startswith(("GPU-", "MIG-")))):
            raise click.BadParameter(
                f"{entry!r} is neither an index nor a UUID; for example 0,1 or GPU-5fd4f087"
            )
    return tuple(dict.fromkeys(entries))


@click.command("agent", epilog=_EPILOG)
@click.option("--engine", "engine_url", required=True, metavar="URL", help="The engine, as seen from here.")
@click.option(
    "--control-plane",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="ADDR",
    envvar="SAGECP_CONTROL_PLANE",
    help="Host and port of the control plane.",
)
@click.option("--instance-id", default="", help="Name in the fleet.  [default: host name and engine port]")
@click.option(
    "--advertise",
    "advertised_url",
    default="",
    metavar="URL",
    help="The engine, as seen from the control plane.  [default: as --engine]",
)
@click.option(
    "--model", "model_name", default="", help="Served name to register.  [default: the engine's first]"
)
@click.option(
    "--max-concurrency",
    "max_concurrent_request_count",
    type=int,
    metavar="N",
    help="Most requests at once.  [default: the engine's batch size, where it tells]",
)
@click.option(
    "--tensor-parallel-size",
    type=int,
    metavar="N",
    help="What the engine does not tell.  [default: discovered]",
)
@click.option("--pipeline-parallel-size", type=int, metavar="N", help="Likewise.")
@click.option("--data-parallel-size", type=int, metavar="N", help="Likewise.")
@click.option("--expert-parallel-size", type=int, metavar="N", help="Likewise.")
@click.option(
    "--gpus",
    callback=_parse_gpus,
    metavar="LIST",
    help="The engine's GPUs, by index in PCI order or UUID: 0,1.  [default: CUDA_VISIBLE_DEVICES, else all]",
)
@click.option("--label", "labels", type=PAIR, multiple=True, metavar="K=V", help="Free label; repeatable.")
@click.option("--usd-per-gpu-hour", type=float, metavar="USD", help="Price of one GPU.")
@click.option(
    "--interval",
    "interval_s",
    type=DURATION,
    metavar="T",
    help="Between heartbeats: 500ms, 5s.  [default: what the control plane asks for]",
)
@click.option(
    "--engine-timeout",
    "engine_timeout_s",
    type=DURATION,
    default=0.0,
    metavar="T",
    help="Give up on an engine that is not ready.  [default: 0, wait for ever]",
)
@click.option(
    "--connect-timeout",
    "connect_timeout_s",
    type=DURATION,
    default=0.0,
    metavar="T",
    help="Give up if the first registration does not succeed.  [default: 0, try for ever]",
)
@click.option("--once", is_flag=True, help="Register, send one heartbeat and leave: checks the set-up.")
@click.option(
    "--ca-cert", "ca_file", default="", metavar="FILE", help="Authority of the control plane (TLS)."
)
@click.option("--cert", "certificate_file", default="", metavar="FILE", help="Own certificate chain (mTLS).")
@click.option("--key", "private_key_file", default="", metavar="FILE", help="Its private key.")
@click.option("--insecure", is_flag=True, help="Speak plaintext, even to another host.")
@click.option(
    "--engine-api-key",
    default="",
    envvar="SAGECP_ENGINE_API_KEY",
    show_envvar=True,
    help="Key for the engine's /v1 pages. Prefer the variable: others can read a command line.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option(
    "--log-format", type=click.Choice(["auto", "json", "console"]), default="auto", show_default=True
)
@debug_option
def agent(log_level: str, log_format: str, labels: tuple[tuple[str, str], ...], **settings: Any) -> int:  # noqa: ANN401 - see AgentConfig
    """Register a vLLM server at the control plane and keep its heart beating.

    Waits for the engine, finds out what it serves, reports its metrics and GPUs,
    reconnects by itself, and takes the instance out of the fleet on SIGTERM.
    """
    from sagecp.agent.config import AgentConfig
    from sagecp.agent.daemon import run_agent
    from sagecp.core.errors import InvalidRequestError
    from sagecp.log import configure_logging
    from sagecp.runtime.event_loop import run

    try:
        config = AgentConfig(labels=dict(labels), **settings).validate()
    except InvalidRequestError as error:
        lines = [f"{violation.field} {violation.description}" for violation in error.violations]
        text = lines[0] if len(lines) == 1 else "\n  ".join(["these do not work:", *lines])
        raise CliError(text, hint="sagecp agent --help", exit_code=ExitCode.INVALID) from None
    configure_logging(log_level, log_format)

    async def main() -> int:
        import asyncio
        import signal

        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        task = asyncio.ensure_future(run_agent(config, stop))

        def on_signal() -> None:
            if stop.is_set():
                task.cancel()  # Asked twice: at once, then.
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            return await task
        except asyncio.CancelledError:
            return ExitCode.INTERRUPTED

    return run(main())
