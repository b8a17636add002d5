"""What can go wrong between a program and the control plane, as one tree of exceptions.

Branch on the class, on :attr:`ClientError.reason` or on
:attr:`ClientError.code`; the message is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from sagecp.core.errors import ErrorReason, FieldViolation
from sagecp.wire.times import seconds_of

if TYPE_CHECKING:
    from sagecp.core.types import RequestState, RequestStatus

_DETAILS_KEY = "grpc-status-details-bin"
_RPC_ID_KEY = "x-request-id"


class ClientError(Exception):
    """Root of the tree: a call did not do what it was asked to do.

    Attributes:
        message: What was wrong and what to do, for a person.
        code: Canonical status.
        reason: Stable cause, or ``None`` when the server did not say, for
            example because it was never reached.
        violations: Every bad field of the call.
        retry_after_s: When another try makes sense, as the server says.
        request_id: The request concerned, or ``""``.
        rpc_id: Id of the call in the server's log, or ``""``.
        metadata: Facts for programs, such as ``available_models``.
        ended_request: Whether this is how a request ended, as opposed to a
            call that could not be made or answered.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: ErrorReason | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
        rpc_id: str = "",
        metadata: Mapping[str, str] | None = None,
        ended_request: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.rpc_id = rpc_id
        self.metadata = dict(metadata or {})
        self.ended_request = ended_request


class InvalidArgumentError(ClientError):
    """The call asked for something that cannot be; ``violations`` names every bad field."""


class NotFoundError(ClientError):
    """The model, request or instance is not known."""


class ConflictError(ClientError):
    """The call does not fit the present state, or an id was used before for something else."""


class OverloadedError(ClientError):
    """A queue, a quota or a limit is full; ``retry_after_s`` says when to come back."""


class UnavailableError(ClientError):
    """The control plane could not be reached, or is going away."""


class DeadlineError(ClientError):
    """The call took longer than its timeout."""


class AccessError(ClientError):
    """The credential is missing, not accepted, or does not allow the call."""


class UnsupportedError(ClientError):
    """This server does not have the operation."""


class ServerError(ClientError):
    """The server failed; its log has details under ``rpc_id``."""


class StreamLostError(ClientError):
    """The output of a request broke off before its end.

    The request itself may still run: `SageClient.stream` with
    :attr:`next_token_index` goes on where this stream stopped.

    Attributes:
        next_token_index: Index of the first token that was not received.
    """

    def __init__(
        self, message: str, *, request_id: str, next_token_index: int, cause: ClientError | None = None
    ) -> None:
        super().__init__(
            message,
            code=grpc.StatusCode.UNAVAILABLE if cause is None else cause.code,
            reason=None if cause is None else cause.reason,
            request_id=request_id,
            rpc_id="" if cause is None else cause.rpc_id,
        )
        self.next_token_index = next_token_index


class RequestFailedError(ClientError):
    """The request ended without success: it failed, was cancelled or expired.

    Attributes:
        state: How it ended: ``FAILED``, ``CANCELLED`` or ``EXPIRED``.
        status: All that is known of it.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: ErrorReason | None,
        request_id: str,
        state: RequestState,
        status: RequestStatus,
    ) -> None:
        super().__init__(message, code=code, reason=reason, request_id=request_id, ended_request=True)
        self.state = state
        self.status = status


_CLASSES: Mapping[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
_REASONS = {reason.name: reason for reason in ErrorReason}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(number: int) -> grpc.StatusCode:
    """Return the status of a ``google.rpc.Code``; unknown numbers are ``UNKNOWN``."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


def reason_of(number: int) -> ErrorReason | None:
    """Return the reason of the contract's number; ``None`` when it is not set or newer than this client."""
    try:
        return ErrorReason(number)
    except ValueError:
        return None


def invalid_argument(violations: Sequence[FieldViolation]) -> InvalidArgumentError:
    """Return the error for fields that do not even fit the message."""
    return InvalidArgumentError(
        "; ".join(f"{each.field}: {each.description}" for each in violations),
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason=ErrorReason.INVALID_REQUEST,
        violations=violations,
    )


def from_rpc_error(error: grpc.aio.AioRpcError, request_id: str = "") -> ClientError:
    """Return the typed error of a failed call, with the details that travelled with it.

    Args:
        error: What grpc raised.
        request_id: The request that the call was about, if the details do not say.
    """
    code = error.code()
    message = error.details() or f"the call ended with {code.name}"
    reason: ErrorReason | None = None
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    rpc_id = ""
    facts: dict[str, str] = {}
    for key, value in error.trailing_metadata() or ():
        if key == _RPC_ID_KEY and isinstance(value, str):
            rpc_id = value
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in _details(value):
            if isinstance(detail, error_details_pb2.ErrorInfo):
                reason = _REASONS.get(detail.reason)
                facts = dict(detail.metadata)
            elif isinstance(detail, error_details_pb2.BadRequest):
                violations += [
                    FieldViolation(each.field, each.description) for each in detail.field_violations
                ]
            elif isinstance(detail, error_details_pb2.RetryInfo):
                retry_after_s = seconds_of(detail.retry_delay)
    return _CLASSES.get(code, ClientError)(
        message,
        code=code,
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
        request_id=facts.get("request_id") or request_id,
        rpc_id=rpc_id,
        metadata=facts,
        ended_request=facts.get("scope") == "request",
    )


def _details(
    packed: bytes,
) -> list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo]:
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = []
    try:
        for holder in status_pb2.Status.FromString(packed).details:
            for kind in kinds:
                if holder.Is(kind.DESCRIPTOR):
                    detail = kind()
                    holder.Unpack(detail)
                    found.append(detail)
    except DecodeError:  # From something else than our server.
        return []
    return found
