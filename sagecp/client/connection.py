"""The connection to a control plane: channel, credentials, typed errors and retries."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from sagecp.client.errors import ClientError, OverloadedError, from_rpc_error
from sagecp.client.retry import NO_RETRY, OverloadThrottle, RetryBudget, RetryPolicy
from sagecp.client.values import TlsOptions
from sagecp.core.errors import ErrorReason
from sagecp.v1 import admin_service_pb2_grpc, fleet_service_pb2_grpc, inference_service_pb2_grpc

if TYPE_CHECKING:
    from sagecp.v1.admin_service_pb2_grpc import AdminServiceAsyncStub
    from sagecp.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub
    from sagecp.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 16 << 20
# Reasons for which more calls now would only be refused as well.
_OVERLOAD = frozenset({ErrorReason.QUEUE_FULL, ErrorReason.INFEASIBLE})


class Connection:
    """One channel with stubs for the three services.

    What the typed client does not cover can be called through the stubs and
    :meth:`unary`, with the same credentials, errors and retries.

    Args:
        target: Host and port, or another name that gRPC resolves.
        tls: Options, ``True`` for TLS with gRPC's own authorities, or ``None`` for plaintext.
        token: Sent as a bearer token.
        timeout_s: How long a unary call may take, repetitions included.
        retry: When calls are repeated.

    Raises:
        ValueError: The target is a URL, a TLS file cannot be read, or a token
            would cross a network in plaintext.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: TlsOptions | bool | None = None,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        if "//" in target and not target.startswith(("dns://", "unix://")):
            raise ValueError(f"{target!r} is a URL; give host and port, for example {DEFAULT_TARGET}")
        self.target = target
        self.timeout_s = timeout_s
        self.retry = RetryPolicy() if retry is None else retry
        self.tls = TlsOptions() if tls is True else tls or None
        self._local = _is_local(target)
        if token and self.tls is None and not self._local:
            raise ValueError(f"a token would be sent to {target} in plaintext; use TLS")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._credentials = _credentials(self.tls) if self.tls is not None else None
        self._channel: grpc.aio.Channel | None = None
        self._budget = RetryBudget()
        self._throttle = OverloadThrottle()
        self._random = random.Random()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel; made on first use, because it belongs to the running event loop."""
        if self._channel is None:
            options: list[tuple[str, int | str]] = [
                # A frozen or vanished server: noticed within half a minute, even between tokens.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.max_pings_without_data", 0),
                # After a restart of the server: back within a second, not after two minutes.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 500),
                ("grpc.max_reconnect_backoff_ms", 5_000),
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                # One layer retries, and it is this one: nobody may configure another through DNS.
                ("grpc.service_config_disable_resolution", 1),
            ]
            if self._local:
                options.append(("grpc.enable_http_proxy", 0))
            if self.tls is not None and self.tls.server_name:
                options.append(("grpc.ssl_target_name_override", self.tls.server_name))
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, options)
        return self._channel

    @property
    def inference(self) -> InferenceServiceAsyncStub:
        """The stub for those who want tokens."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def fleet(self) -> FleetServiceAsyncStub:
        """The stub for agents and operators."""
        return fleet_service_pb2_grpc.FleetServiceStub(self.channel)

    @property
    def admin(self) -> AdminServiceAsyncStub:
        """The stub for operators."""
        return admin_service_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return self._metadata

    async def close(self) -> None:
        """Close the channel; calls in progress end."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        repeatable: bool = True,
        admission: bool = False,
    ) -> ResponseT:
        """Make a call, and repeat it where that can help.

        Args:
            method: A method of one of the stubs.
            request: What to send.
            timeout_s: For all tries together; default: the connection's.
            request_id: The request concerned, for errors.
            repeatable: Whether a second execution does no harm.
            admission: Whether the call asks for new work, and so is kept back
                while the server is overloaded.

        Raises:
            ClientError: The call failed; the class says how.
        """
        end_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        retry = self.retry if repeatable else NO_RETRY
        attempt = 0
        while True:
            attempt += 1
            if admission:
                self.check_overload(request_id)
            try:
                response = await method(
                    request, timeout=max(0.001, end_s - time.monotonic()), metadata=self._metadata
                )
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure, request_id)
                self.note_answer(error, admission=admission)
                if not await self.pause(retry, attempt, error, end_s):
                    raise error from None
            else:
                self.note_answer(None, admission=admission)
                return response

    def check_overload(self, request_id: str) -> None:
        """Keep a call back that an overloaded server would only refuse.

        Raises:
            OverloadedError: The call is not to be made now.
        """
        if self._throttle.refuse(self._random):
            raise OverloadedError(
                "not sent: the control plane has refused most requests of the last seconds for overload; "
                "send fewer, or try again later",
                code=grpc.StatusCode.RESOURCE_EXHAUSTED,
                reason=ErrorReason.QUEUE_FULL,
                retry_after_s=self.retry.max_s,
                request_id=request_id,
            )

    def note_accepted(self) -> None:
        """Note that a call for new work was accepted, before its answer is complete."""
        self._throttle.note(accepted=True)

    def note_answer(self, error: ClientError | None, *, admission: bool) -> None:
        """Learn from the end of a call: whether it succeeded, and whether it was refused for overload."""
        if error is None:
            self._budget.succeeded()
        if admission:
            # Without a time to come back it is this request that cannot be served, whatever the load.
            refused = error is not None and error.reason in _OVERLOAD and error.retry_after_s is not None
            self._throttle.note(accepted=not refused)

    async def pause(
        self,
        retry: RetryPolicy,
        attempt: int,
        error: ClientError,
        end_s: float | None,
        lost_s: float | None = None,
    ) -> bool:
        """Wait before the next try; return false when there shall be none.

        Args:
            retry: When calls are repeated.
            attempt: Number of the try that failed, from 1.
            error: Its error.
            end_s: When the caller's time is over, on the monotonic clock; ``None``: never.
            lost_s: How long ago the open stream was lost that is to be resumed;
                ``None``: the call asks for something new. Only that takes from the
                budget: to go on reading makes no work, and an outage breaks all
                streams at once.
        """
        if lost_s is None:
            wait_s = retry.pause_s(attempt, error, self._random)
        else:
            wait_s = retry.resume_pause_s(attempt, lost_s, error, self._random)
        if wait_s is None or (end_s is not None and time.monotonic() + wait_s >= end_s):
            return False
        if lost_s is None and not self._budget.take():
            return False
        await asyncio.sleep(wait_s)
        return True


class Resumption:
    """Resumes one stream, again and again, as long as the retry policy allows.

    Args:
        connection: That the stream is made over.
        end_s: When the caller's time is over, on the monotonic clock; ``None``: never.
    """

    def __init__(self, connection: Connection, end_s: float | None = None) -> None:
        self._connection = connection
        self._end_s = end_s
        self._failed_attempts = 0
        self._lost_at_s = 0.0

    def note_answer(self) -> None:
        """The stream brought something: the next loss is a new one."""
        self._failed_attempts = 0

    def note_loss(self) -> None:
        """The stream, or a try to have it back, failed."""
        if not self._failed_attempts:
            self._lost_at_s = time.monotonic()
        self._failed_attempts += 1

    async def pause(self, error: ClientError, *, opened: bool) -> bool:
        """Wait before the next try; return false when there shall be none.

        Args:
            error: How the last try failed.
            opened: The stream was open before, so that it is gone on with.
        """
        lost_s = time.monotonic() - self._lost_at_s if opened else None
        return await self._connection.pause(
            self._connection.retry, self._failed_attempts, error, self._end_s, lost_s
        )


def _is_local(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    if host in {"localhost", "ip6-localhost"}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    if bool(tls.certificate_file) != bool(tls.private_key_file):
        raise ValueError("a client certificate and its private key go together; give both")
    contents = []
    for name in (tls.ca_file, tls.private_key_file, tls.certificate_file):
        try:
            contents.append(Path(name).read_bytes() if name else None)
        except OSError as error:
            raise ValueError(f"cannot read {name}: {error.strerror}") from error
    return grpc.ssl_channel_credentials(*contents)
