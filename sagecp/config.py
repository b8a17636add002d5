"""Configuration, validated once and then frozen.

A TOML file has one table per class below; command-line flags win over it.
Parameters of policies, strategies and balancers are in ``[scheduler.parameters]``,
under their own names in quotes or as tables within it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.prices import GpuPrices
from sagecp.core.settings import PARAMETERS

DEFAULT_PORT = 50051


class ConfigError(InvalidRequestError):
    """The configuration is not usable; names every bad setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the control plane talks to engines. Times in seconds.

    Attributes:
        connect_timeout_s: From the call to an open connection.
        first_token_timeout_s: From the request being sent to its first output.
        inter_token_timeout_s: Between two pieces of output.
        health_timeout_s: For a health probe.
        token_ids: Ask engines for token ids beside the text.
    """

    connect_timeout_s: float = 5.0
    first_token_timeout_s: float = 300.0
    inter_token_timeout_s: float = 60.0
    health_timeout_s: float = 5.0
    token_ids: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Loops and bounds of the runtime. Times in seconds.

    Attributes:
        scheduling_interval_s: Safety net behind event-driven scheduling.
        health_interval_s: Between probes of instances without an agent.
        monitoring_interval_s: Between measurements of the event loop's lag.
        heartbeat_interval_s: What agents are told.
        drain_timeout_s: How long running streams may go on after SIGTERM.
        retained_request_count: Most ended requests kept for GetRequest and Stream.
        retained_bytes: Most bytes of output kept for ended requests.
        retention_s: How long an ended request is kept.
        token_coalescing_window_s: After the first chunk, how long a stream may
            collect tokens before it sends them. 0 sends at once; 0.05 to 0.1
            saves the server about half its CPU per paced token.
        max_streams_per_request: Most readers of one request at once.
        reader_stall_timeout_s: A reader that takes nothing for so long is detached.
        max_unread_bytes: Most bytes of messages that wait for stalled readers, over
            all streams; beyond it those that have stalled longest are detached.
    """

    scheduling_interval_s: float = 0.1
    health_interval_s: float = 10.0
    monitoring_interval_s: float = 5.0
    heartbeat_interval_s: float = 1.0
    drain_timeout_s: float = 30.0
    retained_request_count: int = 10_000
    retained_bytes: int = 256 << 20
    retention_s: float = 3600.0
    token_coalescing_window_s: float = 0.0
    max_streams_per_request: int = 16
    reader_stall_timeout_s: float = 30.0
    max_unread_bytes: int = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig:
    """Where accepted requests are written down, and how much is kept. Times in seconds.

    Attributes:
        enabled: Whether there is a journal. Without one, a restart forgets everything.
        path: The file; empty: ``sagecp/journal-PORT.db`` in the user's state folder
            (``$XDG_STATE_HOME``, or ``~/.local/state``), and none where the port is 0.
        retention_s: How long an ended request's id, state and usage are kept.
        max_ended_count: Most ended requests kept, oldest let go of first.
        output_retention_s: How long an ended request's output is kept.
        max_output_bytes: Most output kept of ended requests, oldest let go of first.
        ballast_bytes: Room held on the disk and given up when it is full, so that
            what was accepted can still be written down. 0: none.
        max_pending_bytes: Most that may wait to be written; beyond it new requests are refused.
    """

    enabled: bool = True
    path: str = ""
    retention_s: float = 86_400.0
    max_ended_count: int = 500_000
    output_retention_s: float = 3600.0
    max_output_bytes: int = 256 << 20
    ballast_bytes: int = 8 << 20
    max_pending_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """TLS of the gRPC port. All empty: plaintext.

    Attributes:
        certificate_file: PEM chain of the server.
        private_key_file: PEM key of the server.
        client_ca_file: PEM of the authorities whose client certificates are
            required (mTLS). Empty: no client certificate is asked for.
    """

    certificate_file: str = ""
    private_key_file: str = ""
    client_ca_file: str = ""

    @property
    def enabled(self) -> bool:
        """Whether the port speaks TLS."""
        return bool(self.certificate_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig:
    """The web console on the port of the metrics.

    Attributes:
        enabled: Whether the port has a console, beside the metrics.
        actions: Whether one may drain, resume and change the policy from it, and not only
            look. Only where nobody but this machine can reach the port: it knows no users.
        interval_s: Between two pictures that viewers are sent.
        max_viewer_count: Most pages that may be open at once.
    """

    enabled: bool = True
    actions: bool = False
    interval_s: float = 1.0
    max_viewer_count: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """What the planner is told of the fleet.

    Attributes:
        models: A checkpoint's folder, or its ``config.json``, by the name a model is served under.
            Public models are known by their names.
    """

    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Traces of requests over OpenTelemetry. Needs the extra ``otel``.

    Attributes:
        otlp_endpoint: URL of a collector's OTLP port for gRPC, such as
            ``http://127.0.0.1:4317``; ``https`` uses TLS. Empty: no traces.
        sample_ratio: Share of requests to trace, 0 to 1, of those whose caller
            did not decide; a caller's own trace context decides for its requests.
        service_name: What traces call this control plane.
        export_timeout_s: How long a batch may take to be sent.
    """

    otlp_endpoint: str = ""
    sample_ratio: float = 1.0
    service_name: str = "sagecp"
    export_timeout_s: float = 10.0

    @property
    def enabled(self) -> bool:
        """Whether requests are traced."""
        return bool(self.otlp_endpoint)

    def violations(self) -> list[FieldViolation]:
        """Return what is wrong with it."""
        found = []
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            found.append(
                FieldViolation(
                    "tracing.otlp_endpoint",
                    f"{self.otlp_endpoint!r} is not a URL; give http or https, a host and a port, "
                    "such as http://127.0.0.1:4317",
                )
            )
        if not self.sample_ratio <= 1.0:
            found.append(
                FieldViolation(
                    "tracing.sample_ratio", f"is {self.sample_ratio:g}; must be 0 to 1, it is a share"
                )
            )
        if not self.service_name:
            found.append(FieldViolation("tracing.service_name", "is empty; give one, or leave it out"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything `sagecp serve` needs.

    Attributes:
        listen: Host and port; port 0 takes a free one. Only loopback unless
            TLS is on or ``insecure_listen`` is set.
        insecure_listen: Allow plaintext on an address that others can reach.
        metrics_listen: Host and port of the Prometheus endpoint and the web console; empty:
            none. Only loopback unless ``insecure_listen`` is set: it is plain HTTP.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``json``, ``console`` or ``auto``.
        max_message_bytes: Largest message accepted.
        max_concurrent_rpcs: Most RPCs at once; further ones get RESOURCE_EXHAUSTED.
        max_connections: Most connections at once.
    """

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"
    insecure_listen: bool = False
    metrics_listen: str = ""
    log_level: str = "info"
    log_format: str = "auto"
    max_message_bytes: int = 4 << 20
    max_concurrent_rpcs: int = 40_000
    max_connections: int = 12_000
    tls: TlsConfig = field(default_factory=TlsConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    journal: JournalConfig = field(default_factory=JournalConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    prices: GpuPrices = field(default_factory=GpuPrices)
    planner: PlannerConfig = field(default_factory=PlannerConfig)

    def validate(self) -> ServerConfig:
        """Return self if every setting is usable.

        Raises:
            ConfigError: Names every setting that is not.
        """
        violations: list[FieldViolation] = []
        host = _check_address("listen", self.listen, violations)
        if host and not is_loopback(host) and not self.tls.enabled and not self.insecure_listen:
            violations.append(
                FieldViolation(
                    "listen",
                    f"{self.listen} can be reached by others and has no TLS; give a certificate and key "
                    "(--tls-cert, --tls-key), listen on 127.0.0.1, or accept the risk with --insecure-listen",
                )
            )
        if self.metrics_listen:
            host = _check_address("metrics_listen", self.metrics_listen, violations)
            if host and not is_loopback(host) and not self.insecure_listen:
                violations.append(
                    FieldViolation(
                        "metrics_listen",
                        f"{self.metrics_listen} can be reached by others and is plain HTTP; "
                        "listen on 127.0.0.1, or accept the risk with --insecure-listen",
                    )
                )
            if host and not is_loopback(host) and self.console.actions:
                violations.append(
                    FieldViolation(
                        "console.actions",
                        f"would let everybody who reaches {self.metrics_listen} act; "
                        "let it listen on 127.0.0.1, or leave actions off",
                    )
                )
        if bool(self.tls.certificate_file) != bool(self.tls.private_key_file):
            violations.append(
                FieldViolation("tls", "a certificate and its private key go together; give both")
            )
        if self.tls.client_ca_file and not self.tls.certificate_file:
            violations.append(
                FieldViolation("tls.client_ca_file", "needs the server's own certificate and key")
            )
        for name in ("certificate_file", "private_key_file", "client_ca_file"):
            path = getattr(self.tls, name)
            if path and not Path(path).is_file():
                violations.append(FieldViolation(f"tls.{name}", f"{path} is not a file that can be read"))
        for prefix, section in (
            ("", self),
            ("runtime.", self.runtime),
            ("engine.", self.engine),
            ("scheduler.", self.scheduler),
            ("scheduler.health.", self.scheduler.health),
            ("journal.", self.journal),
            ("tracing.", self.tracing),
            ("console.", self.console),
        ):
            violations += _check_numbers(prefix, section)
        violations += _check_journal(self.journal, self.max_message_bytes)
        violations += self.tracing.violations()
        violations += [
            FieldViolation(f"prices.{each.field}", each.description) for each in self.prices.violations()
        ]
        violations += [
            FieldViolation(f"scheduler.queue_shares.{each.field}", each.description)
            for each in self.scheduler.queue_shares.violations()
        ]
        violations += [
            FieldViolation(f"scheduler.health.{each.field}", each.description)
            for each in self.scheduler.health.violations()
        ]
        violations += [
            FieldViolation(f"scheduler.{each.field}", each.description)
            for each in PARAMETERS.violations(self.scheduler.parameters)
        ]
        if self.log_level not in {"debug", "info", "warning", "error"}:
            violations.append(
                FieldViolation("log_level", f"{self.log_level!r}; choose debug, info, warning or error")
            )
        if self.log_format not in {"json", "console", "auto"}:
            violations.append(
                FieldViolation("log_format", f"{self.log_format!r}; choose json, console or auto")
            )
        if violations:
            raise ConfigError(violations)
        return self


_ZERO_ALLOWED = {
    "drain_timeout_s",
    "token_coalescing_window_s",
    "seed",
    "retained_request_count",
    "retained_bytes",
    "output_retention_s",
    "max_output_bytes",
    "ballast_bytes",
    "sample_ratio",
}


def _check_numbers(prefix: str, section: Any) -> list[FieldViolation]:  # noqa: ANN401 - any section
    violations = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low_is_fine = item.name in _ZERO_ALLOWED
        if math.isnan(value) or value < 0 or (value == 0 and not low_is_fine):
            bound = "0 or more" if low_is_fine else "above 0"
            violations.append(FieldViolation(f"{prefix}{item.name}", f"is {value}; must be {bound}"))
    return violations


def _check_journal(journal: JournalConfig, max_message_bytes: int) -> list[FieldViolation]:
    violations = []
    if journal.path and Path(journal.path).is_dir():
        violations.append(FieldViolation("journal.path", f"{journal.path} is a folder; name a file in it"))
    if 0 < journal.retention_s < journal.output_retention_s:
        violations.append(
            FieldViolation(
                "journal.output_retention_s",
                f"is {journal.output_retention_s:g}, longer than requests themselves are kept: "
                f"lower it, or raise retention_s ({journal.retention_s:g})",
            )
        )
    if 0 < journal.max_pending_bytes < max_message_bytes:
        violations.append(
            FieldViolation(
                "journal.max_pending_bytes",
                f"is {journal.max_pending_bytes}, less than one message may have; "
                f"give at least max_message_bytes ({max_message_bytes})",
            )
        )
    return violations


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port``.

    Raises:
        ValueError: The text is not an address.
    """
    host, separator, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit()
    if not separator or not host or not is_number or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT, for example 127.0.0.1:{DEFAULT_PORT}")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r}: put an IPv6 address in brackets, for example [::1]:{DEFAULT_PORT}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only be reached from this machine."""
    if host in {"localhost", "ip6-localhost"}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(name: str, address: str, violations: list[FieldViolation]) -> str:
    try:
        return split_address(address)[0]
    except ValueError as error:
        violations.append(FieldViolation(name, str(error)))
        return ""


def load_config(path: Path) -> ServerConfig:
    """Read a TOML file. Not validated yet: flags may still change it.

    Raises:
        ConfigError: The file cannot be read, or holds an unknown or mistyped setting.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([FieldViolation(str(path), f"cannot be read as TOML: {error}")]) from error
    violations: list[FieldViolation] = []
    scheduler = tables.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.pop("prices", None) is not None:
        # The core has them among its own, so that a log of its events is complete.
        violations.append(FieldViolation("scheduler.prices", "is not a setting; prices are in [prices]"))
    config = _build(ServerConfig, tables, "", violations)
    if violations:
        raise ConfigError(violations)
    return typing.cast("ServerConfig", config)


def _build(
    kind: type[Any], table: Mapping[str, Any], prefix: str, violations: list[FieldViolation]
) -> object:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        expected = hints.get(name)
        where = f"{prefix}{name}"
        if expected is None:
            known = ", ".join(sorted(hints))
            violations.append(FieldViolation(where, f"is not a setting; known here: {known}"))
        elif dataclasses.is_dataclass(expected):
            if isinstance(value, Mapping):
                values[name] = _build(typing.cast("type[Any]", expected), value, f"{where}.", violations)
            else:
                violations.append(FieldViolation(where, f"must be a table [{where}]"))
        elif typing.get_origin(expected) is Mapping:
            if isinstance(value, Mapping):
                is_text = typing.get_args(expected)[1] is str
                values[name] = (_texts if is_text else _flat_numbers)(value, where, violations)
            else:
                violations.append(FieldViolation(where, f"must be a table [{where}]"))
        elif expected is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif type(value) is not expected:
            violations.append(
                FieldViolation(where, f"must be {expected.__name__}, and is {type(value).__name__} {value!r}")
            )
        else:
            values[name] = value
    return kind(**values) if not violations else None


def _texts(table: Mapping[str, Any], where: str, violations: list[FieldViolation]) -> dict[str, str]:
    """Return the texts of a table."""
    for name, value in table.items():
        if not isinstance(value, str):
            hint = "; put names with dots in quotes" if isinstance(value, Mapping) else ""
            violations.append(
                FieldViolation(f"{where}[{name!r}]", f"must be text, and is {type(value).__name__}{hint}")
            )
    return {name: value for name, value in table.items() if isinstance(value, str)}


def _flat_numbers(table: Mapping[str, Any], where: str, violations: list[FieldViolation]) -> dict[str, float]:
    """Return the numbers of a table by dotted name: ``"a.b" = 1`` and ``a.b = 1`` are the same."""
    numbers: dict[str, float] = {}
    pending = list(table.items())
    while pending:
        name, value = pending.pop(0)
        field = f"{where}[{name!r}]"
        if isinstance(value, Mapping):
            pending += [(f"{name}.{inner}", below) for inner, below in value.items()]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            violations.append(
                FieldViolation(field, f"must be a number, and is {type(value).__name__} {value!r}")
            )
        elif name in numbers:
            violations.append(FieldViolation(field, "is given twice: in quotes, and as a table"))
        else:
            numbers[name] = float(value)
    return numbers
