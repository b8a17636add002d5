"""Rows 30 and 34 of the fault matrix: connections that say nothing, and calls that say too much."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from tests.support.processes import SAGECP, Program
from tests.support.rpc_rig import failure_of, request_spec, untyped
from tests.support.waiting import until

Code = grpc.StatusCode
STATUS = admin_service_pb2.GetStatusRequest()
# What this process needs beside the connections of a test.
SPARE_FILES = 1_000
WAIT_S = 30.0


class Served:
    """A control plane in a process of its own, and one channel to it."""

    def __init__(self, port: int, channel: grpc.aio.Channel) -> None:
        self.port = port
        self.admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self.health = untyped(health_pb2_grpc.HealthStub(channel))


@contextlib.asynccontextmanager
async def served(*flags: str) -> AsyncIterator[Served]:
    server = Program(
        "server", [SAGECP, "serve", "--listen", "127.0.0.1:0", "--log-format", "console", *flags]
    )
    try:
        found = await asyncio.to_thread(server.wait_for_line, r"127\.0\.0\.1:(\d+)", WAIT_S)
        port = int(found[1])
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Served(port, channel)
    finally:
        await asyncio.to_thread(server.stop)


class Silent(asyncio.Protocol):
    """A connection that never says anything.

    Attributes:
        closed_count: How many were closed by the other side, of all.
    """

    closed_count = 0

    def connection_lost(self, exc: Exception | None) -> None:
        Silent.closed_count += 1


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_row_30_silent_connections_are_closed_and_the_server_answers_meanwhile(count: int) -> None:
    count = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)
    loop = asyncio.get_running_loop()
    Silent.closed_count = 0
    async with served() as server:
        await server.admin.GetStatus(STATUS, timeout=WAIT_S)
        transports = []
        for _ in range(0, count, 100):
            opened = await asyncio.gather(
                *(loop.create_connection(Silent, "127.0.0.1", server.port) for _ in range(100))
            )
            transports += [transport for transport, _ in opened]
        answered = 0
        while Silent.closed_count < len(transports):
            await server.admin.GetStatus(STATUS, timeout=WAIT_S)
            answered += 1
            assert answered < 100_000, f"{len(transports) - Silent.closed_count} are still open"
            await asyncio.sleep(0.02)
        assert answered > 10, "administrators were answered while the connections were open"
        assert Silent.closed_count == len(transports)
        # Their places are free again.
        transport, _ = await loop.create_connection(Silent, "127.0.0.1", server.port)
        transport.close()
        await server.admin.GetStatus(STATUS, timeout=WAIT_S)


async def test_row_34_what_is_too_large_is_refused_and_the_connection_lives() -> None:
    async with served() as server:
        # Shares the connection, and would end with it.
        watching = server.health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        for _ in range(3):
            big = inference_service_pb2.SubmitRequest(spec=request_spec("big", "x" * (5 << 20)))
            assert (await failure_of(server.inference.Submit(big, timeout=WAIT_S))).code() is (
                Code.RESOURCE_EXHAUSTED
            )
            large = (("x-large", "x" * (20 << 10)),)
            error = await failure_of(server.admin.GetStatus(STATUS, metadata=large, timeout=WAIT_S))
            assert error.code() is Code.RESOURCE_EXHAUSTED
            assert (await server.admin.GetStatus(STATUS, timeout=WAIT_S)).accepting
        assert not watching.done()
        watching.cancel()
        await until(watching.done)


async def test_row_34_a_flood_of_large_messages_costs_nobody_else_an_answer() -> None:
    async with served() as server:
        big = inference_service_pb2.SubmitRequest(spec=request_spec("big", "x" * (5 << 20)))
        calls = [failure_of(server.inference.Submit(big, timeout=WAIT_S)) for _ in range(20)]
        status = server.admin.GetStatus(STATUS, timeout=WAIT_S)
        outcomes = await asyncio.gather(*calls, status)
        assert outcomes[-1].accepting
        assert {error.code() for error in outcomes[:-1]} == {Code.RESOURCE_EXHAUSTED}
