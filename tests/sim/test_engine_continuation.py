"""A request that one simulated engine began and another one goes on with, as a real pair would."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from sagecp.core.types import ExecutionInstance, RequestMetadata, SamplingParameters, SchedulingDecision
from sagecp.runtime.engines.base import EngineDelta, EngineOutcome, EngineSpliceError
from sagecp.runtime.engines.continuation import Continuation, usage_after
from sagecp.runtime.executor import ExecutionCoordinator
from sagecp.sim import tokenizer
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig

TOKEN_COUNT = 24
TEXT = RequestMetadata(request_id="r", prompt="once upon a time", max_tokens=TOKEN_COUNT)
CHAT = RequestMetadata(
    request_id="r", messages=({"role": "user", "content": "who are you?"},), max_tokens=TOKEN_COUNT
)
TOKENS = RequestMetadata(request_id="r", prompt_token_ids=(300, 301, 302), max_tokens=TOKEN_COUNT)


class Recorder:
    def __init__(self) -> None:
        self.deltas: list[EngineDelta] = []
        self.prompts: list[tuple[int, ...]] = []

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        assert not self.deltas
        self.prompts.append(tuple(token_ids))

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        self.deltas.extend(deltas)


def ids_of(deltas: Sequence[EngineDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas for token_id in delta.token_ids or ())


def text_of(deltas: Sequence[EngineDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def greedy(request: RequestMetadata, **sampling: Any) -> RequestMetadata:
    return dataclasses.replace(request, sampling=SamplingParameters(temperature=0.0, **sampling))


@pytest.fixture
async def servers() -> AsyncIterator[tuple[EngineServer, EngineServer]]:
    config = EngineServerConfig(model_names=("tiny",), profile="instant", max_model_len=512)
    async with EngineServer(config) as first, EngineServer(config) as second:
        yield first, second


async def run(
    server: EngineServer, request: RequestMetadata, continuation: Continuation | None = None
) -> tuple[Recorder, EngineOutcome]:
    coordinator = ExecutionCoordinator()
    recorder = Recorder()
    instance = ExecutionInstance(instance_id="i", host="127.0.0.1", port=server.port, model_name="tiny")
    decision = SchedulingDecision(request_id="r", epoch=2 if continuation else 1, instance_id="i")
    try:
        result = await coordinator.execute_request(
            request, instance, decision, sink=recorder, continuation=continuation
        )
    finally:
        await coordinator.close()
    return recorder, usage_after(result.outcome, continuation)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop": ("never in the output",)},
        {"stop": ("STOP", "xyz")},
        {"stop": ("STOP",), "include_stop_str_in_output": True},
        {"stop": ("STOP",), "min_tokens": 16},
        {"repetition_penalty": 1.1, "engine_extras": {"user": "u"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("request_", [TEXT, CHAT, TOKENS], ids=["text", "chat", "tokens"])
async def test_at_every_token_it_is_the_unbroken_run(
    servers: tuple[EngineServer, EngineServer], request_: RequestMetadata, sampling: dict[str, Any]
) -> None:
    first, second = servers
    if "STOP" in sampling.get("stop", ()):
        # Text across three tokens of this very answer.
        plain, _ = await run(first, greedy(request_))
        stop = text_of(plain.deltas[12:15])[2:-1]
        sampling = {**sampling, "stop": tuple(stop if s == "STOP" else s for s in sampling["stop"])}
    request = greedy(request_, **sampling)
    whole, outcome = await run(first, request)
    assert len(whole.prompts) == 1
    for count in range(1, len(whole.deltas)):
        before = whole.deltas[:count]
        continuation = Continuation(whole.prompts[0], ids_of(before), text_of(before))
        after, after_outcome = await run(second, request, continuation)
        assert ids_of(before) + ids_of(after.deltas) == ids_of(whole.deltas), count
        assert text_of(before) + text_of(after.deltas) == text_of(whole.deltas), count
        end = after.deltas[-1]
        assert end.finish_reason == whole.deltas[-1].finish_reason
        assert end.stop_reason == whole.deltas[-1].stop_reason
        assert after_outcome.finish_reasons == outcome.finish_reasons
        assert after_outcome.prompt_token_count == outcome.prompt_token_count
        assert after_outcome.completion_token_count == outcome.completion_token_count
        assert after.prompts == []
    assert second.model.request_count == 0


async def test_a_continuation_can_be_continued(servers: tuple[EngineServer, EngineServer]) -> None:
    request = greedy(TEXT, stop=("never in the output",))
    whole, _ = await run(servers[0], request)
    ids, text = ids_of(whole.deltas[:3]), text_of(whole.deltas[:3])
    for number in range(4):
        after, _ = await run(servers[number % 2], request, Continuation(whole.prompts[0], ids, text))
        # Lost again after five tokens; the last time not at all.
        kept = after.deltas[:5] if number < 3 else after.deltas
        ids, text = ids + ids_of(kept), text + text_of(kept)
    assert ids == ids_of(whole.deltas)
    assert text == text_of(whole.deltas)


async def test_a_chat_without_a_bound_fills_the_context(servers: tuple[EngineServer, EngineServer]) -> None:
    request = greedy(dataclasses.replace(CHAT, max_tokens=None))
    whole, outcome = await run(servers[0], request)
    assert len(whole.prompts[0]) + len(ids_of(whole.deltas)) == 512
    before = whole.deltas[:100]
    after, after_outcome = await run(
        servers[1], request, Continuation(whole.prompts[0], ids_of(before), text_of(before))
    )
    assert ids_of(before) + ids_of(after.deltas) == ids_of(whole.deltas)
    assert after_outcome.completion_token_count == outcome.completion_token_count


async def test_each_attempt_has_an_id_of_its_own(servers: tuple[EngineServer, EngineServer]) -> None:
    seen: list[str] = []
    for server in servers:
        begin = server._begin

        def noting(http_request: Any, call: Any, begin: Any = begin) -> Any:
            seen.append(http_request.headers["X-Request-Id"])
            return begin(http_request, call)

        server._begin = noting  # type: ignore[method-assign]
    whole, _ = await run(servers[0], greedy(TEXT))
    await run(
        servers[1],
        greedy(TEXT),
        Continuation(whole.prompts[0], ids_of(whole.deltas[:2]), text_of(whole.deltas[:2])),
    )
    assert seen == ["r", "r.2"]


@pytest.mark.parametrize("text", ["", "another text"])
async def test_what_was_delivered_must_be_the_text_of_the_tokens(
    servers: tuple[EngineServer, EngineServer], text: str
) -> None:
    ids = tuple(tokenizer.encode("time and tide"))
    with pytest.raises(EngineSpliceError, match="not the text of its tokens"):
        await run(servers[0], greedy(TEXT), Continuation((300,), ids, text))
    assert servers[0].model.counters.prompt_tokens == 0


async def test_tokens_that_the_engine_does_not_have(servers: tuple[EngineServer, EngineServer]) -> None:
    with pytest.raises(EngineSpliceError, match="out of vocabulary"):
        await run(servers[0], greedy(TEXT), Continuation((300,), (10**6,), "x"))


async def test_a_probe_generates_a_token(servers: tuple[EngineServer, EngineServer]) -> None:
    coordinator = ExecutionCoordinator()
    server = servers[0]
    coordinator.attach(
        ExecutionInstance(instance_id="i", host="127.0.0.1", port=server.port, model_name="tiny")
    )
    try:
        assert (await coordinator.probe_generation("i")).healthy
        assert server.model.counters.generation_tokens == 1
        server.misbehave({"stalled": True})
        assert (await coordinator.health_check("i")).healthy
        assert not (await coordinator.probe_generation("i", 0.1)).healthy
        server.misbehave({"stalled": False})
        assert (await coordinator.probe_generation("i")).healthy
    finally:
        await coordinator.close()
