"""A control plane that is killed and started again, with a real engine behind it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc

from sagecp import client
from sagecp.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    request_pb2,
)
from tests.e2e.conftest import MODEL, Engine, instance_states
from tests.e2e.reading import generate, read
from tests.support.processes import SAGECP, Program, eventually, free_ports

TOKEN_COUNT = 1500


def spec_of(prompt: str) -> request_pb2.RequestSpec:
    return request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text=prompt),
        sampling=request_pb2.SamplingParameters(max_tokens=TOKEN_COUNT, temperature=0, ignore_eos=True),
    )


def serve(port: int, folder: Path) -> Program:
    return Program(
        "durable control plane",
        [SAGECP, "serve", "--listen", f"127.0.0.1:{port}", "--journal", folder / "journal.db"],
        log_file=folder / "serve.log",
    )


def test_streams_survive_the_control_plane(engines: dict[str, Engine], tmp_path: Path) -> None:
    """kill -9 of the control plane mid-stream: readers go on by index, with what one run would have given."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    programs = [serve(port, tmp_path)]
    try:
        programs[0].wait_for_line("serving", 30)
        with grpc.insecure_channel(address) as channel:
            fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
            inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for name, engine in engines.items():
                request = fleet_service_pb2.RegisterInstanceRequest()
                request.spec.instance_id = name
                request.spec.engine_url = engine.url
                request.spec.model_name = MODEL
                fleet.RegisterInstance(request, timeout=10)
            eventually(
                lambda: instance_states(fleet), lambda states: set(states.values()) == {"READY"}, timeout_s=30
            )
            prompts = [f"The sea was calm, {number}" for number in range(4)]
            unbroken = {prompt: generate(inference, spec_of(prompt)) for prompt in prompts}
            ids = {
                prompt: inference.Submit(
                    inference_service_pb2.SubmitRequest(spec=spec_of(prompt)), timeout=10
                ).request.request_id
                for prompt in prompts
            }
        texts = asyncio.run(_read_through_a_crash(address, list(ids.values()), programs, port, tmp_path))
        with grpc.insecure_channel(address) as channel:
            inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
            for prompt, request_id in ids.items():
                whole = unbroken[prompt]
                assert texts[request_id] == whole.text
                again = read(
                    inference.Stream(inference_service_pb2.StreamRequest(request_id=request_id), timeout=60)
                )
                assert again.text == whole.text
                assert again.token_ids == whole.token_ids
                assert again.end.usage == whole.end.usage
                assert len(again.end.request.attempts) == 2
    finally:
        for program in programs:
            program.stop()


async def _read_through_a_crash(
    address: str, request_ids: list[str], programs: list[Program], port: int, folder: Path
) -> dict[str, str]:
    """Read all requests with the client library; kill the control plane once all have begun."""
    policy = client.RetryPolicy(max_attempt_count=60, base_s=0.2, max_s=1.0)
    async with client.SageClient(address, retry=policy) as control_plane:
        begun = asyncio.Semaphore(0)

        async def text_of(request_id: str) -> str:
            texts = []
            async with control_plane.stream(request_id) as stream:
                async for chunk in stream:
                    texts.append(chunk.text)
                    if len(texts) == 20:
                        begun.release()
            return "".join(texts)

        readers = [asyncio.create_task(text_of(request_id)) for request_id in request_ids]
        for _ in request_ids:
            await begun.acquire()
        programs[0].signal_group(signal.SIGKILL)
        programs[0].wait(10)
        programs.append(serve(port, folder))
        return dict(zip(request_ids, await asyncio.gather(*readers), strict=True))
