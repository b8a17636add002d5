"""Requests: from the user's spec, and back to the user's view."""

from __future__ import annotations

import functools
from typing import Any

from sagecp.core.errors import ErrorReason, Failure, FieldViolation, InvalidRequestError
from sagecp.core.types import (
    Durability,
    FailoverMode,
    OpenAiApi,
    ParallelismType,
    RequestMetadata,
    RequestPriority,
    RequestState,
    RequestStatus,
    SamplingParameters,
    Usage,
)
from sagecp.core.validation import request_violations
from sagecp.rpc.convert.common import check_enum, prefixed, struct_to_json, value_to_json
from sagecp.rpc.errors import status_code_of
from sagecp.runtime.engines.request_body import body_violations
from sagecp.v1 import parallelism_pb2, request_pb2
from sagecp.v1.error_pb2 import ErrorReason as ErrorReasonProto
from sagecp.wire.times import seconds_of, timestamp

_PARALLELISM = {
    parallelism_pb2.PARALLELISM_TYPE_TENSOR: ParallelismType.TENSOR,
    parallelism_pb2.PARALLELISM_TYPE_PIPELINE: ParallelismType.PIPELINE,
    parallelism_pb2.PARALLELISM_TYPE_DATA: ParallelismType.DATA,
    parallelism_pb2.PARALLELISM_TYPE_EXPERT: ParallelismType.EXPERT,
    parallelism_pb2.PARALLELISM_TYPE_HYBRID: ParallelismType.HYBRID,
}
_FLOAT_FIELDS = {
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
}
# Of sampling parameters: larger ones hold a schema or a bias, and are their request's own.
_MAX_REMEMBERED_BYTES = 256
_LIST_FIELDS = {"stop", "stop_token_ids", "allowed_token_ids", "bad_words"}


def request_from_proto(
    spec: request_pb2.RequestSpec, tenant_id: str, new_request_id: str = ""
) -> RequestMetadata:
    """Return what a user asks for, validated.

    Args:
        spec: The message.
        tenant_id: Whose it is.
        new_request_id: The request's id where the message names none.

    Raises:
        InvalidRequestError: Names every bad field at once, below ``spec``.
    """
    violations: list[FieldViolation] = []
    values: dict[str, Any] = {
        "request_id": spec.request_id or new_request_id,
        "model_name": spec.model,
        "user_id": spec.user_id,
        "session_id": spec.session_id,
        "tenant_id": tenant_id,
        "include_openai_events": spec.include_openai_events,
    }
    if spec.HasField("prompt"):
        _read_prompt(spec.prompt, values, violations)
    else:
        violations.append(FieldViolation("prompt", "is not set; give text, chat, token_ids or openai"))
    if spec.HasField("sampling"):
        if values.get("openai_body"):
            violations.append(
                FieldViolation("sampling", "is set beside an OpenAI body; put the parameters into the body")
            )
        _read_sampling(spec.sampling, values)
    if spec.HasField("objectives"):
        _read_objectives(spec.objectives, values)
    if check_enum("priority", spec.priority, request_pb2.RequestPriority.DESCRIPTOR, violations):
        values["priority"] = RequestPriority(spec.priority)
    if check_enum(
        "parallelism_hint", spec.parallelism_hint, parallelism_pb2.ParallelismType.DESCRIPTOR, violations
    ):
        values["parallelism_hint"] = _PARALLELISM[spec.parallelism_hint]
    if check_enum("failover_mode", spec.failover_mode, request_pb2.FailoverMode.DESCRIPTOR, violations):
        values["failover_mode"] = FailoverMode(spec.failover_mode)
    if check_enum("durability", spec.durability, request_pb2.Durability.DESCRIPTOR, violations):
        values["durability"] = Durability(spec.durability)
    if spec.HasField("cost_budget_usd"):
        values["cost_budget"] = spec.cost_budget_usd
    if spec.labels:
        values["labels"] = dict(spec.labels)
    metadata = RequestMetadata(**values)
    violations.extend(request_violations(metadata))
    further = list(body_violations(metadata))
    if further:
        named = {violation.field for violation in violations}
        violations.extend(v for v in further if v.field not in named)
    if violations:
        raise InvalidRequestError(prefixed("spec", violations))
    return metadata


