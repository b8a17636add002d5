"""A typed asynchronous client: plain values in and out, typed errors, streams that survive.

async with SageClient("127.0.0.1:50051") as client:
    async for chunk in client.generate("Tell me a story", max_tokens=32):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from sagecp.client.client import SageClient
from sagecp.client.connection import Connection
from sagecp.client.errors import (
    AccessError,
    ClientError,
    ConflictError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    ServerError,
    StreamLostError,
    UnavailableError,
    UnsupportedError,
)
from sagecp.client.event_watch import WatchedEvent
from sagecp.client.retry import NO_RETRY, RetryPolicy
from sagecp.client.streaming import TokenStream
from sagecp.client.values import (
    Cancelled,
    Choice,
    Chunk,
    Completion,
    Drain,
    Explanation,
    Instance,
    Metrics,
    Registration,
    RequestOptions,
    StreamEnd,
    Submitted,
    TlsOptions,
)

__all__ = [
    "NO_RETRY",
    "AccessError",
    "Cancelled",
    "Choice",
    "Chunk",
    "ClientError",
    "Completion",
    "ConflictError",
    "Connection",
    "DeadlineError",
    "Drain",
    "Explanation",
    "Instance",
    "InvalidArgumentError",
    "Metrics",
    "NotFoundError",
    "OverloadedError",
    "Registration",
    "RequestFailedError",
    "RequestOptions",
    "RetryPolicy",
    "SageClient",
    "ServerError",
    "StreamEnd",
    "StreamLostError",
    "Submitted",
    "TlsOptions",
    "TokenStream",
    "UnavailableError",
    "UnsupportedError",
    "WatchedEvent",
]
