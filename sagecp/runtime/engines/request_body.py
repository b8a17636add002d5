"""From a request to the JSON body that an OpenAI-compatible engine takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.types import OpenAiApi, RequestMetadata, SamplingParameters
from sagecp.runtime.engines.base import EngineApi, EngineCall
from sagecp.runtime.engines.continuation import (
    PROMPT_EXTRAS,
    Continuation,
    remaining_token_count,
    why_not_continued,
)

_ENCODER = msgspec.json.Encoder()
_RAW_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY_JSON = msgspec.json.Decoder()
_APIS = {
    OpenAiApi.COMPLETIONS: EngineApi.COMPLETIONS,
    OpenAiApi.CHAT_COMPLETIONS: EngineApi.CHAT_COMPLETIONS,
}
# Named otherwise, or encoded otherwise, than in the engine's API.
_SPECIAL = {"logprobs", "structured_output", "engine_extras", "logit_bias"}
_PLAIN = tuple(f.name for f in dataclasses.fields(SamplingParameters) if f.name not in _SPECIAL)
# What the encoder raises for types that JSON does not have, and for halves of surrogate pairs.
JSON_ERRORS = (TypeError, ValueError)
_TRUE = msgspec.Raw(b"true")
_STREAM_OPTIONS = msgspec.Raw(b'{"include_usage":true}')
CONTROLLED_FIELDS = frozenset({"model", "prompt", "messages", "stream", "stream_options", "return_token_ids"})


# What has a typed field must be given there: the control plane counts with it.
_TYPED_FIELDS = frozenset({*_PLAIN, *_SPECIAL, "max_tokens", "max_completion_tokens", "tools", "tool_choice"})


def body_violations(metadata: RequestMetadata) -> Iterator[FieldViolation]:
    """Yield what cannot be put into an engine's terms, by the contract's field names.

    Complements the checks of `core.validation` with what needs a JSON parser
    and the names of the engine's API. Costs next to nothing for a plain request.
    """
    if metadata.openai_body:
        try:
            _decode_object(metadata.openai_body)
        except InvalidRequestError as error:
            yield from error.violations
        return
    sampling = metadata.sampling
    for name in sorted(sampling.engine_extras):
        if name in CONTROLLED_FIELDS:
            yield FieldViolation(
                f"sampling.engine_extras.{name}", "is set by the control plane; leave it out"
            )
        elif name in _TYPED_FIELDS:
            yield FieldViolation(
                f"sampling.engine_extras.{name}", "has a field of its own in the contract; set that one"
            )
    for kind, value in sampling.structured_output.items():
        where = f"sampling.structured_output.{kind}"
        if kind == "json_schema":
            try:
                _ANY_JSON.decode(value)
            except (msgspec.DecodeError, UnicodeEncodeError, TypeError) as error:
                yield FieldViolation(where, f"is not JSON text: {error}")
        elif kind == "json_object" and value is not True:
            yield FieldViolation(where, f"is {value!r}; must be true when set")
        elif not value:
            yield FieldViolation(where, "is empty; give at least one option, or leave it out")


def _decode_object(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the members of an opaque body, each still as JSON."""
    try:
        return _RAW_OBJECT.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            [FieldViolation("prompt.openai.json", f"is not a JSON object: {error}")]
        ) from error


def engine_request_id(request_id: str, epoch: int) -> str:
    """Return the id under which an engine knows an attempt: the request's own for the first one.

    Later ones differ, so that an attempt can be aborted by its id wherever it runs.
    """
    return request_id if epoch <= 1 else f"{request_id}.{epoch}"


def make_engine_call(
    metadata: RequestMetadata,
    model: str,
    *,
    token_ids: bool,
    continuation: Continuation | None = None,
    context_token_count: int | None = None,
    request_id: str = "",
) -> EngineCall:
    """Build the call that runs a request.

    Args:
        metadata: The request, validated.
        model: The served name to ask for.
        token_ids: Ask for token ids beside the text. A continuation always does.
        continuation: What to go on after. The call's stop strings are left
            out then: `splice` looks for them.
        context_token_count: What the model's context holds: needed to continue a
            request that has no bound of its own.
        request_id: What the engine shall call the attempt; default: the request's id.

    Raises:
        InvalidRequestError: As `body_violations` tells; or it holds what JSON cannot express.
        ValueError: A continuation that cannot be, or that has nothing to add; asking for it is a mistake.
    """
    request_id = request_id or metadata.request_id
    if continuation is not None:
        return _continuing_call(metadata, model, continuation, context_token_count, request_id)
    if metadata.openai_body:
        return _opaque_call(metadata, model, request_id)
    violations = list(body_violations(metadata))
    if violations:
        raise InvalidRequestError(violations)
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    # vLLM leaves the echoed prompt out of a stream that also carries token ids.
    if token_ids and not metadata.sampling.echo:
        body["return_token_ids"] = True
    chat = bool(metadata.messages)
    if chat:
        body["messages"] = metadata.messages
        if metadata.tools:
            body["tools"] = metadata.tools
        if metadata.tool_choice is not None:
            body["tool_choice"] = metadata.tool_choice
    elif metadata.prompt_token_ids:
        body["prompt"] = metadata.prompt_token_ids
    else:
        body["prompt"] = metadata.prompt or ""
    if metadata.max_tokens is not None:
        body["max_completion_tokens" if chat else "max_tokens"] = metadata.max_tokens
    _add_sampling(body, metadata.sampling, chat=chat)
    return EngineCall(
        api=EngineApi.CHAT_COMPLETIONS if chat else EngineApi.COMPLETIONS,
        body=_encode(body),
        request_id=request_id,
        keep_raw=metadata.include_openai_events,
        expected_choice_count=metadata.choice_count,
    )


