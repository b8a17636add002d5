"""KV-cache events of an engine: from a real ZeroMQ publisher through an agent to the control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from sagecp.core.prompt_digest import token_block_hashes
from sagecp.v1 import request_pb2
from tests.rpc.agent.peers import ControlPlane, Engine, Log, Start
from tests.support.kv_events import Publisher, cleared, engine_keys, removed, stored
from tests.support.rpc_rig import Rig
from tests.support.waiting import until


def prompt(seed: int, length: int = 512) -> list[int]:
    return [(seed * 7919 + position * 31) % 50_000 for position in range(length)]


def blocks(token_ids: list[int]) -> set[int]:
    return set(token_block_hashes(token_ids, "tiny"))


def computed(token_ids: list[int]) -> dict[str, object]:
    return stored(engine_keys(token_ids, 16), None, token_ids, 16)


class Told:
    """What a control plane knows after all beats so far."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    def blocks(self) -> set[int]:
        there: set[int] = set()
        for beat in self._control_plane.beats:
            update = beat.kv_cache_update
            if update.reset:
                there = set()
            there -= set(update.removed_block_hashes)
            there |= set(update.stored_block_hashes)
        return there

    async def until(self, expected: set[int]) -> None:
        await self._control_plane.until(lambda: self.blocks() == expected)


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    publisher = Publisher()
    await publisher.start()
    yield publisher
    await publisher.close()


async def test_what_an_engine_caches_is_told_as_it_changes(
    start: Start, control_plane: ControlPlane, publisher: Publisher
) -> None:
    start(kv_events=publisher.endpoint)
    told = Told(control_plane)
    await publisher.wait_for_subscriber()
    first, second = prompt(1), prompt(2)
    await publisher.publish(computed(first))
    await publisher.publish(computed(second))
    await told.until(blocks(first) | blocks(second))
    await publisher.publish(removed(engine_keys(first, 16)[20:]))
    await told.until({token_block_hashes(first, "tiny")[0]} | blocks(second))
    await publisher.publish(cleared())
    await told.until(set())
    updates = [beat.kv_cache_update for beat in control_plane.beats if beat.HasField("kv_cache_update")]
    for before, after in pairwise(updates):
        assert after.sequence == (1 if after.reset else before.sequence + 1)


async def test_batches_that_are_missing_are_asked_for_again(
    start: Start, control_plane: ControlPlane, publisher: Publisher, log: Log
) -> None:
    await publisher.publish(computed(prompt(0)))
    start(kv_events=f"{publisher.endpoint},{publisher.replay_endpoint}")
    told = Told(control_plane)
    # What was published before anybody listened.
    await told.until(blocks(prompt(0)))
    await publisher.publish(computed(prompt(1)), lose=True)
    await publisher.publish(removed(engine_keys(prompt(0), 16)), lose=True)
    await publisher.publish(computed(prompt(2)))
    await told.until(blocks(prompt(1)) | blocks(prompt(2)))
    assert not [entry for entry in log if entry["event"] == "KV-cache events are missing"]


async def test_batches_that_are_missing_for_good_cost_what_was_known(
    start: Start, control_plane: ControlPlane, publisher: Publisher, log: Log
) -> None:
    start(kv_events=publisher.endpoint)
    told = Told(control_plane)
    await publisher.wait_for_subscriber()
    await publisher.publish(computed(prompt(0)))
    await told.until(blocks(prompt(0)))
    await publisher.publish(computed(prompt(1)), lose=True)
    await publisher.publish(computed(prompt(2)))
    await told.until(blocks(prompt(2)))
    (entry,) = [entry for entry in log if entry["event"] == "KV-cache events are missing"]
    assert (entry["first"], entry["last"]) == (1, 1)
    await publisher.publish(payload=b"\xc1")
    await told.until(set())
    await publisher.publish(computed(prompt(3)))
    await told.until(blocks(prompt(3)))


