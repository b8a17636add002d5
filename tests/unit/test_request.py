"""What the core estimates of a request before any engine has seen it."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.types import OpenAiApi, RequestState, SamplingParameters
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