def _continuing_call(
    metadata: RequestMetadata,
    model: str,
    continuation: Continuation,
    context_token_count: int | None,
    request_id: str,
) -> EngineCall:
    """Ask for what follows prompt and output, given together as one prompt of token ids."""
    why_not = why_not_continued(metadata)
    if why_not:
        raise ValueError(f"request {metadata.request_id!r} cannot be continued, because {why_not}")
    output_count = len(continuation.output_token_ids)
    if not continuation.prompt_token_ids or not output_count:
        raise ValueError("a continuation needs the token ids of the prompt and at least one of the output")
    prompt = continuation.prompt_token_ids + continuation.output_token_ids
    remaining = remaining_token_count(metadata, output_count)
    if remaining is None:
        if context_token_count is None:
            raise ValueError("a request without max_tokens is continued up to context_token_count; give it")
        remaining = max(0, context_token_count - len(prompt))
    if remaining == 0:
        raise ValueError(f"the request has all of its {output_count} tokens; there is nothing to add")
    sampling = metadata.sampling
    extras = sampling.engine_extras
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "prompt": prompt,
        "max_tokens": remaining,
    }
    rest = dataclasses.replace(
        sampling,
        min_tokens=None if sampling.min_tokens is None else max(0, sampling.min_tokens - output_count),
        stop=(),
        truncate_prompt_tokens=None,
        engine_extras={name: value for name, value in extras.items() if name not in PROMPT_EXTRAS},
    )
    _add_sampling(body, rest, chat=False)
    return EngineCall(api=EngineApi.COMPLETIONS, body=_encode(body), request_id=request_id)


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return _ENCODER.encode(body)
    except JSON_ERRORS as error:
        raise not_json(error) from error


def not_json(error: Exception) -> InvalidRequestError:
    """Return what a caller of the library is told who puts something into a request that is not JSON."""
    return InvalidRequestError([FieldViolation("request", f"holds what JSON cannot express: {error}")])


def _add_sampling(body: dict[str, Any], sampling: SamplingParameters, *, chat: bool) -> None:
    for name in _PLAIN:
        value = getattr(sampling, name)
        if value is not None and value != ():
            body[name] = value
    if sampling.logprobs is not None:
        if chat:
            body["logprobs"] = True
            body["top_logprobs"] = sampling.logprobs
        else:
            body["logprobs"] = sampling.logprobs
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.structured_output:
        _add_structured_output(body, sampling.structured_output)
    body.update(sampling.engine_extras)


def _add_structured_output(body: dict[str, Any], constraint: Mapping[str, Any]) -> None:
    """Translate to vLLM's ``structured_outputs`` (and ``response_format`` for any JSON object)."""
    kind, value = next(iter(constraint.items()))
    if kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif kind == "json_schema":
        body["structured_outputs"] = {"json": msgspec.Raw(value.encode())}
    else:
        body["structured_outputs"] = {kind: value}


def _opaque_call(metadata: RequestMetadata, model: str, request_id: str) -> EngineCall:
    fields = _decode_object(metadata.openai_body)
    fields["stream"] = _TRUE
    fields["stream_options"] = _STREAM_OPTIONS
    fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    try:
        choice_count = int(msgspec.json.decode(fields["n"])) if "n" in fields else 1
    except (msgspec.DecodeError, TypeError, ValueError):
        choice_count = 1  # The engine will say what is wrong with it.
    assert metadata.openai_api is not None  # noqa: S101 - validated with the body
    return EngineCall(
        api=_APIS[metadata.openai_api],
        body=_ENCODER.encode(fields),
        request_id=request_id,
        keep_raw=True,
        expected_choice_count=max(1, choice_count),
    )
