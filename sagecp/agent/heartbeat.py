"""The connection to the control plane: registration, and the stream of heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from sagecp.agent.config import MAX_INTERVAL_S, MIN_INTERVAL_S, AgentConfig
from sagecp.agent.errors import EXIT_INVALID, AgentError, ControlPlaneLostError, judge
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2
from sagecp.version import __version__

Stream = grpc.aio.StreamStreamCall[Any, Any]

_REGISTER_TIMEOUT_S = 10.0
# An acknowledgement is missed after this many intervals, and not before so many seconds:
# a connection may look alive to TCP, and to gRPC, with nobody behind it.
_ACKNOWLEDGE_INTERVALS = 3
_MIN_ACKNOWLEDGE_S = 5.0

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


class FleetConnection:
    """Calls of one channel, their failures judged.

    Args:
        config: Names the control plane.
        incarnation: Of this agent.
    """

    def __init__(self, config: AgentConfig, incarnation: int) -> None:
        self._config = config
        self._incarnation = incarnation
        self._instance_id = config.effective_instance_id
        self._channel = open_channel(config)
        # The stubs' types are those of the synchronous API.
        self._stub: Any = fleet_service_pb2_grpc.FleetServiceStub(self._channel)

    async def __aenter__(self) -> FleetConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

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
            response: pb.RegisterInstanceResponse = await self._stub.RegisterInstance(
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
        await self._stub.DeregisterInstance(request, timeout=timeout_s)

    def open_stream(self, on_change: Callable[[], None]) -> HeartbeatStream:
        """Return a new stream of heartbeats."""
        return HeartbeatStream(self._stub.Heartbeat(), self.judge, on_change)

    def judge(self, error: grpc.aio.AioRpcError, *, registering: bool = False) -> Exception:
        """Return what a failed call means."""
        return judge(error, self._instance_id, registering=registering, tls=self._config.uses_tls)


class HeartbeatStream:
    """One stream: beats out, acknowledgements in.

    Use as an asynchronous context manager; it owns the task that reads.

    Args:
        call: The open call.
        judge: Turns the failure of the call into what it means.
        on_change: Called when something came in that should not wait for the
            next beat: another interval, requests to abort, the end.

    Attributes:
        acknowledged_sequence: Last beat that was acknowledged.
        asked_interval_s: What the control plane wants between beats; ``None``: nothing yet.
        desired_state: What it wants of the instance.
    """

    def __init__(
        self,
        call: Stream,
        judge: Callable[[grpc.aio.AioRpcError], Exception],
        on_change: Callable[[], None],
    ) -> None:
        self._call = call
        self._judge = judge
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._reader: asyncio.Task[None] | None = None
        self._abort_request_ids: list[str] = []
        self.acknowledged_sequence = 0
        self.asked_interval_s: float | None = None
        self.desired_state = pb.DESIRED_STATE_UNSPECIFIED

    async def __aenter__(self) -> HeartbeatStream:
        self._reader = asyncio.create_task(self._read(), name="heartbeat acknowledgements")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def send(self, beat: pb.HeartbeatRequest, interval_s: float) -> None:
        """Send a beat.

        Raises:
            Exception: As :meth:`check`; also when the beat cannot be sent in time.
        """
        self.check(interval_s)
        assert self._reader is not None, "use `async with`"  # noqa: S101
        write = asyncio.ensure_future(self._call.write(beat))
        try:
            # A call that ends does not always end its write.
            await asyncio.wait(
                {write, self._reader},
                timeout=acknowledge_limit_s(interval_s),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if write.done() and not write.cancelled() and write.exception() is None:
                return
            if not write.done() and not self._reader.done():
                raise ControlPlaneLostError("the control plane takes no more heartbeats")
            # The call has ended; its reader knows how.
            await asyncio.wait({self._reader}, timeout=1.0)
            self.check(interval_s)
            raise ControlPlaneLostError("the heartbeat stream ended")
        finally:
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)

    def check(self, interval_s: float) -> None:
        """Make sure that the stream is alive.

        Raises:
            AgentError: The agent must stop.
            ForgottenError: The instance must be registered again.
            ControlPlaneLostError: The stream ended, or acknowledgements stopped.
        """
        if self._reader is not None and self._reader.done():
            self._reader.result()
        silence_s = self._loop.time() - self._heard_s
        if silence_s > acknowledge_limit_s(interval_s):
            raise ControlPlaneLostError(f"the control plane acknowledged no heartbeat for {silence_s:.1f} s")

    def silence_ends_s(self, interval_s: float) -> float:
        """Return when, on the loop's clock, silence will have lasted too long."""
        return self._heard_s + acknowledge_limit_s(interval_s)

    def take_abort_request_ids(self) -> list[str]:
        """Return the requests to abort that came in since the last call."""
        taken, self._abort_request_ids = self._abort_request_ids, []
        return taken

    async def say_goodbye(self, beat: pb.HeartbeatRequest, timeout_s: float) -> None:
        """Send the last beat and let the control plane end the stream. Best effort."""
        with contextlib.suppress(TimeoutError, asyncio.InvalidStateError, grpc.RpcError):
            async with asyncio.timeout(timeout_s):
                await self._call.write(beat)
                await self._call.done_writing()
                if self._reader is not None:
                    await asyncio.wait({self._reader})

    async def _read(self) -> None:
        try:
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.HeartbeatResponse):
                    raise ControlPlaneLostError("the control plane ended the heartbeat stream")
                self._take(response)
        except grpc.aio.AioRpcError as error:
            raise self._judge(error) from None
        finally:
            self._on_change()

    def _take(self, response: pb.HeartbeatResponse) -> None:
        self._heard_s = self._loop.time()
        self.acknowledged_sequence = max(self.acknowledged_sequence, response.acknowledged_sequence)
        changed = self.acknowledged_sequence == 1
        self.desired_state = response.desired_state
        if response.HasField("next_interval"):
            asked_s = response.next_interval.seconds + response.next_interval.nanos / 1e9
            clamped_s = clamp_interval_s(asked_s)
            changed = changed or clamped_s != self.asked_interval_s
            self.asked_interval_s = clamped_s
        if response.abort_request_ids:
            # Bounded: what does not fit is asked again, for it still runs.
            self._abort_request_ids = [*self._abort_request_ids, *response.abort_request_ids][:1024]
            changed = True
        if changed:
            self._on_change()


def clamp_interval_s(interval_s: float) -> float:
    """Return an interval as agents keep it."""
    return min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)


def acknowledge_limit_s(interval_s: float) -> float:
    """Return how long silence may last."""
    return max(_ACKNOWLEDGE_INTERVALS * interval_s, _MIN_ACKNOWLEDGE_S)
