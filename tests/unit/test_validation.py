"""Every rule that a request and an instance must satisfy, in one table each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import InvalidRequestError
from sagecp.core.types import ExecutionInstance, OpenAiApi, RequestMetadata, SamplingParameters
from sagecp.core.validation import (
    check_instance,
    check_request,
    instance_violations,
    request_violations,
)

NAN = float("nan")
INFINITY = float("inf")
WEEK_MS = 7 * 24 * 3600 * 1000.0


def fields_of(metadata: RequestMetadata) -> list[str]:
    return [violation.field for violation in request_violations(metadata)]


def sampled(**parameters: Any) -> RequestMetadata:
    return RequestMetadata(sampling=SamplingParameters(**parameters))


@pytest.mark.parametrize(
    "metadata",
    [
        RequestMetadata(),
        RequestMetadata(prompt=""),
        RequestMetadata(prompt="x", request_id="a.b_c:D-9", max_tokens=1),
        RequestMetadata(request_id="x" * 128),
        RequestMetadata(messages=({"role": "user", "content": "x"},)),
        RequestMetadata(prompt_token_ids=(1,)),
        RequestMetadata(openai_body=b"{}", openai_api=OpenAiApi.COMPLETIONS),
        RequestMetadata(max_tokens=10_000_000),
        RequestMetadata(max_tokens=3, sampling=SamplingParameters(min_tokens=3)),
        RequestMetadata(slo_deadline_ms=0.001, ttft_slo_ms=WEEK_MS, tpot_slo_ms=1),
        RequestMetadata(cost_budget=1e-9),
        RequestMetadata(user_id="u" * 256, session_id="s" * 256),
        RequestMetadata(labels={"k" * 63: "v" * 63, "e": ""}),
        sampled(temperature=0.0, top_p=1.0, min_p=0.0, presence_penalty=-2.0, frequency_penalty=2.0),
        sampled(temperature=2.0, top_p=1e-6, min_p=1.0, repetition_penalty=100.0),
        sampled(min_tokens=0, top_k=-1, n=128, logprobs=0, prompt_logprobs=100, truncate_prompt_tokens=1),
        sampled(stop=("a" * 1024,) * 64, logit_bias={1: -100.0, 2: 100.0}),
        sampled(structured_output={"regex": "a"}),
    ],
    ids=repr,
)
def test_what_is_allowed(metadata: RequestMetadata) -> None:
    check_request(metadata)


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        (RequestMetadata(request_id="a b"), "request_id"),
        (RequestMetadata(request_id="x" * 129), "request_id"),
        (RequestMetadata(request_id="ü"), "request_id"),
        (RequestMetadata(request_id="a\n"), "request_id"),
        (RequestMetadata(prompt="", prompt_token_ids=(1,)), "prompt"),
        (RequestMetadata(prompt="x", messages=({"role": "user"},)), "prompt"),
        (RequestMetadata(openai_body=b"{}"), "prompt.openai.api"),
        (RequestMetadata(max_tokens=0), "sampling.max_tokens"),
        (RequestMetadata(max_tokens=-1), "sampling.max_tokens"),
        (RequestMetadata(max_tokens=10_000_001), "sampling.max_tokens"),
        (RequestMetadata(max_tokens=2, sampling=SamplingParameters(min_tokens=3)), "sampling.min_tokens"),
        (RequestMetadata(slo_deadline_ms=0), "objectives.end_to_end_deadline"),
        (RequestMetadata(slo_deadline_ms=-1), "objectives.end_to_end_deadline"),
        (RequestMetadata(slo_deadline_ms=NAN), "objectives.end_to_end_deadline"),
        (RequestMetadata(slo_deadline_ms=WEEK_MS + 1), "objectives.end_to_end_deadline"),
        (RequestMetadata(ttft_slo_ms=0), "objectives.time_to_first_token"),
        (RequestMetadata(tpot_slo_ms=INFINITY), "objectives.time_per_output_token"),
        (RequestMetadata(cost_budget=0.0), "cost_budget_usd"),
        (RequestMetadata(cost_budget=NAN), "cost_budget_usd"),
        (RequestMetadata(cost_budget=INFINITY), "cost_budget_usd"),
        (RequestMetadata(user_id="u" * 257), "user_id"),
        (RequestMetadata(session_id="s" * 257), "session_id"),
        (RequestMetadata(labels={str(number): "" for number in range(17)}), "labels"),
        (RequestMetadata(labels={"": "v"}), "labels['']"),
        (RequestMetadata(labels={"k": "v" * 64}), "labels['k']"),
        (sampled(temperature=-0.1), "sampling.temperature"),
        (sampled(temperature=2.1), "sampling.temperature"),
        (sampled(temperature=NAN), "sampling.temperature"),
        (sampled(top_p=0.0), "sampling.top_p"),
        (sampled(top_p=1.1), "sampling.top_p"),
        (sampled(min_p=-0.1), "sampling.min_p"),
        (sampled(min_p=1.5), "sampling.min_p"),
        (sampled(presence_penalty=2.5), "sampling.presence_penalty"),
        (sampled(frequency_penalty=-2.5), "sampling.frequency_penalty"),
        (sampled(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (sampled(repetition_penalty=INFINITY), "sampling.repetition_penalty"),
        (sampled(min_tokens=-1), "sampling.min_tokens"),
        (sampled(top_k=-2), "sampling.top_k"),
        (sampled(n=0), "sampling.n"),
        (sampled(n=129), "sampling.n"),
        (sampled(logprobs=-1), "sampling.logprobs"),
        (sampled(logprobs=101), "sampling.logprobs"),
        (sampled(prompt_logprobs=101), "sampling.prompt_logprobs"),
        (sampled(truncate_prompt_tokens=0), "sampling.truncate_prompt_tokens"),
        (sampled(stop=("a",) * 65), "sampling.stop"),
        (sampled(stop=("a", "")), "sampling.stop[1]"),
        (sampled(stop=("a" * 1025,)), "sampling.stop[0]"),
        (sampled(logit_bias={5: 100.5}), "sampling.logit_bias[5]"),
        (sampled(logit_bias={5: NAN}), "sampling.logit_bias[5]"),
        (sampled(structured_output={"regex": "a", "grammar": "b"}), "sampling.structured_output"),
        (sampled(structured_output={"yaml": "a"}), "sampling.structured_output"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(metadata: RequestMetadata, field: str) -> None:
    assert fields_of(metadata) == [field]
    with pytest.raises(InvalidRequestError) as caught:
        check_request(metadata)
    assert str(caught.value).startswith(f"{field}: ")


def test_everything_wrong_is_told_at_once_and_the_message_stays_short() -> None:
    metadata = RequestMetadata(
        request_id="!",
        max_tokens=0,
        slo_deadline_ms=-1,
        cost_budget=-1,
        user_id="u" * 300,
        labels={"": ""},
        sampling=SamplingParameters(temperature=9, top_p=9, min_p=9, n=0, stop=("",), logit_bias={1: 900.0}),
    )
    with pytest.raises(InvalidRequestError) as caught:
        check_request(metadata)
    assert {violation.field for violation in caught.value.violations} == {
        "request_id",
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.n",
        "sampling.stop[0]",
        "sampling.logit_bias[1]",
        "objectives.end_to_end_deadline",
        "cost_budget_usd",
        "user_id",
        "labels['']",
    }
    assert str(caught.value).endswith("; and 4 more")


def test_a_message_shows_no_more_of_a_value_than_needed() -> None:
    (violation,) = request_violations(RequestMetadata(request_id="!" * 100_000))
    assert len(violation.description) < 200


@given(
    st.builds(
        SamplingParameters,
        temperature=st.none() | st.floats(),
        top_p=st.none() | st.floats(),
        min_p=st.none() | st.floats(),
        presence_penalty=st.none() | st.floats(),
        repetition_penalty=st.none() | st.floats(),
        top_k=st.none() | st.integers(),
        n=st.none() | st.integers(),
        min_tokens=st.none() | st.integers(),
        logprobs=st.none() | st.integers(),
        stop=st.lists(st.text(max_size=3), max_size=3).map(tuple),
        logit_bias=st.dictionaries(st.integers(), st.floats(), max_size=3),
    ),
    st.none() | st.integers(),
    st.none() | st.floats(),
    st.none() | st.floats(),
    st.text(max_size=5),
)
def test_no_value_makes_the_check_itself_fail(
    sampling: SamplingParameters,
    max_tokens: int | None,
    deadline_ms: float | None,
    budget: float | None,
    request_id: str,
) -> None:
    metadata = RequestMetadata(
        request_id=request_id,
        max_tokens=max_tokens,
        sampling=sampling,
        slo_deadline_ms=deadline_ms,
        cost_budget=budget,
    )
    violations = list(request_violations(metadata))
    assert all(violation.field and violation.description for violation in violations)
    names = [violation.field for violation in violations]
    if sampling.temperature is not None:
        assert ("sampling.temperature" in names) != (0.0 <= sampling.temperature <= 2.0)
    if deadline_ms is not None:
        assert ("objectives.end_to_end_deadline" in names) != (0.0 < deadline_ms <= WEEK_MS)


INSTANCE = ExecutionInstance(instance_id="i", host="h", port=8000, model_name="m")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scheme": "https", "host": "::1", "port": 65535},
        {"model_name": "m" * 512, "model_aliases": ("a",) * 1000},
        {"tensor_parallel_size": 4096, "gpu_count": 0, "gpu_memory_gb": 0.0, "usd_per_gpu_hour": 0.0},
        {"max_context_token_count": 1, "key_value_token_capacity": 1, "max_concurrent_request_count": 1},
    ],
    ids=str,
)
def test_instances_that_may_join(change: dict[str, Any]) -> None:
    check_instance(dataclasses.replace(INSTANCE, **change))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"instance_id": ""}, "instance_id"),
        ({"instance_id": "a/b"}, "instance_id"),
        ({"host": ""}, "engine_url"),
        ({"port": 0}, "engine_url"),
        ({"port": 65536}, "engine_url"),
        ({"scheme": "ftp"}, "engine_url"),
        ({"model_name": ""}, "model_name"),
        ({"model_name": "m" * 513}, "model_name"),
        ({"model_aliases": ("a",) * 1001}, "model_aliases"),
        ({"tensor_parallel_size": 0}, "parallel_sizes.tensor_parallel_size"),
        ({"pipeline_parallel_size": -1}, "parallel_sizes.pipeline_parallel_size"),
        ({"data_parallel_size": 4097}, "parallel_sizes.data_parallel_size"),
        ({"expert_parallel_size": 0}, "parallel_sizes.expert_parallel_size"),
        ({"gpu_count": -1}, "gpu_count"),
        ({"gpu_count": 4097}, "gpu_count"),
        ({"gpu_memory_gb": -1.0}, "gpu_memory_gib"),
        ({"gpu_memory_gb": NAN}, "gpu_memory_gib"),
        ({"usd_per_gpu_hour": INFINITY}, "usd_per_gpu_hour"),
        ({"max_context_token_count": 0}, "max_context_token_count"),
        ({"key_value_token_capacity": 0}, "key_value_token_capacity"),
        ({"max_concurrent_request_count": -5}, "max_concurrent_request_count"),
        ({"labels": {"k" * 64: ""}}, f"labels['{'k' * 64}']"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_instances_that_may_not(change: dict[str, Any], field: str) -> None:
    instance = dataclasses.replace(INSTANCE, **change)
    assert [violation.field for violation in instance_violations(instance)] == [field]
    with pytest.raises(InvalidRequestError):
        check_instance(instance)
