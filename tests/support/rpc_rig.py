"""A control plane server inside the test's process, on a port of its own, with scripted engines behind it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sagecp.config import EngineConfig, RuntimeConfig, ServerConfig
from sagecp.core.config import SchedulerConfig
from sagecp.rpc.server import ControlPlaneServer
from sagecp.runtime.control_loop import EventListener
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.store.base import Store
from sagecp.v1 import (
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)
from tests.support.scripted_client import ScriptedEngine, ScriptedFleet
from tests.support.waiting import until

DetailT = TypeVar("DetailT", bound=Message)
WAIT_S = 20.0
MODEL = "tiny"


@dataclasses.dataclass
class Rig:
    """A server with a channel to it and scripted engines behind it."""

    server: ControlPlaneServer
    manager: ControlPlaneManager
    fleet: ScriptedFleet
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        """Stub of `InferenceService`."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def instances(self) -> Any:
        """Stub of `FleetService`."""
        return fleet_service_pb2_grpc.FleetServiceStub(self.channel)

    @property
    def admin(self) -> Any:
        """Stub of `AdminService`."""
        return admin_service_pb2_grpc.AdminServiceStub(self.channel)

    async def add_engine(
        self,
        instance_id: str = "e1",
        *,
        model: str = MODEL,
        limit: int | None = None,
        incarnation: int = 0,
        url: str = "",
    ) -> ScriptedEngine:
        """Register an instance over RPC and return its engine once it takes work."""
        spec = self.spec(instance_id, model=model, limit=limit)
        if url:
            spec.engine_url = url
        await self.instances.RegisterInstance(
            fleet_service_pb2.RegisterInstanceRequest(spec=spec, incarnation=incarnation), timeout=WAIT_S
        )
        if incarnation == 0:
            await until(
                lambda: self.manager.instance(instance_id).state.name == "READY", f"{instance_id} ready"
            )
        return self.fleet[instance_id]

    def spec(
        self, instance_id: str = "e1", *, model: str = MODEL, limit: int | None = None
    ) -> instance_pb2.InstanceSpec:
        """Return an instance as the contract describes it."""
        return instance_pb2.InstanceSpec(
            instance_id=instance_id,
            engine_url=self.fleet.instance(instance_id).engine_url,
            model_name=model,
            max_concurrent_request_count=limit,
        )

    async def submit(self, request_id: str = "", text: str = "hello", **more: Any) -> request_pb2.Request:
        """Submit a request and return it."""
        response = await self.inference.Submit(
            inference_service_pb2.SubmitRequest(spec=request_spec(request_id, text, **more)), timeout=WAIT_S
        )
        request: request_pb2.Request = response.request
        return request

    def generate(
        self,
        request_id: str = "",
        text: str = "hello",
        *,
        detach: bool = False,
        timeout: float = WAIT_S,
        **more: Any,
    ) -> Any:
        """Start a Generate."""
        return self.inference.Generate(
            inference_service_pb2.GenerateRequest(
                spec=request_spec(request_id, text, **more), detach_on_disconnect=detach
            ),
            timeout=timeout,
        )

    def stream(self, request_id: str, *, from_token_index: int = 0, cancel: bool = False) -> Any:
        """Start a Stream."""
        return self.inference.Stream(
            inference_service_pb2.StreamRequest(
                request_id=request_id, from_token_index=from_token_index, cancel_on_disconnect=cancel
            ),
            timeout=WAIT_S,
        )

    async def state_of(self, request_id: str) -> str:
        """Return the name of a request's state, without its prefix."""
        response = await self.inference.GetRequest(
            inference_service_pb2.GetRequestRequest(request_id=request_id), timeout=WAIT_S
        )
        return request_pb2.RequestState.Name(response.request.state).removeprefix("REQUEST_STATE_")


def request_spec(request_id: str = "", text: str = "hello", **more: Any) -> request_pb2.RequestSpec:
    """Return a request with a text prompt, unless another is given."""
    more.setdefault("prompt", request_pb2.Prompt(text=text))
    more.setdefault("model", MODEL)
    return request_pb2.RequestSpec(request_id=request_id, **more)


