"""The gRPC server: everything is constructed here, and ends here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import ssl
from pathlib import Path

import grpc
import grpc.experimental.aio  # channelz looks for the class under this name
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sagecp.config import ConfigError, ServerConfig, TlsConfig, TracingConfig, is_loopback, split_address
from sagecp.console.app import ConsoleServer
from sagecp.core.errors import FieldViolation, SageError
from sagecp.core.types import ExecutionInstance
from sagecp.rpc.grpc_server import make_grpc_server
from sagecp.rpc.interceptors.access_log import AccessLog
from sagecp.rpc.interceptors.call import CallInterceptor, CallObserver
from sagecp.rpc.reader_watch import ReaderWatch
from sagecp.rpc.servicers.admin import AdminServicer
from sagecp.rpc.servicers.fleet import FleetServicer
from sagecp.rpc.servicers.inference import InferenceServicer
from sagecp.rpc.telemetry.exporter import MetricsExporter
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.model_files import read_models
from sagecp.runtime.policy_evaluation import PolicyEvaluator
from sagecp.runtime.store.open_store import make_load_file, make_store
from sagecp.runtime.tracing.base import RequestTracer
from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)

logger = logging.getLogger(__name__)

SERVICE_NAMES = (
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    fleet_service_pb2.DESCRIPTOR.services_by_name["FleetService"].full_name,
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
# How long streams whose requests have ended may take to send their last messages.
_FLUSH_TIMEOUT_S = 2.0


class ListenError(SageError):
    """The server cannot listen where it was told to."""


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the options of the gRPC server; each guards against something that was seen to happen."""
    return [
        # Two servers on one port would each get half of the calls.
        ("grpc.so_reuseport", 0),
        # A connection that never speaks TLS or HTTP/2 is closed.
        ("grpc.server_handshake_timeout_ms", 5_000),
        # A frozen peer: the default lets a ping wait for 60 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        # Allow clients to ping as often as our own do, without calls as well.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Bursts: beyond the default, calls are CANCELLED without a reason.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.max_concurrent_streams", 1_000),
        # It counts streams that have ended on the wire and not yet here, and so refuses
        # well-behaved clients that keep to the limit above: 3 of 100 calls in a burst of 2,000.
        # The bounds on pending requests hold against peers that open and reset streams.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", max(config.max_message_bytes, 4 << 20)),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.absolute_max_metadata_size", 16 << 10),
    ]


