"""The way to the control plane: one channel for all engines of an agent, and the calls of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc

from sagecp.agent.config import AgentConfig
from sagecp.agent.errors import EXIT_INVALID, AgentError, ControlPlaneLostError, judge
from sagecp.agent.heartbeat import HeartbeatLane, HeartbeatStream
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2
from sagecp.version import __version__

_REGISTER_TIMEOUT_S = 10.0

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a frozen peer is noticed after a minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Each connection is a new one: no address list or backoff left from the one before.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.primary_user_agent", f"sagecp-agent/{__version__}"),
]


def open_channel(config: AgentConfig) -> grpc.aio.Channel:
    """Return a new channel to the control plane. Reads the certificates anew: they may be rotated.

    Raises:
        AgentError: A certificate or key cannot be read.
    """
    if not config.uses_tls:
        return grpc.aio.insecure_channel(config.control_plane, options=_CHANNEL_OPTIONS)
    try:
        authorities = Path(config.ca_file).read_bytes() if config.ca_file else None
        chain = Path(config.certificate_file).read_bytes() if config.certificate_file else None
        key = Path(config.private_key_file).read_bytes() if config.private_key_file else None
    except OSError as error:
        raise AgentError(f"cannot read {error.filename}: {error.strerror}", EXIT_INVALID) from None
    credentials = grpc.ssl_channel_credentials(authorities, key, chain)
    return grpc.aio.secure_channel(config.control_plane, credentials, options=_CHANNEL_OPTIONS)


class _SharedChannel:
    """A channel, its heartbeat stream, and how many use them."""

    def __init__(self, config: AgentConfig) -> None:
        self.channel = open_channel(config)
        # The stubs' types are those of the synchronous API.
        self.stub: Any = fleet_service_pb2_grpc.FleetServiceStub(self.channel)
        self.stream: HeartbeatStream | None = None
        self.user_count = 0

    @property
    def is_beating(self) -> bool:
        """Whether heartbeats go over it."""
        return self.stream is not None and not self.stream.has_ended

    def heartbeats(self) -> HeartbeatStream:
        """Return the stream, a new one where there is none or it has ended."""
        if self.stream is None or self.stream.has_ended:
            self.stream = HeartbeatStream(self.stub.Heartbeat())
        return self.stream


class ControlPlaneLink:
    """What the engines of an agent share: a channel, made when it is needed and left when it fails.

    Args:
        config: Names the control plane.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._current: _SharedChannel | None = None

    def acquire(self) -> _SharedChannel:
        """Return the channel; to be given back with :meth:`release`.

        Raises:
            AgentError: A certificate or key cannot be read.
        """
        if self._current is None:
            self._current = _SharedChannel(self._config)
        self._current.user_count += 1
        return self._current

    async def release(self, shared: _SharedChannel, *, failed: bool) -> None:
        """Give a channel back.

        Args:
            shared: The channel.
            failed: It is of no use to the caller; the next one gets a new one, unless
                heartbeats of others still go over it.
        """
        shared.user_count -= 1
        is_unused = shared.user_count == 0
        if shared is self._current and (is_unused or (failed and not shared.is_beating)):
            self._current = None
        if is_unused:
            await shared.channel.close()


class FleetConnection:
    """One engine's calls over the shared channel, their failures judged.

    Use as an asynchronous context manager.

    Args:
        link: To the control plane.
        config: Of the engine's agent.
        incarnation: Of this agent.
    """

    def __init__(self, link: ControlPlaneLink, config: AgentConfig, incarnation: int) -> None:
        self._link = link
        self._config = config
        self._incarnation = incarnation
        self._instance_id = config.effective_instance_id
        self._shared = link.acquire()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        await self._link.release(self._shared, failed=isinstance(error, ControlPlaneLostError))

    async def register(
        self, spec: instance_pb2.InstanceSpec, timeout_s: float = _REGISTER_TIMEOUT_S
    ) -> pb.RegisterInstanceResponse:
        """Say everything about the instance.

        Raises:
            AgentError: It can never succeed like this.
            ControlPlaneLostError: Not now.
        """
        request = pb.RegisterInstanceRequest(
            spec=spec, incarnation=self._incarnation, agent_version=__version__
        )
        try:
            response: pb.RegisterInstanceResponse = await self._shared.stub.RegisterInstance(
                request, timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise self.judge(error, registering=True) from None
        return response

    async def deregister(self, cause: str, timeout_s: float) -> None:
        """Take the instance out of the fleet.

        Raises:
            grpc.aio.AioRpcError: It did not work.
        """
        request = pb.DeregisterInstanceRequest(
            instance_id=self._instance_id, incarnation=self._incarnation, cause=cause
        )
        await self._shared.stub.DeregisterInstance(request, timeout=timeout_s)

    def open_lane(self, on_change: Callable[[], None]) -> HeartbeatLane:
        """Return the engine's part of the heartbeat stream."""
        return HeartbeatLane(self._shared.heartbeats(), self._instance_id, self.judge, on_change)

    def judge(self, error: grpc.aio.AioRpcError, *, registering: bool = False) -> Exception:
        """Return what a failed call means."""
        return judge(error, self._instance_id, registering=registering, tls=self._config.uses_tls)