@contextlib.asynccontextmanager
async def running_rig(
    *,
    scheduler: SchedulerConfig | None = None,
    runtime: RuntimeConfig | None = None,
    channel_options: Sequence[tuple[str, int]] = (),
    credentials: grpc.ChannelCredentials | None = None,
    engine: EngineConfig | None = None,
    scripted: bool = True,
    on_event: EventListener | None = None,
    store: Store | None = None,
    **config: Any,
) -> AsyncIterator[Rig]:
    """Run a server and yield it with a channel of its own to it.

    Its engines are scripted, unless it should speak to real ones.
    """
    fleet = ScriptedFleet()
    settings = ServerConfig(
        listen="127.0.0.1:0",
        scheduler=scheduler or SchedulerConfig(),
        runtime=runtime or RuntimeConfig(),
        engine=engine or EngineConfig(),
        **config,
    )
    manager = ControlPlaneManager(
        scheduler=settings.scheduler,
        runtime=settings.runtime,
        engine=settings.engine,
        client_factory=fleet if scripted else None,
        on_event=on_event,
        store=store,
    )
    server = ControlPlaneServer(settings.validate(), manager)
    await server.start()
    options = [("grpc.use_local_subchannel_pool", 1), *channel_options]
    channel = (
        grpc.aio.insecure_channel(server.address, options=options)
        if credentials is None
        else grpc.aio.secure_channel(f"localhost:{server.port}", credentials, options=options)
    )
    try:
        yield Rig(server, manager, fleet, channel)
    finally:
        await channel.close()
        await server.stop(0.0)


def untyped(value: object) -> Any:
    """Return a stub or channel as something that type checkers know nothing about.

    The stubs of grpc's own services are typed for the synchronous API only.
    """
    return value


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    """Return the error that a call ends with; messages of a stream are read and dropped."""
    try:
        if hasattr(call, "read"):
            await remaining(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call was to fail and did not")


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """Return the full status of an error, with its details."""
    packed = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
    assert len(packed) == 1, f"no details: {error.code()} {error.details()}"
    assert isinstance(packed[0], bytes)
    status = status_pb2.Status.FromString(packed[0])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return status


def detail_of(error: grpc.aio.AioRpcError, kind: type[DetailT]) -> DetailT:
    """Return the one detail of a kind."""
    found = []
    for packed in status_of(error).details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    assert len(found) == 1, f"{len(found)} details of {kind.__name__} in {error}"
    return found[0]


def has_detail(error: grpc.aio.AioRpcError, kind: type[Message]) -> bool:
    """Return whether an error has a detail of a kind."""
    return any(packed.Unpack(kind()) for packed in status_of(error).details)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the stable reason of an error, after a look at its domain."""
    info = detail_of(error, error_details_pb2.ErrorInfo)
    assert info.domain == "sagecp"
    return info.reason


def fields_of(error: grpc.aio.AioRpcError) -> set[str]:
    """Return the fields that an error names as bad."""
    return {v.field for v in detail_of(error, error_details_pb2.BadRequest).field_violations}


class Output:
    """Every message of a stream, taken apart, with the rules that hold for all of them.

    Attributes:
        opened: The first message.
        chunks: The output.
        notices: What was told beside it.
        terminal: The last message.
        error: What the call ended with, or ``None``.
    """

    def __init__(self, messages: Sequence[Any], error: grpc.aio.AioRpcError | None) -> None:
        kinds = [message.WhichOneof("event") for message in messages]
        assert kinds[0] == "opened", kinds
        assert kinds[-1] == "terminal", kinds
        assert set(kinds[1:-1]) <= {"chunk", "notice"}, kinds
        self.opened = messages[0].opened
        self.chunks = [message.chunk for message in messages if message.WhichOneof("event") == "chunk"]
        self.notices = [message.notice for message in messages if message.WhichOneof("event") == "notice"]
        self.terminal = messages[-1].terminal
        self.error = error
        next_index = self.chunks[0].first_token_index if self.chunks else 0
        for chunk in self.chunks:
            assert chunk.first_token_index == next_index, "token indices are contiguous"
            next_index += chunk.token_count
        if self.chunks:
            assert self.terminal.token_count == next_index

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.text_of(0)

    def text_of(self, choice_index: int) -> str:
        """Text of a choice."""
        return "".join(chunk.text for chunk in self.chunks if chunk.choice_index == choice_index)


async def read_all(call: Any) -> Output:
    """Read a stream to its end."""
    messages: list[Any] = []
    error = None
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    except grpc.aio.AioRpcError as raised:
        error = raised
    return Output(messages, error)


async def remaining(call: Any) -> list[Any]:
    """Read what is left of a stream that ends well."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def next_event(call: Any, kind: str) -> Any:
    """Read the next message of a stream, which must be of a kind."""
    message = await asyncio.wait_for(call.read(), WAIT_S)
    assert message is not grpc.aio.EOF, "the stream ended"
    assert message.WhichOneof("event") == kind, message
    return getattr(message, kind)
