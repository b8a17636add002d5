"""The simulated engine over HTTP: generation, identity, aborts, metrics, shutdown."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from sagecp.sim.api_request import GenerationCall
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.generation import Generation
from sagecp.sim.profiles import get_profile
from sagecp.sim.server_config import EngineServerConfig
from tests.sim.engine_client import chat, complete, completion, metric, open_exchange, send, until


def start(**options) -> EngineServer:
    """Make a server; instant unless told otherwise."""
    return EngineServer(EngineServerConfig(**{"model_names": ("tiny",), "profile": "instant", **options}))


@pytest.fixture
async def server() -> AsyncIterator[EngineServer]:
    async with start() as running:
        yield running


@pytest.fixture
async def slow_server() -> AsyncIterator[EngineServer]:
    """One that sends a token every 20 ms, so that things can happen in between."""
    async with start(profile="fixed", time_to_first_token_s=0.0, inter_token_s=0.02) as running:
        yield running


async def scrape(server: EngineServer) -> bytes:
    return (await send(server.port, "/metrics", method="GET")).body


async def test_a_stream_and_a_body_say_the_same(server: EngineServer) -> None:
    body = await complete(server, max_tokens=50, return_token_ids=True)
    stream = await complete(server, max_tokens=50, return_token_ids=True, stream=True)
    choice = body.json["choices"][0]
    assert stream.text == choice["text"]
    assert stream.token_ids == choice["token_ids"]
    assert len(stream.token_ids) == 50
    assert stream.finish_reason == choice["finish_reason"] == "length"
    assert stream.events[-1] == "[DONE]"
    assert len(stream.chunks) == 51, "one event for every token, and the end"


async def test_every_token_has_text_of_its_own(server: EngineServer) -> None:
    stream = await complete(server, max_tokens=100, stream=True)
    assert all(value["choices"][0]["text"] for value in stream.values)


async def test_an_answer_continues_from_its_own_tokens(server: EngineServer) -> None:
    whole = (await complete(server, max_tokens=40, return_token_ids=True)).json["choices"][0]
    prompt = whole["prompt_token_ids"]
    rest = await complete(
        server, prompt=[*prompt, *whole["token_ids"][:15]], max_tokens=25, return_token_ids=True
    )
    assert rest.json["choices"][0]["token_ids"] == whole["token_ids"][15:]


async def test_engines_with_the_same_seed_agree_and_others_do_not() -> None:
    async with start() as one, start(profile="8b-h100", speed=100) as two, start(seed=1) as three:
        texts = [(await complete(each)).json["choices"][0]["text"] for each in (one, two, three)]
    assert texts[0] == texts[1] != texts[2]


async def test_sampling_repeats_with_a_seed_and_varies_without(server: EngineServer) -> None:
    async def text(**fields) -> str:
        answer = await complete(server, temperature=1, max_tokens=30, ignore_eos=True, **fields)
        return str(answer.json["choices"][0]["text"])

    assert await text(seed=3) == await text(seed=3) != await text(seed=4)
    assert await text() != await text()


async def test_sampled_answers_end_by_themselves_unless_told_not_to(server: EngineServer) -> None:
    ended = await complete(server, temperature=1, max_tokens=4000, seed=5, return_token_ids=True)
    choice = ended.json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    assert 1 <= len(choice["token_ids"]) < 4000
    longer = await complete(server, temperature=1, max_tokens=2000, seed=5, ignore_eos=True)
    assert longer.json["usage"]["completion_tokens"] == 2000
    least = len(choice["token_ids"]) + 10
    held = await complete(server, temperature=1, max_tokens=4000, seed=5, min_tokens=least)
    assert held.json["usage"]["completion_tokens"] > least


async def test_choices_differ_and_all_are_counted(server: EngineServer) -> None:
    answer = await complete(server, n=3, temperature=1, seed=1, ignore_eos=True, prompt=["a b", "c"])
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) == 6
    assert answer.json["usage"]["completion_tokens"] == 48
    stream = await send(
        server.port,
        "/v1/chat/completions",
        chat(n=3, temperature=1, ignore_eos=True, stream=True, stream_options={"include_usage": True}),
    )
    finished = [c["index"] for v in stream.values for c in v["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]
    assert stream.values[-1]["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_text_across_tokens_is_found(server: EngineServer, stream: bool, include: bool) -> None:
    full = (await complete(server, max_tokens=30)).json["choices"][0]["text"]
    stop = full[30:36]
    expected = full[: full.index(stop) + (len(stop) if include else 0)]
    answer = await complete(
        server, max_tokens=30, stop=["~never~", stop], include_stop_str_in_output=include, stream=stream
    )
    if stream:
        assert answer.text == expected
        assert answer.values[-1]["choices"][0]["stop_reason"] == stop
        assert answer.finish_reason == "stop"
    else:
        choice = answer.json["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (expected, "stop", stop)
    await until(lambda: server.model.request_count == 0)


async def test_text_held_back_for_a_stop_text_is_sent_at_the_end(server: EngineServer) -> None:
    plain = await complete(server, max_tokens=20, stream=True)
    held = await complete(server, max_tokens=20, stream=True, stop=["#" * 40])
    assert held.text == plain.text
    assert held.finish_reason == "length"


async def test_a_stop_token_ends_an_answer_and_is_not_shown(server: EngineServer) -> None:
    full = (await complete(server, max_tokens=30, return_token_ids=True)).json["choices"][0]
    stop = full["token_ids"][6]
    count = full["token_ids"].index(stop) + 1
    body = await complete(server, max_tokens=30, stop_token_ids=[stop], return_token_ids=True)
    stream = await complete(server, max_tokens=30, stop_token_ids=[stop], return_token_ids=True, stream=True)
    choice = body.json["choices"][0]
    assert choice["token_ids"] == stream.token_ids == full["token_ids"][:count]
    assert choice["stop_reason"] == stream.values[-1]["choices"][0]["stop_reason"] == stop
    assert stream.text == choice["text"]
    assert full["text"].startswith(choice["text"])
    assert choice["text"] != full["text"][: len(choice["text"]) + 1]


async def test_chat_takes_the_rest_of_the_context_when_no_bound_is_given(server: EngineServer) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    usage = (await send(server.port, "/v1/chat/completions", body)).json["usage"]
    assert usage["total_tokens"] == server.config.max_model_len
    body = {"model": "tiny", "prompt": "Hi", "temperature": 0}
    usage = (await send(server.port, "/v1/completions", body)).json["usage"]
    assert usage["completion_tokens"] == 16


async def test_text_and_its_tokens_are_the_same_prompt(server: EngineServer) -> None:
    tokens = (await send(server.port, "/tokenize", {"model": "tiny", "prompt": "What a day!"})).json["tokens"]
    text = (await send(server.port, "/detokenize", {"model": "tiny", "tokens": tokens})).json["prompt"]
    assert text == "What a day!"
    by_text = (await complete(server, prompt=text)).json["choices"][0]["text"]
    assert (await complete(server, prompt=tokens)).json["choices"][0]["text"] == by_text


async def test_names_and_limits_are_told(server: EngineServer) -> None:
    async with start(model_names=("one", "two"), max_model_len=777, tensor_parallel_size=4) as named:
        models = (await send(named.port, "/v1/models", method="GET")).json["data"]
        assert [(card["id"], card["max_model_len"]) for card in models] == [("one", 777), ("two", 777)]
        for name in ("one", "two"):
            assert (await complete(named, model=name)).json["model"] == name
        refused = await complete(named, model="three")
        assert refused.status == 404
        assert "Valid aliases: one, two." in refused.json["error"]["message"]
        info = (await send(named.port, "/server_info?config_format=json", method="GET")).json
        assert info["vllm_config"]["parallel_config"]["tensor_parallel_size"] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_clients_request_id_becomes_the_id(server: EngineServer, path: str) -> None:
    body = chat() if "chat" in path else completion()
    answer = await send(server.port, path, body, headers={"X-Request-Id": "my-7"})
    assert answer.json["id"] == ("chatcmpl-my-7" if "chat" in path else "cmpl-my-7")


async def test_two_live_requests_may_share_an_id(slow_server: EngineServer) -> None:
    headers = {"X-Request-Id": "same"}
    answers = await asyncio.gather(
        *(send(slow_server.port, "/v1/completions", completion(stream=True), headers=headers) for _ in "ab")
    )
    assert [answer.finish_reason for answer in answers] == ["length", "length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request_at_once(slow_server: EngineServer, stream: bool) -> None:
    exchange = await open_exchange(
        slow_server.port, "/v1/completions", completion(max_tokens=5000, stream=stream)
    )
    await until(lambda: slow_server.model.running_count == 1)
    left_at = time.monotonic()
    exchange.writer.transport.abort()
    await until(lambda: slow_server.model.request_count == 0, timeout_s=2)
    assert time.monotonic() - left_at < 1.0
    assert slow_server.live_request_count == 0
    assert slow_server.model.cache.used_block_count == 0
    text = await scrape(slow_server)
    assert metric(text, "vllm:num_requests_running") == 0
    assert metric(text, "vllm:request_success_total", finished_reason="abort") == 0


async def test_a_waiting_request_is_aborted_too() -> None:
    async with start(profile="fixed", inter_token_s=0.02, max_num_seqs=1) as server:
        first = await open_exchange(server.port, "/v1/completions", completion(max_tokens=5000))
        await until(lambda: server.model.running_count == 1)
        second = await open_exchange(server.port, "/v1/completions", completion(max_tokens=5000))
        await until(lambda: server.model.waiting_count == 1)
        second.close()
        await until(lambda: server.model.waiting_count == 0)
        assert server.model.running_count == 1
        first.close()


async def test_a_key_guards_v1_and_nothing_else() -> None:
    async with start(api_key="secret") as server:
        refused = await complete(server)
        assert (refused.status, refused.json) == (401, {"error": "Unauthorized"})
        for value in ("Bearer wrong", "Basic secret", "secret"):
            answer = await send(server.port, "/v1/models", method="GET", headers={"Authorization": value})
            assert answer.status == 401
        headers = {"Authorization": "Bearer secret"}
        assert (await send(server.port, "/v1/models", method="GET", headers=headers)).status == 200
        for path in ("/health", "/metrics", "/version", "/ping", "/load"):
            assert (await send(server.port, path, method="GET")).status == 200
        assert "secret" not in repr(server.config)


async def test_a_full_queue_is_answered_with_503() -> None:
    async with start(profile="fixed", inter_token_s=0.02, max_num_queued_reqs=2) as server:
        held = [await open_exchange(server.port, "/v1/completions", completion(max_tokens=999)) for _ in "ab"]
        await until(lambda: server.model.request_count == 2)
        refused = await complete(server)
        assert refused.status == 503
        assert refused.json["error"]["type"] == "Service Unavailable"
        assert (
            metric(await scrape(server), "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
        )
        for exchange in held:
            exchange.close()


async def test_too_large_a_body_is_refused_and_the_connection_lives() -> None:
    async with start(max_body_bytes=1000) as server:
        assert (await complete(server, prompt="x" * 2000)).status == 413
        assert (await complete(server)).status == 200


async def test_metrics_tell_what_happened(server: EngineServer) -> None:
    prompt = list(range(10, 58))
    for _ in range(2):
        await complete(server, prompt=prompt, max_tokens=10)
    text = await scrape(server)
    for name, expected in (
        ("vllm:prompt_tokens_total", 96),
        ("vllm:generation_tokens_total", 20),
        ("vllm:prefix_cache_queries_total", 96),
        ("vllm:prefix_cache_hits_total", 32),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:inter_token_latency_seconds_count", 18),
        ("vllm:e2e_request_latency_seconds_count", 2),
        ("vllm:request_queue_time_seconds_count", 2),
        ("vllm:request_prefill_time_seconds_count", 2),
        ("vllm:request_decode_time_seconds_count", 2),
        ("vllm:num_requests_running", 0),
        ("vllm:kv_cache_usage_perc", 0),
        ("vllm:request_generation_tokens_sum", 20),
    ):
        assert metric(text, name, model_name="tiny", engine="0") == expected, name
    assert metric(text, "vllm:request_success_total", finished_reason="length") == 2
    assert metric(text, "vllm:engine_sleep_state", sleep_state="awake") == 1
    blocks = str(get_profile("instant").kv_token_capacity // 16)
    assert metric(text, "vllm:cache_config_info", block_size="16", num_gpu_blocks=blocks) == 1


async def test_metrics_have_the_names_and_labels_of_vllm(server: EngineServer) -> None:
    await complete(server)
    found = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families((await scrape(server)).decode())
        for sample in family.samples
    }
    common = {"engine", "model_name"}
    for name, labels in {
        "vllm:num_requests_running": common,
        "vllm:num_requests_waiting": common,
        "vllm:num_requests_waiting_by_reason": common | {"reason"},
        "vllm:kv_cache_usage_perc": common,
        "vllm:num_preemptions_total": common,
        "vllm:request_success_total": common | {"finished_reason"},
        "vllm:prompt_tokens_by_source_total": common | {"source"},
        "vllm:time_to_first_token_seconds_bucket": common | {"le"},
        "vllm:inter_token_latency_seconds_bucket": common | {"le"},
        "vllm:request_time_per_output_token_seconds_bucket": common | {"le"},
        "vllm:iteration_tokens_total_bucket": common | {"le"},
        "vllm:admission_rejections_total": {"model_name", "reason"},
    }.items():
        assert found[name] == labels, name


async def test_running_and_waiting_are_seen_while_they_last() -> None:
    async with start(profile="fixed", inter_token_s=0.02, max_num_seqs=2) as server:
        held = [
            await open_exchange(server.port, "/v1/completions", completion(max_tokens=999, stream=True))
            for _ in range(3)
        ]
        await until(lambda: server.model.waiting_count == 1)
        text = await scrape(server)
        assert metric(text, "vllm:num_requests_running") == 2
        assert metric(text, "vllm:num_requests_waiting") == 1
        assert 0 < metric(text, "vllm:kv_cache_usage_perc") < 1
        for exchange in held:
            exchange.close()


async def test_fixed_times_are_kept(slow_server: EngineServer) -> None:
    began = time.monotonic()
    exchange = await open_exchange(
        slow_server.port, "/v1/completions", completion(max_tokens=26, stream=True)
    )
    await exchange.head()
    await exchange.chunk()
    first = time.monotonic()
    await exchange.rest()
    took = time.monotonic() - first
    # Upper bounds leave room for a busy machine; the pace itself is tested over virtual time.
    assert 25 * 0.02 - 0.05 < took < 25 * 0.02 + 1
    assert first - began < 1


async def test_step_times_follow_the_profile() -> None:
    profile = get_profile("8b-l4")
    async with start(profile="8b-l4", speed=2.0) as server:
        began = time.monotonic()
        usage = (await complete(server, prompt="Hello world", max_tokens=6)).json["usage"]
        took = time.monotonic() - began
    prompt = usage["prompt_tokens"]
    steps = [profile.step_s(prompt, 0, prompt**2 / 2)] + [profile.step_s(1, prompt + n) for n in range(1, 6)]
    assert math.fsum(steps) / 2 <= took < math.fsum(steps) / 2 + 1


async def test_many_streams_at_once_all_end_well(server: EngineServer) -> None:
    answers = await asyncio.gather(
        *(complete(server, prompt=f"stream {n}", max_tokens=60, stream=True) for n in range(64))
    )
    assert all(answer.complete and len(answer.chunks) == 61 for answer in answers)
    assert server.model.cache.used_block_count == 0


async def test_a_connection_serves_one_request_after_the_other(server: EngineServer) -> None:
    exchange = await open_exchange(server.port, "/v1/completions", completion(stream=True))
    for _ in range(3):
        await exchange.head()
        while await exchange.chunk() is not None:
            pass
        again = await open_exchange(server.port, "/v1/completions", completion(stream=True))
        again.close()
        body = b'{"model":"tiny","prompt":"x","stream":true,"max_tokens":2}'
        exchange.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    exchange.close()


async def test_small_writes_are_not_delayed(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    transports = []
    begin = server._begin

    def watched(request: web.Request, call: GenerationCall) -> Generation:
        transports.append(request.transport)
        return begin(request, call)

    monkeypatch.setattr(server, "_begin", watched)
    await complete(server, stream=True)
    assert transports[0] is not None
    option = transports[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert option != 0


async def test_streams_need_http_1_1(server: EngineServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = b'{"model":"tiny","prompt":"x","stream":true}'
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    assert b" 505 " in await reader.readline()
    writer.close()


async def test_stopping_ends_streams_with_abort() -> None:
    server = start(profile="fixed", inter_token_s=0.02)
    await server.start()
    stream = await open_exchange(server.port, "/v1/completions", completion(max_tokens=999, stream=True))
    talk = await open_exchange(server.port, "/v1/chat/completions", chat(max_tokens=999, stream=True))
    body = await open_exchange(server.port, "/v1/completions", completion(max_tokens=999))
    for exchange in (stream, talk):
        await exchange.head()
        await exchange.chunk()
    await until(lambda: server.model.running_count == 3)
    await server.stop()
    for exchange in (stream, talk):
        answer = await exchange.rest()
        assert answer.complete
        assert answer.finish_reason == "abort"
        assert answer.events[-1] == "[DONE]"
    await body.head()
    assert (await body.rest()).json["choices"][0]["finish_reason"] == "abort"


async def test_stopping_with_a_timeout_lets_requests_finish_and_takes_no_more() -> None:
    server = start(profile="fixed", inter_token_s=0.02)
    await server.start()
    port = server.port
    short = await open_exchange(port, "/v1/completions", completion(max_tokens=15, stream=True))
    endless = await open_exchange(port, "/v1/completions", completion(max_tokens=5000, stream=True))
    await until(lambda: server.model.running_count == 2)
    stopping = asyncio.create_task(server.stop(0.8))
    await until(lambda: server._draining)
    assert (await send(port, "/v1/completions", completion())).status == 500
    assert (await send(port, "/health", method="GET")).status == 200
    for exchange in (short, endless):
        await exchange.head()
    assert (await short.rest()).finish_reason == "length"
    cut = await endless.rest()
    assert cut.finish_reason is None
    assert cut.values[-1]["error"]["code"] == 500
    assert cut.events[-1] == "[DONE]"
    await stopping


async def test_a_taken_port_is_an_error_of_the_system(server: EngineServer) -> None:
    with pytest.raises(OSError, match="in use"):
        await start(port=server.port).start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "h200"}, "unknown profile 'h200'"),
        ({"model_names": ()}, "at least one model name"),
        ({"model_names": ("a", "")}, "none may be empty"),
        ({"port": 70_000}, "port must be from 0 to 65535"),
        ({"speed": 0.0}, "speed must be a positive number"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"inter_token_s": 0.02}, "inter_token_s needs profile 'fixed', not 'instant'"),
        ({"profile": "fixed", "inter_token_s": -1.0}, "finite and not negative"),
        ({"kv_token_capacity": 1000}, "max_model_len 8192 does not fit in a KV cache of 992 tokens"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineServerConfig(**{"profile": "instant", **options})
