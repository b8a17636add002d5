"""Many agents in a process of their own: they register, and beat until they are told to stop.

What they send is made beforehand, and what they receive is not parsed: the server
is to be measured, not they.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from bench.agent_messages import BeatSource, registration
from sagecp.runtime.event_loop import run
from sagecp.v1 import fleet_service_pb2_grpc

# Registrations under way at once.
_STARTING_COUNT = 100
_HEARTBEAT = "/sagecp.v1.FleetService/Heartbeat"
_READY_TIMEOUT_S = 300.0
_START, _STOP = "start", "stop"


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """What the agents of one process do.

    Attributes:
        address: Of the server.
        first: Number of the first agent.
        agent_count: Agents; each has one stream.
        connection_count: Connections that they share.
        engine_count: Engines of each agent, whose beats share its stream.
        gpu_count: GPUs of each engine.
        interval_s: Between two beats of one engine.
    """

    address: str
    first: int
    agent_count: int
    connection_count: int
    engine_count: int
    gpu_count: int
    interval_s: float


@dataclass(slots=True)
class BeatCounts:
    """What happened between start and stop.

    Attributes:
        sent: Beats sent.
        acknowledged_s: How long each acknowledgement took.
        cpu_s: CPU time of the process of the agents.
    """

    sent: int = 0
    acknowledged_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0


class AgentProcess:
    """A process of agents, seen from outside. Use as a context manager, which starts and ends it."""

    def __init__(self, plan: AgentPlan) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # Not forked: gRPC has threads.
        self._process = multiprocessing.get_context("spawn").Process(target=_main, args=(plan, theirs))

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def wait_until_ready(self) -> None:
        """Return when every agent has had its first beat acknowledged."""
        self._receive()

    def start(self) -> None:
        """Begin to count."""
        self._pipe.send(_START)

    def stop(self) -> BeatCounts:
        """Stop counting; return the counts."""
        self._pipe.send(_STOP)
        counts: BeatCounts = self._receive()
        return counts

    def _receive(self) -> Any:  # noqa: ANN401 - what the process sends
        if not self._pipe.poll(_READY_TIMEOUT_S):
            raise RuntimeError(f"the agents said nothing for {_READY_TIMEOUT_S:g} s")
        received = self._pipe.recv()
        if isinstance(received, str):
            raise RuntimeError(f"the agents failed: {received}")
        return received


def _main(plan: AgentPlan, pipe: multiprocessing.connection.Connection) -> None:
    try:
        run(_Agents(plan).run(pipe))
    except ExceptionGroup as errors:
        pipe.send(repr(errors.exceptions[0]))
        raise


class _Agents:
    def __init__(self, plan: AgentPlan) -> None:
        self._plan = plan
        self._counts = BeatCounts()
        self._starting = asyncio.Semaphore(_STARTING_COUNT)
        self._ready_count = 0
        self._ready = asyncio.Event()

    async def run(self, pipe: multiprocessing.connection.Connection) -> None:
        plan = self._plan
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(plan.address, options=[("grpc.use_local_subchannel_pool", 1)])
                )
                for _ in range(plan.connection_count)
            ]
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._agent(plan.first + number, channels[number % len(channels)]))
                    for number in range(plan.agent_count)
                ]
                await self._ready.wait()
                pipe.send(None)
                await asyncio.to_thread(pipe.recv)
                self._counts, cpu_s = BeatCounts(), time.process_time()
                await asyncio.to_thread(pipe.recv)
                self._counts.cpu_s = time.process_time() - cpu_s
                pipe.send(self._counts)
                for task in tasks:
                    task.cancel()

    async def _agent(self, number: int, channel: grpc.aio.Channel) -> None:
        plan = self._plan
        async with self._starting:
            stub: fleet_service_pb2_grpc.FleetServiceAsyncStub = fleet_service_pb2_grpc.FleetServiceStub(
                channel
            )
            engines = []
            for place in range(plan.engine_count):
                engine = number * plan.engine_count + place
                response = await stub.RegisterInstance(registration(engine, plan.gpu_count))
                engines.append(BeatSource(engine, plan.gpu_count, response.lease_token))
            stream: Any = channel.stream_stream(_HEARTBEAT)()
            for source in engines:
                await self._beat(stream, source)
        self._ready_count += 1
        if self._ready_count == plan.agent_count:
            self._ready.set()
        for delay_s in _delays_s(number, plan.interval_s):
            await asyncio.sleep(delay_s)
            for source in engines:
                await self._beat(stream, source)

    async def _beat(self, stream: Any, source: BeatSource) -> None:  # noqa: ANN401 - a call of bytes
        counts = self._counts
        started_s = time.perf_counter()
        counts.sent += 1
        await stream.write(source.next())
        if await stream.read() is grpc.aio.EOF:
            raise RuntimeError(f"the server ended a stream: {await stream.code()}, {await stream.details()}")
        if counts is self._counts:
            counts.acknowledged_s.append(time.perf_counter() - started_s)


def _delays_s(number: int, interval_s: float) -> Iterator[float]:
    """Yield how long to wait before each round: agents are spread over the interval, and do not drift."""
    due_s = time.monotonic() + (number * 0.6180339887) % 1.0 * interval_s
    while True:
        yield max(0.0, due_s - time.monotonic())
        due_s = max(due_s + interval_s, time.monotonic())