def _read_prompt(
    prompt: request_pb2.Prompt, values: dict[str, Any], violations: list[FieldViolation]
) -> None:
    kind = prompt.WhichOneof("kind")
    if kind == "text":
        values["prompt"] = prompt.text
        if not prompt.text:
            violations.append(FieldViolation("prompt.text", "is empty; give at least one character"))
    elif kind == "chat":
        _read_chat(prompt.chat, values, violations)
    elif kind == "token_ids":
        values["prompt_token_ids"] = tuple(prompt.token_ids.ids)
        if not prompt.token_ids.ids:
            violations.append(FieldViolation("prompt.token_ids.ids", "is empty; give at least one id"))
    elif kind == "openai":
        values["openai_body"] = prompt.openai.json
        if check_enum(
            "prompt.openai.api",
            prompt.openai.api,
            request_pb2.OpenAiApi.DESCRIPTOR,
            violations,
            required=True,
        ):
            values["openai_api"] = OpenAiApi(prompt.openai.api)
        else:
            # Named already: the check of the whole request must not name it again.
            values["openai_api"] = OpenAiApi.COMPLETIONS
        if not prompt.openai.json:
            violations.append(FieldViolation("prompt.openai.json", "is empty; give a JSON object"))
    else:
        violations.append(FieldViolation("prompt", "is empty; give text, chat, token_ids or openai"))


def _read_chat(
    chat: request_pb2.ChatPrompt, values: dict[str, Any], violations: list[FieldViolation]
) -> None:
    messages = []
    for index, message in enumerate(chat.messages):
        where = f"prompt.chat.messages[{index}]"
        if not message.role:
            violations.append(
                FieldViolation(f"{where}.role", "is empty; use system, user, assistant or tool")
            )
        if message.text and message.parts:
            violations.append(FieldViolation(where, "has both text and parts; choose one"))
        if not message.text and not message.parts and not message.tool_calls:
            violations.append(FieldViolation(f"{where}.text", "is empty; give text, parts or tool calls"))
        entry: dict[str, Any] = {"role": message.role}
        if message.parts:
            entry["content"] = [struct_to_json(part) for part in message.parts]
        elif message.text or not message.tool_calls:
            entry["content"] = message.text
        if message.name:
            entry["name"] = message.name
        if message.tool_call_id:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            entry["tool_calls"] = [struct_to_json(call) for call in message.tool_calls]
        messages.append(entry)
    if not messages:
        violations.append(FieldViolation("prompt.chat.messages", "is empty; give at least one message"))
    values["messages"] = tuple(messages)
    values["tools"] = tuple(struct_to_json(tool) for tool in chat.tools)
    if chat.HasField("tool_choice"):
        values["tool_choice"] = value_to_json(chat.tool_choice)


def _read_sampling(sampling: request_pb2.SamplingParameters, values: dict[str, Any]) -> None:
    if sampling.ByteSize() > _MAX_REMEMBERED_BYTES:
        max_tokens, values["sampling"] = _sampling_of(sampling)
    else:
        max_tokens, values["sampling"] = _remembered_sampling(sampling.SerializeToString())
    if max_tokens is not None:
        values["max_tokens"] = max_tokens


@functools.lru_cache(maxsize=256)
def _remembered_sampling(data: bytes) -> tuple[int | None, SamplingParameters]:
    """Read sampling parameters once for all requests that have the same: callers have few sets of them."""
    return _sampling_of(request_pb2.SamplingParameters.FromString(data))