async def test_an_engine_that_restarts_has_an_empty_cache(
    start: Start, control_plane: ControlPlane, publisher: Publisher
) -> None:
    start(kv_events=f"{publisher.endpoint},{publisher.replay_endpoint}")
    told = Told(control_plane)
    await publisher.wait_for_subscriber()
    for seed in range(3):
        await publisher.publish(computed(prompt(seed)))
    await told.until(blocks(prompt(0)) | blocks(prompt(1)) | blocks(prompt(2)))
    await publisher.stop()
    await told.until(set())
    await publisher.start()
    await publisher.publish(computed(prompt(9)))
    await told.until(blocks(prompt(9)))


async def test_a_control_plane_that_restarts_is_told_everything(
    start: Start, control_plane: ControlPlane, publisher: Publisher
) -> None:
    start(kv_events=publisher.endpoint)
    told = Told(control_plane)
    await publisher.wait_for_subscriber()
    await publisher.publish(computed(prompt(0)))
    await told.until(blocks(prompt(0)))
    await control_plane.stop()
    control_plane.beats.clear()
    await publisher.publish(computed(prompt(1)))
    await control_plane.start()
    await told.until(blocks(prompt(0)) | blocks(prompt(1)))
    first = next(beat for beat in control_plane.beats if beat.HasField("kv_cache_update"))
    assert first.kv_cache_update.reset
    assert first.kv_cache_update.sequence == 1


async def test_an_engine_that_publishes_nothing_is_said_and_served_all_the_same(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    start(kv_events="auto")
    await control_plane.until_beats(2)
    reasons = [entry["reason"] for entry in log if entry["event"] == "KV-cache events are not followed"]
    assert len(reasons) == 1
    assert "--kv-events-config" in reasons[0]
    assert not any(beat.HasField("kv_cache_update") for beat in control_plane.beats)


async def test_ranks_with_caches_of_their_own_are_not_followed(
    start: Start, control_plane: ControlPlane, publisher: Publisher, log: Log
) -> None:
    start(kv_events=publisher.endpoint, data_parallel_size=2)
    await control_plane.until_beats(2)
    (reason,) = [entry["reason"] for entry in log if entry["event"] == "KV-cache events are not followed"]
    assert "2 data-parallel ranks" in reason


async def test_auto_finds_what_the_engine_tells(
    start: Start, engine: Engine, control_plane: ControlPlane, publisher: Publisher
) -> None:
    engine.server_info = {
        "vllm_config": {
            "kv_events_config": {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"tcp://*:{publisher.port}",
                "replay_endpoint": f"tcp://*:{publisher.replay_port}",
            }
        }
    }
    start(kv_events="auto")
    await publisher.publish(computed(prompt(4)))
    await Told(control_plane).until(blocks(prompt(4)))


async def test_a_prompt_goes_where_its_engine_has_its_start(
    rig: Rig, start: Start, publisher: Publisher
) -> None:
    """All of it real but for the engine: publisher, agent, control plane, placement."""
    for name in ("e1", "e2"):
        await rig.add_engine(name)
    start(
        kv_events=publisher.endpoint,
        control_plane=rig.server.address,
        instance_id="e3",
        interval_s=0.1,
        advertised_url=rig.fleet.instance("e3").engine_url,
    )
    await publisher.wait_for_subscriber()
    token_ids = prompt(1, 2100)
    await publisher.publish(computed(token_ids[:2096]))
    wanted = token_block_hashes(token_ids, "tiny")
    prefixes = rig.manager.scheduler.prefixes
    await until(lambda: prefixes.match_one("e3", wanted) == 8, "the report")
    asked = request_pb2.Prompt(token_ids=request_pb2.TokenIdsPrompt(ids=token_ids))
    await rig.submit("r1", prompt=asked)
    call = await rig.fleet["e3"].next_call()
    await publisher.publish(cleared())
    # While it runs, its blocks are taken to be there.
    await until(lambda: prefixes.block_count("e3") == 8 and not prefixes._caches["e3"].reported, "the reset")
    call.answer("a")
    await rig.manager.requests.get("r1").ended.wait()
    await publisher.publish(computed(prompt(5)), cleared())
    await until(lambda: prefixes.block_count("e3") == 0, "the second one")
