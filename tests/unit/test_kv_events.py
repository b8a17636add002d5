"""An agent's view of an engine's prefix cache: from events to updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sagecp.agent.config import AgentConfig
from sagecp.agent.kv_events import backlog as backlog_module
from sagecp.agent.kv_events.address import KvEventsAddress, address_of_engine, parse_address
from sagecp.agent.kv_events.backlog import MAX_HASHES_PER_UPDATE, Backlog
from sagecp.agent.kv_events.batch import BlocksRemoved, BlocksStored, CacheCleared, decode_batch
from sagecp.agent.kv_events.chains import BlockChains
from sagecp.agent.kv_events.follower import EventFollower, Taken
from sagecp.agent.local_engine import parse_command_line
from sagecp.agent.settings import agent_configs
from sagecp.core.errors import InvalidRequestError
from sagecp.core.prompt_digest import BLOCK_TOKEN_COUNT, MAX_BLOCK_COUNT, digest_prompt
from sagecp.core.types import RequestMetadata
from tests.support.kv_events import cleared, engine_keys, payload_of, removed, stored


def digests(token_ids: Sequence[int], model: str = "m") -> tuple[int, ...]:
    metadata = RequestMetadata(prompt_token_ids=tuple(token_ids), model_name=model)
    return digest_prompt(metadata, model).block_hashes


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + position * 31) % 50_000 for position in range(length)]


class Recorder:
    """What chains told: what is there, and that no block ever lacked the one before it."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.log: list[tuple[str, int]] = []

    def store(self, block_hash: int) -> None:
        assert block_hash not in self.there
        self.there.add(block_hash)
        self.log.append(("stored", block_hash))

    def remove(self, block_hash: int) -> None:
        self.there.remove(block_hash)
        self.log.append(("removed", block_hash))

    def clear(self) -> None:
        self.there.clear()
        self.log.append(("cleared", 0))


def feed(chains: BlockChains, *events: dict[str, Any] | list[Any]) -> None:
    for event in decode_batch(payload_of(*events)).events:
        chains.take(event)


# -- the format --------------------------------------------------------------------------------


def test_batches_are_read_in_every_layout() -> None:
    as_map = {
        "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": 9, "token_ids": [5, 6, 7, 8],
        "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, "later": {},
    }  # fmt: skip
    as_list = ["BlockStored", [1, 2], 9, [5, 6, 7, 8], 2, None]
    later_list = [*as_list, "GPU", None, [None, None], 0, "full_attention", "one more"]
    stored_layouts: list[Any] = [as_map, as_list, later_list]
    for event in stored_layouts:
        for batch in ([12.5, [event]], [12.5, [event], 0], [12.5, [event], None, "more"]):
            decoded = decode_batch(msgspec.msgpack.encode(batch))
            assert decoded.time_s == 12.5
            (found,) = decoded.events
            assert isinstance(found, BlocksStored)
            assert (found.keys, found.parent, found.block_bytes) == ([1, 2], 9, 8)
            assert len(found.token_ids) == 16
    removed_layouts: list[Any] = [["BlockRemoved", [b"x"]], removed([b"x"]), ["BlockRemoved", [b"x"], "GPU"]]
    for event in removed_layouts:
        assert decode_batch(payload_of(event)).events == [BlocksRemoved([b"x"])]
    cleared_layouts: list[Any] = [["AllBlocksCleared"], cleared()]
    for event in cleared_layouts:
        assert decode_batch(payload_of(event)).events == [CacheCleared()]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_id": 3},
        {"lora_name": "adapter"},
        {"medium": "CPU"},
        {"medium": "STORAGE"},
        {"group_idx": 1},
        {"extra_keys": [["salt"], None]},
        {"token_ids": [1, 2, 3]},
        {"block_size": 0},
        {"block_hashes": []},
        {"type": "BlockMoved"},
    ],
)
def test_what_says_nothing_of_plain_prompts_is_left_out(changes: dict[str, Any]) -> None:
    event = {**stored([1, 2], None, [1, 2, 3, 4], 2), **changes}
    assert decode_batch(payload_of(event)).events == []


