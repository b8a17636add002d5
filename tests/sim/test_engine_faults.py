"""A simulated engine that misbehaves on purpose, as its clients see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagecp.sim.engine_server import EngineServer
from sagecp.sim.misbehaviour import Misbehaviour
from sagecp.sim.server_config import EngineServerConfig
from tests.sim.engine_client import Answer, chat, complete, completion, open_exchange, send, until


@pytest.fixture
async def server() -> AsyncIterator[EngineServer]:
    config = EngineServerConfig(model_names=("tiny",), profile="fixed", inter_token_s=0.002)
    async with EngineServer(config) as running:
        yield running


async def misbehave(server: EngineServer, **changes: Any) -> Answer:
    return await send(server.port, "/sim/misbehave", changes)


async def assert_works(server: EngineServer) -> None:
    answer = await complete(server, stream=True)
    assert (answer.finish_reason, answer.complete) == ("length", True)


async def test_switches_are_shown_and_set_over_http(server: EngineServer) -> None:
    assert (await send(server.port, "/sim/misbehave", method="GET")).json == Misbehaviour().as_dict()
    changed = await misbehave(server, cut_after_tokens=3, slow_factor=2.5)
    assert changed.json["cut_after_tokens"] == 3
    assert (await misbehave(server, cut_after_tokens=None)).json["slow_factor"] == 2.5
    assert server.faults.switches == Misbehaviour(slow_factor=2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explode": 1}, "unknown: explode; the switches are: die_after_tokens, "),
        ({"reject_rate": 2}, "reject_rate must be a number from 0 to 1, not 2"),
        ([], "Expected `object`"),
    ],
)
async def test_bad_switches_change_nothing(server: EngineServer, changes: Any, message: str) -> None:
    answer = await send(server.port, "/sim/misbehave", changes)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]
    assert server.faults.switches == Misbehaviour()


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_a_connection_is_cut(server: EngineServer, api: str) -> None:
    await misbehave(server, cut_after_tokens=4)
    if api == "chat":
        answer = await send(server.port, "/v1/chat/completions", chat(stream=True, return_token_ids=True))
    else:
        answer = await complete(server, stream=True, return_token_ids=True)
    assert len(answer.token_ids) == 4
    assert not answer.complete
    assert answer.finish_reason is None
    assert "[DONE]" not in answer.events
    await until(lambda: server.model.request_count == 0)
    await misbehave(server, cut_after_tokens=None)
    await assert_works(server)


async def test_done_comes_without_a_finish_reason(server: EngineServer) -> None:
    await misbehave(server, done_after_tokens=4)
    answer = await complete(server, stream=True, stream_options={"include_usage": True})
    assert len(answer.values) == 4
    assert answer.events[-1] == "[DONE]"
    assert answer.finish_reason is None
    assert answer.complete


async def test_an_error_comes_inside_a_stream(server: EngineServer) -> None:
    await misbehave(server, error_after_tokens=2)
    answer = await complete(server, stream=True)
    assert answer.status == 200
    assert list(answer.values[-1]) == ["error"]
    assert answer.values[-1]["error"]["type"] == "InternalServerError"
    assert answer.events[-2].startswith('{"error": {"message": "EngineCore')
    assert answer.events[-1] == "[DONE]"
    body = await complete(server)
    assert (body.status, body.json["error"]["code"]) == (500, 500)


async def test_an_answer_ends_with_abort(server: EngineServer) -> None:
    await misbehave(server, abort_after_tokens=3)
    answer = await complete(server, stream=True, return_token_ids=True)
    assert answer.finish_reason == "abort"
    assert len(answer.token_ids) == 3
    assert answer.events[-1] == "[DONE]"
    assert (await complete(server)).json["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("tokens", [0, 3])
async def test_a_stream_hangs_while_the_engine_looks_healthy(server: EngineServer, tokens: int) -> None:
    await misbehave(server, hang_after_tokens=tokens)
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True, max_tokens=5000))
    await exchange.head()
    for _ in range(tokens):
        await exchange.chunk()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await exchange.chunk()
    assert (await send(server.port, "/health", method="GET")).status == 200
    assert server.model.running_count == 1
    exchange.close()
    await until(lambda: server.model.request_count == 0)
    await misbehave(server, hang_after_tokens=None)
    await assert_works(server)


async def test_a_stream_that_runs_is_hit_too(server: EngineServer) -> None:
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True, max_tokens=5000))
    await exchange.head()
    for _ in range(5):
        await exchange.chunk()
    await misbehave(server, done_after_tokens=1)
    answer = await exchange.rest()
    assert answer.events[-1] == "[DONE]"
    assert answer.finish_reason is None


async def test_garbage_and_broken_json_come_in_between(server: EngineServer) -> None:
    await misbehave(server, garbage_after_tokens=1, bad_json_after_tokens=2)
    answer = await complete(server, stream=True)
    assert b"\xff\xfe" in answer.chunks[1]
    assert answer.chunks[3].startswith(b'data: {"id"')
    with pytest.raises(ValueError, match="Unterminated string"):
        _ = answer.values
    assert answer.events[-1] == "[DONE]"
    body = await complete(server)
    assert body.status == 200
    assert b"\xff\xfe" in body.body


async def test_only_the_first_streams_are_hit(server: EngineServer) -> None:
    await misbehave(server, cut_after_tokens=2, stream_fault_limit=2)
    answers = [await complete(server, stream=True) for _ in range(4)]
    assert [answer.complete for answer in answers] == [False, False, True, True]


async def test_requests_are_rejected(server: EngineServer) -> None:
    await misbehave(server, reject_first=2, reject_status=503)
    assert [(await complete(server)).status for _ in range(4)] == [503, 503, 200, 200]
    await misbehave(server, reject_rate=1.0, reject_status=429)
    refused = await send(server.port, "/v1/chat/completions", chat())
    assert (refused.status, refused.json["error"]["code"]) == (429, 429)
    assert (await send(server.port, "/health", method="GET")).status == 200


async def test_steps_get_slower(server: EngineServer) -> None:
    await misbehave(server, slow_factor=10)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await complete(server, max_tokens=11)
    assert loop.time() - began > 10 * 0.002 * 10 * 0.9


async def test_a_connection_ends_in_an_orderly_way_inside_the_answer(server: EngineServer) -> None:
    await misbehave(server, eof_after_tokens=4)
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True))
    await exchange.head()
    for _ in range(4):
        await exchange.chunk()
    # A reset would raise here.
    assert await exchange.reader.read() == b""
    exchange.close()
    await until(lambda: server.model.request_count == 0)


@pytest.mark.parametrize("as_token_ids", [False, True])
async def test_only_streams_with_the_marker_in_their_prompt_are_hit(
    server: EngineServer, as_token_ids: bool
) -> None:
    await misbehave(server, die_after_tokens=0, stream_fault_marker="arsenic")
    assert (await complete(server, prompt="bread", stream=True)).complete
    prompt: Any = "bread with arsenic in it"
    if as_token_ids:
        prompt = (await send(server.port, "/tokenize", {"prompt": prompt})).json["tokens"]
    assert not (await complete(server, prompt=prompt, stream=True)).complete
    with pytest.raises(ConnectionError):
        await open_exchange(server.port, "/health", method="GET")


async def test_an_engine_stalls_and_goes_on(server: EngineServer) -> None:
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True, max_tokens=400))
    await exchange.head()
    await exchange.chunk()
    await misbehave(server, stalled=True)
    waiting = asyncio.create_task(complete(server, stream=True))
    await until(lambda: server.model.running_count == 2)
    tokens = server.model.counters.generation_tokens
    assert (await send(server.port, "/health", method="GET")).status == 200
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)
    assert server.model.counters.generation_tokens == tokens
    await misbehave(server, stalled=False)
    assert (await waiting).finish_reason == "length"
    assert (await exchange.rest()).finish_reason == "length"


async def test_connections_are_refused_for_a_while(server: EngineServer) -> None:
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True, max_tokens=5000))
    await exchange.head()
    # The answer to the switch itself still comes.
    assert (await misbehave(server, refuse_connections_s=60)).json["refuse_connections_s"] == 60
    assert not (await exchange.rest()).complete
    with pytest.raises(ConnectionRefusedError):
        await open_exchange(server.port, "/health", method="GET")
    server.misbehave({"refuse_connections_s": None})
    async with asyncio.timeout(5):
        while True:
            try:
                await assert_works(server)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
    assert server.live_request_count == 0


async def test_requests_in_progress_are_told_and_aborted_by_id(server: EngineServer) -> None:
    streams = {}
    for name in ("one", "two", "three"):
        body = completion(stream=True, max_tokens=5000)
        streams[name] = await open_exchange(
            server.port, "/v1/completions", body, headers={"X-Request-Id": name}
        )
        await streams[name].head()
        await streams[name].chunk()
    shown = (await send(server.port, "/sim/requests", method="GET")).json
    assert sorted(shown["request_ids"]) == ["one", "three", "two"]
    assert (shown["running_count"], shown["waiting_count"]) == (3, 0)
    answer = await send(server.port, "/abort_requests", {"request_ids": ["two", "unknown"]})
    assert answer.json == {"status": "aborted", "aborted": 2}
    assert (await streams.pop("two").rest()).finish_reason == "abort"
    assert server.model.request_count == 2
    assert (await send(server.port, "/abort_requests", {})).json["aborted"] == 2
    for stream in streams.values():
        assert (await stream.rest()).finish_reason == "abort"
    await until(lambda: server.live_request_count == 0)
    assert (await send(server.port, "/sim/requests", method="GET")).json["request_ids"] == []
    bad_bodies: list[Any] = [[], {"request_ids": [1]}, {"request_ids": "all"}]
    for bad in bad_bodies:
        answer = await send(server.port, "/abort_requests", bad)
        assert answer.status == 400
        assert "request_ids" in answer.json["error"]["message"]


async def test_health_is_never_answered(server: EngineServer) -> None:
    await misbehave(server, silent_health=True)
    exchange = await open_exchange(server.port, "/health", method="GET")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await exchange.head()
    exchange.close()
    await assert_works(server)


async def test_a_server_inside_another_process_plays_dead(server: EngineServer) -> None:
    port = server.port
    body = completion(stream=True, max_tokens=5000)
    streams = [await open_exchange(port, "/v1/completions", body) for _ in "ab"]
    for stream in streams:
        await stream.head()
        await stream.chunk()
    await misbehave(server, die_after_tokens=3)
    answers = [await stream.rest() for stream in streams]
    assert [answer.complete for answer in answers] == [False, False]
    with pytest.raises(ConnectionError):
        await open_exchange(port, "/health", method="GET")


async def test_faults_can_be_set_from_the_start() -> None:
    config = EngineServerConfig(
        model_names=("tiny",),
        profile="instant",
        misbehaviour=Misbehaviour(reject_first=1, cut_after_tokens=1),
    )
    async with EngineServer(config) as server:
        assert (await complete(server)).status == 500
        assert not (await complete(server, stream=True)).complete


async def test_one_fault_ends_all_choices_of_a_request(server: EngineServer) -> None:
    await misbehave(server, done_after_tokens=4)
    answer = await complete(server, stream=True, n=3, temperature=1, ignore_eos=True)
    assert answer.events[-1] == "[DONE]"
    assert answer.events.count("[DONE]") == 1
    assert 4 <= len(answer.values) <= 6
    assert server.model.request_count == 0
