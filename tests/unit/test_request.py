"""What the core estimates of a request before any engine has seen it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sagecp.core.request import RequestRecord
from sagecp.core.types import OpenAiApi, PromptDigest, RequestMetadata, RequestState, SamplingParameters
from tests.support.core_world import make_record

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PARTS = [{"type": "text", "text": "x" * 100}]


@pytest.mark.parametrize(
    ("fields", "size_bytes", "prompt_token_count"),
    [
        ({}, 0, 1),
        ({"prompt": ""}, 0, 1),
        ({"prompt": "x" * 400}, 400, 100),
        ({"prompt_token_ids": (7, 8, 9)}, 24, 3),
        (
            {"messages": ({"role": "user", "content": "x" * 40}, {"role": "user", "content": "y" * 40})},
            80,
            20,
        ),
        ({"messages": ({"role": "user", "content": PARTS},)}, len(str(PARTS)), len(str(PARTS)) // 4),
        ({"messages": ({"role": "assistant"},)}, len("None"), 1),
        (
            {"messages": ({"role": "user", "content": "x" * 40},), "tools": (TOOL,)},
            40 + len(str((TOOL,))),
            (40 + len(str((TOOL,)))) // 4,
        ),
        ({"openai_body": b"{}" * 20, "openai_api": OpenAiApi.COMPLETIONS}, 40, 10),
    ],
)
def test_sizes_of_prompts(fields: dict[str, Any], size_bytes: int, prompt_token_count: int) -> None:
    record = make_record(**fields)
    assert (record.size_bytes, record.prompt_token_count) == (size_bytes, prompt_token_count)


@pytest.mark.parametrize(
    ("max_tokens", "choice_count", "expected"),
    [(None, None, 256), (16, None, 16), (10_000, None, 256), (16, 4, 64), (None, 2, 512)],
)
def test_expected_output(max_tokens: int | None, choice_count: int | None, expected: int) -> None:
    record = make_record(max_tokens=max_tokens, sampling=SamplingParameters(n=choice_count), prompt="x" * 40)
    assert record.expected_output_token_count == expected
    assert record.expected_token_count == 10 + expected


def test_a_new_request() -> None:
    record = make_record("r1", arrival_s=5.0, slo_deadline_ms=1500.0)
    assert (record.deadline_s, record.expire_s) == (6.5, 6.5)
    assert (record.state, record.queued, record.epoch) == (RequestState.QUEUED, False, 0)
    assert make_record().deadline_s is None
    assert (record.ttft_objective_s, record.tpot_objective_s) == (math.inf, math.inf)
    assert (record.demoted, record.waits_for, record.work_s, record.cost_s) == (False, "", 0.0, 0.0)
    assert record.wait_until_s < record.arrival_s


def test_a_digest_that_is_known_better_is_taken_as_it_is() -> None:
    digest = PromptDigest(12_345, (1, 2, 3), 512)
    record = make_record("r1", prompt="x" * 40, prompt_digest=digest, max_tokens=5)
    assert record.digest is digest
    assert (record.prompt_token_count, record.expected_token_count) == (12_345, 12_350)
    # What waits in memory is the prompt itself.
    assert record.size_bytes == 40


def test_prompts_that_begin_alike_share_blocks_and_others_do_not() -> None:
    first, second = make_record(prompt="x" * 5000), make_record(prompt="x" * 2048 + "y" * 4000)
    assert first.digest.block_hashes[:2] == second.digest.block_hashes[:2]
    assert first.digest.block_hashes[2] != second.digest.block_hashes[2]
    assert not set(first.digest.block_hashes) & set(
        make_record(model="n", prompt="x" * 5000).digest.block_hashes
    )


def test_a_request_that_names_no_model_shares_blocks_with_those_that_do() -> None:
    named = make_record(prompt="x" * 5000)
    unnamed = RequestRecord(RequestMetadata(request_id="r2", prompt="x" * 5000), "m", 2, 0.0)
    assert unnamed.digest == named.digest