class ControlPlaneServer:
    """A control plane behind a gRPC port.

    Args:
        config: Validated configuration.
        manager: The control plane to serve; default: one made from ``config``.
        policy_evaluator: For that one: replays the past for the ``adaptive`` policy.
    """

    def __init__(
        self,
        config: ServerConfig,
        manager: ControlPlaneManager | None = None,
        policy_evaluator: PolicyEvaluator | None = None,
    ) -> None:
        self.config = config
        self.manager = manager or ControlPlaneManager(
            scheduler=dataclasses.replace(config.scheduler, prices=config.prices),
            runtime=config.runtime,
            engine=config.engine,
            policy_evaluator=policy_evaluator,
            store=make_store(config.journal, split_address(config.listen)[1]),
            models=read_models(config.planner.models),
            load_file=make_load_file(config.journal, split_address(config.listen)[1]),
            tracer=self._make_tracer(config.tracing),
        )
        self.exporter = MetricsExporter(self.manager)
        self.port = 0
        self._health = health.aio.HealthServicer()
        self._fleet = FleetServicer(self.manager)
        self._admin = AdminServicer(self.manager)
        self._readers = ReaderWatch(config.runtime.reader_stall_timeout_s, config.runtime.max_unread_bytes)
        self._watching: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._console: ConsoleServer | None = None

    def _make_tracer(self, config: TracingConfig) -> RequestTracer | None:
        if not config.enabled:
            return None
        try:
            from sagecp.runtime.tracing.otel import OtelRequestTracer
        except ImportError as error:
            raise ConfigError(
                [
                    FieldViolation(
                        "tracing.otlp_endpoint",
                        f"needs OpenTelemetry ({error.name} is not installed); "
                        "install sagecp with its 'otel' extra",
                    )
                ]
            ) from error

        def instance_of(instance_id: str) -> ExecutionInstance | None:
            record = self.manager.scheduler.fleet.find(instance_id)
            return None if record is None else record.spec

        return OtelRequestTracer(config, instance_of)

    @property
    def address(self) -> str:
        """Host and port that the server listens on."""
        host = split_address(self.config.listen)[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def metrics_port(self) -> int:
        """Port of the metrics and the web console; 0: there is none."""
        return self._console.port if self._console is not None else 0

    async def start(self) -> None:
        """Listen, and answer.

        Raises:
            ListenError: The address is in use or not ours; or the TLS files are not usable.
        StoreError: The journal cannot be opened, or was damaged.
        """
        observers: list[CallObserver] = [AccessLog(), self.exporter.calls]
        server = make_grpc_server(
            interceptors=[CallInterceptor(observers, traced=self.config.tracing.enabled)],
            options=channel_options(self.config),
            maximum_concurrent_rpcs=self.config.max_concurrent_rpcs,
        )
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self.manager, self._readers), server
        )
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, server)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME]
        host, _ = split_address(self.config.listen)
        if is_loopback(host) or self.config.tls.client_ca_file:
            # It shows every peer's address: not for strangers.
            channelz.add_channelz_servicer(server)
            names.append("grpc.channelz.v1.Channelz")
        reflection.enable_server_reflection(names, server)
        self.port = self._bind(server)
        await self._start_console()
        await self.manager.start()
        await server.start()
        self._server = server
        self._watching = asyncio.create_task(self._readers.run(), name="sagecp-readers")
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving", extra={"address": self.address, "tls": self.config.tls.enabled})

    def _bind(self, server: grpc.aio.Server) -> int:
        listen = self.config.listen
        try:
            if self.config.tls.enabled:
                port = server.add_secure_port(listen, _credentials(self.config.tls))
            else:
                port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise ListenError(
                f"cannot listen on {listen}: the port is in use, or the address is not this machine's; "
                "choose another with --listen"
            ) from error
        if port == 0:
            raise ListenError(f"cannot listen on {listen}: check the address and the TLS files")
        return port

    async def _start_console(self) -> None:
        if not self.config.metrics_listen:
            return
        host, port = split_address(self.config.metrics_listen)
        try:
            self._console = ConsoleServer(self.manager, self.config.console, self.exporter.render)
            await self._console.start(host, port)
        except OSError as error:
            raise ListenError(
                f"cannot serve metrics on {self.config.metrics_listen}: {error.strerror}; "
                "choose another with --metrics-listen"
            ) from error

    async def stop(self, drain_timeout_s: float | None = None) -> bool:
        """Stop in order: health says so, running requests finish, then everything closes.

        Args:
            drain_timeout_s: How long requests may go on; default: as configured.

        Returns:
            Whether every request ended by itself.
        """
        if drain_timeout_s is None:
            drain_timeout_s = self.config.runtime.drain_timeout_s
        await self._health.enter_graceful_shutdown()
        logger.info("draining", extra={"requests": self.manager.scheduler.live_count})
        drained = await self.manager.drain(drain_timeout_s)
        if not drained:
            logger.warning(
                "drain timed out; ending what is left",
                extra={"requests": self.manager.scheduler.live_count, "timeout_s": drain_timeout_s},
            )
        # First the requests, so that their streams say how they ended; then the streams.
        await self.manager.stop()
        self._fleet.close_heartbeats()
        self._admin.close_watches()
        if self._server is not None:
            await self._server.stop(_FLUSH_TIMEOUT_S)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._console is not None:
            await self._console.stop()
        logger.info("stopped", extra={"drained": drained})
        return drained


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    try:
        key = Path(tls.private_key_file).read_bytes()
        chain = Path(tls.certificate_file).read_bytes()
        client_ca = Path(tls.client_ca_file).read_bytes() if tls.client_ca_file else None
    except OSError as error:
        raise ListenError(f"cannot read {error.filename}: {error.strerror}") from error
    _check_pem(tls)
    return grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _check_pem(tls: TlsConfig) -> None:
    """Make sure that the TLS files are what they should be: grpc fails as if the port were in use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password function, an encrypted key would ask for one on the terminal.
        context.load_cert_chain(tls.certificate_file, tls.private_key_file, password=lambda: "")
    except ssl.SSLError as error:
        raise ListenError(
            f"the TLS certificate {tls.certificate_file} and key {tls.private_key_file} cannot be used "
            f"({error.reason or error}); give a PEM chain and the unencrypted key that belongs to it"
        ) from error
    if tls.client_ca_file:
        try:
            context.load_verify_locations(tls.client_ca_file)
        except ssl.SSLError as error:
            raise ListenError(
                f"the TLS authorities in {tls.client_ca_file} cannot be used ({error.reason or error}); "
                "give PEM certificates"
            ) from error


async def run_server(
    config: ServerConfig,
    ready: asyncio.Future[ControlPlaneServer] | None = None,
    policy_evaluator: PolicyEvaluator | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain and return the exit code.

    A second signal ends the drain at once.

    Args:
        config: The configuration.
        ready: Gets the server once it answers.
        policy_evaluator: Replays the past for the ``adaptive`` policy.

    Raises:
        ConfigError: The configuration is not usable.
        ListenError: The server cannot listen where it was told to.
    """
    server = ControlPlaneServer(config.validate(), policy_evaluator=policy_evaluator)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    insisted = asyncio.Event()

    def on_signal() -> None:
        (insisted if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        if ready is not None and not ready.done():
            ready.set_result(server)
        await asked.wait()
        stopping = loop.create_task(server.stop())
        hurry = loop.create_task(insisted.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            stopping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
            await server.stop(0.0)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return 0
