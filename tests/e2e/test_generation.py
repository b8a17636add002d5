"""Every kind of prompt, streamed from a real engine."""

from __future__ import annotations

import json

import grpc
import pytest

from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    request_pb2,
    scheduling_pb2,
)
from tests.e2e.conftest import CONTEXT_TOKEN_COUNT, MODEL, Engine
from tests.e2e.reading import generate, read

Inference = inference_service_pb2_grpc.InferenceServiceStub
PROMPT = "The quick brown fox"


def greedy(max_tokens: int = 24) -> request_pb2.SamplingParameters:
    return request_pb2.SamplingParameters(max_tokens=max_tokens, temperature=0)


def text_spec(prompt: str = PROMPT, max_tokens: int = 24) -> request_pb2.RequestSpec:
    return request_pb2.RequestSpec(
        model=MODEL, prompt=request_pb2.Prompt(text=prompt), sampling=greedy(max_tokens)
    )


def chat_spec(*messages: tuple[str, str], max_tokens: int = 24) -> request_pb2.RequestSpec:
    spec = request_pb2.RequestSpec(model=MODEL, sampling=greedy(max_tokens))
    for role, text in messages:
        spec.prompt.chat.messages.add(role=role, text=text)
    return spec


def test_completion_is_the_engines_own_answer(inference: Inference, engines: dict[str, Engine]) -> None:
    output = generate(inference, text_spec())
    for engine in engines.values():
        direct = engine.post(
            "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        )
        assert output.text == direct["choices"][0]["text"]
        assert output.end.usage.prompt_token_count == direct["usage"]["prompt_tokens"]
    assert output.end.finish_reason == "length"
    assert output.end.instance_id in engines


def test_chat_is_the_engines_own_answer(inference: Inference, engines: dict[str, Engine]) -> None:
    output = generate(inference, chat_spec(("system", "Be brief."), ("user", "Hello?")))
    direct = engines["engine-a"].post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
            "max_tokens": 24,
            "temperature": 0,
        },
    )
    assert output.text == direct["choices"][0]["message"]["content"]
    assert output.end.usage.prompt_token_count == direct["usage"]["prompt_tokens"]


def test_output_is_streamed_and_counted(inference: Inference) -> None:
    output = generate(inference, text_spec(max_tokens=200))
    assert output.chunk_count > 20, "200 tokens came in few pieces: this was not streamed"
    assert output.token_count == output.end.token_count == 200
    assert output.end.usage.completion_token_count == 200
    assert len(output.token_ids[0]) == 200
    times = output.end.request
    assert (
        times.create_time.ToNanoseconds()
        <= times.dispatch_time.ToNanoseconds()
        <= times.first_token_time.ToNanoseconds()
        <= times.end_time.ToNanoseconds()
    )


def test_token_ids_say_the_same_as_text(inference: Inference, engines: dict[str, Engine]) -> None:
    ids = engines["engine-a"].post("/tokenize", {"model": MODEL, "prompt": PROMPT})["tokens"]
    spec = text_spec()
    spec.prompt.token_ids.ids.extend(ids)
    output = generate(inference, spec)
    assert output.text == generate(inference, text_spec()).text
    assert output.end.usage.prompt_token_count == len(ids)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_opaque_openai_body(inference: Inference, api: str) -> None:
    body: dict[str, object] = {"max_tokens": 16, "temperature": 0}
    spec = request_pb2.RequestSpec(model=MODEL)
    if api == "completions":
        spec.prompt.openai.api = request_pb2.OPEN_AI_API_COMPLETIONS
        body["prompt"] = PROMPT
        expected = generate(inference, text_spec(max_tokens=16)).text
    else:
        spec.prompt.openai.api = request_pb2.OPEN_AI_API_CHAT_COMPLETIONS
        body["messages"] = [{"role": "user", "content": PROMPT}]
        expected = generate(inference, chat_spec(("user", PROMPT), max_tokens=16)).text
    spec.prompt.openai.json = json.dumps(body).encode()
    output = generate(inference, spec)
    assert output.text == expected
    pieces = [choice for event in output.openai_events for choice in event.get("choices", [])]
    texts = [piece.get("text") or (piece.get("delta") or {}).get("content") or "" for piece in pieces]
    assert "".join(texts) == expected, "the engine's events are handed on once each, in order"


