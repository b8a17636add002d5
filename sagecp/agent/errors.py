"""Why an agent stops, and with which exit code."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

EXIT_DEFECT = 1
EXIT_ENGINE_ENDED = 1
EXIT_INVALID = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_PERMITTED = 4
EXIT_CONFLICT = 5

_STALE = "STALE_INCARNATION"
# What grpc.aio makes of a write to a call that has ended, before it has read how.
_STATUS_LOST = "Internal error from Core"


class AgentError(Exception):
    """The agent cannot go on; the text says why and what to do.

    Attributes:
        exit_code: Of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ControlPlaneLostError(Exception):
    """The control plane cannot be reached, or does not answer; try again later.

    Attributes:
        retry_after_s: What the control plane asked for; 0: nothing.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ForgottenError(Exception):
    """The control plane does not know the instance, or not as registered by us: register again, at once."""


def judge(error: grpc.aio.AioRpcError, instance_id: str, *, registering: bool, tls: bool) -> Exception:
    """Return what a failed call means for the agent.

    Args:
        error: How the call ended.
        instance_id: Of the engine.
        registering: The call was a registration; otherwise the heartbeat stream.
        tls: The connection was to be encrypted.
    """
    code = error.code()
    details = (error.details() or "").strip() or "no reason given"
    reason, fields, retry_after_s = _read_details(error)
    if code is grpc.StatusCode.ABORTED and reason in {"", _STALE}:
        return AgentError(
            f"another agent owns the instance id {instance_id!r} ({details}). End one of the two, or give "
            "this one another --instance-id. If there is no other, this host's clock was set back",
            EXIT_CONFLICT,
        )
    if code is grpc.StatusCode.PERMISSION_DENIED and not registering:
        # The secret of another registration; a new one gets its own, or is refused for good.
        return ForgottenError(details)
    if code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
        return AgentError(
            f"the control plane does not let this agent act for {instance_id!r}: {details}. Give a client "
            "certificate issued for this instance (--cert, --key)",
            EXIT_NOT_PERMITTED,
        )
    if registering and code is grpc.StatusCode.INVALID_ARGUMENT:
        wrong = "; ".join(f"{name}: {what}" for name, what in fields) or details
        return AgentError(f"the control plane refused the registration: {wrong}", EXIT_INVALID)
    if not registering and code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}:
        return ForgottenError(details)
    if not registering and code is grpc.StatusCode.INTERNAL and details == _STATUS_LOST:
        # Of a stream that ends while a beat is sent, the library may tell this instead of the reason:
        # the next registration has the same reason to be refused, or there is none any more.
        return ForgottenError("the stream ended while a heartbeat was sent, and its reason was lost")
    message = f"{code.name}: {details}"
    if code is grpc.StatusCode.UNAVAILABLE:
        if tls and any(word in details.lower() for word in ("ssl", "tls", "handshake")):
            message += (
                " (if the control plane has no TLS, say --insecure; if its authority is private, --ca-cert)"
            )
        elif not tls and "socket closed" in details.lower():
            message += " (if the control plane has TLS, give --ca-cert)"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message += " (is this address a sagecp control plane?)"
    return ControlPlaneLostError(message[:512], retry_after_s)


def _read_details(error: grpc.aio.AioRpcError) -> tuple[str, list[tuple[str, str]], float]:
    """Return the stable reason, the bad fields, and when to retry."""
    reason, retry_after_s = "", 0.0
    fields: list[tuple[str, str]] = []
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of a call
    except (ValueError, DecodeError):
        return reason, fields, retry_after_s
    for detail in status.details if status is not None else ():
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            fields += [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, fields, retry_after_s
