"""Sends the output of a request to one gRPC stream: the token path's last step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc

from sagecp.core.errors import RequestFailedError, ShuttingDownError
from sagecp.rpc.convert.request import failure_to_proto, request_to_proto, state_to_proto, usage_to_proto
from sagecp.rpc.reader_watch import ReaderWatch
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.requests import RequestHandle
from sagecp.v1 import inference_service_pb2 as pb

# A message is closed beyond either: a late reader of a long output gets it in pieces, one of which
# waits while it does not read.
_MAX_DELTAS_PER_CHUNK = 512
_MAX_BYTES_PER_CHUNK = 48 << 10
# A restart takes about so long at least.
_SUSPENDED_RETRY_S = 1.0


async def relay_output(
    manager: ControlPlaneManager,
    handle: RequestHandle,
    watch: ReaderWatch,
    from_token_index: int,
    context: grpc.aio.ServicerContext[Any, Any],
    message_type: type[Any],
) -> None:
    """Send what a request has produced and produces, to its end.

    One message holds everything of one choice that was waiting, so that a
    reader that falls behind gets fewer, larger messages; a message costs the
    server the same with one token in it or with fifty.

    Args:
        manager: Owner of the request.
        handle: The request.
        watch: Detaches the reader if it stalls.
        from_token_index: Index of the first token wanted.
        context: The stream.
        message_type: ``StreamResponse`` or ``GenerateResponse``.

    Raises:
        TokenIndexOutOfRangeError: The index is ahead of the stream.
        TooManyStreamsError: Too many read the request already.
        ReaderStalledError: The reader took nothing for too long.
        RequestFailedError: The request ended without success; the terminal
            message was sent.
        ShuttingDownError: The control plane stops before the request has ended.
    """
    output = handle.output
    cursor = output.seek(from_token_index)
    window_s = manager.runtime_config.token_coalescing_window_s
    with manager.reading(handle), watch.reading() as reader:
        message = reader.message = message_type()
        message.opened.request_id = handle.request_id
        message.opened.state = state_to_proto(handle.state)
        await context.write(message)
        reader.message = None
        deltas = output.deltas
        attempt_count = len(handle.attempts)
        draining_told = False
        while True:
            while cursor < len(deltas):
                if len(handle.attempts) != attempt_count:
                    attempt_count = len(handle.attempts)
                    message = message_type()
                    if _fill_failover(message.notice, handle):
                        reader.message = message
                        await context.write(message)
                message = message_type()
                epoch, end = output.attempt_at(cursor)
                cursor = fill_chunk(
                    message.chunk, deltas, cursor, output.first_index(cursor), epoch, min(end, len(deltas))
                )
                reader.message = message
                await context.write(message)
                reader.message = None
                if window_s and not output.closed:
                    await asyncio.sleep(window_s)
            if output.closed:
                break
            if manager.draining_cut_s is not None and not draining_told:
                draining_told = True
                message = message_type()
                message.notice.draining.cut_time.FromNanoseconds(int(manager.draining_cut_s * 1e9))
                reader.message = message
                await context.write(message)
                reader.message = None
                continue
            await output.wait_beyond(cursor)
        if handle.suspended:
            # No terminal message: the request has not ended.
            raise ShuttingDownError(
                "the control plane stops; the request goes on when it is back: read on with Stream",
                retry_after_s=_SUSPENDED_RETRY_S,
            )
        message = reader.message = message_type()
        _fill_terminal(message.terminal, manager, handle)
        await context.write(message)
    if handle.failure is not None:
        raise RequestFailedError(handle.failure)


def fill_chunk(
    chunk: pb.TokenChunk,
    deltas: Sequence[EngineDelta],
    cursor: int,
    first_token_index: int,
    epoch: int,
    end: int,
) -> int:
    """Put the pieces of one choice from ``cursor`` to ``end`` into a chunk; return the cursor after them."""
    first = deltas[cursor]
    choice_index = first.choice_index
    end = min(end, cursor + _MAX_DELTAS_PER_CHUNK)
    chunk.first_token_index = first_token_index
    chunk.epoch = epoch
    if choice_index:
        chunk.choice_index = choice_index
    if end - cursor == 1 and first.raw is None:
        # By far the most frequent case: one piece, read as soon as it arrived.
        chunk.token_count = first.token_count
        chunk.text = first.text
        if first.token_ids:
            chunk.token_ids.extend(first.token_ids)
        if first.finish_reason:
            chunk.finish_reason = first.finish_reason
            chunk.stop_reason = first.stop_reason
        return end
    texts: list[str] = []
    token_count = 0
    size_bytes = 0
    position = cursor
    while position < end and size_bytes < _MAX_BYTES_PER_CHUNK:
        delta = deltas[position]
        if delta.choice_index != choice_index:
            break
        texts.append(delta.text)
        size_bytes += len(delta.text)
        token_count += delta.token_count
        if delta.token_ids:
            chunk.token_ids.extend(delta.token_ids)
        if delta.raw is not None:
            chunk.openai_events.append(delta.raw)
            size_bytes += len(delta.raw)
        if delta.finish_reason:
            chunk.finish_reason = delta.finish_reason
            chunk.stop_reason = delta.stop_reason
        position += 1
    chunk.text = "".join(texts)
    chunk.token_count = token_count
    return position


def _fill_failover(notice: pb.StreamNotice, handle: RequestHandle) -> bool:
    """Tell of the present attempt, if it follows one that was lost; return whether it does."""
    if len(handle.attempts) < 2:
        return False
    lost, present = handle.attempts[-2:]
    notice.failover.epoch = present.epoch
    if lost.failure is not None:
        notice.failover.failure.CopyFrom(failure_to_proto(lost.failure))
    return True


def _fill_terminal(terminal: pb.StreamTerminal, manager: ControlPlaneManager, handle: RequestHandle) -> None:
    status = manager.status_of(handle)
    terminal.state = state_to_proto(status.state)
    terminal.finish_reason = status.finish_reason
    terminal.usage.CopyFrom(usage_to_proto(status.usage))
    terminal.token_count = handle.output.token_count
    terminal.instance_id = status.instance_id
    terminal.request.CopyFrom(request_to_proto(status))
    if status.failure is not None:
        terminal.failure.CopyFrom(failure_to_proto(status.failure))
