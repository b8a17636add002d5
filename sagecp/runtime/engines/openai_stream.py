"""Reads the OpenAI API's answers: stream events, whole answers and errors.

Only the fields that the control plane uses are decoded; the decoder skips the
rest without building objects for it. An answer counts as complete only when
the engine gave every choice a finish reason, and not ``abort``.

The text of a delta is the answer: ``text`` or ``delta.content``. Reasoning and
tool calls count as output, but their content is found in the event's JSON
only; an event with a tool call keeps its JSON even if the call asks for none,
because the answer would be lost otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

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

MAX_MESSAGE_CHARACTERS = 300
# More choices than any caller asks for: bounds what an engine can make us remember.
MAX_CHOICE_COUNT = 4096
_MAX_PARAMETER_CHARACTERS = 128
# Validation errors end with the value that was refused, which may be the prompt.
_ECHOED_INPUT = re.compile(r""", *(['"])input\1: .*""")
_NOT_UNDERSTOOD = (msgspec.MsgspecError, ValueError, RecursionError)


class _Anything(msgspec.Struct, gc=False):
    """An object whose presence matters and whose content does not."""


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Anything] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _FirstChoice(_Choice, gc=False):
    prompt_token_ids: list[int] | None = None


class _PromptTokensDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptTokensDetails | None = None


class _Answer(msgspec.Struct, gc=False):
    """A stream's event, or a whole answer: they differ in ``delta`` and ``message`` only."""

    choices: list[_Choice] | msgspec.UnsetType | None = msgspec.UNSET
    usage: _Usage | None = None
    error: Any = None


class _FirstAnswer(_Answer, gc=False):
    """An event that may tell the prompt: in its first choice (completions) or beside them (chat)."""

    choices: list[_FirstChoice] | msgspec.UnsetType | None = msgspec.UNSET  # type: ignore[assignment]
    prompt_token_ids: list[int] | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_first_answer = msgspec.json.Decoder(_FirstAnswer).decode


class OpenAiStreamParser:
    """Turns the events of one answer into deltas, and remembers how the choices finished.

    Args:
        keep_raw: Keep each event's JSON on its first delta.
        expected_choice_count: Choices that must finish before the answer is
            complete. More may come; each that appears must finish, too.
        on_prompt: Called with the token ids of the prompt, once, if the engine
            tells them before or with its first output.

    Attributes:
        deltas: What was found and not taken yet; the caller replaces the list.
        done: Whether the engine announced the end of the stream.
        progressed: Set by output, as opposed to roles and usage; the caller clears it.
    """

    __slots__ = (
        "_choice_count",
        "_finish_reasons",
        "_keep_raw",
        "_on_prompt",
        "_prompt_is_due",
        "_usage",
        "deltas",
        "done",
        "progressed",
    )

    def __init__(
        self,
        *,
        keep_raw: bool = False,
        expected_choice_count: int = 1,
        on_prompt: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.deltas: list[EngineDelta] = []
        self.done = False
        self.progressed = False
        self._keep_raw = keep_raw
        self._on_prompt = on_prompt
        self._prompt_is_due = on_prompt is not None
        self._choice_count = max(1, expected_choice_count)
        self._finish_reasons: dict[int, str] = {}
        self._usage: _Usage | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every choice has finished."""
        return len(self._finish_reasons) >= self._choice_count

    def outcome(self) -> EngineOutcome:
        """Return how the answer ended.

        Raises:
            EngineStreamBrokenError: A choice has no finish reason.
        """
        if not self.is_complete:
            finished = len(self._finish_reasons)
            raise EngineStreamBrokenError(
                f"the stream ended with {finished} of {self._choice_count} choices finished"
                if self._choice_count > 1
                else "the stream ended without a finish reason"
            )
        usage = self._usage or _Usage()
        details = usage.prompt_tokens_details
        return EngineOutcome(
            finish_reasons=tuple(self._finish_reasons[index] for index in range(self._choice_count)),
            prompt_token_count=usage.prompt_tokens,
            completion_token_count=usage.completion_tokens,
            cached_token_count=None if details is None else details.cached_tokens,
        )

    def parse(self, payload: bytes) -> None:
        """Take the data of one event.

        Raises:
            EngineError: The engine reports an error or gave up on a choice, or
                the event is not understood. What was found before it is in
                :attr:`deltas`.
        """
        if payload == b"[DONE]":
            self.outcome()
            self.done = True
            return
        if self.done:
            raise EngineStreamBrokenError("the engine sent output after the end of its stream")
        try:
            if self._prompt_is_due:
                answer: _Answer = self._decode_first(payload)
            else:
                answer = _decode_answer(payload)
        except _NOT_UNDERSTOOD:
            raise EngineStreamBrokenError("the stream holds an event that is not understood") from None
        self._take(answer, payload, self._keep_raw)

    def parse_whole(self, body: bytes) -> None:
        """Take an answer that came in one piece; one delta for each choice.

        Raises:
            EngineError: As for :meth:`parse`.
        """
        try:
            answer = self._decode_first(body)
        except _NOT_UNDERSTOOD:
            raise EngineStreamBrokenError("the engine's answer is not understood") from None
        choices = answer.choices
        if isinstance(choices, list):
            for choice in choices:
                choice.delta = choice.message
        self._take(answer, body, self._keep_raw)
        usage = self._usage
        if len(self.deltas) == 1 and usage is not None and usage.completion_tokens is not None:
            delta = self.deltas[0]
            if delta.token_ids is None:
                delta.token_count = usage.completion_tokens

    def _decode_first(self, payload: bytes) -> _Answer:
        """Decode an event that may tell the prompt. Later ones are decoded without looking for it."""
        answer = _decode_first_answer(payload)
        token_ids, choices = answer.prompt_token_ids, answer.choices
        if isinstance(choices, list) and choices:
            first = choices[0]
            token_ids = token_ids or first.prompt_token_ids
            if token_ids or first.text or first.token_ids or (first.delta and first.delta.content):
                self._prompt_is_due = False
        if token_ids and self._on_prompt is not None:
            on_prompt, self._on_prompt = self._on_prompt, None
            if min(token_ids) < 0 or max(token_ids) >> 32:
                raise EngineStreamBrokenError("the stream holds a token id that is out of range")
            on_prompt(token_ids)
        return answer

    def _take(self, answer: _Answer, payload: bytes, keep_raw: bool) -> None:
        if answer.error is not None:
            raise error_of(200, answer.error)
        if answer.usage is not None:
            self._take_usage(answer.usage)
        choices = answer.choices
        if not choices:
            if choices is msgspec.UNSET and answer.usage is None:
                raise _error_of_odd_event(payload)
            if keep_raw:
                self.deltas.append(EngineDelta(0, "", None, 0, "", "", payload))
            return
        raw = payload if keep_raw else None
        for choice in choices:
            text = choice.text
            message = choice.delta
            extra = False
            if message is not None:
                text = message.content
                if message.tool_calls:
                    extra = True
                    raw = payload
                elif message.reasoning_content or message.reasoning:
                    extra = True
            token_ids = choice.token_ids
            if token_ids is not None:
                token_count = len(token_ids)
                for token_id in token_ids:
                    if token_id >> 32:
                        raise EngineStreamBrokenError("the stream holds a token id that is out of range")
            else:
                token_count = 1 if text or extra else 0
            index = choice.index
            if index:
                self._take_index(index)
            reason = choice.finish_reason
            if reason is not None:
                # Truncation must not look like an answer, so it is not passed on as a finish.
                if reason == "abort":
                    raise EngineStreamBrokenError("the engine aborted the request")
                if reason == "error":
                    raise EngineFailedError("the engine failed while it answered", 200)
                self._finish_reasons[index] = reason
                stop_reason = choice.stop_reason
                self.deltas.append(
                    EngineDelta(
                        index,
                        text or "",
                        token_ids,
                        token_count,
                        reason,
                        "" if stop_reason is None else str(stop_reason),
                        raw,
                    )
                )
                self.progressed = True
            elif token_count or text:
                self.deltas.append(EngineDelta(index, text or "", token_ids, token_count, "", "", raw))
                self.progressed = True
            elif raw is not None:
                self.deltas.append(EngineDelta(index, "", token_ids, 0, "", "", raw))
            else:
                continue
            raw = None

    def _take_index(self, index: int) -> None:
        if not 0 <= index < MAX_CHOICE_COUNT:
            raise EngineStreamBrokenError("the stream holds a choice index that is out of range")
        self._choice_count = max(self._choice_count, index + 1)

    def _take_usage(self, usage: _Usage) -> None:
        details = usage.prompt_tokens_details
        counts = (usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details else None)
        if any(count is not None and not 0 <= count < 1 << 53 for count in counts):
            raise EngineStreamBrokenError("the stream holds a token count that is out of range")
        self._usage = usage


def error_of_response(status: int, body: bytes) -> EngineError:
    """Return the error that a response with a status other than 200 means.

    Takes vLLM's ``{"error": {...}}``, the ``{"detail": ...}`` of its web
    framework, and plain text.
    """
    try:
        value = msgspec.json.decode(body)
    except _NOT_UNDERSTOOD:
        value = body.decode("utf-8", "replace")
    if isinstance(value, dict) and value.get("error") is not None:
        value = value["error"]
    return _error_of_status(status, *_describe(value, status))


def error_of(default_status: int, value: object) -> EngineError:
    """Return the error that an ``error`` member means; its ``code`` is the status where it is one."""
    code = value.get("code") if isinstance(value, dict) else None
    status = code if type(code) is int and 100 <= code <= 599 else default_status
    return _error_of_status(status, *_describe(value, status))


def printable(text: str, max_characters: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Return an engine's words, fit for a log line: one line, no control characters, bounded.

    vLLM echoes input in some messages. Where it marks it as such it is cut
    out; what is left of it elsewhere is bounded by the length.
    """
    # Bounded before the work, too: the text may be megabytes.
    text = _ECHOED_INPUT.sub("", text[: 16 * max_characters])
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def _error_of_odd_event(payload: bytes) -> EngineError:
    """Older engines send the error's members at the top of the event."""
    value = msgspec.json.decode(payload)
    if isinstance(value, dict) and (value.get("object") == "error" or {"message", "code"} <= value.keys()):
        return error_of(200, value)
    return EngineStreamBrokenError("the stream holds an event without choices")


def _describe(value: object, status: int) -> tuple[str, str]:
    """Return message and parameter of an error in any of its shapes."""
    parameter = ""
    if isinstance(value, dict):
        if isinstance(value.get("param"), str):
            parameter = printable(value["param"], _MAX_PARAMETER_CHARACTERS)
        value = value.get("message") or value.get("detail") or value.get("type")
        if isinstance(value, list):  # One entry for each bad field.
            value = "; ".join(str(entry.get("msg", "")) for entry in value if isinstance(entry, dict))
    message = printable(value) if isinstance(value, str) else ""
    return message or f"the engine gave no reason (HTTP {status})", parameter


def _error_of_status(status: int, message: str, parameter: str) -> EngineError:
    if status in {401, 403}:
        return EngineUnauthorizedError(
            f"the engine does not accept the API key (HTTP {status}); check the instance's key: {message}",
            status,
        )
    if status in {429, 503}:
        return EngineOverloadedError(message, status)
    if 400 <= status <= 499:
        return EngineRejectedError(message, status, parameter)
    if 300 <= status <= 399:
        return EngineFailedError(f"the engine redirects (HTTP {status}), which is not followed", status)
    return EngineFailedError(message, status)
