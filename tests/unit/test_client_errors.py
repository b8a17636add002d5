"""A failed call becomes a typed error with everything that travelled with it."""

from __future__ import annotations

import grpc
import pytest
from grpc_status import rpc_status

from sagecp import client
from sagecp.client.errors import from_rpc_error, reason_of, status_code
from sagecp.core import errors as core_errors
from sagecp.core.errors import ErrorReason, FieldViolation, SageError
from sagecp.rpc.errors import to_status


def travelled(error: SageError) -> grpc.aio.AioRpcError:
    """Return what a client gets when a server raises an error."""
    status = rpc_status.to_status(to_status(error, "rpc-7"))
    trailing = grpc.aio.Metadata(*status.trailing_metadata, ("x-request-id", "rpc-7"))
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailing, details=status.details)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (core_errors.InvalidRequestError([FieldViolation("spec.x", "is bad")]), client.InvalidArgumentError),
        (core_errors.TokenIndexOutOfRangeError("too far"), client.InvalidArgumentError),
        (core_errors.ModelNotFoundError("m", ["a", "b"]), client.NotFoundError),
        (core_errors.RequestNotFoundError("r"), client.NotFoundError),
        (core_errors.RequestIdConflictError("r"), client.ConflictError),
        (core_errors.StaleIncarnationError("i", 1, 2), client.ConflictError),
        (core_errors.DrainRefusedError("i", ["nobody else is READY"]), client.ConflictError),
        (core_errors.QueueFullError("full", retry_after_s=1.5), client.OverloadedError),
        (core_errors.ShuttingDownError("bye"), client.UnavailableError),
        (core_errors.NotImplementedYetError("later"), client.UnsupportedError),
        (SageError("broken"), client.ServerError),
    ],
)
def test_every_kind(raised: SageError, kind: type[client.ClientError]) -> None:
    error = from_rpc_error(travelled(raised), "asked")
    assert type(error) is kind
    assert (error.message, error.reason) == (raised.message, raised.reason)
    assert (error.rpc_id, error.retry_after_s) == ("rpc-7", raised.retry_after_s)
    assert error.metadata == raised.metadata
    assert error.request_id == raised.metadata.get("request_id", "asked")
    assert not error.ended_request
    if isinstance(raised, core_errors.InvalidRequestError):
        assert error.violations == raised.violations


def test_a_failed_request_is_told_from_a_failed_call() -> None:
    failure = core_errors.Failure(ErrorReason.ENGINE_FAILED, "the engine died")
    raised = core_errors.RequestFailedError(failure)
    raised.metadata["scope"] = "request"
    error = from_rpc_error(travelled(raised))
    assert isinstance(error, client.UnavailableError)
    assert error.ended_request


def test_errors_without_details() -> None:
    bare = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=None
    )
    error = from_rpc_error(bare, "r")
    assert (error.code, error.reason, error.request_id) == (grpc.StatusCode.UNAVAILABLE, None, "r")
    assert "UNAVAILABLE" in error.message


def test_details_of_somebody_else_do_no_harm() -> None:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff not a status"))
    odd = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), trailing, details="odd")
    assert isinstance(from_rpc_error(odd), client.ServerError)


def test_numbers_of_newer_servers() -> None:
    assert reason_of(2) is ErrorReason.MODEL_NOT_FOUND
    assert reason_of(9999) is None
    assert status_code(14) is grpc.StatusCode.UNAVAILABLE
    assert status_code(99) is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_has_an_error(code: grpc.StatusCode) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="x")
    assert isinstance(from_rpc_error(bare), client.ClientError)
