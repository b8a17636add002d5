"""What an engine is asked for, from what a user asked for."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sagecp.core.errors import InvalidRequestError
from sagecp.core.types import OpenAiApi, RequestMetadata, SamplingParameters
from sagecp.runtime.engines.base import EngineApi
from sagecp.runtime.engines.request_body import CONTROLLED_FIELDS, body_violations, make_engine_call

BASE = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}


def body_of(metadata: RequestMetadata, *, token_ids: bool = False) -> dict[str, Any]:
    body = json.loads(make_engine_call(metadata, "m", token_ids=token_ids).body)
    assert isinstance(body, dict)
    return body


def bad_fields(metadata: RequestMetadata) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        make_engine_call(metadata, "m", token_ids=True)
    assert list(caught.value.violations) == list(body_violations(metadata))
    return [violation.field for violation in caught.value.violations]


def test_a_text_prompt_goes_to_completions() -> None:
    call = make_engine_call(RequestMetadata(request_id="r-1", prompt="hi", max_tokens=5), "m", token_ids=True)
    assert call.api is EngineApi.COMPLETIONS
    assert call.request_id == "r-1"
    assert call.expected_choice_count == 1
    assert not call.keep_raw
    assert json.loads(call.body) == {**BASE, "prompt": "hi", "max_tokens": 5, "return_token_ids": True}


def test_token_ids_are_asked_for_only_where_wanted() -> None:
    assert "return_token_ids" not in body_of(RequestMetadata(prompt="hi"))


def test_without_a_prompt_the_engine_gets_an_empty_one() -> None:
    assert body_of(RequestMetadata())["prompt"] == ""


def test_token_ids_are_a_prompt() -> None:
    call = make_engine_call(RequestMetadata(prompt_token_ids=(1, 2, 3)), "m", token_ids=False)
    assert call.api is EngineApi.COMPLETIONS
    assert json.loads(call.body) == {**BASE, "prompt": [1, 2, 3]}


def test_a_conversation_goes_to_chat_with_its_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    message = {"role": "user", "content": [{"type": "text", "text": "é"}]}
    call = make_engine_call(
        RequestMetadata(messages=(message,), tools=(tool,), tool_choice="auto", max_tokens=9),
        "m",
        token_ids=False,
    )
    assert call.api is EngineApi.CHAT_COMPLETIONS
    assert json.loads(call.body) == {
        **BASE,
        "messages": [message],
        "tools": [tool],
        "tool_choice": "auto",
        "max_completion_tokens": 9,
    }


# Every parameter: its value, and what the engine is sent for it.
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "min_tokens": (3, {"min_tokens": 3}),
    "temperature": (0.0, {"temperature": 0.0}),
    "top_p": (0.9, {"top_p": 0.9}),
    "top_k": (-1, {"top_k": -1}),
    "min_p": (0.0, {"min_p": 0.0}),
    "presence_penalty": (-2.0, {"presence_penalty": -2.0}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "seed": (0, {"seed": 0}),
    "n": (2, {"n": 2}),
    "stop": (("a", "b"), {"stop": ["a", "b"]}),
    "stop_token_ids": ((7, 8), {"stop_token_ids": [7, 8]}),
    "ignore_eos": (False, {"ignore_eos": False}),
    "logprobs": (0, {"logprobs": 0}),
    "prompt_logprobs": (1, {"prompt_logprobs": 1}),
    "logit_bias": ({5: -1.5}, {"logit_bias": {"5": -1.5}}),
    "allowed_token_ids": ((1,), {"allowed_token_ids": [1]}),
    "bad_words": (("x",), {"bad_words": ["x"]}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "spaces_between_special_tokens": (False, {"spaces_between_special_tokens": False}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "truncate_prompt_tokens": (4, {"truncate_prompt_tokens": 4}),
    "echo": (True, {"echo": True}),
    "structured_output": ({"regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
    "engine_extras": ({"vendor": {"deep": [1, 2.5]}}, {"vendor": {"deep": [1, 2.5]}}),
}


def test_the_table_below_names_every_sampling_parameter() -> None:
    assert SAMPLING.keys() == {field.name for field in dataclasses.fields(SamplingParameters)}


@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampling_parameter_reaches_the_engine(name: str) -> None:
    value, sent = SAMPLING[name]
    metadata = RequestMetadata(prompt="hi", sampling=SamplingParameters(**{name: value}))
    assert body_of(metadata) == {**BASE, "prompt": "hi", **sent}


def test_parameters_that_are_not_set_are_not_sent() -> None:
    assert body_of(RequestMetadata(prompt="hi")) == {**BASE, "prompt": "hi"}


def test_all_parameters_go_together() -> None:
    values = {name: value for name, (value, _) in SAMPLING.items()}
    sent: dict[str, Any] = {}
    for _, part in SAMPLING.values():
        sent |= part
    metadata = RequestMetadata(prompt="hi", max_tokens=8, sampling=SamplingParameters(**values))
    assert body_of(metadata) == {**BASE, "prompt": "hi", "max_tokens": 8, **sent}
    assert make_engine_call(metadata, "m", token_ids=False).expected_choice_count == 2


def test_chat_has_its_own_form_of_log_probabilities() -> None:
    metadata = RequestMetadata(
        messages=({"role": "user", "content": "x"},), sampling=SamplingParameters(logprobs=3)
    )
    body = body_of(metadata)
    assert body["logprobs"] is True
    assert body["top_logprobs"] == 3


@pytest.mark.parametrize(
    ("constraint", "sent"),
    [
        ({"json_schema": '{"type": "object"}'}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"json_object": True}, {"response_format": {"type": "json_object"}}),
        ({"regex": "[a-z]"}, {"structured_outputs": {"regex": "[a-z]"}}),
        ({"grammar": "root ::= 'a'"}, {"structured_outputs": {"grammar": "root ::= 'a'"}}),
        ({"choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_structured_output_takes_the_engines_form(constraint: dict[str, Any], sent: dict[str, Any]) -> None:
    metadata = RequestMetadata(prompt="x", sampling=SamplingParameters(structured_output=constraint))
    assert body_of(metadata) == {**BASE, "prompt": "x", **sent}


def test_a_large_integer_in_a_schema_stays_what_it_is() -> None:
    schema = '{"const": 123456789012345678901234567890}'
    metadata = RequestMetadata(
        prompt="x", sampling=SamplingParameters(structured_output={"json_schema": schema})
    )
    assert schema.encode() in make_engine_call(metadata, "m", token_ids=False).body


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": "{not json"},
        {"json_schema": ""},
        {"json_schema": {"type": "object"}},
        {"json_object": False},
        {"choice": []},
        {"regex": ""},
        {"grammar": ""},
    ],
    ids=str,
)
def test_a_useless_constraint_is_refused(constraint: dict[str, Any]) -> None:
    metadata = RequestMetadata(prompt="x", sampling=SamplingParameters(structured_output=constraint))
    assert bad_fields(metadata) == [f"sampling.structured_output.{next(iter(constraint))}"]


def test_extras_that_the_control_plane_or_the_contract_sets_are_all_named() -> None:
    extras = {"stream": False, "n": 4, "vendor": 1, "temperature": 1.0, "model": "x", "max_tokens": 3}
    metadata = RequestMetadata(prompt="x", sampling=SamplingParameters(engine_extras=extras))
    assert bad_fields(metadata) == [
        f"sampling.engine_extras.{name}" for name in ("max_tokens", "model", "n", "stream", "temperature")
    ]


@pytest.mark.parametrize("name", sorted(CONTROLLED_FIELDS))
def test_no_controlled_field_can_come_from_extras(name: str) -> None:
    metadata = RequestMetadata(prompt="x", sampling=SamplingParameters(engine_extras={name: "x"}))
    assert bad_fields(metadata) == [f"sampling.engine_extras.{name}"]


@pytest.mark.parametrize(
    ("api", "path"),
    [
        (OpenAiApi.COMPLETIONS, EngineApi.COMPLETIONS),
        (OpenAiApi.CHAT_COMPLETIONS, EngineApi.CHAT_COMPLETIONS),
    ],
)
def test_an_opaque_body_is_passed_on_with_the_controlled_fields_set(api: OpenAiApi, path: EngineApi) -> None:
    opaque = (
        b'{"prompt": "\xc3\xa9", "stream": false, "model": "other", "stream_options": {"a": 1},'
        b' "n": 3, "huge": 123456789012345678901234567890, "float": 1.10}'
    )
    call = make_engine_call(RequestMetadata(openai_body=opaque, openai_api=api), "m", token_ids=True)
    assert call.api is path
    assert call.keep_raw
    assert call.expected_choice_count == 3
    # Fields of others are not even reformatted.
    assert b"123456789012345678901234567890" in call.body
    assert b"1.10" in call.body
    assert json.loads(call.body) == {
        **BASE,
        "prompt": "é",
        "n": 3,
        "huge": 123456789012345678901234567890,
        "float": 1.1,
    }


@pytest.mark.parametrize("n", ["null", '"many"', "[]", "0", "-3", "{}"])
def test_a_strange_number_of_choices_is_left_to_the_engine(n: str) -> None:
    opaque = f'{{"prompt": "x", "n": {n}}}'.encode()
    call = make_engine_call(
        RequestMetadata(openai_body=opaque, openai_api=OpenAiApi.COMPLETIONS), "m", token_ids=False
    )
    assert call.expected_choice_count == 1
    assert json.loads(call.body)["n"] == json.loads(n)


@pytest.mark.parametrize("opaque", [b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b'{"a": 1} trailing'])
def test_an_opaque_body_that_is_no_object_is_refused(opaque: bytes) -> None:
    metadata = RequestMetadata(openai_body=opaque, openai_api=OpenAiApi.COMPLETIONS)
    assert bad_fields(metadata) == ["prompt.openai.json"]


def test_events_are_kept_when_asked_for() -> None:
    metadata = RequestMetadata(prompt="x", include_openai_events=True)
    assert make_engine_call(metadata, "m", token_ids=False).keep_raw


def test_the_call_shows_neither_prompt_nor_headers() -> None:
    call = make_engine_call(RequestMetadata(prompt="canary-in-the-prompt"), "m", token_ids=False)
    assert "canary" not in repr(call)


def test_an_echoed_prompt_comes_without_token_ids() -> None:
    metadata = RequestMetadata(prompt="x", sampling=SamplingParameters(echo=True))
    assert "return_token_ids" not in body_of(metadata, token_ids=True)


@pytest.mark.parametrize(
    "content",
    [{"prompt": "\ud800"}, {"messages": ({"role": object()},)}],
    ids=["half of a pair", "no JSON type"],
)
def test_what_is_not_json_is_the_callers_fault(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="JSON cannot express"):
        make_engine_call(RequestMetadata(**content), "m", token_ids=False)
