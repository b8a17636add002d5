"""Events of the fleet as they happen, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from sagecp.client.connection import Connection, Resumption
from sagecp.client.errors import ClientError, UnavailableError, from_rpc_error
from sagecp.core.fleet_event import FleetEvent
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.wire.events import event_from_proto
from sagecp.wire.times import time_s


@dataclass(frozen=True, slots=True)
class WatchedEvent:
    """An event that was watched for.

    Attributes:
        event: The event.
        skipped_count: Events before this one that were dropped: the reader was too
            slow, or asked for more than is kept. Not all of them need have been wanted.
    """

    event: FleetEvent
    skipped_count: int = 0


async def watch_events(connection: Connection, query: pb.WatchEventsRequest) -> AsyncGenerator[WatchedEvent]:
    """Yield events for ever; a lost connection is made again, and what happened meanwhile comes then.

    Raises:
        ClientError: The call was refused, or the connection is lost for longer than
            streams are resumed.
    """
    resumption = Resumption(connection)
    process_start_s: float | None = None
    while True:
        error: ClientError
        call = None
        try:
            if process_start_s is not None:
                status = await connection.unary(connection.admin.GetStatus, pb.GetStatusRequest())
                if time_s(status.start_time) != process_start_s:
                    # Another process, whose events are numbered from 1: all of them are new.
                    process_start_s, query.after_sequence = time_s(status.start_time), 0
            call = connection.admin.WatchEvents(query, metadata=connection.metadata)
            await call.initial_metadata()
            if process_start_s is None:
                status = await connection.unary(connection.admin.GetStatus, pb.GetStatusRequest())
                process_start_s = time_s(status.start_time)
                if not query.HasField("after_sequence"):
                    # Should the connection break before anything comes, nothing is missed all the same.
                    query.after_sequence = status.last_event_sequence
            async for response in call:
                resumption.note_answer()
                event = event_from_proto(response.event)
                query.after_sequence = event.sequence
                yield WatchedEvent(event, response.skipped_count)
            error = UnavailableError(
                "the stream of events ended without a reason", code=grpc.StatusCode.UNAVAILABLE
            )
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        except ClientError as failure:
            error = failure
        finally:
            if call is not None:
                call.cancel()
        resumption.note_loss()
        if not await resumption.pause(error, opened=process_start_s is not None):
            raise error from None
