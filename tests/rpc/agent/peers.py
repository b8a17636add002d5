"""The two peers of an agent, real servers on loopback ports.

An aiohttp server that answers as vLLM does, and a grpc.aio server whose
`FleetService` records what it is told. Both misbehave as a test wants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sagecp.agent.config import AgentConfig
from sagecp.agent.daemon import run_agent
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2

ROOT = Path(__file__).parents[3]
SAMPLE = (ROOT / "tests" / "data" / "vllm-metrics-sample.txt").read_text()
TIMEOUT_S = 30.0


class Recorder:
    """Something whose changes can be awaited."""

    def __init__(self) -> None:
        self.timeout_s = TIMEOUT_S
        self._changed = asyncio.Condition()
        self._notifying: set[asyncio.Task[None]] = set()

    def changed(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.ensure_future(notify())
        self._notifying.add(task)
        task.add_done_callback(self._notifying.discard)

    async def until(self, accept: Callable[[], Any], timeout_s: float | None = None) -> Any:
        async with asyncio.timeout(timeout_s or self.timeout_s), self._changed:
            await self._changed.wait_for(accept)
        return accept()


class Engine(Recorder):
    """An HTTP server with the pages of vLLM that an agent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.models: list[dict[str, Any]] = [
            {"id": "adapter", "parent": "tiny", "owned_by": "vllm"},
            {"id": "tiny", "parent": None, "owned_by": "vllm", "max_model_len": 8192},
        ]
        self.version: dict[str, Any] = {"version": "0.32.0"}
        self.health_status = 200
        self.metrics: str | None = SAMPLE
        self.server_info: dict[str, Any] | None = None
        self.health_delay_s = 0.0
        self.health_count = 0
        self.aborted: list[list[str]] = []
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/abort_requests", self._abort)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        self.health_count += 1
        self.changed()
        await asyncio.sleep(self.health_delay_s)
        return web.Response(status=self.health_status)

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.metrics is None:
            return web.Response(status=500)
        return web.Response(text=self.metrics)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response(self.version)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.Response(status=404) if self.server_info is None else web.json_response(self.server_info)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["request_ids"])
        self.changed()
        return web.Response()


class ControlPlane(Recorder, fleet_service_pb2_grpc.FleetServiceServicer):
    """Records what agents say and answers as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.registrations: list[pb.RegisterInstanceRequest] = []
        self.peers: list[str] = []
        self.beats: list[pb.HeartbeatRequest] = []
        self.stream_count = 0
        self.deregistrations: list[pb.DeregisterInstanceRequest] = []
        self.acknowledges = True
        self.register_failure: tuple[Any, ...] | None = None
        self.beat_failures: list[tuple[Any, ...]] = []
        self.interval_s = 0.1
        self.lease_s = 6.0
        self.abort_request_ids: list[str] = []
        self.only_instance_id = ""
        self.desired_state: pb.DesiredState.ValueType = pb.DESIRED_STATE_SERVING
        self.sleep_level = 0
        self.adapters: instance_pb2.LoraAdapters | None = None
        self.refused_instance_ids: dict[str, tuple[Any, ...]] = {}
        self.credentials: grpc.ServerCredentials | None = None
        self._server: grpc.aio.Server | None = None

    async def until_beats(self, count: int) -> None:
        await self.until(lambda: len(self.beats) >= count)

    def take_abort_request_ids(self, instance_id: str) -> list[str]:
        """Return what the next beat is answered with: of any instance, unless one is meant."""
        if self.only_instance_id not in {"", instance_id}:
            return []
        taken, self.abort_request_ids = self.abort_request_ids, []
        return taken

    def last_beat(self, instance_id: str) -> pb.HeartbeatRequest | None:
        return next((beat for beat in reversed(self.beats) if beat.instance_id == instance_id), None)

    async def until_beat(
        self, accept: Callable[[pb.HeartbeatRequest], Any], instance_id: str = "engine-1"
    ) -> pb.HeartbeatRequest:
        """Wait until the last beat of an engine is acceptable, and return it."""

        def check() -> pb.HeartbeatRequest | None:
            beat = self.last_beat(instance_id)
            return beat if beat is not None and accept(beat) else None

        found: pb.HeartbeatRequest = await self.until(check)
        return found

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self, server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = server.add_insecure_port(address)
        else:
            self.port = server.add_secure_port(address, self.credentials)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def RegisterInstance(self, request: Any, context: Any) -> pb.RegisterInstanceResponse:  # noqa: N802
        self.registrations.append(request)
        self.peers.append(context.peer())
        self.changed()
        failure = self.register_failure or self.refused_instance_ids.get(request.spec.instance_id)
        if failure is not None:
            await fail(context, *failure)
        response = pb.RegisterInstanceResponse(lease_token=b"token %d" % len(self.registrations))
        response.lease_duration.FromMilliseconds(int(self.lease_s * 1000))
        response.heartbeat_interval.FromMilliseconds(int(self.interval_s * 1000))
        return response

    async def DeregisterInstance(self, request: Any, context: Any) -> pb.DeregisterInstanceResponse:  # noqa: N802
        self.deregistrations.append(request)
        self.changed()
        return pb.DeregisterInstanceResponse()

    async def Heartbeat(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.stream_count += 1
        while (beat := await context.read()) is not grpc.aio.EOF:
            self.beats.append(beat)
            self.changed()
            if self.beat_failures:
                await fail(context, *self.beat_failures.pop(0))
            if beat.goodbye:
                return
            if self.acknowledges:
                response = pb.HeartbeatResponse(
                    instance_id=beat.instance_id,
                    acknowledged_sequence=beat.sequence,
                    desired_state=self.desired_state,
                    abort_request_ids=self.take_abort_request_ids(beat.instance_id),
                    sleep_level=self.sleep_level,
                    desired_lora_adapters=self.adapters,
                )
                response.next_interval.FromMilliseconds(int(self.interval_s * 1000))
                await context.write(response)


async def fail(
    context: Any, code: grpc.StatusCode, message: str, reason: str = "", fields: dict[str, str] | None = None
) -> None:
    """End a call as the control plane does: with details, unless there is no reason."""
    if not reason:
        await context.abort(code, message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="sagecp")]
    if fields:
        bad = error_details_pb2.BadRequest()
        for field, description in fields.items():
            bad.field_violations.add(field=field, description=description)
        details.append(bad)
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    number: int = code.value[0]
    status = rpc_status.to_status(status_pb2.Status(code=number, message=message, details=packed))
    await context.abort(status.code, status.details, status.trailing_metadata)


class RunningAgent:
    """An agent in this process, its log captured."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.stop = asyncio.Event()
        self.task = asyncio.ensure_future(run_agent(config, self.stop))

    async def exit_code(self) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.task

    async def end(self) -> int:
        self.stop.set()
        return await self.exit_code()


Start = Callable[..., RunningAgent]
Log = list[MutableMapping[str, Any]]
