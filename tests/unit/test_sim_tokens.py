"""The simulated tokenizer and the source of made-up tokens."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.sim import token_source, tokenizer
from sagecp.sim.token_source import MEAN_SAMPLED_TOKENS, TokenSource, fold_context

TOKENS = st.lists(st.integers(0, tokenizer.VOCABULARY_SIZE - 1), min_size=1, max_size=400)


@given(st.text())
def test_text_survives_encoding(text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert all(0 <= token_id < tokenizer.VOCABULARY_SIZE for token_id in token_ids)


@pytest.mark.parametrize(
    "text", ["", " ", "Hello, world!\n\n  x", "naïve café", "漢字 and 🎉", "a" * 1000, "12345 6789", "\t\r\n"]
)
def test_texts_of_all_kinds_survive(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_do_not_break_it() -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_common_words_are_single_tokens() -> None:
    assert len(tokenizer.encode("the people were here before the storm")) <= 10


def test_every_generated_token_has_printable_text_of_its_own() -> None:
    texts = [tokenizer.TOKEN_TEXTS[token_id] for token_id in tokenizer.GENERATED_IDS]
    assert len(set(texts)) == len(texts) > 400
    assert all(text.isascii() and text.isprintable() and text.strip() for text in texts)
    assert tokenizer.decode(tokenizer.GENERATED_IDS) == "".join(texts)


def test_texts_are_stored_as_json_wants_them() -> None:
    for text, encoded in zip(tokenizer.TOKEN_TEXTS, tokenizer.TOKEN_JSON, strict=True):
        assert json.loads(b'"' + encoded + b'"') == text


def test_chat_is_rendered_with_a_marker_for_every_turn() -> None:
    token_ids = tokenizer.encode_chat([("system", "be kind"), ("user", "hi")])
    assert token_ids[0] == tokenizer.BOS_ID
    assert token_ids.count(tokenizer.START_ID) == 3
    assert token_ids.count(tokenizer.END_ID) == 2
    assert tokenizer.decode(token_ids) == "system\nbe kind\nuser\nhi\nassistant\n"
    prefix = tokenizer.encode_chat([("system", "be kind")], add_generation_prompt=False)
    assert token_ids[: len(prefix)] == prefix


@given(st.integers(0, 2**64), TOKENS, st.integers(1, 40), st.none() | st.integers(0, 2**63 - 1))
def test_a_continuation_goes_on_where_the_answer_was_cut(
    seed: int, prompt: list[int], cut: int, sampling_seed: int | None
) -> None:
    whole = TokenSource(seed, prompt, sampling_seed, endless=True)
    answer = [whole.next_token(True) for _ in range(cut + 10)]
    rest = TokenSource(seed, [*prompt, *answer[:cut]], sampling_seed, endless=True)
    assert [rest.next_token(True) for _ in range(10)] == answer[cut:]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 5000), max_size=600))
def test_both_ways_to_fold_a_context_agree(seed: int, tokens: list[int]) -> None:
    mask, base = 2**64 - 1, token_source._BASE
    state = (seed * token_source._MIX + base) & mask
    for token in tokens:
        state = (state * base + token + 1) & mask
    assert fold_context(seed, tokens) == state


@given(TOKENS, st.data())
def test_every_token_of_the_prompt_matters(prompt: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(prompt) - 1))
    other = [*prompt]
    other[position] = (other[position] + 1) % tokenizer.VOCABULARY_SIZE
    first, second = TokenSource(0, prompt), TokenSource(0, other)
    assert [first.next_token(True) for _ in range(12)] != [second.next_token(True) for _ in range(12)]


def test_seeds_change_the_answer_and_repeat_it() -> None:
    def answer(seed: int, sampling_seed: int | None) -> list[int]:
        source = TokenSource(seed, [5, 6, 7], sampling_seed, endless=True)
        return [source.next_token(True) for _ in range(50)]

    answers = [answer(0, None), answer(1, None), answer(0, 0), answer(0, 1)]
    assert len({tuple(tokens) for tokens in answers}) == 4
    assert answers == [answer(0, None), answer(1, None), answer(0, 0), answer(0, 1)]


def length(sampling_seed: int | None, limit: int = 5000) -> int:
    source = TokenSource(0, [1, 2, 3], sampling_seed)
    for count in range(1, limit + 1):
        if source.next_token(True) == tokenizer.EOS_ID:
            return count
    return limit


def test_sampled_answers_end_by_themselves_and_greedy_ones_do_not() -> None:
    lengths = [length(seed) for seed in range(2000)]
    assert statistics.mean(lengths) == pytest.approx(MEAN_SAMPLED_TOKENS, rel=0.1)
    assert length(None) == 5000


def test_the_end_token_waits_until_it_may_come() -> None:
    for seed in range(300):
        source = TokenSource(0, [1], seed)
        assert tokenizer.EOS_ID not in [source.next_token(False) for _ in range(50)]


def test_answers_do_not_depend_on_the_process() -> None:
    program = (
        "from sagecp.sim import tokenizer as t; from sagecp.sim.kv_cache import KvCache;"
        "from sagecp.sim.token_source import TokenSource;"
        "prompt = t.encode('Tell me about the sea'); source = TokenSource(7, prompt);"
        "cache = KvCache(4, 2); cache.commit(cache.open([], 4), prompt[:4], 4);"
        "print(prompt, [source.next_token(True) for _ in range(20)], cache.match(prompt))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(outputs) == 1
