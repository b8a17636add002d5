"""The whole path over real sockets: generated stub, server, engine client, simulated vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from sagecp.config import EngineConfig, RuntimeConfig
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from sagecp.v1 import inference_service_pb2, request_pb2
from tests.support.rpc_rig import MODEL, Output, Rig, next_event, read_all, reason_of, running_rig
from tests.support.waiting import until

pb = inference_service_pb2
Code = grpc.StatusCode


class Site:
    """A server with simulated engines."""

    def __init__(self, rig: Rig, engines: list[EngineServer]) -> None:
        self.rig = rig
        self.engines = engines

    def generate(self, request_id: str = "", text: str = "hello", **more: Any) -> Any:
        """Start a Generate that runs to its token limit."""
        limit = more.pop("max_tokens", 8)
        more.setdefault("sampling", request_pb2.SamplingParameters(max_tokens=limit, ignore_eos=True))
        return self.rig.generate(request_id, text, **more)

    def misbehave(self, **switches: Any) -> None:
        """Let every engine misbehave."""
        for engine in self.engines:
            engine.misbehave(switches)


@contextlib.asynccontextmanager
async def site(
    count: int = 1, *, inter_token_s: float = 0.002, engine: EngineConfig | None = None, **config: Any
) -> AsyncIterator[Site]:
    """Run a server and its engines, ready for requests."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                EngineServer(
                    EngineServerConfig(
                        model_names=(MODEL,),
                        profile="fixed",
                        time_to_first_token_s=0.001,
                        inter_token_s=inter_token_s,
                        max_model_len=200,
                        **config,
                    )
                )
            )
            for _ in range(count)
        ]
        rig = await stack.enter_async_context(
            running_rig(
                scripted=False, engine=engine or EngineConfig(), runtime=RuntimeConfig(health_interval_s=0.2)
            )
        )
        for number, server in enumerate(engines):
            await rig.add_engine(f"e{number}", url=server.base_url)
        yield Site(rig, engines)


async def test_text_travels_from_the_engine_to_the_user() -> None:
    async with site() as running:
        output = await read_all(running.generate("r", max_tokens=8))
        assert output.error is None
        assert output.text
        assert output.terminal.finish_reason == "length"
        assert output.terminal.token_count == output.terminal.usage.completion_token_count == 8
        assert output.terminal.usage.prompt_token_count > 0
        token_ids = [token_id for chunk in output.chunks for token_id in chunk.token_ids]
        assert len(token_ids) == 8
        # The same again, from the log: token for token.
        again = await read_all(running.rig.stream("r", from_token_index=3))
        assert [token_id for chunk in again.chunks for token_id in chunk.token_ids] == token_ids[3:]


async def test_a_conversation_and_its_events() -> None:
    async with site() as running:
        chat = request_pb2.ChatPrompt(messages=[request_pb2.ChatMessage(role="user", text="hello")])
        output = await read_all(
            running.generate(
                prompt=request_pb2.Prompt(chat=chat),
                include_openai_events=True,
                sampling=request_pb2.SamplingParameters(max_tokens=5, ignore_eos=True, logprobs=2),
            )
        )
        assert output.error is None
        assert output.terminal.token_count == 5
        events = [json.loads(event) for chunk in output.chunks for event in chunk.openai_events]
        assert all(event["object"] == "chat.completion.chunk" for event in events)
        assert any(choice.get("logprobs") for event in events for choice in event["choices"])


async def test_an_opaque_body() -> None:
    async with site() as running:
        body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True, "model": "whatever", "n": 2}
        openai = request_pb2.OpenAiBody(
            api=request_pb2.OPEN_AI_API_COMPLETIONS, json=json.dumps(body).encode()
        )
        output = await read_all(running.rig.generate(prompt=request_pb2.Prompt(openai=openai)))
        assert output.error is None
        assert output.terminal.token_count == 8
        assert output.text_of(0)
        assert output.text_of(1)
        assert sum(chunk.finish_reason == "length" for chunk in output.chunks) == 2


async def test_leaving_empties_the_engine() -> None:
    async with site(inter_token_s=0.02) as running:
        generate = running.generate("r", max_tokens=150)
        await next_event(generate, "opened")
        await next_event(generate, "chunk")
        (engine,) = running.engines
        assert engine.model.running_count == 1
        generate.cancel()
        await until(lambda: engine.model.running_count == 0, "the engine is idle", timeout_s=1.0)


