"""From keyword arguments to the contract's `RequestSpec`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value

from sagecp.client.errors import invalid_argument
from sagecp.client.values import RequestOptions
from sagecp.core.errors import FieldViolation
from sagecp.core.types import OpenAiApi, ParallelismType, RequestPriority
from sagecp.v1 import parallelism_pb2, request_pb2

KNOWN_OPTIONS = frozenset(get_type_hints(RequestOptions))
_SCALARS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "n", "ignore_eos", "logprobs", "prompt_logprobs",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "truncate_prompt_tokens", "echo",
)  # fmt: skip
_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words")
SAMPLING_OPTIONS = frozenset((*_SCALARS, *_LISTS, "stop", "logit_bias", "structured_output", "engine_extras"))
_ALLOWED = {
    FieldDescriptor.TYPE_UINT32: "a whole number of 0 or more",
    FieldDescriptor.TYPE_INT32: "a whole number",
    FieldDescriptor.TYPE_INT64: "a whole number",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_BOOL: "true or false",
}
_PARALLELISM = {
    ParallelismType.TENSOR: parallelism_pb2.PARALLELISM_TYPE_TENSOR,
    ParallelismType.PIPELINE: parallelism_pb2.PARALLELISM_TYPE_PIPELINE,
    ParallelismType.DATA: parallelism_pb2.PARALLELISM_TYPE_DATA,
    ParallelismType.EXPERT: parallelism_pb2.PARALLELISM_TYPE_EXPERT,
    ParallelismType.HYBRID: parallelism_pb2.PARALLELISM_TYPE_HYBRID,
}
_MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", "tool_calls"})


def new_request_id() -> str:
    """Return an id that nobody else has made."""
    return f"req-{secrets.token_hex(8)}"


def request_spec(prompt: str | None, options: RequestOptions) -> request_pb2.RequestSpec:
    """Return what the arguments ask for; the request id is made when absent.

    Raises:
        InvalidArgumentError: A value does not fit its field; names every such
            field. Ranges are the server's to check.
        TypeError: An option is not known.
    """
    unknown = sorted(set(options) - KNOWN_OPTIONS)
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(unknown)}; what the engine alone knows goes into engine_extras"
        )
    builder = _Builder(options)
    builder.read_prompt(prompt)
    builder.read_sampling()
    builder.read_rest()
    if builder.violations:
        raise invalid_argument(builder.violations)
    return builder.spec


class _Builder:
    """Collects a message, and everything that does not fit it."""

    def __init__(self, options: RequestOptions) -> None:
        self.options: Mapping[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        self.spec = request_pb2.RequestSpec(
            request_id=str(self.options.get("request_id") or new_request_id())
        )
        self.violations: list[FieldViolation] = []

    def attempt(
        self,
        field: str,
        action: Callable[..., object],
        *arguments: object,
        shown: object = None,
        allowed: str = "",
    ) -> None:
        """Do something to the message, and note it when the value does not fit."""
        try:
            action(*arguments)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            must = f"must be {allowed}" if allowed else "that does not fit"
            what = f"is {shown!r}; {must}" if shown is not None else f"does not fit: {error}"
            self.violations.append(FieldViolation(f"spec.{field}", what))

    def read_prompt(self, text: str | None) -> None:
        """Set the prompt; the server says when there is none."""
        options, prompt = self.options, self.spec.prompt
        given = [name for name in ("messages", "token_ids", "openai") if name in options]
        if text is not None:
            given.insert(0, "prompt")
        if len(given) > 1:
            self.violations.append(FieldViolation("spec.prompt", f"gives {' and '.join(given)}; choose one"))
            return
        if text is not None:
            self.attempt("prompt.text", setattr, prompt, "text", text)
        elif "messages" in options:
            self._read_chat(prompt.chat)
        elif "token_ids" in options:
            prompt.token_ids.SetInParent()
            self.attempt("prompt.token_ids.ids", prompt.token_ids.ids.extend, options["token_ids"])
        elif "openai" in options:
            self.attempt("prompt.openai", _fill_openai, prompt.openai, options["openai"])
        for name in ("tools", "tool_choice"):
            if name in options and "messages" not in options:
                self.violations.append(
                    FieldViolation(f"spec.prompt.chat.{name}", "needs messages: only a chat has tools")
                )

    def _read_chat(self, chat: request_pb2.ChatPrompt) -> None:
        chat.SetInParent()
        for index, message in enumerate(self.options["messages"]):
            self.attempt(f"prompt.chat.messages[{index}]", _fill_message, chat.messages.add(), message)
        for index, tool in enumerate(self.options.get("tools", ())):
            self.attempt(f"prompt.chat.tools[{index}]", _fill_struct, chat.tools.add(), tool)
        if "tool_choice" in self.options:
            self.attempt(
                "prompt.chat.tool_choice", _fill_value, chat.tool_choice, self.options["tool_choice"]
            )

    def read_sampling(self) -> None:
        """Set the sampling parameters that were given."""
        options = self.options
        if not SAMPLING_OPTIONS & options.keys():
            return
        sampling = self.spec.sampling
        sampling.SetInParent()
        for name in _SCALARS:
            if name in options:
                value, field = options[name], sampling.DESCRIPTOR.fields_by_name[name]
                allowed = _ALLOWED.get(field.type, "")
                self.attempt(f"sampling.{name}", setattr, sampling, name, value, shown=value, allowed=allowed)
        for name in _LISTS:
            if name in options:
                self.attempt(
                    f"sampling.{name}", getattr(sampling, name).extend, options[name], shown=options[name]
                )
        if "stop" in options:
            stop = options["stop"]
            self.attempt("sampling.stop", sampling.stop.extend, [stop] if isinstance(stop, str) else stop)
        if "logit_bias" in options:
            self.attempt("sampling.logit_bias", _fill_bias, sampling, options["logit_bias"])
        if "structured_output" in options:
            self.attempt(
                "sampling.structured_output",
                _fill_structured,
                sampling.structured_output,
                options["structured_output"],
            )
        if "engine_extras" in options:
            self.attempt(
                "sampling.engine_extras", _fill_struct, sampling.engine_extras, options["engine_extras"]
            )

    def read_rest(self) -> None:
        """Set everything else."""
        options, spec = self.options, self.spec
        for name in ("model", "user_id", "session_id", "cost_budget_usd", "include_openai_events"):
            if name in options:
                self.attempt(name, setattr, spec, name, options[name], shown=options[name])
        for name, target in (
            ("deadline_s", "end_to_end_deadline"),
            ("ttft_s", "time_to_first_token"),
            ("tpot_s", "time_per_output_token"),
        ):
            if name in options:
                duration = getattr(spec.objectives, target)
                self.attempt(
                    f"objectives.{target}", _fill_duration, duration, options[name], shown=options[name]
                )
        if "priority" in options:
            self.attempt("priority", self._set_priority, options["priority"], shown=options["priority"])
        if "parallelism_hint" in options:
            hint = options["parallelism_hint"]
            self.attempt(
                "parallelism_hint", setattr, spec, "parallelism_hint", _PARALLELISM.get(hint), shown=hint
            )
        if "failover_mode" in options:
            mode = options["failover_mode"]
            self.attempt("failover_mode", setattr, spec, "failover_mode", int(mode), shown=mode)
        if "labels" in options:
            self.attempt("labels", spec.labels.update, options["labels"], shown=options["labels"])

    def _set_priority(self, priority: RequestPriority | str | int) -> None:
        if isinstance(priority, str):
            priority = RequestPriority[priority.upper()]
        # Other numbers than the known ones are the server's to refuse.
        self.spec.priority = request_pb2.RequestPriority.ValueType(int(priority))


def _fill_message(entry: request_pb2.ChatMessage, message: Mapping[str, Any]) -> None:
    unknown = sorted(set(message) - _MESSAGE_KEYS)
    if unknown:
        raise ValueError(
            f"has the unknown key {', '.join(unknown)}; known: {', '.join(sorted(_MESSAGE_KEYS))}"
        )
    entry.role = message["role"]
    content = message.get("content")
    if isinstance(content, str):
        entry.text = content
    elif content is not None:
        entry.parts.extend(_struct(part) for part in content)
    entry.name = message.get("name") or ""
    entry.tool_call_id = message.get("tool_call_id") or ""
    entry.tool_calls.extend(_struct(call) for call in message.get("tool_calls") or ())


def _fill_structured(output: request_pb2.StructuredOutput, constraint: Mapping[str, Any]) -> None:
    if len(constraint) != 1:
        raise ValueError(f"gives {', '.join(constraint) or 'nothing'}; give exactly one")
    ((kind, value),) = constraint.items()
    if kind == "choice":
        output.choice.options.extend(value)
    elif kind == "json_schema" and not isinstance(value, str):
        output.json_schema = json.dumps(value)
    else:
        setattr(output, kind, value)


def _fill_openai(
    body: request_pb2.OpenAiBody, given: tuple[OpenAiApi | str, Mapping[str, Any] | bytes | str]
) -> None:
    api, content = given
    chosen = api if isinstance(api, OpenAiApi) else OpenAiApi[str(api).upper()]
    body.api = request_pb2.OpenAiApi.ValueType(chosen.value)
    if isinstance(content, bytes):
        body.json = content
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        body.json = text.encode()


def _fill_bias(sampling: request_pb2.SamplingParameters, bias: Mapping[int, float]) -> None:
    sampling.logit_bias.update({int(token_id): float(by) for token_id, by in bias.items()})


def _fill_duration(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(round(seconds * 1e9))
    # Also when it is zero: a field that was given is present, and the server says that zero is wrong.
    duration.SetInParent()


def _struct(value: Mapping[str, Any]) -> Struct:
    struct = Struct()
    _fill_struct(struct, value)
    return struct


def _fill_struct(struct: Struct, value: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a JSON object, and is {type(value).__name__}")
    struct.update(value)


def _fill_value(target: Value, value: Any) -> None:  # noqa: ANN401 - any JSON value
    holder = Struct()
    holder.update({"value": value})
    target.CopyFrom(holder.fields["value"])
