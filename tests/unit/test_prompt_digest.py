"""Digests of prompts: equal starts are equal blocks, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.prompt_digest import (
    BLOCK_TOKEN_COUNT,
    MAX_BLOCK_COUNT,
    MAX_PARSED_BYTES,
    digest_prompt,
)
from sagecp.core.types import OpenAiApi, PromptDigest, RequestMetadata, SamplingParameters

TEXT = "".join(chr(97 + number * number % 26) for number in range(10_000))
SYSTEM = {"role": "system", "content": TEXT[:5000]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"b": 1, "a": 2}}}


def blocks(model: str = "m", **fields: Any) -> tuple[int, ...]:
    return digest_prompt(RequestMetadata(model_name=model, **fields)).block_hashes


def body(api: OpenAiApi = OpenAiApi.CHAT_COMPLETIONS, **content: Any) -> tuple[int, ...]:
    return blocks(openai_body=json.dumps(content).encode(), openai_api=api)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Leading blocks that two have in common; none may be equal after them."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert not set(one[count:]) & set(other[count:])
    return count


@pytest.mark.parametrize(
    ("fields", "token_count", "block_count"),
    [
        ({}, 1, 0),
        ({"prompt": ""}, 1, 0),
        ({"prompt": TEXT[:1023]}, 255, 0),
        ({"prompt": TEXT[:1024]}, 256, 1),
        ({"prompt": TEXT}, 2500, 9),
        # Characters count, as in the estimate of tokens, however many bytes they take.
        ({"prompt": "\u4e2d" * 3000}, 750, 2),
        ({"prompt": "\ud800" * 2048}, 512, 2),
        ({"prompt_token_ids": tuple(range(255))}, 255, 0),
        ({"prompt_token_ids": tuple(range(700))}, 700, 2),
        ({"prompt_token_ids": (1 << 70,) * 700}, 700, 0),
        ({"messages": (SYSTEM,)}, 1250, 4),
        # No more blocks than tokens for them, whatever surrounds the content.
        ({"messages": ({"role": "r" * 5000, "content": "x" * 1024},)}, 256, 1),
        ({"prompt": "x" * 2_000_000}, 500_000, MAX_BLOCK_COUNT),
        ({"prompt_token_ids": (1,) * 300_000}, 300_000, MAX_BLOCK_COUNT),
        ({"messages": (SYSTEM,) * 300}, 375_000, MAX_BLOCK_COUNT),
    ],
)  # fmt: skip
def test_counts(fields: dict[str, Any], token_count: int, block_count: int) -> None:
    digest = digest_prompt(RequestMetadata(model_name="m", **fields))
    assert (digest.token_count, len(digest.block_hashes)) == (token_count, block_count)
    assert digest.block_token_count == BLOCK_TOKEN_COUNT == 256
    assert len(set(digest.block_hashes)) == block_count
    assert all(0 <= block < 1 << 64 for block in digest.block_hashes)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 6000), added=st.text(max_size=3000), kind=st.sampled_from(["text", "ids", "chat"])
)
def test_a_longer_prompt_has_all_blocks_of_its_start(length: int, added: str, kind: str) -> None:
    start = TEXT[:length]
    if kind == "text":
        short, long = blocks(prompt=start), blocks(prompt=start + added)
    elif kind == "ids":
        ids = tuple(map(ord, start))
        short, long = blocks(prompt_token_ids=ids), blocks(prompt_token_ids=ids + tuple(map(ord, added)))
    else:
        first = ({"role": "user", "content": start},)
        short = blocks(messages=first)
        long = blocks(messages=(*first, {"role": "assistant", "content": added}))
    assert long[: len(short)] == short


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 9999))
def test_blocks_after_a_difference_differ(position: int) -> None:
    changed = TEXT[:position] + "\u00e9" + TEXT[position + 1 :]
    assert shared(blocks(prompt=TEXT), blocks(prompt=changed)) == min(9, position // 1024)


def test_conversations_share_their_system_prompt_and_tools() -> None:
    one = blocks(messages=(SYSTEM, {"role": "user", "content": TEXT}), tools=(TOOL,))
    other = blocks(messages=(SYSTEM, {"role": "user", "content": TEXT[::-1]}), tools=(TOOL,))
    assert shared(one, other) == 4
    # Templates write tools before messages: other tools are another start.
    assert shared(one, blocks(messages=(SYSTEM, {"role": "user", "content": TEXT}))) == 0
    # The order of an object's members says nothing.
    swapped = {"function": {"parameters": {"a": 2, "b": 1}, "name": "look"}, "type": "function"}
    assert blocks(messages=(dict(reversed(SYSTEM.items())),), tools=(swapped,)) == one[:4]


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"role": "user", "content": TEXT[:5000]}, False),
        ({"role": "system", "content": [{"type": "text", "text": TEXT[:5000]}]}, True),
        ({"role": "system", "content": [{"type": "image_url", "image_url": {"url": TEXT[:5000]}}]}, False),
        # Other members come after the content.
        ({"role": "system", "content": TEXT[:5000], "name": "n"}, True),
    ],
)
def test_forms_of_a_message(changed: dict[str, Any], same: bool) -> None:
    assert (shared(blocks(messages=(SYSTEM,)), blocks(messages=(changed,))) == 4) is same


def test_models_kinds_and_cache_salts_are_told_apart() -> None:
    ids = tuple(map(ord, TEXT))
    salted = SamplingParameters(engine_extras={"cache_salt": "s"})
    different = [
        blocks(prompt=TEXT),
        blocks(prompt=TEXT, model="other"),
        blocks(prompt=TEXT, sampling=salted),
        blocks(messages=({"role": "", "content": TEXT},)),
        blocks(prompt_token_ids=ids),
    ]
    firsts = {found[0] for found in different}
    assert len(firsts) == len(different)
    assert digest_prompt(RequestMetadata(prompt=TEXT), "m").block_hashes == different[0]


def test_opaque_bodies_equal_their_typed_forms() -> None:
    messages = [SYSTEM, {"role": "user", "content": "and?"}]
    typed = blocks(messages=tuple(messages), tools=(TOOL,))
    assert len(typed) == 4
    assert body(temperature=0.5, tools=[TOOL], messages=messages, model="x") == typed
    assert body(OpenAiApi.COMPLETIONS, prompt=TEXT) == blocks(prompt=TEXT)
    ids = list(range(600))
    assert body(OpenAiApi.COMPLETIONS, prompt=ids)[:2] == blocks(prompt_token_ids=tuple(ids))
    salted = SamplingParameters(engine_extras={"cache_salt": "s"})
    assert body(OpenAiApi.COMPLETIONS, prompt=TEXT, cache_salt="s") == blocks(prompt=TEXT, sampling=salted)


@pytest.mark.parametrize(
    "raw",
    [
        b"not JSON" * 500,
        b"[" * 100_000,
        b'{"messages":' + b"[" * 90_000,
        json.dumps({"messages": TEXT}).encode(),
        json.dumps({"messages": None, "pad": TEXT}).encode(),
        json.dumps([TEXT]).encode(),
        json.dumps({"messages": [SYSTEM], "pad": "x" * MAX_PARSED_BYTES}).encode(),
        b"\xff\xfe" * 2000,
    ],
)
@pytest.mark.parametrize("api", OpenAiApi)
def test_bodies_without_a_prompt_that_is_understood_have_a_length_only(raw: bytes, api: OpenAiApi) -> None:
    digest = digest_prompt(RequestMetadata(openai_body=raw, openai_api=api))
    assert digest == PromptDigest(len(raw) // 4)


def test_several_prompts_in_a_body_have_no_blocks() -> None:
    assert body(OpenAiApi.COMPLETIONS, prompt=[TEXT, TEXT]) == ()
    assert body(OpenAiApi.COMPLETIONS, prompt=[True] * 5000) == ()


def test_messages_of_no_known_form_do_no_harm() -> None:
    circular: dict[str, Any] = {"role": "user", "content": TEXT}
    circular["self"] = circular
    odd: tuple[Any, ...] = (circular, {"role": 3, "content": {"x": {1, 2}}, 5: b"bytes"})
    assert len(blocks(messages=odd)) == 9
    assert body(messages=["just text" * 500, 5, None, {}])


def test_a_digest_that_is_brought_along_or_counted_is_taken() -> None:
    brought = PromptDigest(77, (1, 2, 3), 16)
    assert digest_prompt(RequestMetadata(prompt=TEXT, prompt_digest=brought)) is brought
    counted = digest_prompt(RequestMetadata(prompt=TEXT), token_count=600)
    assert (counted.token_count, len(counted.block_hashes)) == (600, 2)


def test_another_process_finds_the_same() -> None:
    script = (
        "from sagecp.core.prompt_digest import digest_prompt\n"
        "from sagecp.core.types import RequestMetadata\n"
        "print(digest_prompt(RequestMetadata(prompt='abcd' * 1000, model_name='m')).block_hashes)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert told == {str(blocks(prompt="abcd" * 1000))}
