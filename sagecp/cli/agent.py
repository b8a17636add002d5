"""`sagecp agent`: the daemon beside an engine."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, PAIR, debug_option

_EPILOG = """\b
Exit codes: 0 stopped by a signal; 1 the supervised engine ended too often;
2 bad usage, or refused as invalid; 3 engine or control plane not reached in
time; 4 not permitted; 5 another agent owns the instance id; 130 interrupted
twice.

\b
Examples:
  sagecp agent --engine http://127.0.0.1:8000
  sagecp agent --engine http://127.0.0.1:8000 --advertise http://gpu7:8000 \\
      --control-plane cp.example.com:50051 --ca-cert ca.pem --cert gpu7.pem --key gpu7.key
  sagecp agent --engine left=http://127.0.0.1:8000 --gpus 0,1 \\
      --engine right=http://127.0.0.1:8001 --gpus 2,3
  sagecp agent --supervise -- vllm serve MODEL --port 8000
"""


def _parse_gpus(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, ...]]:
    return [_parse_gpu_list(value) for value in values]


def _parse_gpu_list(value: str) -> tuple[str, ...]:
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    for entry in entries:
        if not (entry.isascii() and (entry.isdigit() or entry.startswith(("GPU-", "MIG-")))):
            raise click.BadParameter(
                f"{entry!r} is neither an index nor a UUID; for example 0,1 or GPU-5fd4f087"
            )
    return tuple(dict.fromkeys(entries))


@click.command("agent", epilog=_EPILOG)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="[NAME=]URL",
    help="The engine, as seen from here, and its name in the fleet; repeat for all engines of a host.",
)
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
    "advertised_urls",
    multiple=True,
    metavar="URL",
    help="The engine, as seen from the control plane; once for each --engine.  [default: as --engine]",
)
@click.option(
    "--model",
    "model_names",
    multiple=True,
    help="Served name to register; once, or once for each --engine.  [default: the engine's first]",
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
    multiple=True,
    callback=_parse_gpus,
    metavar="LIST",
    help="The engine's GPUs, by index in PCI order or UUID: 0,1; once for each --engine.  "
    "[default: the engine's CUDA_VISIBLE_DEVICES, else those its processes hold, else the agent's, else all]",
)
@click.option(
    "--dcgm-exporter",
    default="auto",
    show_default=True,
    metavar="auto|off|URL",
    help="Page of a DCGM exporter to read instead of asking the NVIDIA driver; "
    "auto: this host's, where there is no driver.",
)
@click.option(
    "--kv-events",
    multiple=True,
    metavar="off|auto|ENDPOINT[,REPLAY]",
    help="Follow the engine's KV-cache events, such as tcp://127.0.0.1:5557, so that the control plane knows "
    "what is cached; auto: as the engine's command line says; once for each --engine.  [default: off]",
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
@click.option(
    "--supervise", is_flag=True, help="Start the engine by the COMMAND behind --, and again when it ends."
)
@click.option(
    "--max-restarts",
    "max_restart_count",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Give up on a supervised engine after N restarts in a row.  [default: 0, never]",
)
@click.option(
    "--stop-timeout",
    "stop_timeout_s",
    type=DURATION,
    default="30s",
    show_default=True,
    metavar="T",
    help="How long a supervised engine gets to end by itself.",
)
@click.option(
    "--engine-log",
    "engine_log",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Append what a supervised engine writes to FILE.  [default: standard output]",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@debug_option
def agent(
    log_level: str,
    log_format: str,
    labels: tuple[tuple[str, str], ...],
    engines: tuple[str, ...],
    instance_id: str,
    advertised_urls: tuple[str, ...],
    model_names: tuple[str, ...],
    gpus: list[tuple[str, ...]],
    kv_events: tuple[str, ...],
    supervise: bool,
    max_restart_count: int,
    stop_timeout_s: float,
    engine_log: str | None,
    command: tuple[str, ...],
    **settings: Any,  # noqa: ANN401 - see AgentConfig
) -> int:
    """Register vLLM servers at the control plane and keep their hearts beating.

    Waits for the engine, finds out what it serves, reports its metrics and GPUs,
    reconnects by itself, and takes the instance out of the fleet on SIGTERM. With
    --supervise it also starts the engine, and ends it last.
    """
    from pathlib import Path

    from sagecp.agent.config import Supervision
    from sagecp.agent.daemon import run_agents
    from sagecp.agent.settings import agent_configs
    from sagecp.core.errors import InvalidRequestError
    from sagecp.log import configure_logging
    from sagecp.runtime.event_loop import run

    try:
        if command and not supervise:
            raise CliError(
                f"got an unexpected argument {command[0]!r}; to start an engine, say --supervise -- COMMAND",
                hint="sagecp agent --help",
                exit_code=ExitCode.INVALID,
            )
        supervision = Supervision(
            command=command,
            max_restart_count=max_restart_count,
            stop_timeout_s=stop_timeout_s,
            log_file=Path(engine_log) if engine_log else None,
            owns_port=not engines,
        )
        configs = agent_configs(
            engines,
            instance_id=instance_id,
            advertised_urls=advertised_urls,
            model_names=model_names,
            gpus=gpus,
            kv_events=kv_events,
            supervision=supervision if supervise else None,
            common={"labels": dict(labels), **settings},
        )
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
        task = asyncio.ensure_future(run_agents(configs, stop))

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
