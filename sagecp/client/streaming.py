"""The output of a request: one stream to the reader, over as many connections as it takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import grpc

from sagecp.client import convert
from sagecp.client.connection import Connection, Resumption
from sagecp.client.errors import (
    ClientError,
    NotFoundError,
    RequestFailedError,
    StreamLostError,
    from_rpc_error,
    reason_of,
    status_code,
)
from sagecp.client.retry import is_transient
from sagecp.client.values import Chunk, StreamEnd
from sagecp.core.types import RequestState
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import request_pb2

StreamEvent = pb.StreamResponse | pb.GenerateResponse
_Call = (
    grpc.aio.UnaryStreamCall[pb.StreamRequest, pb.StreamResponse]
    | grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
)
# Pieces remembered to line up an overlap after a lost connection.
_REMEMBERED_PIECES = 64


class EventStream:
    """The contract's events of one request, without gaps or repetitions.

    Args:
        connection: Where to ask.
        request_id: The request.
        spec: Given: start the request with Generate; else read it with Stream.
        from_token_index: Index of the first token wanted.
        survive: Go on with Stream after a lost connection. Without it,
            leaving or losing the stream cancels what Generate started.
        cancel_on_disconnect: Cancel the request when this stream is left.
        timeout_s: For everything; ``None``: no limit.

    Attributes:
        next_token_index: Index of the first token not yet received.
    """

    def __init__(
        self,
        connection: Connection,
        request_id: str,
        *,
        spec: request_pb2.RequestSpec | None = None,
        from_token_index: int = 0,
        survive: bool = True,
        cancel_on_disconnect: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.next_token_index = from_token_index
        self._connection = connection
        self._spec = spec
        self._survive = survive
        self._cancel_on_disconnect = cancel_on_disconnect
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._opened = False
        self._connection_count = 0
        self._recent: deque[tuple[int, int, str]] = deque(maxlen=_REMEMBERED_PIECES)

    async def events(self) -> AsyncGenerator[StreamEvent]:
        """Yield opened, chunks and notices, and at last the terminal message.

        Raises:
            StreamLostError: The stream broke off and could not be resumed.
            ClientError: The request was refused, or is not known.
        """
        resumption = Resumption(self._connection, self._end_s)
        while True:
            starts = self._spec is not None and not self._opened
            if starts:
                self._connection.check_overload(self.request_id)
            call = self._call()
            self._connection_count += 1
            try:
                async for event in call:
                    kind = event.WhichOneof("event")
                    if kind == "chunk":
                        resumption.note_answer()
                        if self._line_up(event.chunk):
                            yield event
                    elif kind == "terminal":
                        # The status that follows repeats what the message says.
                        await call.code()
                        self._connection.note_answer(None, admission=starts)
                        yield event
                        return
                    else:
                        first, self._opened = not self._opened, True
                        if starts:
                            # Accepted: however the request may end, the server had room for it.
                            starts = False
                            self._connection.note_accepted()
                        if kind == "opened":
                            self.request_id = event.opened.request_id
                        if first or kind == "notice":
                            yield event
                raise StreamLostError(
                    "the stream ended without saying how the request ended",
                    request_id=self.request_id,
                    next_token_index=self.next_token_index,
                )
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure, self.request_id)
            finally:
                call.cancel()
            resumption.note_loss()
            self._connection.note_answer(error, admission=starts)
            resumable = self._survive or not self._opened
            if not resumable or not await resumption.pause(error, opened=self._opened):
                raise self._lost(error) from None

    def _call(self) -> _Call:
        timeout_s = None if self._end_s is None else max(0.001, self._end_s - time.monotonic())
        metadata = self._connection.metadata
        if self._spec is not None and not self._opened:
            generate = pb.GenerateRequest(spec=self._spec, detach_on_disconnect=self._survive)
            return self._connection.inference.Generate(generate, timeout=timeout_s, metadata=metadata)
        stream = pb.StreamRequest(
            request_id=self.request_id,
            from_token_index=self.next_token_index,
            cancel_on_disconnect=self._cancel_on_disconnect,
        )
        return self._connection.inference.Stream(stream, timeout=timeout_s, metadata=metadata)

    def _lost(self, error: ClientError) -> ClientError:
        """Return what to raise: before the stream opened the call's own error, afterwards that it is lost."""
        forgotten = isinstance(error, NotFoundError) and self._connection_count > 1
        if not self._opened or not (is_transient(error) or forgotten):
            return error
        why = "the control plane does not know the request any more" if forgotten else error.message
        return StreamLostError(
            f"the stream broke off before its end: {why}",
            request_id=self.request_id,
            next_token_index=self.next_token_index,
            cause=error,
        )

    def _line_up(self, chunk: pb.TokenChunk) -> bool:
        """Cut what was received before from a chunk; return whether anything is left.

        Raises:
            StreamLostError: Tokens are missing, or an overlap cannot be told apart.
        """
        expected, first, count = self.next_token_index, chunk.first_token_index, chunk.token_count
        if first > expected:
            raise self._broken(f"expected token {expected} and got {first}")
        overlap = expected - first
        if overlap and self._recent:
            if overlap >= count > 0:
                return False
            received = "".join(
                text
                for index, choice, text in self._recent
                if index >= first and choice == chunk.choice_index
            )
            boundary_known = any(index == first for index, _, _ in self._recent)
            if not boundary_known or not chunk.text.startswith(received):
                raise self._broken(f"tokens {first} to {expected} came again and differ")
            chunk.text = chunk.text[len(received) :]
            if chunk.token_ids:
                del chunk.token_ids[:overlap]
            chunk.first_token_index, chunk.token_count = expected, count - overlap
        # The very first chunk may hold tokens before the index asked for: it is sent whole.
        self.next_token_index = max(expected, first + count)
        self._recent.append((chunk.first_token_index, chunk.choice_index, chunk.text))
        return True

    def _broken(self, what: str) -> StreamLostError:
        return StreamLostError(
            f"the stream cannot be resumed: {what}",
            request_id=self.request_id,
            next_token_index=self.next_token_index,
        )