def test_blocks_before_an_image_are_kept() -> None:
    event = {**stored([1, 2, 3], None, [1, 2, 3, 4, 5, 6], 2), "extra_keys": [None, [["image", 0]], None]}
    (found,) = decode_batch(payload_of(event)).events
    assert isinstance(found, BlocksStored)
    assert found.keys == [1]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"ts": 1.0}),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode(["now", []]),
        msgspec.msgpack.encode([1.0, 5]),
        msgspec.msgpack.encode([1.0, [[]]]),
        msgspec.msgpack.encode([1.0, ["text"]]),
        msgspec.msgpack.encode([1.0, [{"kind": "BlockStored"}]]),
        msgspec.msgpack.encode([1.0, [["BlockRemoved"]]]),
        payload_of({**stored([1], None, [1, 2], 2), "block_hashes": [[1]]}),
        payload_of({**stored([1], None, [1, 2], 2), "parent_block_hash": [1]}),
        payload_of({**stored([1], None, [1, 2], 2), "block_size": 2.0}),
        payload_of({**stored([1], None, [1, 2], 2), "token_ids": [1, 1 << 40]}),
        payload_of({**stored([1], None, [1, 2], 2), "token_ids": 7}),
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="no batch of KV-cache events"):
        decode_batch(payload)


