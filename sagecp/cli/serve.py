"""`sagecp serve`: the control plane."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, NUMBER_PAIR, debug_option

# Replays the past for the adaptive policy.
_EVALUATION_MODULE = "sagecp.sim.fleet.policy_evaluation"
# Option, and the setting it overrides: section (empty: the top) and name.
_SETTINGS = {
    "listen": ("", "listen"),
    "insecure_listen": ("", "insecure_listen"),
    "metrics_listen": ("", "metrics_listen"),
    "log_level": ("", "log_level"),
    "log_format": ("", "log_format"),
    "tls_cert": ("tls", "certificate_file"),
    "tls_key": ("tls", "private_key_file"),
    "client_ca": ("tls", "client_ca_file"),
    "scheduling_policy": ("scheduler", "scheduling_policy"),
    "routing_strategy": ("scheduler", "routing_strategy"),
    "load_balancer": ("scheduler", "load_balancer"),
    "max_queue": ("scheduler", "max_queued_request_count"),
    "drain_timeout": ("runtime", "drain_timeout_s"),
    "journal": ("journal", "path"),
    "coalesce": ("runtime", "token_coalescing_window_s"),
    "console_actions": ("console", "actions"),
    "otlp_endpoint": ("tracing", "otlp_endpoint"),
    "trace_sample_ratio": ("tracing", "sample_ratio"),
}


@click.command("serve")
@click.option("--config", "config_file", metavar="FILE", help="TOML file; flags win over it.")
@click.option("--listen", metavar="ADDR", help="Host and port; port 0 takes a free one.  [127.0.0.1:50051]")
@click.option(
    "--insecure-listen",
    is_flag=True,
    default=None,
    help="Allow plaintext on an address that others can reach.",
)
@click.option("--tls-cert", metavar="FILE", help="Certificate chain of the server, PEM.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--client-ca", metavar="FILE", help="Require client certificates of this authority (mTLS).")
@click.option("--scheduling-policy", metavar="NAME", help="Order of waiting requests.  [adaptive]")
@click.option("--routing-strategy", metavar="NAME", help="Choice among instances.  [load_balanced]")
@click.option("--load-balancer", metavar="NAME", help="How load_balanced balances.  [predicted_latency]")
@click.option(
    "--set",
    "parameters",
    multiple=True,
    type=NUMBER_PAIR,
    metavar="NAME=NUMBER",
    help="A parameter of these, on top of the file's; repeatable. `sagecp policy parameters` lists them.",
)
@click.option("--max-queue", type=int, metavar="N", help="Most requests that may wait.  [100000]")
@click.option(
    "--drain-timeout", type=DURATION, metavar="T", help="How long requests may go on after SIGTERM.  [30s]"
)
@click.option(
    "--journal",
    metavar="FILE|off",
    help="Where accepted requests are written down, to survive a restart.  "
    "[~/.local/state/sagecp/journal-PORT.db; off with port 0]",
)
@click.option(
    "--coalesce",
    type=DURATION,
    metavar="T",
    help="Collect tokens for so long before sending them; saves CPU.  [0s]",
)
@click.option(
    "--metrics-listen",
    metavar="ADDR",
    help="Prometheus endpoint and web console, such as 127.0.0.1:9464.  [none]",
)
@click.option(
    "--console-actions",
    is_flag=True,
    default=None,
    help="Let the web console drain, resume and change the policy, on this machine alone.",
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send traces to this OpenTelemetry collector (gRPC), such as http://127.0.0.1:4317.  [none]",
)
@click.option("--trace-sample-ratio", type=float, metavar="SHARE", help="Share of requests to trace.  [1]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[info]")
@click.option(
    "--log-format",
    type=click.Choice(["auto", "json", "console"]),
    help="auto: console on a terminal, else JSON.",
)
@debug_option
def serve(config_file: str | None, **flags: Any) -> int:  # noqa: ANN401 - see _SETTINGS
    """Run the control plane, until SIGTERM or Ctrl-C.

    Then it takes no new requests, lets running ones finish within the drain
    timeout, and exits 0; a second signal ends it at once. Durable requests that
    are left go on when it is started again. Only this machine can reach it
    unless TLS is on.
    """
    import sys

    from sagecp.config import ConfigError, ServerConfig, load_config
    from sagecp.core.errors import SageError
    from sagecp.log import configure_logging
    from sagecp.rpc.server import ListenError, run_server
    from sagecp.runtime.event_loop import run
    from sagecp.runtime.policy_evaluation import EvaluationProcess
    from sagecp.runtime.store.base import StoreCorruptError, StoreError

    try:
        config = load_config(_path(config_file)) if config_file else ServerConfig()
        config = _with_flags(config, flags).validate()
        configure_logging(config.log_level, config.log_format)
        evaluator = EvaluationProcess([sys.executable, "-m", _EVALUATION_MODULE])
        return run(run_server(config, policy_evaluator=evaluator))
    except ConfigError as error:
        raise CliError(
            _violations_text(error), hint="sagecp serve --help", exit_code=ExitCode.INVALID
        ) from error
    except ListenError as error:
        raise CliError(str(error), exit_code=ExitCode.UNREACHABLE) from error
    except StoreCorruptError as error:
        raise CliError(str(error), exit_code=ExitCode.NOT_FOUND_OR_CONFLICT) from error
    except StoreError as error:
        advice = "name another file with --journal FILE, or keep none with --journal off"
        raise CliError(f"{error}; {advice}", exit_code=ExitCode.NOT_FOUND_OR_CONFLICT) from error
    except SageError as error:
        # Names of policies and the like, which only the registries know.
        raise CliError(str(error), exit_code=ExitCode.INVALID) from error


def _path(name: str) -> Any:  # noqa: ANN401 - a Path, imported late
    from pathlib import Path

    return Path(name)


def _with_flags(config: Any, flags: dict[str, Any]) -> Any:  # noqa: ANN401 - a ServerConfig, imported late
    """Return the configuration with the flags that were given."""
    changes: dict[str, dict[str, Any]] = {}
    for flag, (section, name) in _SETTINGS.items():
        if flags[flag] is not None:
            changes.setdefault(section, {})[name] = flags[flag]
    if flags["parameters"]:
        merged = {**config.scheduler.parameters, **dict(flags["parameters"])}
        changes.setdefault("scheduler", {})["parameters"] = merged
    if changes.get("journal", {}).get("path") == "off":
        changes["journal"] = {"enabled": False}
    elif "journal" in changes:
        changes["journal"]["enabled"] = True
    top = changes.pop("", {})
    if top.get("metrics_listen") == "off":
        top["metrics_listen"] = ""
    for section, values in changes.items():
        top[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **top)


def _violations_text(error: Any) -> str:  # noqa: ANN401 - a ConfigError
    flags = {f"{section}.{name}".lstrip("."): flag for flag, (section, name) in _SETTINGS.items()}
    lines = []
    for each in error.violations:
        flag = flags.get(each.field)
        where = f"{each.field} (--{flag.replace('_', '-')})" if flag else each.field
        lines.append(f"{where}: {each.description}")
    if len(lines) == 1:
        return lines[0]
    return "the configuration is not usable:\n" + "\n".join(f"  {line}" for line in lines)
