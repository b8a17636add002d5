"""Every way in which a call can fail has an exit code and a line that says what to do."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from sagecp import client
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import from_client_error
from sagecp.client.errors import status_code
from sagecp.core.errors import ErrorReason, FieldViolation
from sagecp.core.types import RequestPriority, RequestState, RequestStatus

UNREACHED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
    "Failed to connect to remote host: Connection refused"
)


def error(kind: type[client.ClientError], code: str, message: str = "why", **more: Any) -> client.ClientError:
    return kind(message, code=grpc.StatusCode[code], **more)


def ended(state: RequestState, code: int, reason: ErrorReason) -> client.RequestFailedError:
    status = RequestStatus(
        request_id="r", state=state, model_name="m", priority=RequestPriority.NORMAL, create_time_s=0.0
    )
    return client.RequestFailedError(
        "why", code=status_code(code), reason=reason, request_id="r", state=state, status=status
    )


CASES = [
    (error(client.UnavailableError, "UNAVAILABLE", UNREACHED), ExitCode.UNREACHABLE, "sagecp serve"),
    (error(client.UnavailableError, "UNAVAILABLE", "Socket closed"), ExitCode.UNREACHABLE, "--ca-cert"),
    (error(client.UnavailableError, "UNAVAILABLE", "Ssl handshake failed"), ExitCode.UNREACHABLE, "--tls"),
    (error(client.UnavailableError, "UNAVAILABLE", "errors resolving x"), ExitCode.UNREACHABLE, "--server"),
    (
        error(client.UnavailableError, "UNAVAILABLE", reason=ErrorReason.SHUTTING_DOWN),
        ExitCode.UNREACHABLE,
        "try again",
    ),
    (
        error(client.UnavailableError, "UNAVAILABLE", reason=ErrorReason.ENGINE_FAILED, ended_request=True),
        ExitCode.REQUEST_FAILED,
        "",
    ),
    (
        error(client.NotFoundError, "NOT_FOUND", reason=ErrorReason.MODEL_NOT_FOUND),
        ExitCode.NOT_FOUND_OR_CONFLICT,
        "sagecp instances",
    ),
    (
        error(client.NotFoundError, "NOT_FOUND", reason=ErrorReason.REQUEST_NOT_FOUND),
        ExitCode.NOT_FOUND_OR_CONFLICT,
        "sagecp requests",
    ),
    (error(client.ConflictError, "ALREADY_EXISTS"), ExitCode.NOT_FOUND_OR_CONFLICT, ""),
    (error(client.AccessError, "PERMISSION_DENIED"), ExitCode.NOT_PERMITTED, "--cert"),
    (
        error(client.OverloadedError, "RESOURCE_EXHAUSTED", retry_after_s=1.5),
        ExitCode.REQUEST_FAILED,
        "in 1.5 s",
    ),
    (
        error(client.OverloadedError, "RESOURCE_EXHAUSTED", "Received message larger than max (5 vs. 4)"),
        ExitCode.INVALID,
        "send less",
    ),
    (error(client.DeadlineError, "DEADLINE_EXCEEDED"), ExitCode.DEADLINE, "--timeout"),
    (error(client.UnsupportedError, "UNIMPLEMENTED"), ExitCode.UNEXPECTED, "a sagecp control plane?"),
    (error(client.ServerError, "INTERNAL", rpc_id="rpc-7"), ExitCode.UNEXPECTED, "rpc-7"),
    (
        client.StreamLostError("why", request_id="r", next_token_index=7),
        ExitCode.UNREACHABLE,
        "sagecp stream r --from 7",
    ),
    (
        ended(RequestState.FAILED, 14, ErrorReason.ENGINE_FAILED),
        ExitCode.REQUEST_FAILED,
        "sagecp requests get r",
    ),
    (ended(RequestState.FAILED, 3, ErrorReason.ENGINE_REJECTED), ExitCode.INVALID, ""),
    (ended(RequestState.CANCELLED, 1, ErrorReason.REQUEST_CANCELLED), ExitCode.REQUEST_FAILED, ""),
    (ended(RequestState.EXPIRED, 4, ErrorReason.DEADLINE_EXCEEDED), ExitCode.DEADLINE, ""),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "code", "hint"), CASES, ids=lambda value: type(value).__name__)
def test_exit_codes_and_hints(failure: client.ClientError, code: ExitCode, hint: str) -> None:
    shown = from_client_error(failure, server="cp:1")
    assert shown.code == code
    assert hint in shown.hint


def test_every_class_of_error_was_tried() -> None:
    def below(kind: type[client.ClientError]) -> set[type[client.ClientError]]:
        return {kind, *(found for each in kind.__subclasses__() for found in below(each))}

    tried = {type(failure) for failure, _, _ in CASES}
    assert below(client.ClientError) - {client.ClientError, client.InvalidArgumentError} == tried


def test_who_is_not_reached_is_named_in_short() -> None:
    shown = from_client_error(error(client.UnavailableError, "UNAVAILABLE", UNREACHED), server="cp:1")
    assert shown.message == "cannot reach the control plane at cp:1: Connection refused"


def test_every_bad_field_has_a_line() -> None:
    violations = [FieldViolation("spec.prompt.text", "is empty"), FieldViolation("page_size", "is 9")]
    shown = from_client_error(
        error(client.InvalidArgumentError, "INVALID_ARGUMENT", violations=violations), server="cp:1"
    )
    assert shown.code == ExitCode.INVALID
    assert shown.message == "refused as invalid:\n  prompt.text: is empty\n  page_size: is 9"
