"""Nothing of a prompt or an answer is where operators look: logs, metrics, events, console, traces."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from google.protobuf import json_format

from sagecp.v1 import admin_service_pb2 as admin_pb
from sagecp.v1 import (
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)
from tests.rpc.test_tracing import collecting
from tests.support.processes import free_ports
from tests.support.rpc_rig import WAIT_S
from tests.support.scripted_engine import Request, scripted_engine, sse
from tests.support.waiting import until

# What users wrote, in every form that a prompt can take, and what an engine answered.
SAID = {
    "text": "canary-text-prompt",
    "chat": "canary-chat-message",
    "openai": "canary-openai-body",
    "answer": "canary-answer",
    "refusal": "canary-in-a-refusal",
    "key": "canary-engine-key",
}


async def engine(request: Request) -> None:
    """Answer, but refuse what is chatted, quoting it."""
    if request.method == "GET":
        await request.answer("200 OK", b"{}")
    elif b"canary-chat" in request.body:
        quoted = json.dumps(
            {"error": {"message": f"{SAID['refusal']}: {request.body.decode()}", "code": 400}}
        )
        await request.answer("400 Bad Request", quoted.encode())
    elif b"canary-openai" in request.body:
        request.reset()
    else:
        await request.stream(
            sse({"choices": [{"index": 0, "text": SAID["answer"], "token_ids": [1]}]}),
            sse({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}),
            b"data: [DONE]\n\n",
        )


def prompts() -> list[request_pb2.Prompt]:
    body = {"prompt": SAID["openai"], "max_tokens": 3}
    chat = request_pb2.Prompt(
        chat=request_pb2.ChatPrompt(messages=[request_pb2.ChatMessage(role="user", text=SAID["chat"])])
    )
    opaque = request_pb2.Prompt(
        openai=request_pb2.OpenAiBody(api=request_pb2.OPEN_AI_API_COMPLETIONS, json=json.dumps(body).encode())
    )
    return [request_pb2.Prompt(text=SAID["text"]), chat, opaque]


@pytest.mark.timeout(90)
async def test_a_canary_is_nowhere(tmp_path: Path) -> None:
    port, metrics_port = free_ports(2)
    log = tmp_path / "server.log"
    async with collecting() as collector, scripted_engine(engine) as scripted:
        command = [sys.executable, "-m", "sagecp", "serve", "--listen", f"127.0.0.1:{port}"]
        command += ["--metrics-listen", f"127.0.0.1:{metrics_port}", "--log-level", "debug"]
        command += ["--log-format", "json", "--journal", str(tmp_path / "journal.db")]
        command += ["--otlp-endpoint", collector.endpoint]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                seen = await _use(channel, scripted.url)
            seen += await _look(metrics_port)
        finally:
            process.terminate()
            async with asyncio.timeout(30):
                assert await process.wait() == 0
        seen.append(str(collector.spans))
        await until(lambda: bool(collector.named("request")), "a trace")
    text = log.read_text()
    seen.append(text)
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) > 5, text
    assert [line for line in lines if not line.keys() >= {"time", "level", "logger", "event"}] == []
    for page in seen:
        for what, said in SAID.items():
            assert said not in page, (
                f"{what} is in {page[max(0, page.find(said) - 300) : page.find(said) + 80]}"
            )


async def _use(channel: grpc.aio.Channel, engine_url: str) -> list[str]:
    """Send every kind of prompt; return what operators are answered afterwards."""
    inference: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
    fleet: Any = fleet_service_pb2_grpc.FleetServiceStub(channel)
    admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
    spec = instance_pb2.InstanceSpec(
        instance_id="e1", engine_url=engine_url, model_name="m", engine_api_key=SAID["key"]
    )
    await fleet.RegisterInstance(
        fleet_service_pb2.RegisterInstanceRequest(spec=spec), timeout=WAIT_S, wait_for_ready=True
    )
    for number, prompt in enumerate(prompts()):
        request = request_pb2.RequestSpec(request_id=f"r-{number}", model="m", prompt=prompt)
        call = inference.Generate(inference_service_pb2.GenerateRequest(spec=request), timeout=WAIT_S)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            assert number > 0, "the first one is answered"
    answers = [
        await admin.GetStatus(admin_pb.GetStatusRequest(), timeout=WAIT_S),
        await admin.ListEvents(admin_pb.ListEventsRequest(), timeout=WAIT_S),
        await admin.GetMetrics(admin_pb.GetMetricsRequest(), timeout=WAIT_S),
        await fleet.ListInstances(fleet_service_pb2.ListInstancesRequest(), timeout=WAIT_S),
    ]
    return [json_format.MessageToJson(answer) for answer in answers]


async def _look(metrics_port: int) -> list[str]:
    pages = []
    async with aiohttp.ClientSession() as http:
        for path in ("/metrics", "/api/snapshot", "/api/requests/r-0"):
            async with http.get(f"http://127.0.0.1:{metrics_port}{path}") as response:
                assert response.status == 200, path
                pages.append(await response.text())
    return pages
