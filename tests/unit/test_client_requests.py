"""Keyword arguments of the client become exactly the message that the contract describes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.protobuf import json_format

from sagecp.client import InvalidArgumentError
from sagecp.client.requests import KNOWN_OPTIONS, SAMPLING_OPTIONS, request_spec
from sagecp.core.errors import ErrorReason
from sagecp.core.types import FailoverMode, OpenAiApi, ParallelismType, RequestPriority
from sagecp.rpc.convert.request import request_from_proto
from sagecp.v1 import request_pb2


def as_json(spec: request_pb2.RequestSpec) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(spec, preserving_proto_field_name=True)
    return value


def test_every_sampling_parameter_of_the_contract_has_an_option() -> None:
    fields = {field.name for field in request_pb2.SamplingParameters.DESCRIPTOR.fields}
    assert fields == SAMPLING_OPTIONS
    assert fields <= KNOWN_OPTIONS


def test_a_request_id_is_made_once_per_request() -> None:
    first, second = request_spec("x", {}), request_spec("x", {})
    assert first.request_id != second.request_id
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", first.request_id)
    assert request_spec("x", {"request_id": "mine"}).request_id == "mine"


def test_what_is_not_given_is_not_set() -> None:
    assert as_json(request_spec("hi", {"request_id": "r"})) == {"request_id": "r", "prompt": {"text": "hi"}}


def test_everything_reaches_the_core_unchanged() -> None:
    """Through the client's message and the server's reader: the same values come out."""
    spec = request_spec(
        "hi",
        {
            "model": "m", "max_tokens": 7, "min_tokens": 1, "temperature": 0.7, "top_p": 0.9, "top_k": -1,
            "min_p": 0.05, "presence_penalty": -0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1,
            "seed": 42, "n": 2, "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True, "logprobs": 3,
            "prompt_logprobs": 0, "logit_bias": {7: -1.5}, "allowed_token_ids": [1, 2], "bad_words": ["no"],
            "skip_special_tokens": False, "spaces_between_special_tokens": True,
            "include_stop_str_in_output": True, "truncate_prompt_tokens": 9, "echo": False,
            "structured_output": {"choice": ["yes", "no"]}, "engine_extras": {"x": {"y": [1, True, None]}},
            "priority": "high", "deadline_s": 1.5, "ttft_s": 0.25, "tpot_s": 0.05, "cost_budget_usd": 0.01,
            "user_id": "u", "session_id": "s", "labels": {"k": "v"},
            "parallelism_hint": ParallelismType.TENSOR, "failover_mode": FailoverMode.RESTART,
            "include_openai_events": True,
        },
    )  # fmt: skip
    got = request_from_proto(spec, "t")
    sampling = got.sampling
    assert (got.prompt, got.model_name, got.max_tokens, got.priority) == ("hi", "m", 7, RequestPriority.HIGH)
    assert (got.slo_deadline_ms, got.ttft_slo_ms, got.tpot_slo_ms) == (1500, 250, 50)
    assert (got.user_id, got.session_id, got.labels, got.cost_budget) == ("u", "s", {"k": "v"}, 0.01)
    assert (got.parallelism_hint, got.failover_mode) == (ParallelismType.TENSOR, FailoverMode.RESTART)
    assert got.include_openai_events
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, -1, 0.05)
    assert (sampling.stop, sampling.stop_token_ids, sampling.seed) == (("a", "b"), (5,), 42)
    assert (sampling.prompt_logprobs, sampling.echo, sampling.skip_special_tokens) == (0, False, False)
    assert (sampling.logit_bias, sampling.bad_words) == ({7: -1.5}, ("no",))
    assert sampling.structured_output == {"choice": ["yes", "no"]}
    assert sampling.engine_extras == {"x": {"y": [1, True, None]}}


def test_chat() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    spec = request_spec(
        None,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
                {"role": "tool", "tool_call_id": "c", "content": "42"},
            ],
            "tools": [tool],
            "tool_choice": "auto",
        },
    )
    got = request_from_proto(spec, "t")
    assert [message["role"] for message in got.messages] == ["system", "user", "assistant", "tool"]
    assert got.messages[1]["content"] == [{"type": "text", "text": "hi"}]
    assert got.messages[2]["tool_calls"] == [{"id": "c"}]
    assert got.messages[3]["tool_call_id"] == "c"
    assert got.tools == (tool,)
    assert got.tool_choice == "auto"


@pytest.mark.parametrize("body", [{"messages": []}, '{"messages": []}', b'{"messages": []}'])
def test_openai_bodies_of_every_form(body: Any) -> None:
    spec = request_spec(None, {"openai": ("chat_completions", body)})
    assert spec.prompt.openai.api == request_pb2.OPEN_AI_API_CHAT_COMPLETIONS
    assert json.loads(spec.prompt.openai.json) == {"messages": []}
    assert not spec.HasField("sampling")
    same = request_spec(None, {"openai": (OpenAiApi.COMPLETIONS, body)})
    assert same.prompt.openai.api == request_pb2.OPEN_AI_API_COMPLETIONS


def test_every_value_that_does_not_fit_is_named_at_once() -> None:
    wrong: Any = {
        "max_tokens": -1, "n": "two", "temperature": "hot", "seed": 2**70, "stop_token_ids": [-1],
        "priority": "urgent", "deadline_s": "soon", "labels": {"k": 1}, "engine_extras": [1],
        "structured_output": {"regex": "a", "grammar": "b"}, "logit_bias": {"x": 1},
    }  # fmt: skip
    with pytest.raises(InvalidArgumentError) as caught:
        request_spec("hi", wrong)
    fields = {each.field for each in caught.value.violations}
    sampling = {"max_tokens", "n", "temperature", "seed", "stop_token_ids", "engine_extras", "logit_bias"}
    expected = {f"spec.sampling.{name}" for name in (*sampling, "structured_output")}
    assert fields == expected | {"spec.priority", "spec.objectives.end_to_end_deadline", "spec.labels"}
    assert caught.value.reason is ErrorReason.INVALID_REQUEST
    assert "spec.sampling.max_tokens: is -1; must be a whole number of 0 or more" in caught.value.message


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"token_ids": [1], "messages": [{"role": "user", "content": "x"}]}, "spec.prompt"),
        ({"token_ids": [-1]}, "spec.prompt.token_ids.ids"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "spec.prompt.chat.messages[0]"),
        ({"messages": [{"content": "x"}]}, "spec.prompt.chat.messages[0]"),
        ({"token_ids": [1], "tools": []}, "spec.prompt.chat.tools"),
        ({"openai": ("embeddings", {})}, "spec.prompt.openai"),
    ],
)
def test_bad_prompts(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        request_spec(None, options)
    assert [each.field for each in caught.value.violations] == [field]


def test_unknown_options_are_a_programming_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        request_spec("hi", {"temprature": 1})  # type: ignore[typeddict-unknown-key]  # wrong on purpose
