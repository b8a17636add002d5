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
# Clients refuse trailers beyond 8 KiB (grpc#37852) and then know nothing of what was wrong. The message
# travels percent-encoded (three bytes for each that is not printable ASCII), and once more, with the
# details, in base64. So these count bytes as they travel, and together stay below 8 KiB.
MAX_MESSAGE_BYTES = 1024
MAX_METADATA_BYTES = 1024
MAX_VIOLATION_BYTES = 3072
_MAX_DESCRIPTION_BYTES = 384
_VIOLATION_OVERHEAD_BYTES = 8

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
    ErrorReason.SETTINGS_VERSION_CONFLICT: grpc.StatusCode.ABORTED,
    ErrorReason.JOURNAL_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.DRAIN_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.READER_STALLED: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.OUTPUT_LOST: grpc.StatusCode.DATA_LOSS,
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
    info = error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        info.metadata[key] = _clip(value, room // 2)
        room -= len(key) + len(info.metadata[key].encode())
    details: list[Message] = [info]
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
    return status_pb2.Status(code=code, message=_clip_header(error.message), details=packed)


def _clip(text: str, limit: int) -> str:
    """Return the beginning of a text that fits into ``limit`` bytes of UTF-8."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= limit else data[: max(0, limit - 3)].decode(errors="ignore") + "..."


def _clip_header(text: str) -> str:
    """Return the beginning of a text that fits as a percent-encoded header."""
    size = 0
    for index, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode(errors="replace"))
        if size > MAX_MESSAGE_BYTES - 3:
            return _clip(text[:index], MAX_MESSAGE_BYTES) + "..."
    return _clip(text, MAX_MESSAGE_BYTES)


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    """Return every violation, as far as they fit; a last entry counts the others."""
    detail = error_details_pb2.BadRequest()
    room = MAX_VIOLATION_BYTES
    for index, violation in enumerate(error.violations):
        field = _clip(violation.field, _MAX_DESCRIPTION_BYTES)
        description = _clip(violation.description, _MAX_DESCRIPTION_BYTES)
        room -= len(field.encode()) + len(description.encode()) + _VIOLATION_OVERHEAD_BYTES
        if room < 0:
            rest = len(error.violations) - index
            detail.field_violations.add(field="", description=f"and {rest} more bad fields")
            break
        detail.field_violations.add(field=field, description=description)
    return detail
