"""Events of the OpenAI API: what becomes a delta, what ends an answer, and what is an error."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.runtime.engines.base import (
    EngineDelta,
    EngineError,
    EngineFailedError,
    EngineOutcome,
    EngineOverloadedError,
    EngineRejectedError,
    EngineStreamBrokenError,
    EngineUnauthorizedError,
)
from sagecp.runtime.engines.openai_stream import (
    MAX_CHOICE_COUNT,
    MAX_MESSAGE_CHARACTERS,
    OpenAiStreamParser,
    error_of_response,
    printable,
)

DONE = b"[DONE]"


def event(*choices: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"id": "cmpl-1", "model": "tiny", "choices": list(choices), **fields}).encode()


def values(deltas: list[EngineDelta]) -> list[tuple[Any, ...]]:
    return [
        (d.choice_index, d.text, d.token_ids, d.token_count, d.finish_reason, d.stop_reason) for d in deltas
    ]


def parse(*payloads: bytes, **settings: Any) -> OpenAiStreamParser:
    parser = OpenAiStreamParser(**settings)
    for payload in payloads:
        parser.parse(payload)
    return parser


def test_completion_events_of_a_real_server() -> None:
    parser = parse(
        b'{"id":"cmpl-8a","object":"text_completion","created":1795469499,"model":"tiny","choices":[{"index":0,'
        b'"text":" e","logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":[265,79,325],"token_ids":[297]}]}',
        b'{"id":"cmpl-8a","object":"text_completion","created":1795469499,"model":"tiny","choices":[{"index":0,'
        b'"text":"!","logprobs":null,"finish_reason":"stop","stop_reason":5,"token_ids":[4,5]}]}',
        b'{"id":"cmpl-8a","object":"text_completion","choices":[],"usage":{"prompt_tokens":3,"total_tokens":6,'
        b'"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}},"system_fingerprint":"vllm"}',
        DONE,
    )
    assert values(parser.deltas) == [(0, " e", [297], 1, "", ""), (0, "!", [4, 5], 2, "stop", "5")]
    assert parser.done
    assert parser.outcome() == EngineOutcome(("stop",), 3, 3, 2)


def test_chat_events_of_a_real_server() -> None:
    parser = parse(
        b'{"id":"chatcmpl-b8","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant",'
        b'"content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":[0,2],"prompt_text":null}',
        b'{"id":"chatcmpl-b8","choices":[{"index":0,"delta":{"content":"ler"},"finish_reason":null,'
        b'"token_ids":[1131]}]}',
        b'{"id":"chatcmpl-b8","choices":[{"index":0,"delta":{"content":"lated"},"finish_reason":"length",'
        b'"stop_reason":null,"token_ids":[1578]}]}',
        b'{"id":"chatcmpl-b8","choices":[],"usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":2}}',
        DONE,
    )
    # The role alone is no output.
    assert values(parser.deltas) == [(0, "ler", [1131], 1, "", ""), (0, "lated", [1578], 1, "length", "")]
    assert parser.outcome() == EngineOutcome(("length",), 14, 2, None)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "x"}, [(0, "x", None, 1, "", "")]),
        ({"text": "x", "token_ids": []}, [(0, "x", [], 0, "", "")]),  # text that was held back
        ({"text": "", "token_ids": [9]}, [(0, "", [9], 1, "", "")]),  # a token that completes no character
        ({"text": ""}, []),
        ({"text": "", "finish_reason": "length"}, [(0, "", None, 0, "length", "")]),
        ({"text": "", "finish_reason": "stop", "stop_reason": "\n"}, [(0, "", None, 0, "stop", "\n")]),
        ({"delta": {"content": "x"}}, [(0, "x", None, 1, "", "")]),
        ({"delta": {"reasoning_content": "hm"}}, [(0, "", None, 1, "", "")]),
        ({"delta": {"reasoning": "hm"}, "token_ids": [7, 8]}, [(0, "", [7, 8], 2, "", "")]),
        ({"delta": {}}, []),
        ({"delta": {"content": None}, "finish_reason": "tool_calls"}, [(0, "", None, 0, "tool_calls", "")]),
        ({"index": 3, "text": "x"}, [(3, "x", None, 1, "", "")]),
        ({"text": "x", "token_ids": [2**32 - 1]}, [(0, "x", [2**32 - 1], 1, "", "")]),
    ],
)
def test_deltas(choice: dict[str, Any], expected: list[tuple[Any, ...]]) -> None:
    parser = parse(event(choice))
    assert values(parser.deltas) == expected
    assert parser.progressed is bool(expected)
    assert all(delta.raw is None for delta in parser.deltas)


def test_the_json_is_kept_once_for_each_event_when_asked_for() -> None:
    payloads = [
        event({"delta": {"role": "assistant", "content": ""}}),
        event({"index": 0, "text": "a"}, {"index": 1, "text": "b"}),
        event({"index": 0, "text": "", "finish_reason": "stop"}, {"index": 1, "finish_reason": "stop"}),
        event(usage={"prompt_tokens": 1, "completion_tokens": 2}),
    ]
    parser = parse(*payloads, DONE, keep_raw=True, expected_choice_count=2)
    assert [delta.raw for delta in parser.deltas if delta.raw is not None] == payloads
    assert [delta.token_count for delta in parser.deltas] == [0, 1, 1, 0, 0, 0]


def test_only_output_is_progress() -> None:
    parser = parse(
        event({"delta": {"role": "assistant"}}), event(usage={"completion_tokens": 0}), keep_raw=True
    )
    assert len(parser.deltas) == 2
    assert not parser.progressed


def test_a_tool_call_keeps_its_event_unasked() -> None:
    call = {"index": 0, "id": "call-1", "function": {"name": "f", "arguments": "{}"}}
    payload = event({"delta": {"tool_calls": [call]}})
    parser = parse(payload, event({"delta": {}, "finish_reason": "tool_calls"}))
    assert [delta.raw for delta in parser.deltas] == [payload, None]
    assert parser.deltas[0].token_count == 1


def test_the_last_usage_counts() -> None:
    parser = parse(
        event({"text": "a"}, usage={"prompt_tokens": 3, "completion_tokens": 1}),
        event({"text": "b", "finish_reason": "stop"}, usage={"prompt_tokens": 3, "completion_tokens": 2}),
        event(usage=None),
    )
    assert parser.outcome() == EngineOutcome(("stop",), 3, 2, None)


@pytest.mark.parametrize(
    ("payloads", "expected_choice_count", "complete"),
    [
        ([], 1, False),
        ([event({"text": "a"})], 1, False),
        ([event({"text": "a", "finish_reason": "stop"})], 1, True),
        ([event({"text": "a", "finish_reason": "stop"})], 2, False),
        ([event({"index": 1, "finish_reason": "stop"})], 1, False),
        ([event({"finish_reason": "stop"}), event({"index": 1, "text": "x"})], 1, False),
        ([event({"index": 1, "finish_reason": "stop"}, {"finish_reason": "length"})], 1, True),
    ],
)
def test_done_proves_nothing(payloads: list[bytes], expected_choice_count: int, complete: bool) -> None:
    parser = parse(*payloads, expected_choice_count=expected_choice_count)
    assert parser.is_complete is complete
    if complete:
        parser.parse(DONE)
        assert parser.outcome().finish_reasons
    else:
        with pytest.raises(EngineStreamBrokenError, match="finish"):
            parser.parse(DONE)


def test_finish_reasons_are_in_the_order_of_choices() -> None:
    parser = parse(
        event({"index": 2, "finish_reason": "stop"}),
        event({"index": 0, "finish_reason": "length"}),
        event({"index": 1, "finish_reason": "tool_calls"}),
        expected_choice_count=3,
    )
    assert parser.outcome().finish_reasons == ("length", "tool_calls", "stop")


@pytest.mark.parametrize(
    ("payload", "kind", "words"),
    [
        (event({"text": "", "finish_reason": "abort"}), EngineStreamBrokenError, "aborted"),
        (event({"text": "", "finish_reason": "error"}), EngineFailedError, "failed"),
        (b"{", EngineStreamBrokenError, "not understood"),
        (b"", EngineStreamBrokenError, "not understood"),
        (b"null", EngineStreamBrokenError, "not understood"),
        (b"[]", EngineStreamBrokenError, "not understood"),
        (b"[" * 100_000, EngineStreamBrokenError, "not understood"),
        (b"\xff\xfe", EngineStreamBrokenError, "not understood"),
        (b'{"choices":[{"text":"\xff"}]}', EngineStreamBrokenError, "not understood"),
        (b'{"choices":[{"text":"\\ud800"}]}', EngineStreamBrokenError, "not understood"),
        (b'{"choices":[{"text":5}]}', EngineStreamBrokenError, "not understood"),
        (b'{"choices":{"0":{}}}', EngineStreamBrokenError, "not understood"),
        (event({"text": "x"}) + b"{}", EngineStreamBrokenError, "not understood"),
        (b"{}", EngineStreamBrokenError, "without choices"),
        (event({"index": -1, "text": "x"}), EngineStreamBrokenError, "choice index"),
        (event({"index": MAX_CHOICE_COUNT, "text": "x"}), EngineStreamBrokenError, "choice index"),
        (event({"text": "x", "token_ids": [-1]}), EngineStreamBrokenError, "token id"),
        (event({"text": "x", "token_ids": [2**32]}), EngineStreamBrokenError, "token id"),
        (event(usage={"prompt_tokens": -1}), EngineStreamBrokenError, "token count"),
    ],
)
def test_damage(payload: bytes, kind: type[EngineError], words: str) -> None:
    parser = parse(event({"text": "before"}))
    with pytest.raises(kind, match=words) as caught:
        parser.parse(payload)
    assert type(caught.value) is kind
    # What came before stays; nothing of the damaged event does.
    assert [delta.text for delta in parser.deltas] == ["before"]


def test_output_after_the_end_is_damage() -> None:
    parser = parse(event({"text": "a", "finish_reason": "stop"}), DONE)
    with pytest.raises(EngineStreamBrokenError, match="after the end"):
        parser.parse(event({"text": "b"}))


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        ({"message": "EngineCore died", "type": "InternalServerError", "code": 500}, EngineFailedError, 500),
        ({"message": "EngineCore died", "code": "internal"}, EngineFailedError, 200),
        ({"message": "EngineCore died", "code": True}, EngineFailedError, 200),
        ({"message": "EngineCore died", "code": 7}, EngineFailedError, 200),
        ({"message": "EngineCore died"}, EngineFailedError, 200),
        ({}, EngineFailedError, 200),
        ("EngineCore died", EngineFailedError, 200),
        ({"message": "too long", "param": "prompt", "code": 400}, EngineRejectedError, 400),
        ({"message": "no such model", "code": 404}, EngineRejectedError, 404),
        ({"message": "slow down", "code": 429}, EngineOverloadedError, 429),
        ({"message": "queue is full", "code": 503}, EngineOverloadedError, 503),
        ({"message": "bad key", "code": 401}, EngineUnauthorizedError, 401),
    ],
)
def test_errors_inside_a_stream(error: Any, kind: type[EngineError], status: int) -> None:
    parser = parse(event({"text": "before"}))
    with pytest.raises(kind) as caught:
        parser.parse(json.dumps({"error": error}).encode())
    assert type(caught.value) is kind
    assert caught.value.status == status  # type: ignore[attr-defined]
    if isinstance(caught.value, EngineRejectedError) and status == 400:
        assert caught.value.parameter == "prompt"


def test_an_error_of_an_older_server_has_no_wrapper() -> None:
    payload = json.dumps({"object": "error", "message": "too long", "code": 400}).encode()
    with pytest.raises(EngineRejectedError, match="too long"):
        parse(payload)


def test_no_error_is_no_error() -> None:
    assert parse(event({"text": "a"}, error=None)).deltas[0].text == "a"


@pytest.mark.parametrize(
    ("status", "body", "kind", "message", "parameter"),
    [
        (
            404,
            b'{"error":{"message":"The model `nope` does not exist.","param":"model","code":404}}',
            EngineRejectedError,
            "The model `nope` does not exist.",
            "model",
        ),
        (400, b'{"object":"error","message":"bad","param":null}', EngineRejectedError, "bad", ""),
        (404, b'{"detail":"Not Found"}', EngineRejectedError, "Not Found", ""),
        (422, b'{"detail":[{"msg":"one"},{"msg":"two"}]}', EngineRejectedError, "one; two", ""),
        (400, b"plain text", EngineRejectedError, "plain text", ""),
        (400, b"", EngineRejectedError, "the engine gave no reason (HTTP 400)", ""),
        (400, b"5", EngineRejectedError, "the engine gave no reason (HTTP 400)", ""),
        (400, b'{"error":{"message":{"a":1}}}', EngineRejectedError, "no reason", ""),
        (500, b"Internal Server Error", EngineFailedError, "Internal Server Error", ""),
        (502, b"\xff\xfe", EngineFailedError, "\ufffd", ""),
        (503, b'{"error":{"message":"queue is full"}}', EngineOverloadedError, "queue is full", ""),
        (429, b'{"error":"slow down"}', EngineOverloadedError, "slow down", ""),
        (401, b'{"error":"Unauthorized"}', EngineUnauthorizedError, "API key", ""),
        (403, b"", EngineUnauthorizedError, "API key", ""),
        (301, b"", EngineFailedError, "redirects", ""),
        (204, b"", EngineFailedError, "HTTP 204", ""),
    ],
)
def test_errors_of_a_response(
    status: int, body: bytes, kind: type[EngineError], message: str, parameter: str
) -> None:
    error = error_of_response(status, body)
    assert type(error) is kind
    assert message in str(error)
    assert error.status == status  # type: ignore[attr-defined]
    if isinstance(error, EngineRejectedError):
        assert error.parameter == parameter


def test_who_is_blamed() -> None:
    rejected, overloaded = error_of_response(400, b""), error_of_response(503, b"")
    failed, unauthorized = error_of_response(500, b""), error_of_response(401, b"")
    assert [e.retryable for e in (rejected, overloaded, failed, unauthorized)] == [False, True, True, True]
    assert [e.counts_against_engine for e in (rejected, overloaded, failed, unauthorized)] == [
        False,
        False,
        True,
        True,
    ]


def test_messages_are_short_printable_and_without_the_echoed_input() -> None:
    assert printable("a\x00b\x1b[31m\n\tc\u202e") == "a b [31m c"
    assert printable("x" * 1000) == "x" * (MAX_MESSAGE_CHARACTERS - 1) + "…"
    message = (
        "1 validation error:\n  {'type': 'float_parsing', 'loc': 'body.temperature', "
        "'msg': 'Input should be a valid number', 'input': 'my secret prompt'}\n  {'msg': 'second'}"
    )
    body = json.dumps({"error": {"message": message, "param": "body.temperature"}}).encode()
    error = error_of_response(400, body)
    assert "secret" not in str(error)
    assert "Input should be a valid number" in str(error)
    assert "second" in str(error)
    assert printable("Invalid input: prompt too long") == "Invalid input: prompt too long"


def test_a_whole_answer_is_one_delta_for_each_choice() -> None:
    parser = OpenAiStreamParser(expected_choice_count=2)
    parser.parse_whole(
        event(
            {"index": 0, "text": "one", "finish_reason": "stop", "token_ids": [1, 2]},
            {"index": 1, "message": {"role": "assistant", "content": "two"}, "finish_reason": "length"},
            usage={"prompt_tokens": 3, "completion_tokens": 5},
        )
    )
    assert values(parser.deltas) == [(0, "one", [1, 2], 2, "stop", ""), (1, "two", None, 1, "length", "")]
    assert parser.outcome() == EngineOutcome(("stop", "length"), 3, 5, None)


def test_a_whole_answer_without_token_ids_is_counted_by_its_usage() -> None:
    parser = OpenAiStreamParser()
    parser.parse_whole(event({"text": "one two", "finish_reason": "stop"}, usage={"completion_tokens": 5}))
    assert values(parser.deltas) == [(0, "one two", None, 5, "stop", "")]


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'{"error":{"message":"x"}}'])
def test_a_whole_answer_that_is_none(body: bytes) -> None:
    with pytest.raises(EngineError):
        OpenAiStreamParser().parse_whole(body)


NAMES = [
    "choices",
    "index",
    "text",
    "delta",
    "content",
    "token_ids",
    "finish_reason",
    "usage",
    "error",
    "code",
    "message",
    "detail",
    "tool_calls",
    "stop_reason",
    "prompt_tokens_details",
    "param",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON, st.integers(100, 599))
def test_any_json_gives_deltas_or_an_engine_error(value: Any, status: int) -> None:
    payload = json.dumps(value).encode()
    for take in (OpenAiStreamParser().parse, OpenAiStreamParser(keep_raw=True).parse_whole):
        with contextlib.suppress(EngineError):
            take(payload)
    error = error_of_response(status, payload)
    assert isinstance(error, EngineError)
    assert len(str(error)) <= MAX_MESSAGE_CHARACTERS + 100


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_an_engine_error(payload: bytes) -> None:
    with pytest.raises(EngineError):
        parse(payload, DONE)


def prompts_told(*payloads: bytes, whole: bool = False) -> list[list[int]]:
    told: list[list[int]] = []
    parser = OpenAiStreamParser(on_prompt=lambda ids: told.append(list(ids)))
    for payload in payloads:
        if whole:
            parser.parse_whole(payload)
        else:
            parser.parse(payload)
    return told


TOKEN = {"index": 0, "text": "a", "token_ids": [9]}
ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}}


@pytest.mark.parametrize(
    ("payloads", "told"),
    [
        (
            [event({**TOKEN, "prompt_token_ids": [1, 2]}), event({**TOKEN, "prompt_token_ids": None})],
            [[1, 2]],
        ),
        ([event(ROLE, prompt_token_ids=[1, 2], prompt_text=None), event(TOKEN)], [[1, 2]]),
        # Once is enough, whatever the engine repeats.
        ([event({**TOKEN, "prompt_token_ids": [1]}), event({**TOKEN, "prompt_token_ids": [2]})], [[1]]),
        ([event(ROLE, prompt_token_ids=[1]), event({**TOKEN, "prompt_token_ids": [2]})], [[1]]),
        # Only before the output, so that later events need not be looked at.
        ([event(TOKEN), event({**TOKEN, "prompt_token_ids": [1]})], []),
        ([event(ROLE), event({**TOKEN, "prompt_token_ids": [1]})], [[1]]),
        ([event({**TOKEN, "prompt_token_ids": []}), event(TOKEN)], []),
        ([event({**TOKEN, "prompt_token_ids": [2**32 - 1, 0]})], [[2**32 - 1, 0]]),
        ([event({**TOKEN, "prompt_token_ids": [5]}, {**TOKEN, "index": 1, "prompt_token_ids": [6]})], [[5]]),
    ],
)
def test_the_prompts_token_ids_are_told_once(payloads: list[bytes], told: list[list[int]]) -> None:
    assert prompts_told(*payloads) == told


def test_a_whole_answer_tells_the_prompt_too() -> None:
    choice = {"index": 0, "text": "a", "token_ids": [9], "finish_reason": "stop", "prompt_token_ids": [1]}
    assert prompts_told(event(choice), whole=True) == [[1]]
    message = {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}
    assert prompts_told(event(message, prompt_token_ids=[1]), whole=True) == [[1]]


@pytest.mark.parametrize("ids", [[-1], [1, 2**32], [2**70], ["1"], [1.5], 7, [None]])
def test_a_prompt_that_is_no_list_of_token_ids_breaks_the_stream(ids: Any) -> None:
    for payload in (event({**TOKEN, "prompt_token_ids": ids}), event(ROLE, prompt_token_ids=ids)):
        with pytest.raises(EngineStreamBrokenError):
            prompts_told(payload)


def test_nobody_needs_to_hear_of_the_prompt() -> None:
    parser = parse(event({**TOKEN, "prompt_token_ids": [1, 2]}), event(TOKEN))
    assert len(parser.deltas) == 2
