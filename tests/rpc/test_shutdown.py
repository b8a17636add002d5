"""How a server ends: what runs may finish, everybody is told, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sagecp.config import ServerConfig
from sagecp.rpc.server import ControlPlaneServer
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from sagecp.v1 import (
    admin_service_pb2,
    error_pb2,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)
from tests.support.processes import SAGECP, Program
from tests.support.rpc_rig import (
    MODEL,
    WAIT_S,
    Output,
    Rig,
    detail_of,
    failure_of,
    next_event,
    read_all,
    reason_of,
    remaining,
    request_spec,
    running_rig,
    untyped,
)
from tests.support.waiting import until

pb = inference_service_pb2
Code = grpc.StatusCode
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_what_runs_may_finish_and_nothing_new_is_taken(rig: Rig) -> None:
    engine = await rig.add_engine(limit=1)
    running = rig.generate("running")
    waiting = rig.generate("waiting")
    await next_event(running, "opened")
    await next_event(waiting, "opened")
    call = await engine.next_call()
    stopping = asyncio.create_task(rig.server.stop(WAIT_S))
    await until(lambda: not rig.manager.accepting)
    error = await failure_of(rig.inference.Submit(pb.SubmitRequest(spec=request_spec("new"))))
    assert error.code() is Code.UNAVAILABLE
    assert reason_of(error) == "SHUTTING_DOWN"
    # Questions are answered to the last.
    assert not (await rig.admin.GetStatus(admin_service_pb2.GetStatusRequest())).accepting
    call.answer("a")
    (await engine.next_call()).answer("b")
    for stream, text in ((running, "a"), (waiting, "b")):
        messages = await remaining(stream)
        assert "".join(message.chunk.text for message in messages) == text
        assert messages[-1].terminal.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert await stopping is True


async def test_what_does_not_finish_in_time_is_told_why(rig: Rig) -> None:
    engine = await rig.add_engine(limit=1)
    running = rig.generate("running")
    waiting = rig.generate("waiting")
    call = await engine.next_call()
    call.send("a")
    await until(lambda: len(rig.manager.requests) == 2)
    assert await rig.server.stop(0.05) is False
    for stream in (running, waiting):
        output = await read_all(stream)
        assert output.terminal.state == request_pb2.REQUEST_STATE_FAILED
        assert output.terminal.failure.reason == error_pb2.ERROR_REASON_SHUTTING_DOWN
        assert [notice.WhichOneof("kind") for notice in output.notices] == ["draining"]
        assert output.error is not None
        assert output.error.code() is Code.UNAVAILABLE
        assert reason_of(output.error) == "SHUTTING_DOWN"
    await call.wait_ended()
    assert call.cancelled


async def test_agents_are_told_and_hold_nothing_up(rig: Rig) -> None:
    streams = []
    for number in range(3):
        await rig.add_engine(f"e{number}", incarnation=5)
        stream = rig.instances.Heartbeat()
        await stream.write(
            fleet_service_pb2.HeartbeatRequest(instance_id=f"e{number}", incarnation=5, sequence=1)
        )
        await stream.read()
        streams.append(stream)
    loop = asyncio.get_running_loop()
    before_s = loop.time()
    assert await rig.server.stop() is True
    for stream in streams:
        error = await failure_of(stream)
        assert error.code() is Code.UNAVAILABLE
        assert reason_of(error) == "SHUTTING_DOWN"
        assert detail_of(error, error_details_pb2.RequestInfo).request_id
    # Well below the time that streams get to flush.
    assert loop.time() - before_s < 1.5


async def test_an_idle_server_stops_at_once_and_more_than_once() -> None:
    async with running_rig() as rig:
        loop = asyncio.get_running_loop()
        before_s = loop.time()
        assert await rig.server.stop(WAIT_S) is True
        assert await rig.server.stop(WAIT_S) is True
        assert loop.time() - before_s < 1.5
        # The port is free for a successor.
        successor = ControlPlaneServer(ServerConfig(listen=rig.server.address))
        await successor.start()
        await successor.stop(0.0)


# -- as a process ------------------------------------------------------------------------------


class Served:
    """`sagecp serve` in a process of its own, with a simulated engine in this one."""

    def __init__(self, program: Program, address: str, channel: grpc.aio.Channel) -> None:
        self.program = program
        self.address = address
        self.inference = untyped(inference_service_pb2_grpc.InferenceServiceStub(channel))
        self.instances = untyped(fleet_service_pb2_grpc.FleetServiceStub(channel))
        self.health = untyped(health_pb2_grpc.HealthStub(untyped(channel)))

    async def start_stream(self, token_count: int) -> Any:
        """Start a request; return its stream once tokens flow."""
        stream = self.inference.Generate(
            pb.GenerateRequest(
                spec=request_spec(
                    "r", sampling=request_pb2.SamplingParameters(max_tokens=token_count, ignore_eos=True)
                )
            ),
            timeout=60,
        )
        await next_event(stream, "opened")
        await next_event(stream, "chunk")
        return stream

    async def terminate(self) -> None:
        """Send SIGTERM and return once health says that the server is going."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service="sagecp.v1.InferenceService"))
        await watch.read()
        self.program.process.send_signal(signal.SIGTERM)
        assert (await asyncio.wait_for(watch.read(), WAIT_S)).status == NOT_SERVING
        watch.cancel()

    async def wait(self, timeout_s: float) -> int:
        """Return the exit code."""
        return await asyncio.to_thread(self.program.wait, timeout_s)


