"""Between wire messages and the library's values: nothing is lost, and everything wrong is named at once."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.client import convert as client_convert
from sagecp.core import errors as core_errors
from sagecp.core.engine_state import EngineCapability
from sagecp.core.errors import (
    ErrorReason,
    Failure,
    FieldViolation,
    InfeasibleError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestNotFoundError,
)
from sagecp.core.gpu import GpuDevice, GpuLink, GpuLinkKind
from sagecp.core.instance_load import InstanceLoad
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.parallelism.fleet_advice import FleetAdvice, FleetGroup
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.placement import CandidateRow, PlacementInputs, RequestRow
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.prediction.step_time_report import StepTimeReport
from sagecp.core.receipts import run_again
from sagecp.core.router.registry import LOAD_BALANCERS
from sagecp.core.settings import PARAMETERS, SettingsChange, SettingsHistory
from sagecp.core.types import (
    AttemptRecord,
    CandidateScore,
    ControlPlaneStatus,
    Durability,
    EngineGauges,
    ExecutionInstance,
    FailoverMode,
    GpuReading,
    InstanceState,
    LoopStatus,
    OpenAiApi,
    ParallelismType,
    RecentFault,
    RequestCost,
    RequestMetadata,
    RequestPriority,
    RequestState,
    RequestStatus,
    SamplingParameters,
    SchedulingDecision,
    Usage,
)
from sagecp.rpc.convert.admin import status_to_proto
from sagecp.rpc.convert.common import struct_to_json, value_to_json
from sagecp.rpc.convert.fleet import (
    instance_from_proto,
    instance_to_proto,
    states_from_proto,
)
from sagecp.rpc.convert.metrics import metrics_to_proto
from sagecp.rpc.convert.request import (
    failure_to_proto,
    request_from_proto,
    request_to_proto,
)
from sagecp.rpc.convert.scheduling import (
    UnknownNamesError,
    change_from_proto,
    decision_to_proto,
    numbers_from_struct,
    parameters_to_proto,
    settings_to_proto,
)
from sagecp.rpc.errors import status_code_of, to_status
from sagecp.rpc.servicers.paging import page_size, page_token, position_of
from sagecp.runtime.metrics_table import GpuSums, LiveCount, MetricsTable
from sagecp.v1 import (
    admin_service_pb2,
    error_pb2,
    inference_service_pb2,
    instance_pb2,
    metrics_pb2,
    parallelism_pb2,
    request_pb2,
    scheduling_pb2,
)
from sagecp.wire.times import duration, seconds_of, timestamp


def spec_from(text: str) -> request_pb2.RequestSpec:
    return json_format.Parse(text, request_pb2.RequestSpec())


def bad_fields(spec: request_pb2.RequestSpec) -> set[str]:
    with pytest.raises(InvalidRequestError) as caught:
        request_from_proto(spec, "t")
    fields = [violation.field for violation in caught.value.violations]
    assert len(fields) == len(set(fields)), "each field is named once"
    return set(fields)


def text_spec(**more: Any) -> request_pb2.RequestSpec:
    return request_pb2.RequestSpec(model="m", prompt=request_pb2.Prompt(text="hi"), **more)


def test_a_plain_request() -> None:
    assert request_from_proto(text_spec(), "tenant") == RequestMetadata(
        model_name="m", prompt="hi", tenant_id="tenant"
    )


FULL = """{
  "requestId": "r-1", "model": "m", "userId": "u", "sessionId": "s",
  "prompt": {"text": "hi"},
  "sampling": {
    "maxTokens": 5, "minTokens": 1, "temperature": 0.7, "topP": 0.9, "topK": -1, "minP": 0.05,
    "presencePenalty": -0.1, "frequencyPenalty": 0.2, "repetitionPenalty": 1.1, "seed": "-5", "n": 2,
    "stop": ["a", "b"], "stopTokenIds": [1, 2], "ignoreEos": true, "logprobs": 0, "promptLogprobs": 1,
    "logitBias": {"7": -1.5}, "allowedTokenIds": [9], "badWords": ["x"], "skipSpecialTokens": false,
    "spacesBetweenSpecialTokens": false, "includeStopStrInOutput": true, "truncatePromptTokens": 3,
    "echo": false, "structuredOutput": {"choice": {"options": ["a", "b"]}},
    "engineExtras": {"whole": 5, "part": 0.5, "deep": {"list": [1, null, true, "x", 2.5]}}
  },
  "priority": "REQUEST_PRIORITY_HIGH",
  "objectives": {"endToEndDeadline": "2s", "timeToFirstToken": "0.25s", "timePerOutputToken": "0.0105s"},
  "costBudgetUsd": 0.5, "parallelismHint": "PARALLELISM_TYPE_EXPERT",
  "failoverMode": "FAILOVER_MODE_RESTART", "durability": "DURABILITY_EPHEMERAL",
  "labels": {"team": "a"}, "includeOpenaiEvents": true
}"""


def test_every_field_of_a_request_arrives() -> None:
    assert request_from_proto(spec_from(FULL), "tenant") == RequestMetadata(
        request_id="r-1",
        model_name="m",
        user_id="u",
        session_id="s",
        tenant_id="tenant",
        prompt="hi",
        max_tokens=5,
        sampling=SamplingParameters(
            min_tokens=1,
            temperature=0.7,
            top_p=0.9,
            top_k=-1,
            min_p=0.05,
            presence_penalty=-0.1,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            seed=-5,
            n=2,
            stop=("a", "b"),
            stop_token_ids=(1, 2),
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=1,
            logit_bias={7: -1.5},
            allowed_token_ids=(9,),
            bad_words=("x",),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            include_stop_str_in_output=True,
            truncate_prompt_tokens=3,
            echo=False,
            structured_output={"choice": ["a", "b"]},
            engine_extras={"whole": 5, "part": 0.5, "deep": {"list": [1, None, True, "x", 2.5]}},
        ),
        priority=RequestPriority.HIGH,
        slo_deadline_ms=2000.0,
        ttft_slo_ms=250.0,
        tpot_slo_ms=10.5,
        cost_budget=0.5,
        parallelism_hint=ParallelismType.EXPERT,
        failover_mode=FailoverMode.RESTART,
        durability=Durability.EPHEMERAL,
        labels={"team": "a"},
        include_openai_events=True,
    )


def test_the_full_request_above_sets_every_field_that_the_contract_has() -> None:
    spec = spec_from(FULL)
    assert {f.name for f, _ in spec.ListFields()} == {f.name for f in spec.DESCRIPTOR.fields}
    # Presence is tracked: set to its default is set.
    named = {f.name for f, _ in spec.sampling.ListFields()}
    assert named == {f.name for f in spec.sampling.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("seed", 0),
        ("top_k", 0),
        ("ignore_eos", False),
        ("logprobs", 0),
        ("min_tokens", 0),
        ("min_p", 0.0),
    ],
)
def test_zero_is_not_absent(field: str, value: Any) -> None:
    spec = text_spec(sampling=request_pb2.SamplingParameters(**{field: value}))
    assert getattr(request_from_proto(spec, "").sampling, field) == value


@given(st.integers(0, 200_000))
def test_single_precision_numbers_are_what_the_user_wrote(number: int) -> None:
    # 0.7 arrives as 0.699999988; an engine that sees that would not reproduce what 0.7 gave.
    typed = number / 100_000
    spec = text_spec(sampling=request_pb2.SamplingParameters(temperature=typed))
    assert request_from_proto(spec, "").sampling.temperature == typed


def test_a_conversation_takes_the_openai_form() -> None:
    spec = spec_from("""{
      "prompt": {"chat": {
        "messages": [
          {"role": "system", "text": "be kind"},
          {"role": "user", "name": "ann", "parts": [{"type": "text", "text": "x"}]},
          {"role": "assistant", "toolCalls": [{"id": "c1", "type": "function"}]},
          {"role": "tool", "toolCallId": "c1", "text": "42"}
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "toolChoice": {"type": "function", "function": {"name": "f"}}
      }}}""")
    metadata = request_from_proto(spec, "")
    assert metadata.messages == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    )
    assert metadata.tools == ({"type": "function", "function": {"name": "f"}},)
    assert metadata.tool_choice == {"type": "function", "function": {"name": "f"}}


def test_token_ids_and_opaque_bodies() -> None:
    ids = request_pb2.RequestSpec(prompt=request_pb2.Prompt(token_ids=request_pb2.TokenIdsPrompt(ids=[5, 6])))
    assert request_from_proto(ids, "").prompt_token_ids == (5, 6)
    body = request_pb2.OpenAiBody(api=request_pb2.OPEN_AI_API_CHAT_COMPLETIONS, json=b'{"messages": []}')
    metadata = request_from_proto(request_pb2.RequestSpec(prompt=request_pb2.Prompt(openai=body)), "")
    assert metadata.openai_api is OpenAiApi.CHAT_COMPLETIONS
    assert metadata.openai_body == b'{"messages": []}'


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("null", {"spec.prompt"}),
        ("{}", {"spec.prompt"}),
        ('{"text": ""}', {"spec.prompt.text"}),
        ('{"tokenIds": {}}', {"spec.prompt.token_ids.ids"}),
        ('{"chat": {}}', {"spec.prompt.chat.messages"}),
        (
            '{"chat": {"messages": [{}, {"role": "user", "text": "x", "parts": [{}]}]}}',
            {
                "spec.prompt.chat.messages[0].role",
                "spec.prompt.chat.messages[0].text",
                "spec.prompt.chat.messages[1]",
            },
        ),
        ('{"openai": {}}', {"spec.prompt.openai.api", "spec.prompt.openai.json"}),
        ('{"openai": {"api": 1}}', {"spec.prompt.openai.json"}),
        (
            f'{{"openai": {{"api": 7, "json": "{base64.b64encode(b"{}").decode()}"}}}}',
            {"spec.prompt.openai.api"},
        ),
        (
            f'{{"openai": {{"api": 1, "json": "{base64.b64encode(b"[1]").decode()}"}}}}',
            {"spec.prompt.openai.json"},
        ),
    ],
)
def test_prompts_that_are_none(prompt: str, fields: set[str]) -> None:
    assert bad_fields(spec_from(f'{{"prompt": {prompt}}}')) == fields


def test_sampling_beside_an_opaque_body_is_refused() -> None:
    body = request_pb2.OpenAiBody(api=request_pb2.OPEN_AI_API_COMPLETIONS, json=b"{}")
    spec = request_pb2.RequestSpec(
        prompt=request_pb2.Prompt(openai=body), sampling=request_pb2.SamplingParameters(n=1)
    )
    assert bad_fields(spec) == {"spec.sampling"}


def test_every_bad_field_is_named_at_once() -> None:
    extras = Struct()
    extras.update({"stream": False, "n": 2})
    spec = request_pb2.RequestSpec(
        request_id="not an id",
        sampling=request_pb2.SamplingParameters(
            max_tokens=0,
            temperature=9.0,
            n=500,
            engine_extras=extras,
            structured_output=request_pb2.StructuredOutput(json_schema="{"),
        ),
        priority=77,  # type: ignore[arg-type]
        parallelism_hint=88,  # type: ignore[arg-type]
        failover_mode=-1,  # type: ignore[arg-type]
        durability=55,  # type: ignore[arg-type]
        objectives=request_pb2.Objectives(
            end_to_end_deadline=Duration(), time_to_first_token=Duration(seconds=-1)
        ),
        cost_budget_usd=-0.5,
        user_id="u" * 257,
        labels={"": ""},
    )
    assert bad_fields(spec) == {
        "spec.prompt",
        "spec.request_id",
        "spec.sampling.max_tokens",
        "spec.sampling.temperature",
        "spec.sampling.n",
        "spec.sampling.engine_extras.stream",
        "spec.sampling.engine_extras.n",
        "spec.sampling.structured_output.json_schema",
        "spec.priority",
        "spec.parallelism_hint",
        "spec.failover_mode",
        "spec.durability",
        "spec.objectives.end_to_end_deadline",
        "spec.objectives.time_to_first_token",
        "spec.cost_budget_usd",
        "spec.user_id",
        "spec.labels['']",
    }


def test_an_unknown_enum_value_is_told_what_exists() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request_from_proto(text_spec(priority=77), "")
    assert "unknown value 77" in caught.value.message
    assert "REQUEST_PRIORITY_CRITICAL (1)" in caught.value.message
    assert "UNSPECIFIED" not in caught.value.message


@pytest.mark.parametrize("number", request_pb2.RequestPriority.values())
def test_priorities(number: int) -> None:
    priority = request_from_proto(text_spec(priority=number), "").priority
    assert priority == (number or RequestPriority.NORMAL)


@pytest.mark.parametrize("number", parallelism_pb2.ParallelismType.values())
def test_parallelism_hints(number: int) -> None:
    hint = request_from_proto(text_spec(parallelism_hint=number), "").parallelism_hint
    if number == 0:
        assert hint is None
    else:
        assert hint is not None
        assert parallelism_pb2.ParallelismType.Name(number).endswith(hint.name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("core", "wire", "prefix"),
    [
        (RequestState, request_pb2.RequestState, "REQUEST_STATE_"),
        (RequestPriority, request_pb2.RequestPriority, "REQUEST_PRIORITY_"),
        (InstanceState, instance_pb2.InstanceState, "INSTANCE_STATE_"),
        (ErrorReason, error_pb2.ErrorReason, "ERROR_REASON_"),
        (OpenAiApi, request_pb2.OpenAiApi, "OPEN_AI_API_"),
    ],
)
def test_the_librarys_enums_are_the_contracts(core: Any, wire: Any, prefix: str) -> None:
    assert {item.name: item.value for item in core} == {
        name.removeprefix(prefix): number for name, number in wire.items() if number
    }


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=5))
def test_a_struct_is_what_was_put_in(content: dict[str, Any]) -> None:
    struct = Struct()
    json_format.ParseDict(content, struct)
    assert struct_to_json(struct) == content


@pytest.mark.parametrize(
    ("number", "expected"),
    [(5.0, "5"), (-0.0, "0"), (0.5, "0.5"), (2.0**53, str(2**53)), (1e300, "1e+300")],
)
def test_whole_numbers_of_a_struct_are_integers(number: float, expected: str) -> None:
    # As the engine reads it: 5.0 is not 5 to a parser that wants an integer.
    assert json.dumps(value_to_json(Value(number_value=number))) == expected


def test_an_empty_value_is_null() -> None:
    assert value_to_json(Value()) is None


@given(st.floats(0, 4e9))
def test_times_keep_their_microseconds(time_s: float) -> None:
    stamp = timestamp(time_s)
    assert 0 <= stamp.nanos < 1_000_000_000
    assert stamp.seconds + stamp.nanos / 1e9 == pytest.approx(time_s, abs=1e-6)
    assert seconds_of(duration(time_s)) == pytest.approx(time_s, abs=1e-6)


# -- requests, back to the user -------------------------------------------------------


def test_everything_known_of_a_request_is_shown() -> None:
    failure = Failure(ErrorReason.ENGINE_TIMEOUT, "silent")
    message = request_to_proto(
        RequestStatus(
            request_id="r",
            state=RequestState.FAILED,
            model_name="m",
            priority=RequestPriority.LOW,
            create_time_s=1.0,
            user_id="u",
            session_id="s",
            tenant_id="t",
            dispatch_time_s=2.0,
            first_token_time_s=3.0,
            end_time_s=4.0,
            deadline_time_s=5.0,
            instance_id="i",
            attempts=(
                AttemptRecord(
                    epoch=1, instance_id="a", dispatch_time_s=1.5, end_time_s=1.75, failure=failure
                ),
                AttemptRecord(epoch=2, instance_id="i", dispatch_time_s=2.0),
            ),
            usage=Usage(7, 9, 0),
            finish_reason="stop",
            failure=failure,
            queue_position=0,
            labels={"k": "v"},
            cost=RequestCost(
                predicted_p10_usd=0.25, predicted_p50_usd=0.5, predicted_p90_usd=0.75, actual_usd=0.0
            ),
        )
    )
    assert json_format.MessageToDict(message) == {
        "requestId": "r",
        "state": "REQUEST_STATE_FAILED",
        "model": "m",
        "priority": "REQUEST_PRIORITY_LOW",
        "userId": "u",
        "sessionId": "s",
        "tenantId": "t",
        "createTime": "1970-01-01T00:00:01Z",
        "dispatchTime": "1970-01-01T00:00:02Z",
        "firstTokenTime": "1970-01-01T00:00:03Z",
        "endTime": "1970-01-01T00:00:04Z",
        "deadlineTime": "1970-01-01T00:00:05Z",
        "instanceId": "i",
        "attempts": [
            {
                "epoch": 1,
                "instanceId": "a",
                "dispatchTime": "1970-01-01T00:00:01.500Z",
                "endTime": "1970-01-01T00:00:01.750Z",
                "failure": {"reason": "ERROR_REASON_ENGINE_TIMEOUT", "message": "silent", "code": 14},
            },
            {"epoch": 2, "instanceId": "i", "dispatchTime": "1970-01-01T00:00:02Z"},
        ],
        "usage": {"promptTokenCount": 7, "completionTokenCount": 9, "cachedPromptTokenCount": 0},
        "finishReason": "stop",
        "failure": {"reason": "ERROR_REASON_ENGINE_TIMEOUT", "message": "silent", "code": 14},
        "queuePosition": 0,
        "labels": {"k": "v"},
        "cost": {
            "predictedP10Usd": 0.25,
            "predictedP50Usd": 0.5,
            "predictedP90Usd": 0.75,
            "actualUsd": 0.0,
        },
    }
    assert {f.name for f, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}


def test_what_is_unknown_is_absent() -> None:
    message = request_to_proto(
        RequestStatus(
            request_id="r",
            state=RequestState.QUEUED,
            model_name="m",
            priority=RequestPriority.NORMAL,
            create_time_s=1.0,
        )
    )
    for name in (
        "dispatch_time",
        "first_token_time",
        "end_time",
        "deadline_time",
        "failure",
        "queue_position",
        "cost",
    ):
        assert not message.HasField(name)
    assert not message.usage.HasField("prompt_token_count")
    assert not message.usage.HasField("cached_prompt_token_count")


STEP_TIMES = StepTimeReport(
    model="m",
    gpu_name="NVIDIA L4",
    config=ParallelismConfig(tensor_parallel_size=2),
    source="planned",
    observation_count=30,
    ratio=1.1,
    decode_ratio=1.2,
    prefill_ratio=None,
    drifting=False,
)
FLEET_GROUP = FleetGroup(
    model="m", gpu_name="NVIDIA L4", instance_count=2, gpu_count=4, config=ParallelismConfig()
)


def step_time(scale: float = 1.0) -> StepTimeParameters:
    return StepTimeParameters(
        overhead_s=0.002 * scale,
        memory_base_s=0.0061 * scale,
        memory_per_token_s=1.5e-5 * scale,
        compute_base_s=0.0029 * scale,
        compute_per_token_s=2.16e-5 * scale,
        context_per_token_s=4.9e-8 * scale,
        attention_per_token_pair_s=9.6e-10 * scale,
    )


def candidate(instance_id: str, **changes: Any) -> CandidateRow:
    row = CandidateRow(
        instance_id,
        last_dispatch_sequence=3,
        is_open=1,
        opens_in_s=0.0,
        in_flight_count=2,
        concurrency_limit=8,
        reserved_token_count=1000,
        key_value_token_capacity=math.inf,
        cached_token_count=256,
        backlog_s=0.1,
        decode_count=2,
        context_token_count=812.5,
        prefill_share=0.25,
        ttft_factor=1.1,
        tpot_factor=0.9,
        sigma=0.4,
        latency_estimate_s=2.5,
        ttft_estimate_s=math.inf,
        tpot_estimate_s=0.02,
        usd_per_hour=4.5,
        extra=0.5,
        step_time=step_time(),
    )
    return row._replace(**changes)


REQUEST_ROW = RequestRow(1000, 128.3, 0.25, 1.25, 0.15, math.inf, 3, math.inf)


def decided(
    inputs: PlacementInputs,
    strategy: str = "load_balanced",
    balancer: str = "predicted_latency",
    policy: str = "fifo",
) -> SchedulingDecision:
    """Return a decision with the scores that its inputs give."""
    empty = SchedulingDecision(
        request_id="r",
        epoch=2,
        instance_id="",
        queue_wait_s=0.5,
        scheduling_policy="adaptive",
        routing_strategy=strategy,
        load_balancer=balancer,
        config_version=3,
        reason="because",
        candidate_count=1,
        policy_in_force=policy,
        inputs=inputs,
    )
    chosen, scores = run_again(empty)
    return dataclasses.replace(empty, instance_id=chosen, candidates=scores)


def test_a_decision_is_shown_with_its_candidates_and_what_it_was_made_from() -> None:
    rows = (
        candidate("i", plan_mismatch=1),
        candidate("j", is_open=0, opens_in_s=0.42, backlog_s=0.0, plan_mismatch=1),
    )
    message = decision_to_proto(decided(PlacementInputs(REQUEST_ROW, rows, PARAMETERS.resolve({}))), 10.0)
    assert {f.name for f, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}
    assert message.decision_time.seconds == 10
    assert message.queue_wait.ToMilliseconds() == 500
    shown = {each.instance_id: each for each in message.candidates}
    assert shown["i"].terms["backlog_s"] == 0.1
    assert {name: each.excluded_reason for name, each in shown.items()} == {"i": "", "j": "busy for 0.4 s"}
    inputs = message.inputs
    assert {f.name for f, _ in inputs.request.ListFields()} == {
        f.name for f in inputs.request.DESCRIPTOR.fields
    }
    assert math.isinf(inputs.request.deadline_s)
    open_fields = {f.name for f, _ in inputs.candidates[0].ListFields()}
    assert open_fields == {f.name for f in inputs.candidates[0].DESCRIPTOR.fields} - {"opens_in_s"}
    assert dict(inputs.parameters) == PARAMETERS.resolve({})


def test_a_decision_without_inputs_shows_its_scores_as_they_are() -> None:
    decision = SchedulingDecision(
        request_id="r",
        epoch=1,
        instance_id="i",
        candidates=(CandidateScore("i", 0.5, {"load": 0.5}), CandidateScore("j", 0.0, {}, "busy")),
    )
    message = decision_to_proto(decision, 10.0)
    assert not message.HasField("inputs")
    assert dict(message.candidates[0].terms) == {"load": 0.5}
    assert message.candidates[1].excluded_reason == "busy"
    assert client_convert.decision(message).inputs is None


def test_the_messages_have_the_fields_of_the_rows() -> None:
    for row, message in (
        (RequestRow, scheduling_pb2.PlacementRequestInputs),
        (CandidateRow, scheduling_pb2.PlacementCandidateInputs),
    ):
        assert row._fields == tuple(field.name for field in message.DESCRIPTOR.fields)
    constants = [field.name for field in dataclasses.fields(StepTimeParameters)]
    assert constants == [field.name for field in scheduling_pb2.StepTimeConstants.DESCRIPTOR.fields]


def numbers(least: float = 0.0, most: float = 1e6, *, infinite: bool = False) -> st.SearchStrategy[float]:
    finite = st.floats(least, most, allow_nan=False)
    return finite | st.just(math.inf) if infinite else finite


CANDIDATE_ROWS = st.builds(
    CandidateRow,
    st.sampled_from(["a", "b", "c", "d"]),
    last_dispatch_sequence=st.integers(0, 2**40),
    is_open=st.integers(0, 1),
    plan_mismatch=st.integers(0, 1),
    opens_in_s=numbers(),
    in_flight_count=st.integers(0, 500),
    concurrency_limit=st.integers(1, 500),
    reserved_token_count=st.integers(0, 2**40),
    key_value_token_capacity=numbers(1.0, 1e9, infinite=True),
    cached_token_count=st.integers(0, 1000),
    backlog_s=numbers(),
    decode_count=st.integers(0, 500),
    context_token_count=numbers(),
    prefill_share=numbers(0.0, 1.0),
    ttft_factor=numbers(0.01, 100.0),
    tpot_factor=numbers(0.01, 100.0),
    sigma=numbers(0.01, 5.0),
    latency_estimate_s=numbers(1e-6, infinite=True),
    ttft_estimate_s=numbers(1e-6, infinite=True),
    tpot_estimate_s=numbers(1e-6, infinite=True),
    usd_per_hour=numbers(0.0, 1000.0),
    extra=numbers(0.0, 1.0),
    step_time=st.builds(step_time, numbers(0.001, 1000.0)),
)
REQUEST_ROWS = st.builds(
    RequestRow,
    prompt_token_count=st.integers(1, 10**6),
    output_token_count=numbers(0.0, 1e5),
    waited_s=numbers(),
    ttft_objective_s=numbers(1e-3),
    tpot_objective_s=numbers(1e-4),
    deadline_s=numbers(1e-3, infinite=True),
    priority=st.integers(1, 5),
    cost_budget_usd=numbers(1e-9, infinite=True),
)


@settings(max_examples=100, deadline=None)
@given(
    REQUEST_ROWS,
    st.lists(CANDIDATE_ROWS, min_size=1, max_size=4, unique_by=lambda row: row.instance_id),
    st.sampled_from(LOAD_BALANCERS.names),
    st.sampled_from([name for name in SCHEDULING_POLICIES.names if name != "adaptive"]),
)
def test_a_receipt_comes_back_exactly_and_runs_again_exactly(
    request: RequestRow, rows: list[CandidateRow], balancer: str, policy: str
) -> None:
    decision = decided(
        PlacementInputs(request, tuple(rows), PARAMETERS.resolve({})), balancer=balancer, policy=policy
    )
    sent = decision_to_proto(decision, 10.0).SerializeToString()
    back = client_convert.decision(scheduling_pb2.SchedulingDecision.FromString(sent))
    assert back.inputs == decision.inputs
    assert run_again(back) == (decision.instance_id, decision.candidates)
    assert [(each.instance_id, each.score) for each in back.candidates] == [
        (each.instance_id, each.score) for each in decision.candidates
    ]


# -- scheduling settings ------------------------------------------------------------------


def change_from(text: str) -> SettingsChange:
    return change_from_proto(json_format.Parse(text, admin_service_pb2.UpdateSchedulingConfigRequest()))


def test_a_whole_change_is_read() -> None:
    change = change_from(
        """{
        "config": {
            "version": 7, "update_time": "2030-01-01T00:00:00Z", "comment": "why",
            "scheduling_policy": "priority", "routing_strategy": "locality", "load_balancer": "power_of_two",
            "parameters": {"dispatch.patience": 1, "priority.boost_high_s": 0.5}
        },
        "expected_version": 7, "validate_only": true, "reset_parameters": true}"""
    )
    assert change == SettingsChange(
        scheduling_policy="priority",
        routing_strategy="locality",
        load_balancer="power_of_two",
        parameters={"dispatch.patience": 1.0, "priority.boost_high_s": 0.5},
        reset_parameters=True,
        comment="why",
        expected_version=7,
    )
    assert change_from('{"revert_to_version": 3}') == SettingsChange(revert_to_version=3)


def test_only_an_unknown_name_has_the_reason_of_one() -> None:
    with pytest.raises(UnknownNamesError) as caught:
        change_from('{"config": {"load_balancer": "x", "parameters": {"dispatch.patience": -1}}}')
    assert caught.value.reason is ErrorReason.UNKNOWN_POLICY
    assert len(caught.value.violations) == 2
    with pytest.raises(InvalidRequestError) as other:
        change_from('{"config": {"parameters": {"dispatch.patience": -1}}}')
    assert other.value.reason is ErrorReason.INVALID_REQUEST


def test_only_numbers_are_numbers() -> None:
    struct = Struct()
    struct.update({"n": 1.5, "s": "1", "b": True, "nothing": None, "l": [1], "d": {"a": 1}})
    struct.fields["unset"].CopyFrom(Value())
    violations: list[FieldViolation] = []
    assert numbers_from_struct(struct, "p", violations) == {"n": 1.5}
    assert {each.field: each.description.split(";")[0] for each in violations} == {
        "p['s']": "is of kind string",
        "p['b']": "is of kind bool",
        "p['nothing']": "is of kind null",
        "p['l']": "is of kind list",
        "p['d']": "is of kind struct",
        "p['unset']": "is of kind null",
    }


def test_settings_and_parameters_are_shown_whole() -> None:
    given = {"dispatch.patience": 0.5, "priority.weight.ann": 3.0}
    history = SettingsHistory("fifo", "random", "least_connections", given)
    current = history.apply(SettingsChange(scheduling_policy="priority", comment="why"), 7.0)
    message = settings_to_proto(current, 12.5)
    assert {f.name for f, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}
    assert (message.version, message.scheduling_policy, message.comment) == (2, "priority", "why")
    assert dict(message.parameters) == given
    assert message.update_time.ToMilliseconds() == 12_500
    shown = {each.name: each for each in parameters_to_proto(current.values)}
    assert shown.keys() == {*PARAMETERS.resolve(given), "priority.weight.*"}
    assert [name for name in shown if "weight." in name] == ["priority.weight.*", "priority.weight.ann"]
    assert (shown["priority.weight.*"].value, shown["priority.weight.ann"].value) == (1.0, 3.0)
    patience = shown["dispatch.patience"]
    assert (patience.value, patience.default_value) == (0.5, PARAMETERS.resolve({})["dispatch.patience"])


# -- instances --------------------------------------------------------------------------

FULL_INSTANCE = """{
  "instanceId": "i", "engineUrl": "https://h.example:8443", "modelName": "m", "modelAliases": ["a"],
  "parallelSizes": {"tensorParallelSize": 2, "pipelineParallelSize": 3, "dataParallelSize": 4,
                    "expertParallelSize": 5},
  "gpuCount": 6, "gpuMemoryGib": 80.0, "gpuName": "H100", "maxContextTokenCount": 4096,
  "keyValueTokenCapacity": "100000", "maxConcurrentRequestCount": 32, "engineKind": "ENGINE_KIND_SIMULATED",
  "engineVersion": "1.0", "usdPerGpuHour": 2.5, "hostId": "host", "labels": {"zone": "a"},
  "gpuDevices": [{"index": 1, "uuid": "GPU-1", "name": "H100", "pciBusId": "00000000:17:00.0", "numaNode": 0,
    "totalMemoryBytes": "85899345920", "maxSmClockMhz": 1980, "slowdownTemperatureCelsius": 87.0,
    "links": [{"peerUuid": "GPU-2", "kind": "GPU_LINK_KIND_NVLINK", "nvlinkCount": 4}]}],
  "engineConfiguration": {"block_size": "16"}, "engineCapabilities": ["ENGINE_CAPABILITY_LORA"]
}"""


def record_of(instance: ExecutionInstance) -> InstanceRecord:
    return InstanceRecord(instance, 7, 1.0, 256, InstanceLoad(PredictionBook().kind_of(instance), 1.0))


def test_an_instance_survives_the_round_trip() -> None:
    spec = json_format.Parse(FULL_INSTANCE, instance_pb2.InstanceSpec())
    spec.engine_api_key = "a-secret"
    assert {f.name for f, _ in spec.ListFields()} == {f.name for f in spec.DESCRIPTOR.fields}
    instance = instance_from_proto(spec)
    assert instance == ExecutionInstance(
        instance_id="i",
        host="h.example",
        port=8443,
        scheme="https",
        model_name="m",
        model_aliases=("a",),
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        data_parallel_size=4,
        expert_parallel_size=5,
        gpu_count=6,
        gpu_memory_gb=80.0,
        gpu_name="H100",
        max_context_token_count=4096,
        key_value_token_capacity=100_000,
        max_concurrent_request_count=32,
        engine_kind="simulated",
        engine_version="1.0",
        usd_per_gpu_hour=2.5,
        gpu_devices=(
            GpuDevice(
                index=1,
                uuid="GPU-1",
                name="H100",
                pci_bus_id="00000000:17:00.0",
                numa_node=0,
                total_memory_bytes=80 << 30,
                max_sm_clock_mhz=1980,
                slowdown_temperature_celsius=87.0,
                links=(GpuLink("GPU-2", GpuLinkKind.NVLINK, 4),),
            ),
        ),
        engine_configuration={"block_size": "16"},
        engine_capabilities=frozenset({EngineCapability.LORA}),
        host_id="host",
        labels={"zone": "a"},
        api_key="a-secret",
    )
    record = record_of(instance)
    spec.ClearField("engine_api_key")  # Never comes back.
    assert instance_to_proto(record, 0.0, 1.0).spec == spec


def test_an_instance_as_an_operator_sees_it() -> None:
    record = record_of(ExecutionInstance(instance_id="i", host="h", port=1, model_name="m"))
    message = instance_to_proto(record, 1000.0, 1.0)
    for name in ("engine", "heartbeat_time", "lease_expire_time", "mean_ttft"):
        assert not message.HasField(name)
    assert message.register_time.seconds == 1001
    assert message.max_concurrent_request_count == 256
    record.heartbeat_s, record.lease_expire_s, record.ttft_estimate_s = 2.0, 3.0, 0.5
    record.gauges = EngineGauges(running_request_count=0, key_value_cache_usage=0.5)
    record.gpus = (GpuReading(index=1, utilization=0.0),)
    message = instance_to_proto(record, 1000.0, 1.0)
    assert (message.heartbeat_time.seconds, message.lease_expire_time.seconds) == (1002, 1003)
    assert message.engine.HasField("running_request_count")
    assert not message.engine.HasField("waiting_request_count")
    assert message.gpus[0].HasField("utilization")
    assert not message.gpus[0].HasField("used_memory_bytes")
    assert message.mean_ttft.ToMilliseconds() == 500


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://h:8000", ("http", "h", 8000)),
        ("http://h:8000/", ("http", "h", 8000)),
        ("https://h", ("https", "h", 443)),
        ("http://h", ("http", "h", 80)),
        ("http://[::1]:9", ("http", "::1", 9)),
    ],
)
def test_engine_urls(url: str, parts: tuple[str, str, int]) -> None:
    instance = instance_from_proto(instance_pb2.InstanceSpec(instance_id="i", engine_url=url, model_name="m"))
    assert (instance.scheme, instance.host, instance.port) == parts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:8000",
        "ftp://h:1",
        "http://",
        "http://:80",
        "http://h:x",
        "http://h:0",
        "http://h:65536",
        "http://h:1/v1",
        "http://h:1?q=1",
        "http://h:1#f",
        "http://user:secret@h:1",
        "http://[::1",
        "unix:///tmp/x",
    ],
)
def test_engine_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        instance_from_proto(instance_pb2.InstanceSpec(instance_id="i", engine_url=url, model_name="m"))
    assert [violation.field for violation in caught.value.violations] == ["spec.engine_url"]
    assert "secret" not in caught.value.message


def test_everything_wrong_with_an_instance_is_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        instance_from_proto(
            instance_pb2.InstanceSpec(
                engine_kind=9,  # type: ignore[arg-type]
                gpu_count=5000,
                max_context_token_count=0,
                parallel_sizes=parallelism_pb2.ParallelSizes(tensor_parallel_size=5000),
                labels={"": ""},
            )
        )
    assert {violation.field for violation in caught.value.violations} == {
        "spec.instance_id",
        "spec.engine_url",
        "spec.model_name",
        "spec.engine_kind",
        "spec.gpu_count",
        "spec.max_context_token_count",
        "spec.parallel_sizes.tensor_parallel_size",
        "spec.labels['']",
    }


def test_a_filter_of_states() -> None:
    violations: list[FieldViolation] = []
    assert states_from_proto("states", [0, 2, 6], violations) == {InstanceState.READY, InstanceState.LOST}
    assert violations == []
    states_from_proto("states", [99], violations)
    assert [violation.field for violation in violations] == ["states"]


def test_the_gauges_of_library_and_contract_have_the_same_names() -> None:
    for core, wire in ((EngineGauges, instance_pb2.EngineGauges), (GpuReading, instance_pb2.GpuReading)):
        assert {f.name for f in dataclasses.fields(core)} == {f.name for f in wire.DESCRIPTOR.fields}


# -- reports ------------------------------------------------------------------------------


def test_metrics_are_shown_whole() -> None:
    def table(gpus: GpuSums, durations: tuple[list[int], list[float], list[list[float]]]) -> MetricsTable:
        counts, means_s, quantiles_s = durations
        return MetricsTable(
            window_s=60.0,
            values=["a"],
            ended=[[2, 3, 4, 9]],
            live=[LiveCount(5, 6)],
            sample_counts=[counts],
            means_s=[means_s],
            quantiles_s=[quantiles_s],
            tokens_per_second=[7.0],
            requests_per_second=[8.0],
            slo_compliance_rate=[None if gpus is nothing else 0.5],
            gpus=[gpus],
            cost_usd=[None if gpus is nothing else 0.25],
            usd_per_million_output_tokens=[None if gpus is nothing else 1.5],
        )

    nothing = GpuSums()
    gpus = GpuSums()
    gpus.add([GpuReading(index=0, utilization=0.5, total_memory_bytes=80 << 30, used_memory_bytes=1 << 30)])
    message = metrics_pb2.PerformanceMetrics()
    durations = [1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], [[0.1 * n, 0.9, 1.0] for n in range(1, 5)]
    metrics_to_proto(table(gpus, durations), 0, message)
    assert {f.name for f, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}
    assert message.total_request_count == 2 + 3 + 4 + 5 + 6
    assert (message.ttft.sample_count, message.ttft.mean_s, message.ttft.p50_s) == (2, 0.2, 0.2)
    assert (message.queue_wait.sample_count, message.queue_wait.p95_s) == (4, 0.9)
    # The client's values and the library's are the same.
    assert client_convert.performance(message) == table(gpus, durations).metrics(0)
    empty = metrics_pb2.PerformanceMetrics()
    metrics_to_proto(table(nothing, ([0] * 4, [0.0] * 4, [[0.0] * 3] * 4)), 0, empty)
    assert empty.HasField("latency")
    assert not empty.latency.sample_count
    for name in (
        "average_gpu_utilization",
        "total_gpu_memory_gib",
        "used_gpu_memory_gib",
        "slo_compliance_rate",
        "cost_usd",
        "usd_per_million_output_tokens",
    ):
        assert not empty.HasField(name)


def test_the_state_of_the_control_plane_is_shown_whole() -> None:
    message = status_to_proto(
        ControlPlaneStatus(
            version="1",
            start_time_s=1.0,
            uptime_s=2.5,
            accepting=True,
            scheduling_policy="fifo",
            routing_strategy="random",
            load_balancer="least_connections",
            config_version=2,
            policy_reason="because",
            instance_count_by_state={"READY": 1},
            queued_count_by_model={"m": 2},
            queued_count_by_priority={"HIGH": 2},
            active_requests=3,
            queued_requests=2,
            queue_capacity=100,
            event_loop_lag_s=0.25,
            models=("m",),
            recent_faults=(RecentFault(5.0, "broke", "i", "r"),),
            queued_count_by_tenant={"t": 2},
            loops=(LoopStatus("scheduling", 0.1, 5.0, 7), LoopStatus("monitoring", 5.0)),
            heartbeat_count=8,
            refused_heartbeat_count_by_reason={"BAD_FIGURE": 1},
            cpu_seconds=1.5,
            resident_memory_bytes=1 << 20,
            last_event_sequence=9,
            lease_duration_s=5.0,
        ),
        scheduling_pb2.SchedulingConfig(version=2, scheduling_policy="fifo"),
        "fifo",
        {
            "ttft": QuantityAccuracy(
                count=3, bias_ratio=1.5, median_error_ratio=0.1, p90_error_ratio=0.4, upper_coverage=0.9
            ),
            "tpot": QuantityAccuracy(
                count=1, bias_ratio=1.0, median_error_ratio=0.1, p90_error_ratio=0.1, upper_coverage=None
            ),
        },
        [STEP_TIMES],
        [FleetAdvice(group=FLEET_GROUP, gain_ratio=1.5, change_advised=True, message="change it")],
    )
    assert message.step_time_accuracy[0].kind == "m on NVIDIA L4, TP2"
    assert message.step_time_accuracy[0].sizes.tensor_parallel_size == 2
    assert message.fleet_plans[0].gain_ratio == 1.5
    assert not message.fleet_plans[0].HasField("recommended")
    assert {f.name for f, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}
    assert message.scheduling.scheduling_policy == "fifo"
    assert message.recent_faults[0].message == "broke"
    assert [loop.HasField("last_run_time") for loop in message.loops] == [True, False]
    assert dict(message.refused_heartbeat_count_by_reason) == {"BAD_FIGURE": 1}
    assert message.lease_duration.ToMilliseconds() == 5000
    ttft, tpot = message.prediction_accuracy
    assert {f.name for f, _ in ttft.ListFields()} == {f.name for f in ttft.DESCRIPTOR.fields}
    assert (ttft.quantity, ttft.sample_count, ttft.bias) == ("ttft", 3, 1.5)
    assert (ttft.median_error, ttft.p90_error, ttft.coverage) == (0.1, 0.4, 0.9)
    assert not tpot.HasField("coverage")


# -- errors ---------------------------------------------------------------------------------


CONTRACT = Path(__file__).resolve().parents[2] / "protos" / "sagecp" / "v1" / "error.proto"


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_travels_with_the_status_that_the_contract_promises(reason: ErrorReason) -> None:
    comments = re.search(rf"((?:  //.*\n)+)  ERROR_REASON_{reason.name} = ", CONTRACT.read_text())
    assert comments is not None
    code = status_code_of(reason)
    assert re.search(rf"\b{code.name}\b", comments[1])
    failure = failure_to_proto(Failure(reason, "x"))
    assert (failure.reason, failure.code) == (reason.value, code.value[0])


def unpack(status: status_pb2.Status, kind: type[Any]) -> Any:
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None


def test_an_error_carries_reason_facts_and_the_calls_id() -> None:
    status = to_status(ModelNotFoundError("x", ["b", "a"]), "rpc-1")
    info = unpack(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "sagecp")
    assert dict(info.metadata) == {"model": "x", "available_models": "a,b"}
    assert unpack(status, error_details_pb2.RequestInfo).request_id == "rpc-1"
    assert unpack(status, error_details_pb2.RetryInfo) is None
    assert unpack(status, error_details_pb2.BadRequest) is None


def test_an_error_says_when_to_try_again() -> None:
    status = to_status(QueueFullError("full", retry_after_s=1.25), "r")
    assert unpack(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1250


def test_what_cannot_be_met_says_what_was_predicted() -> None:
    error = InfeasibleError("too late", retry_after_s=2.5, predicted_finish_s="9.125", deadline_s="5.000")
    status = to_status(error, "r")
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    info = unpack(status, error_details_pb2.ErrorInfo)
    assert info.reason == "INFEASIBLE"
    assert dict(info.metadata) == {"predicted_finish_s": "9.125", "deadline_s": "5.000"}
    assert unpack(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2500


def test_every_violation_is_listed_and_what_does_not_fit_is_counted() -> None:
    few = to_status(InvalidRequestError([FieldViolation(f"f{i}", "bad") for i in range(60)]), "r")
    assert len(unpack(few, error_details_pb2.BadRequest).field_violations) == 60
    many = unpack(
        to_status(InvalidRequestError([FieldViolation(f"f{i}", "bad " * 20) for i in range(500)]), "r"),
        error_details_pb2.BadRequest,
    )
    listed = len(many.field_violations) - 1
    assert many.field_violations[-1].description == f"and {500 - listed} more bad fields"


def header_size(status: status_pb2.Status) -> int:
    """Bytes that a status takes in the trailers: the message percent-encoded, and all of it in base64."""
    message = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())
    return message + 4 * ((len(status.SerializeToString()) + 2) // 3)


WILD_TEXT = st.text(max_size=30) | st.builds(str.__mul__, st.text(max_size=3), st.integers(0, 5000))


@settings(max_examples=30)
@given(
    st.lists(st.builds(FieldViolation, WILD_TEXT, WILD_TEXT), min_size=1, max_size=30),
    WILD_TEXT,
    st.lists(WILD_TEXT, max_size=30),
)
def test_an_error_always_fits_into_the_trailers(
    violations: list[FieldViolation], text: str, names: list[str]
) -> None:
    for error in (
        InvalidRequestError(violations),
        ModelNotFoundError(text, names),
        RequestNotFoundError(text),
        core_errors.SageError(text, a=text, b=text, c=text),
    ):
        # Clients give up at 8 KiB; other trailers need a little.
        assert header_size(to_status(error, "r" * 128)) < 7600


def test_a_text_that_is_half_a_surrogate_pair_makes_no_other_error() -> None:
    status = to_status(core_errors.SageError("bad \ud800", fact="\ud800"), "r")
    assert status.message == "bad ?"


# -- pages ------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=50))
def test_a_page_token_says_where_it_was(position: str) -> None:
    violations: list[FieldViolation] = []
    assert position_of("list", page_token("list", position), violations) == position
    assert violations == []


@pytest.mark.parametrize(
    "token",
    ["x", "!!!!", "é", "cg==", page_token("other", "5"), page_token("list", ""), "AAAA", " ", "=" * 8],
)
def test_a_token_of_somebody_else_is_refused(token: str) -> None:
    violations: list[FieldViolation] = []
    assert position_of("list", token, violations) == ""
    assert [violation.field for violation in violations] == ["page_token"]


def test_page_sizes() -> None:
    violations: list[FieldViolation] = []
    assert [page_size(asked, violations) for asked in (0, 1, 1000)] == [100, 1, 1000]
    assert violations == []
    page_size(1001, violations)
    assert [violation.field for violation in violations] == ["page_size"]


def test_stream_and_generate_have_the_same_events() -> None:
    # One function fills both.
    def fields(message: Any) -> list[tuple[str, int]]:
        return [(field.name, field.number) for field in message.DESCRIPTOR.fields]

    assert fields(inference_service_pb2.StreamResponse) == fields(inference_service_pb2.GenerateResponse)
