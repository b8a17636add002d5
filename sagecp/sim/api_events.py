"""The bytes of answers: events of a stream, and whole JSON bodies, shaped as vLLM's.

Events of ordinary tokens are put together from parts made once per stream,
because a load test spends most of its time here. Each event is one chunk of
HTTP's chunked encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sagecp.sim.api_request import GenerationCall
from sagecp.sim.logprobs import chat_logprobs, completion_logprobs
from sagecp.sim.tokenizer import TOKEN_JSON

DONE_EVENT = b"e\r\ndata: [DONE]\n\n\r\n"
"""The last event of every stream, framed."""

_encode = msgspec.json.Encoder().encode
_OPTIONAL_FIELDS = {"prompt_tokens_details": None, "completion_tokens_details": None}


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What all parts of an answer repeat.

    Attributes:
        response_id: ``cmpl-...`` or ``chatcmpl-...``.
        created: Unix time, in whole seconds.
        model: The served name.
        fingerprint: The engine's ``system_fingerprint``.
    """

    response_id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one choice's answer.

    Attributes:
        text: The text that is new.
        token_ids: The tokens that are new.
        finish_reason: Why the choice ended, or ``None``.
        stop_reason: The stop text or token that ended it, or ``None``.
        prompt_token_ids: The prompt, when this event shall give it.
        text_offset: Where the text begins in the answer.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: Sequence[int] | None = None
    text_offset: int = 0


