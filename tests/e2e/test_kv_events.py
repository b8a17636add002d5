"""KV-cache events of a real vLLM: what an agent tells of them, against what the engine says it had cached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sagecp.core.prompt_digest import token_block_hashes
from sagecp.v1 import fleet_service_pb2 as pb
from tests.e2e.conftest import MODEL, RECIPE, Engine
from tests.rpc.agent.peers import ControlPlane
from tests.support.processes import SAGECP, Program, free_ports

BLOCK_TOKEN_COUNT = 256
# So few that a handful of prompts fills it.
CACHE_BYTES, CONTEXT_TOKEN_COUNT = "4M", 2048


@pytest.fixture(scope="module")
def publishing_engine(logs: Path) -> Iterator[Engine]:
    port, events_port, replay_port = free_ports(3)
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events_port}",
        "replay_endpoint": f"tcp://*:{replay_port}",
    }
    program = Program(
        "vLLM that publishes",
        [
            RECIPE / "serve.sh", str(port),
            "--max-model-len", str(CONTEXT_TOKEN_COUNT),
            "--max-num-seqs", "4",
            "--enable-prompt-tokens-details",
            "--kv-events-config", json.dumps(config),
        ],
        environment={"SAGECP_ENGINE_KV_BYTES": CACHE_BYTES, "VLLM_SERVER_DEV_MODE": "1"},
        log_file=logs / "publishing.log",
    )  # fmt: skip
    engine = Engine("publishing", port, program)
    try:
        engine.wait_until_healthy()
        yield engine
    finally:
        program.stop(timeout_s=5)


@contextlib.asynccontextmanager
async def running_agent(engine: Engine, log_file: Path) -> AsyncIterator[Told]:
    control_plane = ControlPlane()  # type: ignore[abstract]  # agents call nothing else
    control_plane.timeout_s = 90.0
    await control_plane.start()
    agent = Program(
        "agent",
        [
            SAGECP, "agent", "--engine", engine.url,
            "--control-plane", control_plane.address, "--kv-events", "auto",
        ],
        log_file=log_file,
    )  # fmt: skip
    try:
        yield Told(control_plane)
    finally:
        await asyncio.to_thread(agent.stop)
        await control_plane.stop()


class Told:
    """What a control plane knows of the engine's cache."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self.control_plane = control_plane

    def blocks(self) -> set[int]:
        there: set[int] = set()
        for beat in self.control_plane.beats:
            update: pb.KvCacheUpdate = beat.kv_cache_update
            there = set() if update.reset else there
            there = (there - set(update.removed_block_hashes)) | set(update.stored_block_hashes)
        return there

    def cached_block_count(self, token_ids: list[int]) -> int:
        there = self.blocks()
        count = 0
        for block in token_block_hashes(token_ids, MODEL):
            if block not in there:
                break
            count += 1
        return count

    async def settle(self) -> None:
        """Wait until what the engine has published by now is told: two beats that change nothing."""
        quiet = 0
        while quiet < 2:
            count = len(self.control_plane.beats)
            await self.control_plane.until_beats(count + 1)
            quiet = 0 if self.control_plane.beats[-1].HasField("kv_cache_update") else quiet + 1


def prompt(seed: int, length: int) -> list[int]:
    return [100 + (seed * 131 + position * 17) % 150 for position in range(length)]


async def run(engine: Engine, token_ids: list[int]) -> int:
    """Run a prompt, and return how many of its tokens the engine had cached."""
    body: dict[str, Any] = {"model": MODEL, "prompt": token_ids, "max_tokens": 1, "temperature": 0}
    answer = await asyncio.to_thread(engine.post, "/v1/completions", body)
    details = answer["usage"]["prompt_tokens_details"] or {}
    return int(details.get("cached_tokens") or 0)


def reset_prefix_cache(engine: Engine) -> None:
    request = urllib.request.Request(engine.url + "/reset_prefix_cache", b"", method="POST")
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 200


async def test_what_is_told_is_what_the_engine_has(publishing_engine: Engine, logs: Path) -> None:
    async with running_agent(publishing_engine, logs / "agent.log") as told:
        await compare(publishing_engine, told)


async def compare(publishing_engine: Engine, told: Told) -> None:
    prompts = [prompt(seed, 800) for seed in range(4)]
    for token_ids in prompts:
        assert await run(publishing_engine, token_ids) == 0
    await told.settle()
    assert [told.cached_block_count(token_ids) for token_ids in prompts] == [3, 3, 3, 3]
    # More than fits: the engine gives up what it used longest ago, and says so.
    for seed in range(10, 13):
        await run(publishing_engine, prompt(seed, 1500))
    await told.settle()
    expected = [told.cached_block_count(token_ids) for token_ids in prompts]
    assert min(expected) == 0
    for token_ids, count in [*zip(prompts, expected, strict=True)][::-1]:
        if count == 0:
            continue
        cached = await run(publishing_engine, token_ids)
        assert cached // BLOCK_TOKEN_COUNT == count
    assert await run(publishing_engine, prompts[expected.index(0)]) < BLOCK_TOKEN_COUNT
    # All at once. An idle engine publishes that with its next step.
    await asyncio.to_thread(reset_prefix_cache, publishing_engine)
    alone = prompt(30, 300)
    await run(publishing_engine, alone)
    await told.control_plane.until(lambda: told.blocks() == set(token_block_hashes(alone, MODEL)))


async def test_who_comes_late_is_told_what_happened_before(publishing_engine: Engine, logs: Path) -> None:
    token_ids = prompt(20, 600)
    await run(publishing_engine, token_ids)
    async with running_agent(publishing_engine, logs / "late-agent.log") as told:
        await told.control_plane.until(lambda: told.cached_block_count(token_ids) == 2)
