"""What an agent is told, validated once and then frozen."""

from __future__ import annotations

import ipaddress
import math
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sagecp.agent.kv_events.address import AUTO, OFF, parse_address
from sagecp.core.errors import FieldViolation, InvalidRequestError

DEFAULT_CONTROL_PLANE = "127.0.0.1:50051"
MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 60.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Scheme, host and port of an engine; an engine has no path."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as a URL; an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> EngineAddress:
        """Read ``http://HOST:PORT`` or ``https://HOST:PORT``.

        Raises:
            ValueError: It is something else; says what is wrong with it.
        """
        hint = "give http or https, a host and a port, such as http://10.0.0.7:8000"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(f"{url!r} is not a URL; {hint}") from None
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of an engine; {hint}")
        if parts.username is not None or parts.path not in {"", "/"} or parts.query or parts.fragment:
            raise ValueError(f"has more than scheme, host and port; {hint}")
        if port == 0:
            raise ValueError(f"{url!r} has port 0; {hint}")
        return cls(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme])


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """An engine process that the agent owns.

    Attributes:
        command: What to run.
        max_restart_count: How often in a row it is started again. 0: for ever.
        stop_timeout_s: How long it gets to end by itself.
        log_file: What it writes is appended to this file; ``None``: passed on to standard output.
        restart_base_s: Bound of the wait before the first restart; it doubles.
        restart_cap_s: Largest bound.
        stable_s: Once healthy for so long, the next end counts as the first one.
        owns_port: Nobody else should listen where the engine is looked for; not so
            where that is a proxy in front of it.
    """

    command: tuple[str, ...]
    max_restart_count: int = 0
    stop_timeout_s: float = 30.0
    log_file: Path | None = None
    restart_base_s: float = 1.0
    restart_cap_s: float = 60.0
    stable_s: float = 60.0
    owns_port: bool = True

    def violations(self) -> list[FieldViolation]:
        """Return what is wrong with it, by flag."""
        found: list[FieldViolation] = []
        if not self.command or not self.command[0]:
            found.append(
                FieldViolation(
                    "--supervise",
                    "needs the command that starts the engine, behind --: "
                    "sagecp agent --supervise -- vllm serve MODEL --port 8000",
                )
            )
        elif shutil.which(self.command[0]) is None:
            found.append(
                FieldViolation(
                    "--supervise", f"cannot run {self.command[0]!r}: there is no such program on the PATH"
                )
            )
        if not 0 <= self.max_restart_count <= 1_000_000:
            found.append(
                FieldViolation(
                    "--max-restarts", f"is {self.max_restart_count}; must be 0 (for ever) to 1000000"
                )
            )
        if not 0 <= self.stop_timeout_s <= 3600:
            found.append(
                FieldViolation("--stop-timeout", f"is {self.stop_timeout_s:g}; must be 0 to 3600 seconds")
            )
        if self.log_file is not None and (self.log_file.is_dir() or not self.log_file.parent.is_dir()):
            found.append(FieldViolation("--engine-log", f"{self.log_file} cannot be a file to write to"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything `sagecp agent` needs. Times in seconds; ``None`` and empty mean: find out.

    Attributes:
        engine_url: Where the agent reaches the engine: scheme, host and port.
        control_plane: Host and port of the control plane.
        instance_id: Name in the fleet; default: host name and engine port.
        advertised_url: Where the control plane reaches the engine; default: ``engine_url``.
        model_name: Served name to register instead of the first that the engine lists.
        max_concurrent_request_count: Most requests the control plane puts on the engine.
        tensor_parallel_size: And the three after it: how the engine is spread over GPUs.
        gpus: Indices or UUIDs of the engine's GPUs.
        dcgm_exporter: ``off``; the URL of a DCGM exporter's page to read instead of asking
            the NVIDIA driver; or ``auto``: that of this host, where there is no driver.
        kv_events: ``off``; ``ENDPOINT`` or ``ENDPOINT,REPLAY_ENDPOINT`` of the engine's
            publisher of KV-cache events; or ``auto``: as the engine's command line says.
        labels: Free labels for filters.
        usd_per_gpu_hour: Price of one GPU.
        interval_s: Between heartbeats, instead of what the control plane asks for.
        engine_timeout_s: How long to wait for the engine at the start. 0: for ever.
        connect_timeout_s: How long to try to register for the first time. 0: for ever.
        once: Register, send one beat, leave again: a check of the set-up.
        insecure: Plaintext even to a control plane on another host.
        ca_file: PEM of the authorities that the control plane's certificate is
            checked against; default: gRPC's own list.
        certificate_file: PEM chain that the agent shows (mTLS).
        private_key_file: Its key.
        engine_api_key: Bearer token for the engine's ``/v1`` pages. Never shown or logged.
        supervision: The engine's process, where the agent owns it; ``None``: it does not.
    """

    engine_url: str
    control_plane: str = DEFAULT_CONTROL_PLANE
    instance_id: str = ""
    advertised_url: str = ""
    model_name: str = ""
    max_concurrent_request_count: int | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    expert_parallel_size: int | None = None
    gpus: tuple[str, ...] | None = None
    dcgm_exporter: str = "auto"
    kv_events: str = OFF
    labels: Mapping[str, str] = field(default_factory=dict)
    usd_per_gpu_hour: float | None = None
    interval_s: float | None = None
    engine_timeout_s: float = 0.0
    connect_timeout_s: float = 0.0
    once: bool = False
    insecure: bool = False
    ca_file: str = ""
    certificate_file: str = ""
    private_key_file: str = ""
    engine_api_key: str = field(default="", repr=False)
    supervision: Supervision | None = None

    @property
    def engine(self) -> EngineAddress:
        """The engine's address."""
        return EngineAddress.parse(self.engine_url)

    @property
    def advertised(self) -> EngineAddress:
        """The address that the control plane is told."""
        return EngineAddress.parse(self.advertised_url or self.engine_url)

    @property
    def effective_instance_id(self) -> str:
        """The id given, or one made of host name and port."""
        if self.instance_id:
            return self.instance_id
        name = re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname()) or "host"
        return f"{name[:120]}-{self.engine.port}"

    @property
    def uses_tls(self) -> bool:
        """Whether the connection to the control plane is encrypted.

        It is whenever a certificate is named, and to any other host unless
        ``insecure`` says otherwise.
        """
        if self.insecure:
            return False
        return bool(self.ca_file or self.certificate_file) or not is_loopback(
            split_address(self.control_plane)[0]
        )

    def validate(self) -> AgentConfig:
        """Return self if every setting is usable.

        Raises:
            InvalidRequestError: Names every flag whose value is not.
        """
        violations: list[FieldViolation] = []
        engine = _address_or_note("--engine", self.engine_url, violations)
        if self.advertised_url:
            _address_or_note("--advertise", self.advertised_url, violations)
        try:
            control_plane_host = split_address(self.control_plane)[0]
        except ValueError as error:
            violations.append(FieldViolation("--control-plane", str(error)))
        else:
            if (
                engine is not None
                and not self.advertised_url
                and is_loopback(engine.host)
                and not is_loopback(control_plane_host)
            ):
                violations.append(
                    FieldViolation(
                        "--advertise",
                        f"is needed: the control plane is on {control_plane_host} and cannot reach the "
                        f"engine at {engine.url}, an address of this machine alone; give the URL under which "
                        f"it can, such as http://{socket.gethostname()}:{engine.port}, and let the engine "
                        "listen there",
                    )
                )
        self._check_tls(violations)
        if self.supervision is not None:
            violations += self.supervision.violations()
        for flag, size in (
            ("--tensor-parallel-size", self.tensor_parallel_size),
            ("--pipeline-parallel-size", self.pipeline_parallel_size),
            ("--data-parallel-size", self.data_parallel_size),
            ("--expert-parallel-size", self.expert_parallel_size),
            ("--max-concurrency", self.max_concurrent_request_count),
        ):
            if size is not None and not 1 <= size <= 1_000_000:
                violations.append(FieldViolation(flag, f"is {size}; must be 1 to 1000000"))
        for flag, seconds in (
            ("--engine-timeout", self.engine_timeout_s),
            ("--connect-timeout", self.connect_timeout_s),
        ):
            if not (seconds >= 0 and math.isfinite(seconds)):
                violations.append(
                    FieldViolation(flag, f"is {seconds:g}; must be 0 (for ever) or more seconds")
                )
        if self.interval_s is not None and not MIN_INTERVAL_S <= self.interval_s <= MAX_INTERVAL_S:
            violations.append(
                FieldViolation(
                    "--interval",
                    f"is {self.interval_s:g}; must be {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds",
                )
            )
        price = self.usd_per_gpu_hour
        if price is not None and not (price >= 0 and math.isfinite(price)):
            violations.append(FieldViolation("--usd-per-gpu-hour", f"is {price:g}; must be 0 or more"))
        if self.dcgm_exporter not in {"auto", "off"} and not _is_page(self.dcgm_exporter):
            violations.append(
                FieldViolation(
                    "--dcgm-exporter",
                    f"is {self.dcgm_exporter!r}; must be auto, off or the URL of the exporter's page, "
                    "such as http://127.0.0.1:9400/metrics",
                )
            )
        if self.kv_events not in {AUTO, OFF}:
            try:
                parse_address(self.kv_events)
            except ValueError as error:
                violations.append(FieldViolation("--kv-events", str(error)))
        if violations:
            raise InvalidRequestError(violations)
        return self

    def _check_tls(self, violations: list[FieldViolation]) -> None:
        if bool(self.certificate_file) != bool(self.private_key_file):
            violations.append(FieldViolation("--cert", "a certificate and its --key go together; give both"))
        if self.insecure and (self.ca_file or self.certificate_file):
            violations.append(
                FieldViolation("--insecure", "contradicts --ca-cert and --cert; give one of them")
            )
        for flag, name in (
            ("--ca-cert", self.ca_file),
            ("--cert", self.certificate_file),
            ("--key", self.private_key_file),
        ):
            if name and not Path(name).is_file():
                violations.append(FieldViolation(flag, f"{name} is not a file that can be read"))


def _address_or_note(flag: str, url: str, violations: list[FieldViolation]) -> EngineAddress | None:
    try:
        return EngineAddress.parse(url)
    except ValueError as error:
        violations.append(FieldViolation(flag, str(error)))
        return None


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in _DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port``.

    Raises:
        ValueError: The text is not an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not HOST:PORT, for example {DEFAULT_CONTROL_PLANE}")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r}: put an IPv6 address in brackets, for example [::1]:50051")
    if "/" in host:
        raise ValueError(
            f"{address!r} is not HOST:PORT, for example {DEFAULT_CONTROL_PLANE}: leave out any scheme"
        )
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only be reached from this machine."""
    if host in {"localhost", "ip6-localhost"}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
