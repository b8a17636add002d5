"""The command ``engine-sim``: a simulated vLLM in a process of its own."""

from __future__ import annotations

import asyncio
import errno
import signal
from typing import Any

import click

from sagecp.sim.misbehaviour import Misbehaviour, MisbehaviourError
from sagecp.sim.profiles import FIXED_PROFILE, PROFILES

_MILLISECONDS = 1000.0

_EPILOG = """
Example: an 8B model on an H100, whose first three requests fail:

\b
  sagecp engine-sim --port 8000 --model llama-3-8b --reject-first 3
  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "llama-3-8b", "prompt": "Hello", "max_tokens": 8}'

Faults can also be changed while it runs: POST JSON such as
{"hang_after_tokens": 4} to /sim/misbehave; null turns a fault off.
"""


class AddressError(click.ClickException):
    """The address cannot be listened on."""

    exit_code = 3


def _fault_options(command: Any) -> Any:  # noqa: ANN401 - click decorates functions and commands alike
    """Add one option for each switch of :class:`Misbehaviour`."""
    tokens = click.IntRange(min=0)
    options = [
        click.option("--die-after-tokens", type=tokens, help="Exit at once after N tokens of any stream."),
        click.option("--cut-after-tokens", type=tokens, help="Close a stream's connection after N tokens."),
        click.option("--eof-after-tokens", type=tokens, help="End a connection inside the answer after N."),
        click.option("--done-after-tokens", type=tokens, help="Send [DONE] without finish reason after N."),
        click.option("--error-after-tokens", type=tokens, help="Send an error event in a stream after N."),
        click.option("--abort-after-tokens", type=tokens, help="Finish with reason abort after N tokens."),
        click.option("--hang-after-tokens", type=tokens, help="Go silent after N tokens; health stays good."),
        click.option("--garbage-after-tokens", type=tokens, help="Send bytes that are no event after N."),
        click.option("--bad-json-after-tokens", type=tokens, help="Send an event that is no JSON after N."),
        click.option("--stream-fault-limit", type=tokens, help="Hit only the first N streams."),
        click.option("--stream-fault-marker", help="Hit only streams whose prompt contains this text."),
        click.option("--reject-status", type=click.IntRange(400, 599), help="Status of rejections [500]."),
        click.option("--reject-rate", type=click.FloatRange(0, 1), help="Share of requests rejected."),
        click.option("--reject-first", type=tokens, help="Reject the first N requests."),
        click.option("--slow-factor", type=float, help="Factor on the duration of every step."),
        click.option("--silent-health", is_flag=True, default=None, help="Never answer /health."),
        click.option("--stalled", is_flag=True, default=None, help="Make no progress; health stays good."),
        click.option(
            "--refuse-connections-s", type=click.FloatRange(min=0), help="Refuse connections for so long."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("engine-sim", epilog=_EPILOG)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--model", "models", multiple=True, required=True, help="Served model name; repeat for further names."
)
@click.option(
    "--profile",
    type=click.Choice(sorted(PROFILES)),
    help="Timing: a model and GPU, instant, or fixed.  [8b-h100, or fixed when times are given]",
)
@click.option("--speed", default=1.0, show_default=True, help="Factor on the pace of everything.")
@click.option("--ttft-ms", type=click.FloatRange(min=0), help="Fixed time to the first token.")
@click.option("--inter-token-ms", type=click.FloatRange(min=0), help="Fixed time between tokens.")
@click.option("--seed", default=0, show_default=True, help="Seed of the model's answers.")
@click.option("--endless-answers", is_flag=True, help="Sampled answers run to max_tokens, as greedy ones do.")
@click.option("--max-model-len", default=8192, show_default=True, help="Context length, in tokens.")
@click.option("--max-num-seqs", default=256, show_default=True, help="Requests that run at once.")
@click.option("--max-num-batched-tokens", default=2048, show_default=True, help="Token budget of a step.")
@click.option("--kv-tokens", type=click.IntRange(min=1), help="Tokens in the KV cache.  [the profile's]")
@click.option("--block-size", default=16, show_default=True, help="Tokens in a KV block.")
@click.option(
    "--prefix-caching/--no-prefix-caching", default=True, show_default=True, help="Reuse prompts' blocks."
)
@click.option(
    "--tensor-parallel-size", type=click.IntRange(min=1), help="GPUs it claims to use.  [the profile's]"
)
@click.option("--enable-lora", is_flag=True, help="Have pages that load and unload LoRA adapters.")
@click.option(
    "--max-loras", default=1, show_default=True, type=click.IntRange(min=1), help="As vLLM tells it."
)
@click.option("--max-num-queued-reqs", type=click.IntRange(min=1), help="Answer 503 beyond so many requests.")
@click.option(
    "--api-key", default="", envvar="SAGECP_ENGINE_API_KEY", show_envvar=True, help="Key that /v1 asks for."
)
@click.option(
    "--shutdown-timeout",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that running requests get on SIGTERM; 0 ends them with reason abort.",
)
@_fault_options
def engine_sim(
    host: str,
    port: int,
    models: tuple[str, ...],
    profile: str | None,
    speed: float,
    ttft_ms: float | None,
    inter_token_ms: float | None,
    seed: int,
    endless_answers: bool,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_tokens: int | None,
    block_size: int,
    prefix_caching: bool,
    tensor_parallel_size: int | None,
    enable_lora: bool,
    max_loras: int,
    max_num_queued_reqs: int | None,
    api_key: str,
    shutdown_timeout: float,
    **faults: Any,  # noqa: ANN401 - one per switch, checked there
) -> None:
    """Serve a simulated vLLM: same API, no GPU.

    Answers are made up but deterministic, timing follows a model of the
    engine, and faults can be switched on. SIGTERM stops it.
    """
    # Late, so that the help is fast.
    from sagecp.sim.server_config import EngineServerConfig

    fixed = ttft_ms is not None or inter_token_ms is not None
    try:
        given = {name: value for name, value in faults.items() if value is not None}
        config = EngineServerConfig(
            host=host,
            port=port,
            model_names=models,
            profile=profile or (FIXED_PROFILE if fixed else "8b-h100"),
            speed=speed,
            time_to_first_token_s=None if ttft_ms is None else ttft_ms / _MILLISECONDS,
            inter_token_s=None if inter_token_ms is None else inter_token_ms / _MILLISECONDS,
            seed=seed,
            endless_answers=endless_answers,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_token_capacity=kv_tokens,
            block_size=block_size,
            enable_prefix_caching=prefix_caching,
            tensor_parallel_size=tensor_parallel_size,
            enable_lora=enable_lora,
            max_loras=max_loras,
            max_num_queued_reqs=max_num_queued_reqs,
            api_key=api_key,
            misbehaviour=Misbehaviour().changed(given),
        )
    except (MisbehaviourError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    _run(config, shutdown_timeout)


def _run(config: Any, shutdown_timeout_s: float) -> None:  # noqa: ANN401 - EngineServerConfig, imported late
    from sagecp.sim.engine_process import run_engine_server
    from sagecp.sim.engine_server import EngineServer

    def announce(server: EngineServer) -> None:
        pace = config.profile if config.speed == 1 else f"{config.profile}, speed {config.speed:g}"
        names = ", ".join(config.model_names)
        click.echo(f"sagecp engine-sim: model {names} on {server.base_url} (profile {pace})")

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await run_engine_server(
            config, stop=stop, shutdown_timeout_s=shutdown_timeout_s, on_listening=announce
        )

    try:
        _run_async(serve)
    except OSError as error:
        where = f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            message = f"{where} is already in use; choose another --port, or 0 for a free one"
        else:
            message = f"cannot listen on {where}: {error.strerror or error}"
        raise AddressError(message) from error


def _run_async(main: Any) -> None:  # noqa: ANN401 - a coroutine function
    """Run on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
