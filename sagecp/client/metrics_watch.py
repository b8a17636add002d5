"""Metrics again and again, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

from sagecp.client import convert
from sagecp.client.connection import Connection, Resumption
from sagecp.client.errors import ClientError, UnavailableError, from_rpc_error
from sagecp.client.values import Metrics
from sagecp.v1 import admin_service_pb2 as pb


async def watch_metrics(connection: Connection, query: pb.WatchMetricsRequest) -> AsyncGenerator[Metrics]:
    """Yield metrics for ever; a lost connection is made again.

    Raises:
        ClientError: The call was refused, or the connection is lost for longer than
            streams are resumed.
    """
    resumption = Resumption(connection)
    began = False
    while True:
        call = connection.admin.WatchMetrics(query, metadata=connection.metadata)
        error: ClientError
        try:
            async for response in call:
                began = True
                resumption.note_answer()
                yield convert.metrics(response.snapshot)
            error = UnavailableError(
                "the stream of metrics ended without a reason", code=grpc.StatusCode.UNAVAILABLE
            )
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        finally:
            call.cancel()
        resumption.note_loss()
        if not await resumption.pause(error, opened=began):
            raise error from None