@contextlib.asynccontextmanager
async def served(*options: str, inter_token_s: float = 0.02) -> AsyncIterator[Served]:
    """Run a server process with one engine that is ready for requests."""
    engine_config = EngineServerConfig(
        model_names=(MODEL,), profile="fixed", time_to_first_token_s=0.0, inter_token_s=inter_token_s
    )
    command: list[str | Path] = [SAGECP, "serve", "--listen", "127.0.0.1:0", "--log-format", "json", *options]
    async with EngineServer(engine_config) as engine:
        program = Program("sagecp serve", command)
        try:
            line = await asyncio.to_thread(
                program.wait_for_line, r'"event":"serving".*"address":"(127\.0\.0\.1:\d+)"', 30
            )
            async with grpc.aio.insecure_channel(
                line[1], options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                server = Served(program, line[1], channel)
                await server.instances.RegisterInstance(
                    fleet_service_pb2.RegisterInstanceRequest(
                        spec=instance_pb2.InstanceSpec(
                            instance_id="e1", engine_url=engine.base_url, model_name=MODEL
                        )
                    )
                )
                yield server
        except BaseException:
            # Pytest shows it beside what went wrong.
            print(program.tail())  # noqa: T201
            raise
        finally:
            await asyncio.to_thread(program.stop)
    assert "Traceback" not in program.output


def rest_of(messages: list[Any]) -> Output:
    """Return the rest of a stream whose beginning was read."""
    opened = pb.GenerateResponse(opened=pb.StreamOpened(request_id="r"))
    return Output([opened, *messages], None)


async def test_sigterm_lets_a_stream_finish_and_the_process_exits_with_0() -> None:
    async with served() as server:
        stream = await server.start_stream(60)
        await server.terminate()
        # Health has said so, and the stream goes on.
        error = await failure_of(server.inference.Submit(pb.SubmitRequest(spec=request_spec("new"))))
        assert (error.code(), reason_of(error)) == (Code.UNAVAILABLE, "SHUTTING_DOWN")
        output = rest_of(await remaining(stream))
        assert output.terminal.state == request_pb2.REQUEST_STATE_SUCCEEDED
        assert output.terminal.token_count == 60
        assert await server.wait(10) == 0
        assert '"event":"stopped"' in server.program.output
        assert '"drained":true' in server.program.output


async def test_a_drain_that_takes_too_long_ends_with_0_all_the_same() -> None:
    async with served("--drain-timeout", "0.2s") as server:
        stream = await server.start_stream(5_000)
        await server.terminate()
        error = await failure_of(stream)
        assert (error.code(), reason_of(error)) == (Code.UNAVAILABLE, "SHUTTING_DOWN")
        assert await server.wait(10) == 0
        assert '"drained":false' in server.program.output


async def test_a_second_signal_hurries() -> None:
    async with served("--drain-timeout", "60s") as server:
        stream = await server.start_stream(5_000)
        await server.terminate()
        server.program.process.send_signal(signal.SIGINT)
        error = await failure_of(stream)
        assert (error.code(), reason_of(error)) == (Code.UNAVAILABLE, "SHUTTING_DOWN")
        assert await server.wait(10) == 0


async def test_an_idle_process_ends_at_once_and_frees_its_port() -> None:
    async with served() as server:
        server.program.process.send_signal(signal.SIGTERM)
        assert await server.wait(5) == 0
        host, port = server.address.split(":")
        with socket.socket() as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            successor.bind((host, int(port)))


@pytest.mark.parametrize(
    ("options", "exit_code", "hint"),
    [
        (("--listen", "0.0.0.0:0"), 2, "--insecure-listen"),
        (("--listen", "nonsense"), 2, "HOST:PORT"),
        (("--scheduling-policy", "best"), 2, "choose one of"),
        (("--listen", "{taken}"), 3, "in use"),
        (("--config", "/nonexistent.toml"), 2, "nonexistent.toml"),
    ],
    ids=["reachable by others", "no address", "unknown policy", "port in use", "no such file"],
)
def test_what_cannot_start_says_why(options: tuple[str, str], exit_code: int, hint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        program = Program("sagecp serve", [SAGECP, "serve", *(o.format(taken=address) for o in options)])
        try:
            assert program.wait(30) == exit_code
        finally:
            program.stop()
    assert hint in program.output
    assert "Traceback" not in program.output