def frame(payload: bytes) -> bytes:
    """Make one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(value: object) -> bytes:
    """Make one framed event that carries JSON."""
    return frame(b"data: %b\n\n" % _encode(value))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return token counts in the API's order."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class ChoiceEvents:
    """Makes the events of one choice.

    Args:
        call: What was asked for.
        head: What all events repeat.
        index: The choice.
        prompt_token_count: For the counts in every event.

    Attributes:
        token: Makes the event of an ordinary token from its id and the number
            of tokens so far, itself included.
    """

    __slots__ = ("_body", "_call", "_head", "_prompt_token_count", "token")

    def __init__(self, call: GenerationCall, head: ResponseHead, index: int, prompt_token_count: int) -> None:
        self._call = call
        self._head = head
        self._prompt_token_count = prompt_token_count
        kind = b"chat.completion.chunk" if call.is_chat else b"text_completion"
        self._body = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[{"index":%d,' % (
            _encode(head.response_id),
            kind,
            head.created,
            _encode(head.model),
            index,
        )
        self.token = self._make_token()

    def role(self, prompt_token_ids: Sequence[int] | None) -> bytes:
        """Make the event that opens a chat answer."""
        counts = b""
        if self._call.continuous_usage:
            counts = b',"usage":' + self._usage(0)
        return frame(
            b'%b"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b'
            b',"prompt_token_ids":%b,"prompt_text":null}\n\n'
            % (self._body, counts, _encode(prompt_token_ids))
        )

    def delta(self, delta: Delta, completion_tokens: int) -> bytes:
        """Make the event of any piece of an answer.

        Args:
            delta: The piece.
            completion_tokens: Tokens of the choice so far.
        """
        call = self._call
        token_ids = _encode(list(delta.token_ids)) if call.return_token_ids else b"null"
        finish = _encode(delta.finish_reason)
        parts = [self._body]
        if call.is_chat:
            parts += [b'"delta":{"content":', _encode(delta.text), b'},"logprobs":', self._logprobs(delta)]
            parts += [b',"finish_reason":', finish]
            if delta.finish_reason is not None:
                parts += [b',"stop_reason":', _encode(delta.stop_reason)]
        else:
            parts += [b'"text":', _encode(delta.text), b',"logprobs":', self._logprobs(delta)]
            parts += [b',"finish_reason":', finish, b',"stop_reason":', _encode(delta.stop_reason)]
            parts += [b',"prompt_token_ids":', _encode(delta.prompt_token_ids)]
        parts += [b',"token_ids":', token_ids, b"}]"]
        if call.continuous_usage:
            parts += [b',"usage":', self._usage(completion_tokens)]
        if delta.finish_reason is not None and not call.include_usage:
            parts += [b',"system_fingerprint":', _encode(self._head.fingerprint)]
        parts.append(b"}\n\n")
        return frame(b"".join(parts))

    def _make_token(self) -> Callable[[int, int], bytes]:
        call = self._call
        if call.is_chat:
            before = self._body + b'"delta":{"content":"'
            middle = b'"},"logprobs":null,"finish_reason":null,"token_ids":'
        else:
            before = self._body + b'"text":"'
            middle = (
                b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
                b'"prompt_token_ids":null,"token_ids":'
            )
        texts = TOKEN_JSON
        if call.continuous_usage:
            return self._counted_token
        if call.return_token_ids:
            middle += b"["
            size = len(before) + len(middle) + len(b"]}]}\n\n")

            def with_id(token_id: int, _count: int) -> bytes:
                text, number = texts[token_id], b"%d" % token_id
                return b"%x\r\n%b%b%b%b]}]}\n\n\r\n" % (
                    size + len(text) + len(number),
                    before,
                    text,
                    middle,
                    number,
                )

            return with_id
        after = middle + b"null}]}\n\n\r\n"
        size = len(before) + len(after) - 2

        def plain(token_id: int, _count: int) -> bytes:
            text = texts[token_id]
            return b"%x\r\n%b%b%b" % (size + len(text), before, text, after)

        return plain

    def _counted_token(self, token_id: int, count: int) -> bytes:
        return self.delta(Delta(TOKEN_JSON[token_id].decode(), (token_id,)), count)

    def _usage(self, completion_tokens: int) -> bytes:
        counts: dict[str, Any] = dict(usage(self._prompt_token_count, completion_tokens))
        if self._call.is_chat:
            counts["completion_tokens_details"] = None
        return _encode(counts)

    def _logprobs(self, delta: Delta) -> bytes:
        top = self._call.logprobs
        if top is None:
            return b"null"
        if self._call.is_chat:
            return _encode(chat_logprobs(delta.token_ids, top))
        return _encode(completion_logprobs(delta.token_ids, top, text_offset=delta.text_offset))


def usage_event(
    call: GenerationCall, head: ResponseHead, prompt_tokens: int, completion_tokens: int
) -> bytes:
    """Make the event with the final counts."""
    return event(
        {
            "id": head.response_id,
            "object": "chat.completion.chunk" if call.is_chat else "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [],
            "usage": usage(prompt_tokens, completion_tokens),
            "system_fingerprint": head.fingerprint,
        }
    )


def error_event(message: str, type_: str = "InternalServerError", code: int = 500) -> bytes:
    """Make the event of a failure inside a stream (vLLM writes this one with spaces)."""
    return frame(
        b'data: {"error": {"message": %b, "type": %b, "param": null, "code": %d}}\n\n'
        % (_encode(message), _encode(type_), code)
    )


def completion_body(
    call: GenerationCall,
    head: ResponseHead,
    answers: Sequence[tuple[int, Delta]],
) -> bytes:
    """Make the body of a completion.

    Args:
        call: What was asked for.
        head: Id, time, model.
        answers: For every choice in order, the index of its prompt and the whole answer.
    """
    choices = []
    completion_tokens = 0
    for index, (prompt_index, answer) in enumerate(answers):
        prompt = call.prompts[prompt_index]
        completion_tokens += len(answer.token_ids)
        text, shown = answer.text, answer.token_ids
        if call.echo:
            before = "" if call.return_token_ids else call.prompt_texts[prompt_index]
            text = before if call.echo_only else before + text
            shown = prompt if call.echo_only else [*prompt, *shown]
        logprobs = None
        if call.logprobs is not None:
            logprobs = completion_logprobs(shown, call.logprobs, unknown_first=call.echo)
        choices.append(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
                "token_ids": list(answer.token_ids) if call.return_token_ids else None,
                "prompt_logprobs": None,
                "prompt_token_ids": prompt if call.return_token_ids else None,
                "routed_experts": None,
            }
        )
    prompt_tokens = sum(len(prompt) for prompt in call.prompts)
    return _encode(
        {
            "id": head.response_id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": head.fingerprint,
            "usage": {**usage(prompt_tokens, completion_tokens), **_OPTIONAL_FIELDS},
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )


def chat_body(call: GenerationCall, head: ResponseHead, answers: Sequence[tuple[int, Delta]]) -> bytes:
    """Make the body of a chat completion; arguments as for :func:`completion_body`."""
    choices = [
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": answer.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": None if call.logprobs is None else chat_logprobs(answer.token_ids, call.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "token_ids": list(answer.token_ids) if call.return_token_ids else None,
            "routed_experts": None,
        }
        for index, (_, answer) in enumerate(answers)
    ]
    completion_tokens = sum(len(answer.token_ids) for _, answer in answers)
    return _encode(
        {
            "id": head.response_id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": head.fingerprint,
            "usage": {**usage(len(call.prompts[0]), completion_tokens), **_OPTIONAL_FIELDS},
            "prompt_logprobs": None,
            "prompt_token_ids": call.prompts[0] if call.return_token_ids else None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )
