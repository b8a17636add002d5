"""Sends the output of a request to one gRPC stream: the token path's last step."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from sagecp.core.errors import RequestFailedError
from sagecp.rpc.convert.request import failure_to_proto, request_to_proto, state_to_proto, usage_to_proto
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.requests import RequestHandle
from sagecp.v1 import inference_service_pb2 as pb

# A message is closed beyond either: a late reader of a long output gets it in pieces.
_MAX_DELTAS_PER_CHUNK = 512
_MAX_RAW_BYTES_PER_CHUNK = 256 << 10


async def relay_output(
    manager: ControlPlaneManager,
    handle: RequestHandle,
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
        from_token_index: Index of the first token wanted.
        context: The stream.
        message_type: ``StreamResponse`` or ``GenerateResponse``.

    Raises:
        TokenIndexOutOfRangeError: The index is ahead of the stream.
        TooManyStreamsError: Too many read the request already.
        RequestFailedError: The request ended without success; the terminal
            message was sent.
    """
    output = handle.output
    cursor = output.seek(from_token_index)
    window_s = manager.runtime_config.token_coalescing_window_s
    with manager.reading(handle):
        message = message_type()
        message.opened.request_id = handle.request_id
        message.opened.state = state_to_proto(handle.state)
        await context.write(message)
        deltas = output.deltas
        while True:
            while cursor < len(deltas):
                message = message_type()
                cursor = fill_chunk(message.chunk, deltas, cursor, output.first_index(cursor), output.epoch)
                await context.write(message)
                if window_s and not output.closed:
                    await asyncio.sleep(window_s)
            if output.closed:
                break
            await output.wait_beyond(cursor)
        message = message_type()
        _fill_terminal(message.terminal, manager, handle)
        await context.write(message)
    if handle.failure is not None:
        raise RequestFailedError(handle.failure)


def fill_chunk(
    chunk: pb.TokenChunk, deltas: list[EngineDelta], cursor: int, first_token_index: int, epoch: int
) -> int:
    """Put the pieces of one choice, from ``cursor`` on, into a chunk; return the cursor after them."""
    first = deltas[cursor]
    choice_index = first.choice_index
    end = min(len(deltas), cursor + _MAX_DELTAS_PER_CHUNK)
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
    raw_bytes = 0
    position = cursor
    while position < end and raw_bytes < _MAX_RAW_BYTES_PER_CHUNK:
        delta = deltas[position]
        if delta.choice_index != choice_index:
            break
        texts.append(delta.text)
        token_count += delta.token_count
        if delta.token_ids:
            chunk.token_ids.extend(delta.token_ids)
        if delta.raw is not None:
            chunk.openai_events.append(delta.raw)
            raw_bytes += len(delta.raw)
        if delta.finish_reason:
            chunk.finish_reason = delta.finish_reason
            chunk.stop_reason = delta.stop_reason
        position += 1
    chunk.text = "".join(texts)
    chunk.token_count = token_count
    return position


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
