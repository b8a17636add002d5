"""From the tree of errors to gRPC statuses, in one table."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sagecp.core.errors import ErrorReason, InvalidRequestError, SageError

DOMAIN = "sagecp"
# Clients refuse metadata beyond 8 to 16 KiB (grpc#37852), and details travel in base64 beside the message.
MAX_DETAIL_TEXT = 1024
MAX_VIOLATION_TEXT = 3072

_CODES: Mapping[ErrorReason, grpc.StatusCode] = {
    ErrorReason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.INSTANCE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.REQUEST_ID_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.STALE_INCARNATION: grpc.StatusCode.ABORTED,
    ErrorReason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.MESSAGE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorReason.REQUEST_CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorReason.ENGINE_REJECTED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.ENGINE_FAILED: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ENGINE_TIMEOUT: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ENGINE_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ILLEGAL_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.TOKEN_INDEX_OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    ErrorReason.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorReason.INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorReason.UNKNOWN_POLICY: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.POISON_REQUEST: grpc.StatusCode.ABORTED,
    ErrorReason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorReason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.INFEASIBLE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.FLEET_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.TOO_MANY_STREAMS: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def status_code_of(reason: ErrorReason) -> grpc.StatusCode:
    """Return the status that a reason travels with."""
    return _CODES[reason]


def to_status(error: SageError, rpc_id: str) -> status_pb2.Status:
    """Return the full status of an error, with its details.

    Args:
        error: What went wrong.
        rpc_id: Id of the call, so that a user can name it to an operator.
    """
    metadata = {key: value[:MAX_DETAIL_TEXT] for key, value in error.metadata.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata)
    ]
    if isinstance(error, InvalidRequestError):
        details.append(_bad_request(error))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.append(error_details_pb2.RequestInfo(request_id=rpc_id))
    packed = []
    for detail in details:
        holder = AnyMessage()
        holder.Pack(detail)
        packed.append(holder)
    code: int = status_code_of(error.reason).value[0]
    return status_pb2.Status(code=code, message=error.message[:MAX_DETAIL_TEXT], details=packed)


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    """Return every violation, as far as they fit; a last entry counts the others."""
    detail = error_details_pb2.BadRequest()
    room = MAX_VIOLATION_TEXT
    for index, violation in enumerate(error.violations):
        description = violation.description[:256]
        room -= len(violation.field) + len(description)
        if room < 0:
            rest = len(error.violations) - index
            detail.field_violations.add(field="", description=f"and {rest} more bad fields")
            break
        detail.field_violations.add(field=violation.field, description=description)
    return detail