def _sampling_of(sampling: request_pb2.SamplingParameters) -> tuple[int | None, SamplingParameters]:
    """Return ``max_tokens``, which is a field of requests here, and the other parameters."""
    max_tokens: int | None = None
    parameters: dict[str, Any] = {}
    for descriptor, value in sampling.ListFields():
        name = descriptor.name
        if name == "max_tokens":
            max_tokens = value
        elif name in _FLOAT_FIELDS:
            # The wire has single precision: 0.7 arrives as 0.699999988.
            parameters[name] = float(f"{value:.7g}")
        elif name in _LIST_FIELDS:
            parameters[name] = tuple(value)
        elif name == "logit_bias":
            parameters[name] = {token_id: float(f"{bias:.7g}") for token_id, bias in value.items()}
        elif name == "structured_output":
            parameters[name] = _structured_output(value)
        elif name == "engine_extras":
            parameters[name] = struct_to_json(value)
        else:
            parameters[name] = value
    return max_tokens, SamplingParameters(**parameters)


def _structured_output(output: request_pb2.StructuredOutput) -> dict[str, Any]:
    kind = output.WhichOneof("constraint")
    if kind is None:
        return {}
    if kind == "choice":
        return {"choice": list(output.choice.options)}
    return {kind: getattr(output, kind)}


def _read_objectives(objectives: request_pb2.Objectives, values: dict[str, Any]) -> None:
    for field, name in (
        ("end_to_end_deadline", "slo_deadline_ms"),
        ("time_to_first_token", "ttft_slo_ms"),
        ("time_per_output_token", "tpot_slo_ms"),
    ):
        if objectives.HasField(field):  # type: ignore[arg-type]  # the names above are its fields
            values[name] = seconds_of(getattr(objectives, field)) * 1000.0


def failure_to_proto(failure: Failure) -> request_pb2.Failure:
    """Return a failure as a message."""
    return request_pb2.Failure(
        reason=reason_to_proto(failure.reason),
        message=failure.message,
        code=status_code_of(failure.reason).value[0],
    )


def reason_to_proto(reason: ErrorReason) -> ErrorReasonProto.ValueType:
    """Return a reason as the contract's enum; the numbers are equal."""
    return ErrorReasonProto.ValueType(reason.value)


def usage_to_proto(usage: Usage) -> request_pb2.Usage:
    """Return token counts as a message."""
    return request_pb2.Usage(
        prompt_token_count=usage.prompt_token_count,
        completion_token_count=usage.completion_token_count,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )


def state_to_proto(state: RequestState) -> request_pb2.RequestState.ValueType:
    """Return a state as the contract's enum; the numbers are equal."""
    return request_pb2.RequestState.ValueType(state.value)


def request_to_proto(status: RequestStatus) -> request_pb2.Request:
    """Return a request as the user sees it."""
    message = request_pb2.Request(
        request_id=status.request_id,
        state=state_to_proto(status.state),
        model=status.model_name,
        priority=request_pb2.RequestPriority.ValueType(status.priority.value),
        user_id=status.user_id,
        session_id=status.session_id,
        tenant_id=status.tenant_id,
        create_time=timestamp(status.create_time_s),
        instance_id=status.instance_id,
        usage=usage_to_proto(status.usage),
        finish_reason=status.finish_reason,
        queue_position=status.queue_position,
        labels=dict(status.labels),
    )
    for name, time_s in (
        ("dispatch_time", status.dispatch_time_s),
        ("first_token_time", status.first_token_time_s),
        ("end_time", status.end_time_s),
        ("deadline_time", status.deadline_time_s),
    ):
        if time_s is not None:
            getattr(message, name).CopyFrom(timestamp(time_s))
    for attempt in status.attempts:
        entry = message.attempts.add(
            epoch=attempt.epoch,
            instance_id=attempt.instance_id,
            dispatch_time=timestamp(attempt.dispatch_time_s),
        )
        if attempt.end_time_s is not None:
            entry.end_time.CopyFrom(timestamp(attempt.end_time_s))
        if attempt.failure is not None:
            entry.failure.CopyFrom(failure_to_proto(attempt.failure))
    if status.failure is not None:
        message.failure.CopyFrom(failure_to_proto(status.failure))
    if status.cost is not None:
        message.cost.predicted_p10_usd = status.cost.predicted_p10_usd
        message.cost.predicted_p50_usd = status.cost.predicted_p50_usd
        message.cost.predicted_p90_usd = status.cost.predicted_p90_usd
        if status.cost.actual_usd is not None:
            message.cost.actual_usd = status.cost.actual_usd
    return message