class TokenStream:
    """The output of a request, to be read with ``async for``.

    Leaving the loop early leaves the stream open until this object goes away;
    ``async with`` closes it at once.

    Attributes:
        end: How it ended; ``None`` before.
    """

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        self._events = stream.events()
        self.end: StreamEnd | None = None

    @property
    def request_id(self) -> str:
        """The request."""
        return self._stream.request_id

    @property
    def next_token_index(self) -> int:
        """Index of the first token not yet received: where another stream would go on."""
        return self._stream.next_token_index

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """Return the next piece of output.

        Raises:
            RequestFailedError: The request ended without success.
            StreamLostError: The stream broke off before its end.
            ClientError: The request was refused, or is not known.
        """
        async for event in self._events:
            kind = event.WhichOneof("event")
            if kind == "chunk":
                return convert.chunk(event.chunk)
            if kind == "terminal":
                self.end = stream_end(event.terminal, self.request_id)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Leave the stream."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def stream_end(terminal: pb.StreamTerminal, request_id: str) -> StreamEnd:
    """Return how a stream ended.

    Raises:
        RequestFailedError: The request ended without success.
    """
    status = convert.request_status(terminal.request)
    state = convert.request_state(terminal.state)
    if state is not RequestState.SUCCEEDED:
        raise RequestFailedError(
            terminal.failure.message or f"the request ended as {state.name}",
            code=status_code(terminal.failure.code),
            reason=reason_of(terminal.failure.reason),
            request_id=request_id,
            state=state,
            status=status,
        )
    return StreamEnd(
        request_id=request_id,
        finish_reason=terminal.finish_reason,
        usage=convert.usage(terminal.usage),
        token_count=terminal.token_count,
        instance_id=terminal.instance_id,
        status=status,
    )
