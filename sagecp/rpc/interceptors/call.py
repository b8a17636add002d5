"""One interceptor around every call of our services.

It gives the call an id, maps errors to statuses with details, and tells
observers (access log, metrics) how the call went. One wrapper instead of four:
each layer of a grpc.aio interceptor costs every call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from sagecp.core.errors import (
    FieldViolation,
    InvalidRequestError,
    ReaderStalledError,
    RequestFailedError,
    SageError,
)
from sagecp.rpc.errors import status_code_of, to_status
from sagecp.runtime.tracing.base import CALLER_TRACE, TRACE_CONTEXT_KEYS

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 128
_OUR_PREFIX = "/sagecp."
_UNREAD_ABORT_S = 0.5


class CallInfo:
    """One call, as observers see it.

    Attributes:
        method: Full name, such as ``/sagecp.v1.InferenceService/Submit``.
        rpc_id: From the caller's ``x-request-id``, else made here.
        code: Status it ended with.
        reason: Stable reason of an error, or ``""``.
        duration_s: From start to end.
    """

    __slots__ = ("_context", "code", "duration_s", "method", "reason", "rpc_id")

    def __init__(self, method: str, rpc_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.method = method
        self.rpc_id = rpc_id
        self._context = context
        self.code = grpc.StatusCode.OK
        self.reason = ""
        self.duration_s = 0.0

    @property
    def peer(self) -> str:
        """Address of the caller. Asked for when it is needed: most calls never do."""
        return self._context.peer()


class CallObserver(Protocol):
    """Is told about calls. Must not raise and must be cheap."""

    def started(self, call: CallInfo) -> None:
        """A call begins."""

    def finished(self, call: CallInfo) -> None:
        """A call ended; code, reason and duration are set."""


Handler = Callable[[Any, Any], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of our services once, and reuses the wrapper.

    Args:
        observers: Told about every call.
        traced: Let the tracer know the trace context that a call came with.
    """

    def __init__(self, observers: Sequence[CallObserver], *, traced: bool = False) -> None:
        self._observers = tuple(observers)
        self._traced = traced
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a grpc.RpcMethodHandler or None
        """Return the wrapped handler of the method."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None or not method.startswith(_OUR_PREFIX):
                return handler  # Unknown methods are never kept: anybody can invent names.
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:  # noqa: ANN401 - a grpc.RpcMethodHandler
        kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
            "stream" if handler.response_streaming else "unary"
        )
        inner: Handler = getattr(handler, kind)
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            self._around(method, inner, streaming=handler.request_streaming),
            _guarded(handler.request_deserializer, streaming=handler.request_streaming),
            handler.response_serializer,
        )

    def _around(self, method: str, inner: Handler, *, streaming: bool) -> Handler:
        observers = self._observers
        traced = self._traced

        async def call(received: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401
            info = CallInfo(method, _rpc_id(context), context)
            context.set_trailing_metadata(((REQUEST_ID_HEADER, info.rpc_id),))
            if traced:
                # Every call is handled in a task, and so in a context, of its own.
                CALLER_TRACE.set(_trace_context(context))
            started_s = time.perf_counter()
            for observer in observers:
                observer.started(info)
            try:
                # A message is left to the handler alone, which may let go of it before the call ends.
                return await inner(received if streaming else received.pop(), context)
            except asyncio.CancelledError:
                info.code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.InternalError:
                # What was being sent cannot be: the caller left while it waited to be read.
                info.code = grpc.StatusCode.CANCELLED
                raise asyncio.CancelledError from None
            except SageError as error:
                info.code, info.reason = status_code_of(error.reason), error.reason.name
                await _abort(context, error, info.rpc_id)
            except grpc.aio.AbortError:
                info.code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            except Exception:
                info.code, info.reason = grpc.StatusCode.INTERNAL, "INTERNAL"
                logger.exception("call crashed", extra={"method": method, "rpc_id": info.rpc_id})
                message = f"the server failed to handle the call; its log has the details under {info.rpc_id}"
                await _abort(context, SageError(message), info.rpc_id)
            finally:
                info.duration_s = time.perf_counter() - started_s
                for observer in observers:
                    observer.finished(info)

        return call


class _Received:
    """The message of a call that sends one, until the handler takes it."""

    __slots__ = ("_message",)

    def __init__(self, message: Any) -> None:  # noqa: ANN401 - a message
        self._message = message

    def pop(self) -> Any:  # noqa: ANN401 - a message
        """Hand the message over.

        Raises:
            InvalidRequestError: What came is no message of the method's type.
        """
        message, self._message = self._message, None
        if message is None:
            raise _malformed_error()
        return message


def _malformed_error() -> InvalidRequestError:
    return InvalidRequestError(
        [
            FieldViolation(
                "message",
                "are not bytes of this method's request; build the client from this server's protos",
            )
        ]
    )


def _guarded(deserialize: Callable[[bytes], Any], *, streaming: bool) -> Callable[[bytes], Any]:
    """Return a deserializer whose failure our wrapper sees: grpc would answer UNKNOWN with a class name."""

    def guarded(data: bytes) -> Any:  # noqa: ANN401 - a message
        try:
            message = deserialize(data)
        except DecodeError:
            if streaming:
                # Read by the handler itself, inside the wrapper.
                raise _malformed_error() from None
            return _Received(None)
        return message if streaming else _Received(message)

    return guarded


def _rpc_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and value and value.isprintable():
            return value[:_MAX_REQUEST_ID_LENGTH]
    return os.urandom(8).hex()


def _trace_context(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {
        key: value
        for key, value in context.invocation_metadata() or ()
        if key in TRACE_CONTEXT_KEYS and isinstance(value, str)
    }


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SageError, rpc_id: str) -> None:
    if isinstance(error, RequestFailedError):
        error.metadata.setdefault("scope", "request")
    status = rpc_status.to_status(to_status(error, rpc_id))
    trailing = (*status.trailing_metadata, (REQUEST_ID_HEADER, rpc_id))
    if isinstance(error, ReaderStalledError):
        await _abort_unread(context, status.code, status.details, trailing)
    await context.abort(status.code, status.details, trailing)


async def _abort_unread(
    context: grpc.aio.ServicerContext[Any, Any],
    code: grpc.StatusCode,
    details: str,
    trailing: tuple[tuple[str, str | bytes], ...],
) -> NoReturn:
    """End a call whose reader does not read: the status waits behind what is unread, this call does not."""
    try:
        async with asyncio.timeout(_UNREAD_ABORT_S):
            await context.abort(code, details, trailing)
    except TimeoutError:
        # The status is on its way, and grpc sends it once the reader reads.
        raise asyncio.CancelledError from None
