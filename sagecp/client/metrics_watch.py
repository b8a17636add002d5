"""Metrics again and again, over as many connections as it takes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import grpc

from sagecp.client import convert
from sagecp.client.connection import Connection
from sagecp.client.errors import ClientError, UnavailableError, from_rpc_error
from sagecp.client.values import Metrics
from sagecp.v1 import admin_service_pb2 as pb


async def watch_metrics(connection: Connection, query: pb.WatchMetricsRequest) -> AsyncGenerator[Metrics]:
    """Yield metrics for ever; a lost connection is made again.

    Raises:
        ClientError: The call was refused, or the connection is lost for longer than
            streams are resumed.
    """
    failed_attempts = 0
    lost_at_s: float | None = None
    began = False
    while True:
        call = connection.admin.WatchMetrics(query, metadata=connection.metadata)
        error: ClientError
        try:
            async for response in call:
                began, failed_attempts, lost_at_s = True, 0, None
                yield convert.metrics(response.snapshot)
            error = UnavailableError(
                "the stream of metrics ended without a reason", code=grpc.StatusCode.UNAVAILABLE
            )
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        finally:
            call.cancel()
        now = time.monotonic()
        if lost_at_s is None:
            lost_at_s = now
        failed_attempts += 1
        lost_s = now - lost_at_s if began else None
        if not await connection.pause(connection.retry, failed_attempts, error, None, lost_s):
            raise error from None
