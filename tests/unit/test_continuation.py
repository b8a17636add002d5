"""Which requests can go on from token ids, how, and what their usage is then."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sagecp.core.types import OpenAiApi, RequestMetadata, SamplingParameters
from sagecp.runtime.engines.base import EngineApi, EngineOutcome
from sagecp.runtime.engines.continuation import (
    Continuation,
    remaining_token_count,
    usage_after,
    why_not_continued,
)
from sagecp.runtime.engines.request_body import engine_request_id, make_engine_call

AFTER = Continuation((1, 2, 3), (10, 11), "ab")
MESSAGE = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def asked(**fields: Any) -> RequestMetadata:
    sampling = {
        name: fields.pop(name)
        for name in list(fields)
        if name in {field.name for field in dataclasses.fields(SamplingParameters)}
    }
    fields = {"request_id": "r-1", "max_tokens": 10, **fields}
    if not fields.keys() & {"messages", "openai_body", "prompt_token_ids"}:
        fields["prompt"] = "hi"
    return RequestMetadata(sampling=SamplingParameters(**sampling), **fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"n": 3}, "it asks for 3 choices"),
        ({"openai_body": b'{"prompt":"x"}', "openai_api": OpenAiApi.COMPLETIONS}, "passed through"),
        ({"include_openai_events": True}, "its engine events are passed through"),
        ({"messages": (MESSAGE,), "tools": (TOOL,)}, "it uses tools"),
        ({"messages": (MESSAGE,), "tools": (TOOL,), "tool_choice": "none"}, "it uses tools"),
        ({"messages": ({"role": "assistant", "tool_calls": [{}]},)}, "holds more than text"),
        (
            {"messages": ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]},)},
            "its prompt holds more than text",
        ),
        ({"structured_output": {"regex": "a+"}}, "its output is restricted by a grammar"),
        ({"logprobs": 0}, "it asks for log probabilities"),
        ({"prompt_logprobs": 1}, "it asks for log probabilities"),
        ({"echo": True}, "it echoes the prompt"),
        ({"presence_penalty": 0.1}, "penalty counts output tokens"),
        ({"frequency_penalty": -0.1}, "penalty counts output tokens"),
        ({"bad_words": ("never",)}, "it forbids words"),
        *(
            ({"engine_extras": {name: 1, "user": "u"}}, f"its engine extra '{name}' may change")
            for name in (
                "response_format",
                "structured_outputs",
                "guided_json",
                "guided_choice",
                "logits_processors",
                "kv_transfer_params",
                "use_beam_search",
                "vllm_xargs",
                "length_penalty",
                "suffix",
                "reasoning_effort",
                "something_new",
            )
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_shapes_that_cannot_be_continued(fields: dict[str, Any], why: str) -> None:
    request = asked(**fields)
    assert why in why_not_continued(request)
    with pytest.raises(ValueError, match="cannot be continued, because it"):
        make_engine_call(request, "m", token_ids=True, continuation=AFTER)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "echo": False, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        {"messages": (MESSAGE, {"role": "assistant", "content": None})},
        {"messages": ({"role": "user", "content": [{"type": "text", "text": "x"}]},)},
        {"temperature": 1.0, "seed": 5, "top_k": 3, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
        {"stop": ("x",), "stop_token_ids": (5,), "min_tokens": 4, "allowed_token_ids": (1, 2)},
        {"engine_extras": {"chat_template_kwargs": {"a": 1}, "priority": 3, "cache_salt": "s"}},
    ],
    ids=str,
)
def test_shapes_that_can(fields: dict[str, Any]) -> None:
    request = asked(**fields)
    assert why_not_continued(request) == ""
    make_engine_call(request, "m", token_ids=True, continuation=AFTER)


def body_after(request: RequestMetadata, **arguments: Any) -> dict[str, Any]:
    call = make_engine_call(request, "m", token_ids=False, continuation=AFTER, **arguments)
    assert call.api is EngineApi.COMPLETIONS
    assert call.expected_choice_count == 1
    assert not call.keep_raw
    body = json.loads(call.body)
    assert isinstance(body, dict)
    return body


BASE = {
    "model": "m",
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
    "prompt": [1, 2, 3, 10, 11],
    "max_tokens": 8,
}


@pytest.mark.parametrize(
    "prompt", [{"prompt": "hi"}, {"prompt_token_ids": (1, 2, 3)}, {"messages": (MESSAGE,)}], ids=str
)
def test_prompt_and_output_are_one_prompt_of_token_ids(prompt: dict[str, Any]) -> None:
    assert body_after(asked(**prompt)) == BASE


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"min_tokens": 5}, {"min_tokens": 3}),
        ({"min_tokens": 1}, {"min_tokens": 0}),
        ({"truncate_prompt_tokens": 4}, {}),
        # The splice looks for these itself.
        ({"stop": ("a", "b"), "include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"stop_token_ids": (7,), "ignore_eos": True}, {"stop_token_ids": [7], "ignore_eos": True}),
        (
            {"temperature": 0.5, "seed": 9, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}},
            {"temperature": 0.5, "seed": 9, "repetition_penalty": 1.1, "logit_bias": {"5": 1.0}},
        ),
        (
            {
                "messages": (MESSAGE,),
                "engine_extras": {
                    "chat_template_kwargs": {"thinking": False},
                    "add_generation_prompt": True,
                    "add_special_tokens": True,
                    "priority": -1,
                },
            },
            {"priority": -1},
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_continuation_asks_for(fields: dict[str, Any], sent: dict[str, Any]) -> None:
    assert body_after(asked(**fields)) == {**BASE, **sent}


def test_a_chat_without_a_bound_is_continued_to_the_end_of_the_context() -> None:
    request = asked(messages=(MESSAGE,), max_tokens=None)
    assert remaining_token_count(request, 2) is None
    assert body_after(request, context_token_count=100)["max_tokens"] == 95
    with pytest.raises(ValueError, match="give it"):
        body_after(request)
    with pytest.raises(ValueError, match="nothing to add"):
        body_after(request, context_token_count=5)


def test_a_completion_without_a_bound_has_the_interfaces_own() -> None:
    assert body_after(asked(max_tokens=None))["max_tokens"] == 14


@pytest.mark.parametrize(("max_tokens", "left"), [(10, 8), (3, 1), (2, 0), (1, 0)])
def test_the_bound_counts_all_attempts(max_tokens: int, left: int) -> None:
    request = asked(max_tokens=max_tokens)
    assert remaining_token_count(request, 2) == left
    if left:
        assert body_after(request)["max_tokens"] == left
    else:
        with pytest.raises(ValueError, match="has all of its 2 tokens"):
            body_after(request)


@pytest.mark.parametrize("after", [Continuation((), (1,), "x"), Continuation((1,), (), "")])
def test_a_continuation_needs_both_prompt_and_output(after: Continuation) -> None:
    with pytest.raises(ValueError, match="needs the token ids"):
        make_engine_call(asked(), "m", token_ids=True, continuation=after)


def test_attempts_have_ids_of_their_own() -> None:
    assert [engine_request_id("r", epoch) for epoch in (1, 2, 3)] == ["r", "r.2", "r.3"]
    call = make_engine_call(asked(), "m", token_ids=True, continuation=AFTER, request_id="r-1.2")
    assert call.request_id == "r-1.2"
    assert make_engine_call(asked(), "m", token_ids=True, request_id="r-1.2").request_id == "r-1.2"
    assert make_engine_call(asked(), "m", token_ids=True).request_id == "r-1"


@pytest.mark.parametrize(
    ("attempt", "whole"),
    [
        ((9, 4, 0), (7, 6, 0)),
        ((9, 4, 8), (7, 6, 7)),  # The cache held output of the lost attempt, which is no prompt.
        ((9, 4, None), (7, 6, None)),
        ((None, None, 3), (None, None, 3)),
        ((1, 0, 1), (0, 2, 0)),
    ],
)
def test_usage_is_the_requests(attempt: tuple[int | None, ...], whole: tuple[int | None, ...]) -> None:
    outcome = EngineOutcome(("stop",), *attempt)
    assert usage_after(outcome, AFTER) == EngineOutcome(("stop",), *whole)
    assert usage_after(outcome, None) is outcome


def test_a_continuation_shows_no_content() -> None:
    assert "canary" not in repr(Continuation((424242,), (424242,), "canary"))
    assert "424242" not in repr(Continuation((424242,), (424242,), "canary"))