def test_submit_then_stream_then_resume(inference: Inference) -> None:
    submitted = inference.Submit(
        inference_service_pb2.SubmitRequest(spec=text_spec(max_tokens=64)), timeout=10
    )
    assert submitted.created
    request_id = submitted.request.request_id
    whole = read(inference.Stream(inference_service_pb2.StreamRequest(request_id=request_id), timeout=60))
    assert whole.token_count == 64
    rest = read(
        inference.Stream(
            inference_service_pb2.StreamRequest(request_id=request_id, from_token_index=40), timeout=10
        ),
        from_token_index=40,
    )
    assert rest.text
    assert whole.text.endswith(rest.text)
    assert rest.token_ids[0][-24:] == whole.token_ids[0][-24:]
    request = inference.GetRequest(
        inference_service_pb2.GetRequestRequest(request_id=request_id), timeout=10
    ).request
    assert request.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert request.usage.completion_token_count == 64
    assert [attempt.epoch for attempt in request.attempts] == [1]


def test_a_repeated_submit_is_recognised(inference: Inference) -> None:
    spec = text_spec()
    spec.request_id = "e2e-repeated"
    first = inference.Submit(inference_service_pb2.SubmitRequest(spec=spec), timeout=10)
    again = inference.Submit(inference_service_pb2.SubmitRequest(spec=spec), timeout=10)
    assert (first.created, again.created) == (True, False)
    spec.sampling.max_tokens += 1
    with pytest.raises(grpc.RpcError) as caught:
        inference.Submit(inference_service_pb2.SubmitRequest(spec=spec), timeout=10)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_the_model_may_be_left_out_when_one_is_served(inference: Inference) -> None:
    spec = text_spec(max_tokens=4)
    spec.model = ""
    assert generate(inference, spec).end.request.model == MODEL


def test_work_is_spread_and_explained(
    inference: Inference, admin: admin_service_pb2_grpc.AdminServiceStub, engines: dict[str, Engine]
) -> None:
    # By turns: what the predictions prefer depends on how busy the machine was a moment ago.
    before = admin.GetSchedulingConfig(admin_service_pb2.GetSchedulingConfigRequest(), timeout=10).config
    changed = scheduling_pb2.SchedulingConfig()
    changed.CopyFrom(before)
    changed.routing_strategy = "round_robin"
    admin.UpdateSchedulingConfig(admin_service_pb2.UpdateSchedulingConfigRequest(config=changed), timeout=10)
    try:
        ids = [
            inference.Submit(
                inference_service_pb2.SubmitRequest(spec=text_spec(f"Story {number}", 100)), timeout=10
            ).request.request_id
            for number in range(8)
        ]
        used = {
            read(
                inference.Stream(inference_service_pb2.StreamRequest(request_id=request_id), timeout=60)
            ).end.instance_id
            for request_id in ids
        }
        # Beside a busy engine that has prefill enough there is one candidate: both are idle now.
        last = generate(inference, text_spec("Story 8", 100)).request_id
    finally:
        admin.UpdateSchedulingConfig(
            admin_service_pb2.UpdateSchedulingConfigRequest(config=before), timeout=10
        )
    assert used == set(engines)
    explained = inference.ExplainRequest(
        inference_service_pb2.ExplainRequestRequest(request_id=last), timeout=10
    )
    (decision,) = explained.decisions
    assert decision.reason
    assert decision.instance_id == explained.request.instance_id == decision.candidates[0].instance_id
    assert decision.candidate_count == 2


def test_agents_report_what_the_engine_says(
    inference: Inference, fleet: fleet_service_pb2_grpc.FleetServiceStub, engines: dict[str, Engine]
) -> None:
    for name, engine in engines.items():
        instance = fleet.GetInstance(
            fleet_service_pb2.GetInstanceRequest(instance_id=name), timeout=10
        ).instance
        assert instance.spec.model_name == MODEL
        assert instance.spec.engine_url == engine.url
        assert instance.spec.max_context_token_count == CONTEXT_TOKEN_COUNT
        assert instance.spec.key_value_token_capacity == 65_536
        assert instance.spec.engine_version
        assert instance.engine.HasField("running_request_count")
        assert instance.engine.HasField("generation_token_count")
        if not instance.gpus:
            assert instance.gpu_absent_reason, "no GPU is a fact with a reason, never a row of zeros"
