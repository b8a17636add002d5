"""What standard tools rely on: health, reflection, channelz."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sagecp.rpc.server import SERVICE_NAMES
from sagecp.v1 import admin_service_pb2
from tests.support.rpc_rig import WAIT_S, Rig, failure_of, untyped

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", *SERVICE_NAMES])
async def test_every_service_and_the_whole_are_healthy(rig: Rig, service: str) -> None:
    stub = untyped(health_pb2_grpc.HealthStub(untyped(rig.channel)))
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    assert response.status == SERVING


async def test_an_unknown_service_is_not_found(rig: Rig) -> None:
    stub = untyped(health_pb2_grpc.HealthStub(untyped(rig.channel)))
    error = await failure_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_whoever_watches_sees_the_end_coming_before_streams_end(rig: Rig) -> None:
    engine = await rig.add_engine()
    stub = untyped(health_pb2_grpc.HealthStub(untyped(rig.channel)))
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAMES[0]))
    assert (await watch.read()).status == SERVING
    generate = rig.generate("r")
    call = await engine.next_call()
    stopping = asyncio.create_task(rig.server.stop(WAIT_S))
    assert (await watch.read()).status == NOT_SERVING
    assert not call.ended.is_set()
    watch.cancel()
    call.answer("x")
    while (message := await generate.read()) is not grpc.aio.EOF:
        last = message
    assert last.HasField("terminal")
    assert await generate.code() is grpc.StatusCode.OK
    assert await stopping is True


def ask(**question: str) -> reflection_pb2.ServerReflectionRequest:
    return reflection_pb2.ServerReflectionRequest(**question)  # type: ignore[arg-type]


async def reflect(
    rig: Rig, question: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    stub = untyped(reflection_pb2_grpc.ServerReflectionStub(untyped(rig.channel)))
    call = stub.ServerReflectionInfo()
    await call.write(question)
    answer = await call.read()
    await call.done_writing()
    assert isinstance(answer, reflection_pb2.ServerReflectionResponse)
    return answer


async def test_services_and_messages_can_be_discovered(rig: Rig) -> None:
    answer = await reflect(rig, ask(list_services="*"))
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        *SERVICE_NAMES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.channelz.v1.Channelz",
    }
    answer = await reflect(rig, ask(file_containing_symbol="sagecp.v1.InferenceService"))
    assert answer.file_descriptor_response.file_descriptor_proto


async def test_connections_can_be_inspected_from_this_machine(rig: Rig) -> None:
    await rig.admin.GetStatus(admin_service_pb2.GetStatusRequest())
    stub = untyped(channelz_pb2_grpc.ChannelzStub(untyped(rig.channel)))
    answer = await stub.GetServers(channelz_pb2.GetServersRequest())
    assert sum(server.data.calls_succeeded for server in answer.server) >= 1
