"""Every sampling parameter reaches the engine: each is shown by its effect."""

from __future__ import annotations

import json
import re

from google.protobuf import struct_pb2

from sagecp.v1 import inference_service_pb2_grpc, request_pb2
from tests.e2e.conftest import MODEL, Engine
from tests.e2e.reading import Output, generate

Inference = inference_service_pb2_grpc.InferenceServiceStub
PROMPT = "Once upon a time"


def run(inference: Inference, sampling: request_pb2.SamplingParameters, *, events: bool = False) -> Output:
    return generate(
        inference,
        request_pb2.RequestSpec(
            model=MODEL,
            prompt=request_pb2.Prompt(text=PROMPT),
            sampling=sampling,
            include_openai_events=events,
        ),
    )


def greedy(max_tokens: int = 24) -> request_pb2.SamplingParameters:
    return request_pb2.SamplingParameters(max_tokens=max_tokens, temperature=0)


def test_seed(inference: Inference) -> None:
    def sample(seed: int) -> str:
        sampling = request_pb2.SamplingParameters(max_tokens=24, temperature=1, seed=seed, ignore_eos=True)
        return run(inference, sampling).text

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_temperature_top_k_and_top_p_narrow_the_choice(inference: Inference) -> None:
    answer = run(inference, greedy()).text
    for narrow in (
        request_pb2.SamplingParameters(max_tokens=24, temperature=1, top_k=1),
        request_pb2.SamplingParameters(max_tokens=24, temperature=1, top_p=1e-6),
        request_pb2.SamplingParameters(max_tokens=24, temperature=1, min_p=1.0),
    ):
        assert run(inference, narrow).text == answer


def test_stop_string(inference: Inference) -> None:
    whole = run(inference, greedy(60)).text
    # A stop in the middle, not part of what comes before it.
    stop = next(
        whole[start : start + 3]
        for start in range(20, len(whole) - 3)
        if whole.find(whole[start : start + 3]) == start
    )
    sampling = greedy(60)
    sampling.stop.append(stop)
    output = run(inference, sampling)
    assert output.text == whole[: whole.find(stop)]
    assert output.end.finish_reason == "stop"
    assert output.stop_reason == stop
    sampling.include_stop_str_in_output = True
    assert run(inference, sampling).text == whole[: whole.find(stop)] + stop


def test_stop_token_id(inference: Inference) -> None:
    ids = run(inference, greedy()).token_ids[0]
    stop = next(token for place, token in enumerate(ids) if place >= 5 and token not in ids[:place])
    sampling = greedy()
    sampling.stop_token_ids.append(stop)
    output = run(inference, sampling)
    assert output.end.finish_reason == "stop"
    assert output.token_count == ids.index(stop) + 1
    assert output.stop_reason == str(stop)


def test_several_choices(inference: Inference) -> None:
    sampling = request_pb2.SamplingParameters(max_tokens=12, temperature=1, n=3, seed=1, ignore_eos=True)
    output = run(inference, sampling)
    assert sorted(output.texts) == [0, 1, 2]
    assert len(set(output.texts.values())) == 3
    assert set(output.finish_reasons.values()) == {"length"}
    assert output.token_count == output.end.usage.completion_token_count == 36


def test_min_tokens_and_ignore_eos(inference: Inference) -> None:
    # At temperature 1 the tiny model ends after 128 tokens on average.
    sampling = request_pb2.SamplingParameters(max_tokens=400, min_tokens=400, temperature=1, seed=3)
    assert run(inference, sampling).token_count == 400
    sampling = request_pb2.SamplingParameters(max_tokens=400, ignore_eos=True, temperature=1, seed=3)
    assert run(inference, sampling).token_count == 400