async def test_what_the_engine_refuses_is_the_callers_mistake() -> None:
    async with site() as running:
        output = await read_all(running.generate("long", "hello " * 500))
        assert output.error is not None
        assert (output.error.code(), reason_of(output.error)) == (Code.INVALID_ARGUMENT, "ENGINE_REJECTED")
        assert "context length" in (output.error.details() or "")
        # Nothing is held against the engine.
        assert running.rig.manager.instance("e0").state.name == "READY"
        assert running.rig.manager.instance("e0").failed_attempt_count == 0


MID_STREAM = ["cut_after_tokens", "done_after_tokens", "error_after_tokens", "abort_after_tokens"]


@pytest.mark.parametrize("fault", MID_STREAM)
async def test_a_stream_that_breaks_is_never_taken_for_complete(fault: str) -> None:
    async with site(2) as running:
        running.misbehave(**{fault: 3})
        output = await read_all(running.generate("r", max_tokens=20))
        assert output.error is not None
        assert (output.error.code(), reason_of(output.error)) == (Code.UNAVAILABLE, "ENGINE_FAILED")
        assert output.terminal.state == request_pb2.REQUEST_STATE_FAILED
        # Each of the attempts goes on after the one before it, and is lost in turn.
        attempts = output.terminal.request.attempts
        assert len(attempts) == 3
        assert 1 <= output.terminal.token_count <= 3 * len(attempts)


@pytest.mark.parametrize("stop", [(), ("never in the output",)], ids=["", "with held back text"])
@pytest.mark.parametrize("fault", [*MID_STREAM, "eof_after_tokens", "garbage_after_tokens"])
async def test_a_stream_that_breaks_goes_on_as_if_nothing_had_happened(
    fault: str, stop: tuple[str, ...]
) -> None:
    async with site(2) as running:
        sampling = request_pb2.SamplingParameters(max_tokens=40, temperature=0, stop=stop)
        whole = await read_all(running.generate("whole", sampling=sampling))
        # Of each engine the first stream is lost.
        running.misbehave(**{fault: 7, "stream_fault_limit": 1})
        spliced = await read_all(running.generate("spliced", sampling=sampling))
        assert spliced.error is None
        assert len(spliced.terminal.request.attempts) > 1
        assert spliced.text == whole.text
        assert token_ids_of(spliced) == token_ids_of(whole)
        assert spliced.terminal.finish_reason == whole.terminal.finish_reason == "length"
        assert spliced.terminal.usage.prompt_token_count == whole.terminal.usage.prompt_token_count
        assert spliced.terminal.usage.completion_token_count == 40


def token_ids_of(output: Output) -> list[int]:
    return [token_id for chunk in output.chunks for token_id in chunk.token_ids]


async def test_an_engine_that_breaks_before_the_first_token_is_passed_over() -> None:
    async with site(2) as running:
        running.engines[0].misbehave({"reject_rate": 1.0, "reject_status": 500})
        for number in range(4):
            output = await read_all(running.generate(f"r{number}"))
            assert output.error is None
            assert output.terminal.instance_id == "e1"


async def test_an_engine_that_hangs_is_given_up() -> None:
    impatient = EngineConfig(first_token_timeout_s=0.3, inter_token_timeout_s=0.3)
    async with site(2, engine=impatient) as running:
        # Before the first token: somebody else takes over.
        running.engines[0].misbehave({"hang_after_tokens": 0})
        running.engines[1].misbehave({"hang_after_tokens": None})
        for number in range(2):
            output = await read_all(running.generate(f"r{number}"))
            assert output.error is None
        running.misbehave(hang_after_tokens=2)
        output = await read_all(running.generate("late", max_tokens=20))
        assert output.error is not None
        assert (output.error.code(), reason_of(output.error)) == (Code.UNAVAILABLE, "ENGINE_TIMEOUT")
        for engine in running.engines:
            await until(lambda engine=engine: engine.model.running_count == 0, timeout_s=2.0)  # type: ignore[misc]


async def test_a_dead_engine_leaves_the_rotation() -> None:
    async with site(2) as running:
        await running.engines[0].stop()
        outputs = await asyncio.gather(*(read_all(running.generate(f"r{number}")) for number in range(6)))
        assert [output.error for output in outputs] == [None] * 6
        assert {output.terminal.instance_id for output in outputs} == {"e1"}
        assert running.rig.manager.instance("e0").state.name == "UNHEALTHY"


async def test_many_streams_over_real_sockets() -> None:
    async with site(3, inter_token_s=0.001) as running:
        outputs = await asyncio.gather(
            *(read_all(running.generate(f"r{number}", max_tokens=20)) for number in range(100))
        )
        assert [output.error for output in outputs] == [None] * 100
        assert {output.terminal.token_count for output in outputs} == {20}
        assert {output.terminal.instance_id for output in outputs} == {"e0", "e1", "e2"}
        assert all(engine.model.running_count == 0 for engine in running.engines)
