"""What agents tell of their engines' prefix caches, over RPC, and where prompts go for it."""

from __future__ import annotations

import pytest

from sagecp.core.prompt_digest import token_block_hashes
from sagecp.core.settings import SettingsChange
from sagecp.core.types import InstanceState
from sagecp.rpc.convert.heartbeat import MAX_BLOCK_HASH_COUNT
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import request_pb2
from tests.rpc.test_fleet import beat, exchange, get, register
from tests.support.rpc_rig import MODEL, Rig

IDS = list(range(5, 2105))
BLOCKS = token_block_hashes(IDS, MODEL)


@pytest.mark.parametrize("strategy", ["", "locality"])
async def test_a_prompt_goes_where_its_start_is_reported(rig: Rig, strategy: str) -> None:
    if strategy:
        rig.manager.update_scheduling(SettingsChange(routing_strategy=strategy))
    for name in ("e1", "e2", "e3"):
        await register(rig, name)
        stream = rig.instances.Heartbeat()
        told = None
        if name == "e3":
            told = pb.KvCacheUpdate(sequence=1, reset=True, stored_block_hashes=BLOCKS)
        await exchange(stream, beat(name, kv_cache_update=told))
    assert rig.manager.scheduler.prefixes.match_one("e3", BLOCKS) == len(BLOCKS)
    for number in range(3):
        prompt = request_pb2.Prompt(token_ids=request_pb2.TokenIdsPrompt(ids=IDS))
        await rig.submit(f"r{number}", prompt=prompt)
        (await rig.fleet["e3"].next_call()).answer("a")


async def test_an_update_with_too_many_hashes_is_a_reset_and_said(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(
        stream, beat(kv_cache_update=pb.KvCacheUpdate(sequence=1, reset=True, stored_block_hashes=BLOCKS))
    )
    many = pb.KvCacheUpdate(sequence=2, removed_block_hashes=range(MAX_BLOCK_HASH_COUNT + 1))
    await exchange(stream, beat(sequence=2, kv_cache_update=many))
    assert len(rig.manager.scheduler.prefixes) == 0
    instance = await get(rig)
    assert "kv_cache_update has 4097 hashes" in instance.heartbeat_refusal
    assert rig.manager.instance("e1").state is InstanceState.READY


async def test_a_text_is_linked_to_the_tokens_that_its_engine_tells(rig: Rig) -> None:
    await register(rig)
    stream = rig.instances.Heartbeat()
    await exchange(stream, beat(kv_cache_update=pb.KvCacheUpdate(sequence=1, reset=True)))
    engine = rig.fleet["e1"]
    text = "".join(f"{number:08d}" for number in range(1050))
    await rig.submit("r1", text)
    call = await engine.next_call()
    handle = rig.manager.requests.get("r1")
    texts = handle.record.digest.block_hashes
    assert len(texts) == 8
    call.tell_prompt(IDS)
    call.send("a")
    call.finish()
    await handle.ended.wait()
    match_one = rig.manager.scheduler.prefixes.match_one
    assert match_one("e1", texts) == 8
    for sequence, update in enumerate(
        (
            pb.KvCacheUpdate(sequence=2, stored_block_hashes=BLOCKS),
            pb.KvCacheUpdate(sequence=3, removed_block_hashes=BLOCKS[:2:-1]),
        ),
        2,
    ):
        await exchange(stream, beat(sequence=sequence, kv_cache_update=update))
    assert (match_one("e1", BLOCKS), match_one("e1", texts)) == (3, 3)