def test_logit_bias_and_allowed_tokens(inference: Inference) -> None:
    favoured = run(inference, greedy()).token_ids[0][0]
    sampling = greedy(8)
    sampling.logit_bias[favoured] = -100
    assert favoured not in run(inference, sampling).token_ids[0]
    sampling = greedy(8)
    sampling.allowed_token_ids.extend([favoured, favoured + 1])
    assert set(run(inference, sampling).token_ids[0]) <= {favoured, favoured + 1}


def test_penalties_change_the_answer(inference: Inference) -> None:
    plain = run(inference, greedy(60)).token_ids[0]
    assert len(set(plain)) < len(plain), "the test needs an answer that repeats itself"
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        sampling = greedy(60)
        setattr(sampling, name, 2.0)
        assert run(inference, sampling).token_ids[0] != plain, name


def test_bad_words(inference: Inference, engines: dict[str, Engine]) -> None:
    engine = engines["engine-a"]

    def word_of(token: int) -> str:
        """The token as a word that the engine reads as this very token, or nothing."""
        text = str(engine.post("/detokenize", {"model": MODEL, "tokens": [token]})["prompt"])
        ids = engine.post("/tokenize", {"model": MODEL, "prompt": text})["tokens"]
        return text if text.isalpha() and ids == [token] else ""

    plain = run(inference, greedy(40)).token_ids[0]
    token = next(token for token in plain if word_of(token))
    sampling = greedy(40)
    sampling.bad_words.append(word_of(token))
    assert token not in run(inference, sampling).token_ids[0]


def test_echo_and_truncation(inference: Inference) -> None:
    sampling = greedy(4)
    sampling.echo = True
    assert run(inference, sampling).text.startswith(PROMPT)
    sampling = greedy(4)
    sampling.truncate_prompt_tokens = 2
    assert run(inference, sampling).end.usage.prompt_token_count == 2


def test_logprobs_are_in_the_engines_events(inference: Inference) -> None:
    sampling = greedy(5)
    sampling.logprobs = 2
    output = run(inference, sampling, events=True)
    logprobs = [
        choice["logprobs"]
        for event in output.openai_events
        for choice in event.get("choices", [])
        if choice.get("logprobs")
    ]
    chosen = [value for each in logprobs for value in each["token_logprobs"]]
    assert len(chosen) == 5
    assert all(value <= 0 for value in chosen)
    assert all(len(top) >= 2 for each in logprobs for top in each["top_logprobs"])


def test_events_are_left_out_unless_asked_for(inference: Inference) -> None:
    assert run(inference, greedy(4)).openai_events == []


def test_structured_output(inference: Inference) -> None:
    sampling = request_pb2.SamplingParameters(max_tokens=60, temperature=0)
    sampling.structured_output.choice.options.extend(["red", "green", "blue"])
    assert run(inference, sampling).text in {"red", "green", "blue"}

    sampling = request_pb2.SamplingParameters(max_tokens=60, temperature=0)
    sampling.structured_output.regex = r"\d{3}-\d{4}"
    assert re.fullmatch(r"\d{3}-\d{4}", run(inference, sampling).text)

    sampling = request_pb2.SamplingParameters(max_tokens=200, temperature=0)
    sampling.structured_output.json_schema = json.dumps(
        {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
            "required": ["colour", "sure"],
            "additionalProperties": False,
        }
    )
    answer = json.loads(run(inference, sampling).text)
    assert answer["colour"] in {"red", "green"}
    assert isinstance(answer["sure"], bool)


def test_extras_reach_the_engine(inference: Inference) -> None:
    extras = struct_pb2.Struct()
    extras.update({"return_tokens_as_token_ids": True})
    sampling = greedy(3)
    sampling.logprobs = 1
    sampling.engine_extras.CopyFrom(extras)
    output = run(inference, sampling, events=True)
    names = [
        token
        for event in output.openai_events
        for choice in event.get("choices", [])
        if choice.get("logprobs")
        for token in choice["logprobs"]["tokens"]
    ]
    assert names == [f"token_id:{token}" for token in output.token_ids[0]]
