"""Answers have the shape of a real vLLM's, field by field and in the same order.

``vllm_answers.json`` holds requests and what vLLM 0.32 answered. Texts, ids and
numbers differ; statuses, content types, events, keys, their order, nulls,
finish reasons and the words of errors must not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from tests.sim.engine_client import Answer, send

RECORDED = json.loads(Path(__file__).with_name("vllm_answers.json").read_text())
# Strings that say what something is; all others are content.
NAMING_KEYS = {"finish_reason", "object", "role", "type", "param", "owned_by", "model", "message"}


def shape(value: Any, key: str = "") -> Any:
    """Reduce a value to what must be the same in both engines."""
    if isinstance(value, dict):
        if key == "top_logprobs":
            return f"{len(value)} alternatives"
        return [(name, shape(item, name)) for name, item in value.items()]
    if isinstance(value, list):
        if key in {"token_ids", "prompt_token_ids", "tokens", "bytes"}:
            return "list"
        return [shape(item, key) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return value if key in NAMING_KEYS else type(value).__name__


def reduce(event: str) -> Any:
    prefix, content = ("data: ", event[6:]) if event.startswith("data: ") else ("", event)
    try:
        return prefix, shape(json.loads(content))
    except ValueError:
        return event


def pieces(answer: Answer) -> list[str]:
    """Return the chunks of a stream, as the recording has them, or the body."""
    if answer.headers.get("transfer-encoding") == "chunked":
        return [chunk.decode() for chunk in answer.chunks] + ["END"] * answer.complete
    return [answer.body.decode()]


@pytest.mark.parametrize("recorded", RECORDED, ids=[entry["name"] for entry in RECORDED])
async def test_an_answer_is_shaped_as_vllms(recorded: dict[str, Any]) -> None:
    raw_body = recorded["raw_body"].encode() if "raw_body" in recorded else None
    async with EngineServer(EngineServerConfig(model_names=("tiny",), profile="instant")) as server:
        answer = await send(
            server.port,
            recorded["path"],
            recorded["body"],
            method=recorded["method"],
            headers=recorded.get("headers"),
            raw_body=raw_body,
        )
    assert answer.status == recorded["status"], answer.body
    assert answer.complete
    if recorded["content_type"] is not None:
        assert answer.headers["content-type"] == recorded["content_type"]
    assert [reduce(piece) for piece in pieces(answer)] == [reduce(event) for event in recorded["events"]]
