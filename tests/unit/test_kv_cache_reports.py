"""What engines report of their caches, in the core: the index, texts, and where requests go."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sagecp.core import events as ev
from sagecp.core.engine_state import KvCacheUpdate
from sagecp.core.kv_cache_reports import MAX_TEXTS_PER_BLOCK, KvCacheReports
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.prompt_digest import (
    digest_prompt,
    has_cache_salt,
    next_token_block,
    token_block_hashes,
    token_chain_start,
)
from sagecp.core.types import EngineCondition, EngineGauges, PromptDigest, RequestMetadata, SamplingParameters
from tests.support.core_world import STEP_TIME, World, arrive, healthy, make_instance_record
from tests.unit.test_prefix_index import FORK, LONG, chain, index_of, serve

IDS = tuple(range(1000, 1900))


# -- digests -----------------------------------------------------------------------------------


def test_blocks_can_be_hashed_one_by_one_as_digests_have_them() -> None:
    expected = digest_prompt(RequestMetadata(prompt_token_ids=IDS), "m").block_hashes
    assert len(expected) == 3
    assert token_block_hashes(IDS, "m") == token_block_hashes(array("I", IDS), "m") == expected
    value, found = token_chain_start("m"), []
    for start in (0, 256, 512):
        packed = b"".join(each.to_bytes(4, "little") for each in IDS[start : start + 256])
        value = next_token_block(value, packed)
        found.append(value)
    assert tuple(found) == expected
    assert token_block_hashes(IDS, "other") != expected


def test_salted_requests_are_told_apart() -> None:
    salted = SamplingParameters(engine_extras={"cache_salt": "x"})
    assert has_cache_salt(RequestMetadata(prompt="x", sampling=salted))
    assert has_cache_salt(RequestMetadata(openai_body=b'{"cache_salt": "x"}'))
    assert not has_cache_salt(RequestMetadata(openai_body=b'{"prompt": "x"}'))


# -- the index ---------------------------------------------------------------------------------


def test_what_an_engine_reports_stays_until_it_says_otherwise() -> None:
    index = index_of("a", "b", capacity=2)
    assert not index.is_exact("a")
    index.note_stored("a", LONG)
    assert index.is_exact("a")
    assert not index.is_exact("b")
    assert (index.match_one("a", LONG), index.block_count("a"), len(index)) == (5, 5, 5)
    # Its capacity is an estimate, which bounds guesses alone.
    serve(index, "a", chain(7, 7, 7))
    index.resize("a", 0)
    assert dict(index.match(LONG)) == {"a": 5}
    assert index.match_one("a", chain(7, 7, 7)) == 0
    index.note_removed("a", reversed(LONG[3:]))
    assert dict(index.match(LONG)) == {"a": 3}
    index.note_removed("a", [*chain(9), *chain(8)])
    assert len(index) == 3
    index.reset("a")
    assert (len(index), index._masks) == (0, {})
    for call in (index.note_stored, index.note_removed):
        call("unknown", LONG)
    index.reset("unknown")
    assert len(index) == 0


def test_a_guess_becomes_a_fact_and_a_removal_holds_against_it() -> None:
    index = index_of("a", capacity=100)
    serve(index, "a", LONG)
    index.note_stored("a", LONG[:3])
    assert (index.block_count("a"), len(index)) == (5, 5)
    index.note_removed("a", reversed(LONG[1:]))
    assert index.match_one("a", LONG) == 1
    # Sent again: expected again, before any report.
    serve(index, "a", LONG)
    assert index.match_one("a", LONG) == 5


def test_what_runs_stays_whatever_is_reported() -> None:
    index = index_of("a", capacity=100)
    index.insert("a", LONG, pinned=True)
    index.note_stored("a", LONG)
    index.note_removed("a", reversed(LONG))
    assert (index.match_one("a", LONG), len(index)) == (5, 5)
    index.note_stored("a", FORK)
    index.reset("a")
    assert (index.match_one("a", LONG), index.match_one("a", FORK)) == (5, 2)
    index.release("a", LONG)
    index.reset("a")
    assert len(index) == 0


def test_a_registration_forgets_reports() -> None:
    index = index_of("a", "b")
    index.insert("a", LONG[:2], pinned=True)
    index.note_stored("a", LONG)
    index.note_stored("b", LONG)
    index.add_instance("a", 5, keep_reported=True)
    assert index.is_exact("a")
    assert (index.match_one("a", LONG), index._caches["a"].pins) == (5, {})
    index.add_instance("a", 5)
    assert not index.is_exact("a")
    assert dict(index.match(LONG)) == {"b": 5}
    index.remove_instance("b")
    assert index._masks == {}


def test_at_the_bound_over_everything_the_ends_of_what_was_reported_go() -> None:
    index = index_of("a", "b", bound=12)
    index.note_stored("a", chain(*range(10)))
    index.note_stored("b", chain(*range(100, 110)))
    assert len(index) == 12
    assert index.match_one("a", chain(*range(10))) + index.match_one("b", chain(*range(100, 110))) == 12
    index.insert("a", chain(*range(20)), pinned=True)
    assert len(index) == 12


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(lambda path: chain(*path))


class ReportsAgainstSets(RuleBasedStateMachine):
    """Reports and dispatches on two instances, with room for every guess."""

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex()
        self.reported: dict[str, set[int]] = {}
        self.guessed: dict[str, set[int]] = {}
        self.running: dict[str, list[tuple[int, ...]]] = {}
        for name in "ab":
            self.add(name)

    @rule(name=st.sampled_from("ab"))
    def add(self, name: str) -> None:
        self.index.add_instance(name, 10**6)
        self.reported[name], self.guessed[name], self.running[name] = set(), set(), []

    def pinned(self, name: str) -> set[int]:
        return {block for blocks in self.running[name] for block in blocks}

    @rule(name=st.sampled_from("ab"), blocks=PATHS)
    def stored(self, name: str, blocks: tuple[int, ...]) -> None:
        self.index.note_stored(name, blocks)
        self.reported[name] |= set(blocks)
        self.guessed[name] -= set(blocks)

    @rule(name=st.sampled_from("ab"), blocks=PATHS, kept=st.integers(0, 5))
    def removed(self, name: str, blocks: tuple[int, ...], kept: int) -> None:
        gone = set(blocks[kept:])
        self.index.note_removed(name, sorted(gone))
        self.reported[name] -= gone
        self.guessed[name] -= gone

    @rule(name=st.sampled_from("ab"))
    def reset(self, name: str) -> None:
        self.index.reset(name)
        self.reported[name].clear()
        self.guessed[name].clear()

    @rule(name=st.sampled_from("ab"), blocks=PATHS)
    def begin(self, name: str, blocks: tuple[int, ...]) -> None:
        assert self.index.insert(name, blocks, pinned=True) == len(blocks)
        self.running[name].append(blocks)
        self.guessed[name] -= set(blocks)

    @rule(name=st.sampled_from("ab"))
    def end(self, name: str) -> None:
        if self.running[name]:
            blocks = self.running[name].pop(0)
            self.index.release(name, blocks)
            self.guessed[name] |= set(blocks) - self.pinned(name) - self.reported[name]

    @rule(name=st.sampled_from("ab"), blocks=PATHS)
    def guess(self, name: str, blocks: tuple[int, ...]) -> None:
        self.index.insert(name, blocks, pinned=False)
        self.guessed[name] |= set(blocks) - self.pinned(name) - self.reported[name]

    @invariant()
    def the_index_has_what_the_sets_have(self) -> None:
        if not hasattr(self, "index"):
            return
        held = {name: self.reported[name] | self.guessed[name] | self.pinned(name) for name in self.reported}
        assert len(self.index) == sum(map(len, held.values()))
        assert set(self.index._masks) == held["a"] | held["b"]
        for name, blocks in held.items():
            bit = self.index._caches[name].bit
            assert {block for block, mask in self.index._masks.items() if mask & bit} == blocks
            assert self.index.block_count(name) == len(blocks)


ReportsAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReportsAgainstSets = ReportsAgainstSets.TestCase


# -- updates and texts -------------------------------------------------------------------------


def reports_of(*instance_ids: str, **bounds: int) -> tuple[KvCacheReports, PrefixIndex]:
    index = index_of(*instance_ids)
    return KvCacheReports(index, **bounds), index


def test_updates_follow_each_other_and_a_missing_one_voids_what_was_known() -> None:
    reports, index = reports_of("a")
    record = make_instance_record("a")
    reports.take(record, KvCacheUpdate(1, True, LONG))
    reports.take(record, KvCacheUpdate(2, False, FORK, (LONG[4],)))
    assert (index.match_one("a", LONG), index.match_one("a", FORK)) == (4, 4)
    reports.take(record, KvCacheUpdate(4, False, FORK[:1]))
    assert (len(index), record.kv_cache_sequence) == (1, 4)
    reports.take(record, KvCacheUpdate(1, True))
    assert (len(index), record.kv_cache_sequence) == (0, 1)


TEXTS = chain(50, 51, 52, 53, 54, 55)


@pytest.mark.parametrize(
    ("estimated", "counted", "gone", "left"),
    [
        # Half as many tokens as estimated: two blocks of text in one of tokens.
        (1600, 800, 2, 4),
        (1600, 800, 1, 2),
        (1600, 800, 0, 0),
        (1536, 768, 2, 4),
        # A dense text: its blocks have more tokens than estimated.
        (1536, 1600, 1, 0),
        (1536, 1600, 2, 1),
        (1536, 1600, 5, 4),
    ],
)
def test_blocks_of_a_text_go_with_the_tokens_that_they_became(
    estimated: int, counted: int, gone: int, left: int
) -> None:
    reports, index = reports_of("a", "b")
    record = make_instance_record("a")
    for name in "ab":
        serve(index, name, TEXTS)
    tokens = chain(*range(60, 60 + counted // 256))
    reports.link(PromptDigest(estimated, TEXTS), counted, tokens)
    reports.take(record, KvCacheUpdate(1, True, tokens))
    assert index.match_one("a", TEXTS) == 6
    reports.take(record, KvCacheUpdate(2, False, (), tuple(reversed(tokens[gone:]))))
    assert index.match_one("a", TEXTS) == left
    assert index.match_one("b", TEXTS) == 6


def test_links_are_bounded() -> None:
    reports, _ = reports_of("a", max_linked_block_count=10)
    for number in range(50):
        reports.link(PromptDigest(300, chain(number)), 300, chain(1000 + number))
        assert len(reports._texts) <= 10
    for number in range(50):
        reports.link(PromptDigest(300, chain(number)), 300, chain(7))
    assert len(reports._texts[chain(7)[0]]) <= MAX_TEXTS_PER_BLOCK
    # Nothing to link: no block of text, none of tokens, far too many for the tokens, token ids themselves.
    known = dict(reports._texts)
    reports.link(PromptDigest(10), 10, chain(1))
    reports.link(PromptDigest(300, chain(1)), 200, ())
    reports.link(PromptDigest(256 * 20, chain(*range(20))), 300, chain(9))
    reports.link(PromptDigest(300, chain(1)), 300, chain(1))
    assert dict(reports._texts) == known


@settings(max_examples=100, deadline=None)
@given(
    text_count=st.integers(1, 40),
    token_count=st.integers(1, 12_000),
    spare=st.integers(0, 255),
    kept=st.integers(0, 47),
)
def test_the_start_of_a_text_is_never_gone_before_its_end(
    text_count: int, token_count: int, spare: int, kept: int
) -> None:
    reports, index = reports_of("a")
    record = make_instance_record("a")
    texts = chain(*range(text_count))
    tokens = chain(*range(100, 100 + token_count // 256))
    reports.link(PromptDigest(256 * text_count + spare, texts), token_count, tokens)
    reports.take(record, KvCacheUpdate(1, True, tokens))
    reports.take(record, KvCacheUpdate(2, False, (), tuple(reversed(tokens[kept:]))))
    cache = index._caches["a"]
    present = [cache.has(text) for text in texts]
    assert present == sorted(present, reverse=True)
    if tokens and kept == 0:
        assert not any(present)


def told(instance_id: str, update: KvCacheUpdate) -> ev.HeartbeatReceived:
    return ev.HeartbeatReceived(instance_id, 1, EngineCondition.HEALTHY, kv_cache_update=update)


def world_of(*instance_ids: str) -> World:
    world = World(scheduling_policy="fifo", default_concurrency_limit=16)
    for name in instance_ids:
        world.feed(healthy(name, step_time=STEP_TIME, incarnation=1, key_value_token_capacity=100_000))
    return world


def place(world: World, request_id: str, **fields: Any) -> str:
    (line,) = [line for line in world.feed(arrive(request_id, **fields)) if line.startswith("dispatch")]
    return line.rsplit(" ", 1)[1]


def test_a_prompt_goes_where_the_engine_says_that_its_start_is() -> None:
    world = world_of("a", "b", "c")
    ids = tuple(range(2100))
    blocks = token_block_hashes(ids, "m")
    world.feed(told("b", KvCacheUpdate(1, True, blocks)))
    assert place(world, "r1", prompt_token_ids=ids) == "b"
    world.feed(ev.AttemptProgressed("r1", 1), ev.AttemptSucceeded("r1", 1, 5))
    world.feed(
        told("c", KvCacheUpdate(1, True, blocks)), told("b", KvCacheUpdate(2, False, (), blocks[::-1]))
    )
    assert place(world, "r2", prompt_token_ids=ids) == "c"
    world.feed(ev.AttemptProgressed("r2", 1), ev.AttemptSucceeded("r2", 1, 5))
    # Its gauges say that its engine has restarted, as its reports have said by themselves.
    for count in (5000, 10):
        world.feed(
            ev.HeartbeatReceived(
                "c", 1, EngineCondition.HEALTHY, gauges=EngineGauges(prompt_token_count=count)
            )
        )
    assert world.scheduler.prefixes.match_one("c", blocks) == 8
    world.feed(healthy("c", incarnation=2))
    assert world.scheduler.prefixes.match_one("c", blocks) == 0


def test_a_text_that_became_tokens_follows_their_reports() -> None:
    world = world_of("a", "b")
    text = "".join(f"{number:08d}" for number in range(1050))
    ids = tuple(range(2100))
    blocks = token_block_hashes(ids, "m")
    world.feed(told("a", KvCacheUpdate(1, True)))
    assert place(world, "r1", prompt=text) == "a"
    texts = digest_prompt(RequestMetadata(prompt=text), "m").block_hashes
    assert len(texts) == 8
    world.feed(ev.AttemptProgressed("r1", 1, len(ids), blocks), told("a", KvCacheUpdate(2, False, blocks)))
    world.feed(ev.AttemptSucceeded("r1", 1, 5))
    match_one = world.scheduler.prefixes.match_one
    assert match_one("a", texts) == 8
    world.feed(told("a", KvCacheUpdate(3, False, (), blocks[:4:-1])))
    assert match_one("a", texts) == 5
    # Another engine has the same tokens: the text goes there.
    world.feed(told("b", KvCacheUpdate(1, True, blocks)))
    assert place(world, "r2", prompt=text) == "b"