# -- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 16, 48, 128, 256, 272, 528])
def test_blocks_become_those_of_digests_whatever_their_size(block_size: int) -> None:
    sink = Recorder()
    chains = BlockChains("m", sink)
    token_ids = prompt(1, 2640)
    keys = engine_keys(token_ids, block_size)
    half = len(keys) // 2
    feed(chains, stored(keys[:half], None, token_ids[: half * block_size], block_size))
    rest = token_ids[half * block_size : len(keys) * block_size]
    feed(chains, stored(keys[half:], keys[half - 1] if half else None, rest, block_size))
    expected = digests(token_ids[: len(keys) * block_size])
    assert [block for _, block in sink.log] == list(expected)
    # Another prompt with the same start shares it.
    other = [*token_ids[:600], *prompt(2, 700)]
    other_keys = engine_keys(other, block_size)
    feed(chains, stored(other_keys, None, other[: len(other_keys) * block_size], block_size))
    assert sink.there == {*expected, *digests(other[: len(other_keys) * block_size])}
    # One engine block less is one block of the digest less, and all that build on it.
    feed(chains, removed([keys[-1]]))
    last_token = (len(keys) - 1) * block_size
    assert sink.there & set(expected) == {*expected[: last_token // BLOCK_TOKEN_COUNT], *digests(other)} & {
        *expected
    }


def test_a_block_takes_what_builds_on_it_along() -> None:
    sink = Recorder()
    chains = BlockChains("m", sink)
    trunk = prompt(1, 512)
    left, right = [*trunk, *prompt(2, 512)], [*trunk, *prompt(3, 256)]
    for token_ids in (left, right):
        feed(chains, stored(engine_keys(token_ids, 16), None, token_ids, 16))
    assert sink.there == {*digests(left), *digests(right)}
    # In the second block of the trunk.
    feed(chains, removed([engine_keys(trunk, 16)[20]]))
    assert sink.there == {digests(trunk)[0]}
    taken = [block for kind, block in sink.log if kind == "removed"]
    assert taken.index(digests(left)[3]) < taken.index(digests(left)[2]) < taken.index(digests(left)[1])
    # What builds on it is there again with it, once the engine says so: it computed all of it anew.
    feed(chains, stored(engine_keys(left, 16), None, left, 16))
    assert sink.there == set(digests(left))
    feed(chains, cleared())
    assert sink.there == set()
    assert chains.engine_block_count == 0


def test_what_builds_on_unknown_blocks_is_not_known() -> None:
    sink = Recorder()
    chains = BlockChains("m", sink)
    token_ids = prompt(1, 1024)
    keys = engine_keys(token_ids, 16)
    feed(chains, stored(keys[32:], keys[31], token_ids[512:], 16))
    assert chains.engine_block_count == 0
    feed(chains, stored(keys[:8], None, token_ids[:128], 16), removed([keys[3]]))
    # The rest of the first block is there, without all of its start.
    feed(chains, stored(keys[8:16], keys[7], token_ids[128:256], 16))
    assert sink.log == []
    feed(chains, stored(keys, None, token_ids, 16), removed([12345]))
    assert sink.there == set(digests(token_ids))


def test_a_long_prompt_is_followed_as_far_as_digests_go() -> None:
    sink = Recorder()
    chains = BlockChains("m", sink)
    token_ids = prompt(1, (MAX_BLOCK_COUNT + 4) * BLOCK_TOKEN_COUNT)
    feed(chains, stored(engine_keys(token_ids, 256), None, token_ids, 256))
    assert len(sink.there) == MAX_BLOCK_COUNT
    assert sink.there == set(digests(token_ids))
    assert chains.engine_block_count == MAX_BLOCK_COUNT


def test_beyond_the_bound_everything_is_begun_anew() -> None:
    sink = Recorder()
    chains = BlockChains("m", sink, max_engine_block_count=100)
    for seed in range(20):
        token_ids = prompt(seed, 512)
        feed(chains, stored(engine_keys(token_ids, 16), None, token_ids, 16))
        assert chains.engine_block_count <= 100
        assert len(chains) == len(sink.there)
    assert chains.overflow_count > 0
    assert ("cleared", 0) in sink.log


def test_newest_prompts_come_first_and_starts_before_ends() -> None:
    chains = BlockChains("m", Recorder())
    old, new = prompt(1, 768), prompt(2, 512)
    longer = [*old, *prompt(3, 256)]
    for token_ids in (old, new, longer):
        feed(chains, stored(engine_keys(token_ids, 16), None, token_ids, 16))
    assert list(chains.newest_first()) == [*digests(longer), *digests(new)]


# -- updates -----------------------------------------------------------------------------------


def test_changes_are_told_once_in_order_and_bounded() -> None:
    backlog = Backlog(lambda: iter(()))
    assert backlog.take_update() is None
    for number in range(MAX_HASHES_PER_UPDATE + 5):
        backlog.store(number)
    backlog.remove(0)
    backlog.remove(7)
    backlog.store(7)
    first, second = backlog.take_update(), backlog.take_update()
    assert first is not None
    assert second is not None
    assert (first.sequence, second.sequence, first.reset, second.reset) == (1, 2, False, False)
    assert len(first.stored_block_hashes) == MAX_HASHES_PER_UPDATE
    assert not {0, 7} & set(first.stored_block_hashes)
    assert (second.stored_block_hashes[-1], second.removed_block_hashes) == (7, (0,))
    assert backlog.take_update() is None
    backlog.store(1)
    backlog.clear()
    third = backlog.take_update()
    assert third is not None
    assert (third.sequence, third.reset, third.stored_block_hashes) == (1, True, ())


def test_whoever_knows_nothing_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = Backlog(lambda: iter(range(10)))
    backlog.store(77)
    backlog.begin()
    update = backlog.take_update()
    assert update is not None
    assert (update.sequence, update.reset, update.stored_block_hashes) == (1, True, tuple(range(10)))
    monkeypatch.setattr(backlog_module, "MAX_BACKLOG", 12)
    for number in range(100, 200):
        backlog.remove(number)
        assert len(backlog) <= 12
    update = backlog.take_update()
    assert update is not None
    assert update.reset
    assert set(range(6)) <= set(update.stored_block_hashes)


# -- batches in their order --------------------------------------------------------------------


def batch(seed: int, time_s: float = 1.0) -> bytes:
    token_ids = prompt(seed, 256)
    return payload_of(stored(engine_keys(token_ids, 16), None, token_ids, 16), time_s=time_s)


def test_a_gap_is_noticed_and_costs_what_was_known() -> None:
    follower = EventFollower("m")
    assert follower.take(5, batch(1, 1.0)) is Taken.TAKEN, "whoever joins late begins somewhere"
    assert follower.take(6, batch(2, 2.0)) is Taken.TAKEN
    assert follower.block_count == 2
    assert follower.take(9, batch(3, 5.0)) is Taken.AFTER_A_GAP
    assert (follower.block_count, follower.next_sequence) == (2, 7)
    # The missing ones came again, by another way.
    assert follower.take(5, batch(1, 1.0), skip_gap=True) is Taken.KNOWN_ALREADY
    for sequence in (7, 8, 9):
        assert follower.take(sequence, batch(sequence, sequence - 4.0), skip_gap=True) is Taken.TAKEN
    assert follower.take(9, batch(3, 5.0)) is Taken.KNOWN_ALREADY
    assert (follower.block_count, follower.reset_count) == (5, 0)
    # And now they do not.
    assert follower.take(20, batch(20, 9.0), skip_gap=True) is Taken.TAKEN
    assert (follower.block_count, follower.reset_count, follower.next_sequence) == (1, 1, 21)


def test_a_publisher_that_counts_from_the_start_is_another_engine() -> None:
    follower = EventFollower("m")
    for sequence in range(5):
        follower.take(sequence, batch(sequence, float(sequence)))
    follower.tell_everything()
    assert follower.take(0, batch(50, 100.0)) is Taken.TAKEN
    assert (follower.block_count, follower.next_sequence, follower.reset_count) == (1, 1, 1)
    update = follower.take_update()
    assert update is not None
    assert (update.reset, update.stored_block_hashes) == (True, digests(prompt(50, 256)))


def test_an_unreadable_batch_costs_what_was_known() -> None:
    follower = EventFollower("m")
    follower.take(0, batch(1))
    assert follower.take(1, b"\xc1") is Taken.TAKEN
    assert "no batch" in follower.trouble
    assert (follower.block_count, follower.next_sequence) == (0, 2)
    follower.take(2, batch(2))
    assert (follower.block_count, follower.trouble) == (1, "")


class NaiveCache:
    """What the control plane makes of updates: a set, whose blocks never lack those before them."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.sequence = 0


class AnEngineAndItsFollower(RuleBasedStateMachine):
    """An engine that caches and evicts as it likes, batches that get lost, and beats that are taken.

    The first few batches arrive: without any, a gap cannot be told from joining late.
    """

    @initialize()
    def start(self) -> None:
        self.follower = EventFollower("m")
        self.cached: dict[int, tuple[int, ...]] = {}  # Key: the tokens up to the block's end.
        self.sequence = 0
        self.lost = False
        self.remote = NaiveCache()

    def publish(self, *events: Any, lose: bool) -> None:
        if not lose:
            payload = payload_of(*events, time_s=float(self.sequence))
            if self.follower.take(self.sequence, payload) is Taken.AFTER_A_GAP:
                self.follower.take(self.sequence, payload, skip_gap=True)
        self.lost = lose
        self.sequence += 1

    @rule(path=st.lists(st.integers(0, 1), min_size=1, max_size=4), lose=st.booleans(), whole=st.booleans())
    def serve(self, path: list[int], lose: bool, whole: bool) -> None:
        """Compute a prompt: what is cached of its start is not computed again."""
        token_ids = [token for step in path for token in prompt(step, 192)]
        keys = engine_keys(token_ids, 64)
        hit = 0
        while not whole and hit < len(keys) and keys[hit] in self.cached:
            hit += 1
        for number, key in enumerate(keys):
            self.cached[key] = tuple(token_ids[: (number + 1) * 64])
        if hit < len(keys):
            parent = keys[hit - 1] if hit else None
            self.publish(
                stored(keys[hit:], parent, token_ids[hit * 64 :], 64), lose=lose and self.sequence > 3
            )

    @rule(data=st.data(), lose=st.booleans())
    def evict(self, data: st.DataObject, lose: bool) -> None:
        if self.cached:
            key = data.draw(st.sampled_from(sorted(self.cached)))
            del self.cached[key]
            self.publish(removed([key]), lose=lose and self.sequence > 3)

    @rule()
    def clear_cache(self) -> None:
        self.cached.clear()
        self.publish(cleared(), lose=False)

    @rule()
    def begin_stream(self) -> None:
        self.follower.tell_everything()
        self.remote = NaiveCache()

    @rule(count=st.integers(1, 3))
    def beat(self, count: int) -> None:
        for _ in range(count):
            update = self.follower.take_update()
            if update is None:
                return
            if update.reset:
                self.remote.there.clear()
            else:
                assert update.sequence == self.remote.sequence + 1
            self.remote.sequence = update.sequence
            self.remote.there -= set(update.removed_block_hashes)
            self.remote.there |= set(update.stored_block_hashes)

    @invariant()
    def nothing_is_told_that_is_not_there(self) -> None:
        if not hasattr(self, "cached"):
            return
        whole = {
            block
            for tokens in self.cached.values()
            for count, block in enumerate(digests(tokens), 1)
            if all(key in self.cached for key in engine_keys(tokens[: count * BLOCK_TOKEN_COUNT], 64))
        }
        known = set(self.follower._chains.newest_first())
        if not self.lost:
            assert known <= whole
        backlog = self.follower._backlog
        if self.remote.sequence and not len(backlog) and not backlog._is_reset_due:
            assert self.remote.there == known


AnEngineAndItsFollower.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnEngineAndItsFollower = AnEngineAndItsFollower.TestCase


# -- where it is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "address"),
    [
        ('{"enable_kv_cache_events": true, "publisher": "zmq"}', ("tcp://*:5557", "")),
        (
            {"enable_kv_cache_events": True, "endpoint": "tcp://*:7", "replay_endpoint": "tcp://*:8"},
            ("tcp://*:7", "tcp://*:8"),
        ),
        ({"enable_kv_cache_events": True, "endpoint": "ipc:///tmp/kv"}, ("ipc:///tmp/kv", "")),
        ({"enable_kv_cache_events": True, "endpoint": "tcp://10.0.0.1:7"}, None),
        ({"enable_kv_cache_events": True, "publisher": "null"}, None),
        ('{"enable_kv_cache_events": false}', None),
        ("{", None),
        ("[]", None),
        ("", None),
        (None, None),
    ],
)
def test_where_an_engine_publishes(config: Any, address: tuple[str, str] | None) -> None:
    assert address_of_engine(config) == (None if address is None else KvEventsAddress(*address))


def test_a_command_line_says_where_an_engine_publishes() -> None:
    config = '{"enable_kv_cache_events": true, "replay_endpoint": "tcp://*:5558"}'
    for words in (["--kv-events-config", config], [f"--kv-events-config={config}"]):
        arguments = parse_command_line(["vllm", "serve", "m", *words, "--port", "1"])
        assert arguments is not None
        assert arguments.kv_events == KvEventsAddress("tcp://*:5557", "tcp://*:5558")
    address = KvEventsAddress("tcp://*:5557", "tcp://*:5558")
    assert address.at("10.0.0.7") == KvEventsAddress("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558")
    assert address.at("fd00::7").endpoint == "tcp://[fd00::7]:5557"


def test_what_the_flag_takes() -> None:
    assert parse_address("tcp://h:1,ipc:///tmp/replay") == KvEventsAddress("tcp://h:1", "ipc:///tmp/replay")
    for text in (
        "",
        "on",
        "tcp://h",
        "tcp://h:0",
        "tcp://h:99999",
        "udp://h:1",
        "tcp://h:1,",
        "tcp://h/x:1",
        "ipc://",
    ):
        with pytest.raises(ValueError, match="is no ZeroMQ endpoint"):
            parse_address(text)
    with pytest.raises(InvalidRequestError, match="--kv-events"):
        AgentConfig(engine_url="http://127.0.0.1:1", kv_events="tcp://*:5557").validate()
    engines = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert [each.kv_events for each in agent_configs(engines, kv_events=["auto"], common={})] == ["auto"] * 2
    with pytest.raises(InvalidRequestError, match="--kv-events"):
        agent_configs(engines, kv_events=["tcp://h:1"], common={})
