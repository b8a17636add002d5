"""The simulated engine told to sleep, to wake up, and which adapters to have: as vLLM does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from tests.sim.engine_client import complete, completion, metric, open_exchange, send


@pytest.fixture
async def server() -> AsyncIterator[EngineServer]:
    config = EngineServerConfig(
        model_names=("tiny",),
        profile="fixed",
        time_to_first_token_s=0.0,
        inter_token_s=0.01,
        enable_lora=True,
        max_loras=3,
    )
    async with EngineServer(config) as running:
        yield running


async def page(server: EngineServer) -> bytes:
    return (await send(server.port, "/metrics", method="GET")).body


async def is_sleeping(server: EngineServer) -> bool:
    answer: bool = (await send(server.port, "/is_sleeping", method="GET")).json["is_sleeping"]
    return answer


@pytest.mark.parametrize(("level", "state"), [(1, "weights_offloaded"), (2, "discard_all")])
async def test_it_sleeps_and_its_metrics_say_how_deep(server: EngineServer, level: int, state: str) -> None:
    answer = await send(server.port, f"/sleep?level={level}")
    assert (answer.status, answer.json) == (200, {"status": "sleeping", "level": level})
    assert await is_sleeping(server)
    scrape = await page(server)
    states = {
        name: metric(scrape, "vllm:engine_sleep_state", sleep_state=name)
        for name in ("awake", "weights_offloaded", "discard_all")
    }
    assert [name for name, value in states.items() if value] == [state]
    assert (await send(server.port, "/health", method="GET")).status == 200
    assert (await send(server.port, "/wake_up")).json == {"status": "awake", "tags": None}
    assert not await is_sleeping(server)
    assert metric(await page(server), "vllm:engine_sleep_state", sleep_state="awake") == 1


async def test_requests_wait_while_it_sleeps(server: EngineServer) -> None:
    await send(server.port, "/sleep")
    exchange = await open_exchange(server.port, "/v1/completions", completion(max_tokens=3))
    for _ in range(5):
        assert metric(await page(server), "vllm:num_requests_running") == 0
    assert metric(await page(server), "vllm:num_requests_waiting") == 1
    await send(server.port, "/wake_up")
    await exchange.head()
    answer = await exchange.rest()
    assert answer.json["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
async def test_what_runs_when_it_falls_asleep(server: EngineServer, mode: str, reason: str) -> None:
    body = completion(max_tokens=40, stream=True)
    exchange = await open_exchange(server.port, "/v1/completions", body)
    await exchange.head()
    await exchange.chunk()
    asleep = asyncio.ensure_future(send(server.port, f"/sleep?mode={mode}"))
    assert (await exchange.rest()).finish_reason == reason
    assert (await asleep).status == 200


@pytest.mark.parametrize("query", ["level=3", "level=x", "mode=never"])
async def test_a_sleep_that_makes_no_sense_is_refused(server: EngineServer, query: str) -> None:
    assert (await send(server.port, f"/sleep?{query}")).status == 422
    assert not await is_sleeping(server)


async def test_dropped_weights_come_back_only_when_asked_for(server: EngineServer) -> None:
    await send(server.port, "/sleep?level=2")
    await send(server.port, "/wake_up")
    assert server.control.weights_are_missing, "awake, and answering nonsense"
    await send(server.port, "/sleep?level=2")
    assert (await send(server.port, "/wake_up?tags=weights")).json["status"] == "sleeping"
    assert (await send(server.port, "/collective_rpc", {"method": "reload_weights"})).status == 200
    assert (await send(server.port, "/wake_up?tags=kv_cache")).json["status"] == "awake"
    assert not server.control.weights_are_missing
    assert (await send(server.port, "/collective_rpc", {})).status == 400


async def test_an_adapter_is_served_once_loaded(server: EngineServer, tmp_path: Path) -> None:
    assert (await complete(server, model="red")).status == 404
    load = {"lora_name": "red", "lora_path": str(tmp_path)}
    assert (await send(server.port, "/v1/load_lora_adapter", load)).status == 200
    cards = (await send(server.port, "/v1/models", method="GET")).json["data"]
    assert [(card["id"], card["parent"], card["root"]) for card in cards] == [
        ("tiny", None, "tiny"),
        ("red", "tiny", str(tmp_path)),
    ]
    exchange = await open_exchange(
        server.port, "/v1/completions", completion(model="red", max_tokens=50, stream=True)
    )
    await exchange.head()
    await exchange.chunk()
    assert b'max_lora="3",running_lora_adapters="red",waiting_lora_adapters=""' in await page(server)
    await exchange.rest()
    assert b'running_lora_adapters="",' in await page(server)
    assert (await send(server.port, "/v1/unload_lora_adapter", {"lora_name": "red"})).status == 200
    assert (await complete(server, model="red")).status == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("load", {"lora_name": "red"}, 400, "must be provided"),
        ("load", {"lora_name": "tiny", "lora_path": "org/x"}, 400, "conflicts with a served base model"),
        ("load", {"lora_name": "blue", "lora_path": "org/x"}, 400, "already been loaded"),
        ("load", {"lora_name": "red", "lora_path": "/nowhere/at/all"}, 404, "No adapter found for /nowhere"),
        ("unload", {"lora_name": "red"}, 404, "cannot be found"),
        ("unload", {}, 400, "needs to be provided"),
        ("load", [1], 400, "JSON object"),
    ],
)
async def test_what_vllm_refuses_is_refused(
    server: EngineServer, path: str, body: object, status: int, text: str
) -> None:
    server.control.adapters["blue"] = "org/blue"
    answer = await send(server.port, f"/v1/{path}_lora_adapter", body)
    assert (answer.status, text in answer.json["error"]["message"]) == (status, True)


async def test_without_the_option_there_are_no_adapters() -> None:
    async with EngineServer(EngineServerConfig(model_names=("tiny",), profile="instant")) as server:
        assert (await send(server.port, "/v1/load_lora_adapter", {})).status == 404
        assert b"lora_requests_info" not in await page(server)
