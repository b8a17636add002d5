"""Requests that cannot work: each refusal is precise, and the service goes on."""

from __future__ import annotations

import grpc
import pytest

from sagecp.v1 import inference_service_pb2, inference_service_pb2_grpc, request_pb2
from tests.e2e.conftest import CONTEXT_TOKEN_COUNT, MODEL, Engine
from tests.e2e.reading import Output, Refusal, generate, read, refusal

Inference = inference_service_pb2_grpc.InferenceServiceStub


def refused(inference: Inference, spec: request_pb2.RequestSpec) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        list(inference.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=30))
    found = refusal(caught.value)
    assert "Traceback" not in found.message
    return found


def spec_of(prompt: str = "Hello", model: str = MODEL) -> request_pb2.RequestSpec:
    return request_pb2.RequestSpec(
        model=model,
        prompt=request_pb2.Prompt(text=prompt),
        sampling=request_pb2.SamplingParameters(max_tokens=4, temperature=0),
    )


def test_wrong_model(inference: Inference) -> None:
    found = refused(inference, spec_of(model="llama-900b"))
    assert found.code is grpc.StatusCode.NOT_FOUND
    assert found.reason == "MODEL_NOT_FOUND"
    assert found.metadata["available_models"] == MODEL
    assert "llama-900b" in found.message
    assert MODEL in found.message


def test_prompt_longer_than_the_context(inference: Inference) -> None:
    spec = request_pb2.RequestSpec(model=MODEL, sampling=request_pb2.SamplingParameters(max_tokens=4))
    spec.prompt.token_ids.ids.extend([100] * (CONTEXT_TOKEN_COUNT + 10))
    output = Output()
    with pytest.raises(grpc.RpcError) as caught:
        read(inference.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=30), output=output)
    found = refusal(caught.value)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.reason == "ENGINE_REJECTED"
    assert str(CONTEXT_TOKEN_COUNT) in found.message, "the engine's own words say what the limit is"
    assert output.end.state == request_pb2.REQUEST_STATE_FAILED
    assert len(output.end.request.attempts) == 1, "what one engine rejects is not tried on the next"


def test_every_bad_field_is_named_at_once(inference: Inference) -> None:
    spec = spec_of()
    spec.request_id = "has spaces"
    spec.sampling.max_tokens = 0
    spec.sampling.temperature = -1
    spec.sampling.top_p = 1.5
    spec.sampling.n = 1000
    spec.objectives.end_to_end_deadline.seconds = -5
    spec.cost_budget_usd = -1
    spec.priority = 99  # type: ignore[assignment]  # open enums take any number on the wire
    found = refused(inference, spec)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.reason == "INVALID_REQUEST"
    named = {name.removeprefix("spec.") for name in found.fields}
    assert named == {
        "request_id",
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.n",
        "objectives.end_to_end_deadline",
        "cost_budget_usd",
        "priority",
    }
    assert all(found.fields.values())


@pytest.mark.parametrize("kind", ["nothing", "text", "chat", "token_ids", "openai"])
def test_empty_prompt(inference: Inference, kind: str) -> None:
    spec = request_pb2.RequestSpec(model=MODEL)
    if kind == "text":
        spec.prompt.text = ""
    elif kind == "chat":
        spec.prompt.chat.SetInParent()
    elif kind == "token_ids":
        spec.prompt.token_ids.SetInParent()
    elif kind == "openai":
        spec.prompt.openai.api = request_pb2.OPEN_AI_API_COMPLETIONS
    found = refused(inference, spec)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert any("prompt" in name for name in found.fields)


def test_body_that_the_engine_rejects(inference: Inference) -> None:
    spec = request_pb2.RequestSpec(model=MODEL)
    spec.prompt.openai.api = request_pb2.OPEN_AI_API_CHAT_COMPLETIONS
    spec.prompt.openai.json = b'{"messages": "not a list"}'
    found = refused(inference, spec)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.reason == "ENGINE_REJECTED"


def test_grammar_that_cannot_be_compiled(inference: Inference) -> None:
    spec = spec_of()
    spec.sampling.structured_output.json_schema = '{"type": "no such type"}'
    found = refused(inference, spec)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.reason == "ENGINE_REJECTED"


def test_unknown_request(inference: Inference) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(inference.Stream(inference_service_pb2.StreamRequest(request_id="nobody"), timeout=10))
    assert refusal(caught.value).code is grpc.StatusCode.NOT_FOUND
    assert refusal(caught.value).reason == "REQUEST_NOT_FOUND"


def test_message_over_the_limit_leaves_the_connection_alive(inference: Inference) -> None:
    found = refused(inference, spec_of("x" * (5 << 20)))
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert generate(inference, spec_of()).text


def test_the_engines_took_no_harm(inference: Inference, engines: dict[str, Engine]) -> None:
    assert all(engine.is_healthy() for engine in engines.values())
    assert generate(inference, spec_of()).text
