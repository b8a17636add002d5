"""One HTTP request inside the engine: its choices, and what each token means for the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from sagecp.sim import tokenizer
from sagecp.sim.api_events import (
    DONE_EVENT,
    ChoiceEvents,
    Delta,
    ResponseHead,
    chat_body,
    completion_body,
    error_event,
    frame,
    usage_event,
)
from sagecp.sim.api_fields import ApiError
from sagecp.sim.api_request import GenerationCall
from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineRequest
from sagecp.sim.tokenizer import EOS_ID, TOKEN_TEXTS

ENGINE_FAILURE = "EngineCore encountered an issue. See stack trace (above) for the root cause."
_GARBAGE = b"\x00\xff\xfe\x1f\x8b garbage \xc3\x28\n\n"
_BAD_JSON = b'data: {"id":"cmpl-garbage","choices":[{"index":0,"text":"unfinished\n\n'


class GenerationHost(Protocol):
    """What a generation needs from its server."""

    model: EngineModel

    def finished(self, request: EngineRequest, reason: str, choice_count: int) -> None:
        """Count a choice that ended with an answer."""

    def claim_fault(self, generation: Generation) -> bool:
        """Return whether this generation may be hit by a fault."""

    def die(self) -> None:
        """End the process as a crash would."""


class StopTexts:
    """Finds stop texts in an answer, and holds back text that might begin one.

    Args:
        stop: The texts.
        include: Whether the text found belongs to the answer.
    """

    __slots__ = ("_held_back", "_include", "_shown", "_stop", "text")

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held_back = 0 if include else max(len(text) for text in self._stop) - 1
        self._shown = 0
        self.text = ""

    def push(self, piece: str, *, may_stop: bool, last: bool) -> tuple[str, str | None]:
        """Take the next piece; return the text that may be shown, and the stop text found."""
        self.text += piece
        found: str | None = None
        if may_stop and piece:
            for stop in self._stop:
                start = self.text.find(stop, max(0, len(self.text) - len(piece) - len(stop) + 1))
                if start >= 0:
                    found = stop
                    self.text = self.text[: start + len(stop) if self._include else start]
                    break
        end = len(self.text) if last or found is not None else max(0, len(self.text) - self._held_back)
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown : self._shown], found


class Choice:
    """One answer of a generation: the engine request's ``context``."""

    __slots__ = (
        "events",
        "finish_reason",
        "generation",
        "index",
        "plain",
        "prompt_index",
        "request",
        "stop_reason",
        "stop_texts",
        "text_offset",
    )

    def __init__(self, generation: Generation, index: int, prompt_index: int, request: EngineRequest) -> None:
        call = generation.call
        self.generation = generation
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.events: ChoiceEvents | None = None
        if call.stream:
            self.events = ChoiceEvents(call, generation.head, index, request.prompt_token_count)
        self.stop_texts = StopTexts(call.stop, include=call.include_stop) if call.stop else None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.text_offset = 0
        # Whether ordinary tokens need nothing but their event; a stream's first token needs more.
        self.plain = not call.stream and self.stop_texts is None

    def push(self, token_id: int, finish_reason: str) -> None:
        """Take the next token from the engine."""
        generation = self.generation
        if self.plain and not finish_reason and not generation.faults:
            if self.events is not None:
                generation.write(self.events.token(token_id, self.request.output_token_count))
        elif self.finish_reason is None:
            generation.push(self, token_id, finish_reason)

    def silence(self) -> None:
        """Ignore tokens that this step still has for the choice."""
        self.plain = False
        if self.finish_reason is None:
            self.finish_reason = "abort"

    def answer(self) -> Delta:
        """Return the whole answer, for a body that is not streamed."""
        call, tokens = self.generation.call, self.request.output_token_ids
        if self.stop_texts is not None:
            text = self.stop_texts.text
        else:
            hidden = isinstance(self.stop_reason, int) and not call.include_stop
            text = tokenizer.decode(tokens[:-1] if hidden else tokens)
        return Delta(text, tokens, self.finish_reason, self.stop_reason)


class Generation:
    """A request over HTTP, streamed or not, with all its choices.

    Args:
        host: The server.
        call: What was asked for.
        head: Id, time, model.
        write: Sends bytes to the client at once.
        drop: Resets the client's connection.
        close: Closes it in an orderly way, once what was written is sent.

    Attributes:
        choices: Filled by the server, before the first token.
        faults: Faults to come, as (tokens, kind), the earliest first.
        done: Set when the client has everything, or will get nothing more.
        error: What to answer instead of a body, when not streamed.
        spoiled: Answer with bytes that are no JSON, when not streamed.
    """

    def __init__(
        self,
        host: GenerationHost,
        call: GenerationCall,
        head: ResponseHead,
        write: Callable[[bytes], object],
        drop: Callable[[], object],
        close: Callable[[], object],
    ) -> None:
        self.call = call
        self.head = head
        self.write = write
        self.choices: list[Choice] = []
        self.faults: list[tuple[int, str]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: ApiError | None = None
        self.spoiled = False
        self._host = host
        self._drop = drop
        self._close = close
        self._open_choice_count = 0
        self._role_sent = False

    def add(self, choice: Choice) -> None:
        """Take a choice in, before its request is added to the engine."""
        self.choices.append(choice)
        self._open_choice_count += 1

    def mentions(self, text: str) -> bool:
        """Return whether a prompt contains a text."""
        return any(text in tokenizer.decode(prompt) for prompt in self.call.prompts)

    def push(self, choice: Choice, token_id: int, finish_reason: str) -> None:
        """Handle a token that needs more than its event."""
        call, request = self.call, choice.request
        stop_reason: str | int | None = None
        text = TOKEN_TEXTS[token_id]
        if finish_reason == "stop":
            if token_id in call.stop_token_ids:
                stop_reason = token_id
            if not call.include_stop or token_id == EOS_ID:
                text = ""
        if choice.stop_texts is not None:
            may_stop = request.output_token_count > call.min_tokens
            text, found = choice.stop_texts.push(text, may_stop=may_stop, last=bool(finish_reason))
            if found is not None:
                if not finish_reason:
                    self._host.model.abort(request.request_id, "stop")
                finish_reason, stop_reason = "stop", found
        if choice.events is not None:
            self._send(choice, text, token_id, finish_reason or None, stop_reason)
        if finish_reason:
            self._host.finished(request, finish_reason, call.choice_count)
            self._end_choice(choice, finish_reason, stop_reason)
        if self.faults:
            self.fire_faults()

    def fire_faults(self) -> None:
        """Fire the faults whose number of tokens is reached."""
        sent = sum(choice.request.output_token_count for choice in self.choices)
        while self.faults and self.faults[0][0] <= sent and not self.done.done():
            if not self._host.claim_fault(self):
                self.faults.clear()
                return
            _, kind = self.faults.pop(0)
            self._fire(kind)

    def abort(self) -> None:
        """End what is unfinished as an engine that is shutting down does."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._host.model.abort(choice.request.request_id)
                if choice.events is not None:
                    if self.call.is_chat:
                        self._send_roles(self.call.prompts[choice.prompt_index])
                    end = Delta("", (), "abort", text_offset=choice.text_offset)
                    self.write(choice.events.delta(end, choice.request.output_token_count))
                self._end_choice(choice, "abort", None)

    def fail(self, message: str = ENGINE_FAILURE) -> None:
        """End with an error: inside a stream, or as the status of a body."""
        self.leave_engine()
        if self.call.stream:
            self.write(error_event(message))
            self.write(DONE_EVENT)
        else:
            self.error = ApiError(message, status=500, type_="InternalServerError")
        self._complete()

    def leave_engine(self) -> None:
        """Stop the engine's work for this request, as when the client has gone."""
        for choice in self.choices:
            self._host.model.abort(choice.request.request_id)
            choice.silence()

    def body(self) -> bytes:
        """Return the JSON of an answer that is not streamed."""
        if self.spoiled:
            return _GARBAGE
        answers = [(choice.prompt_index, choice.answer()) for choice in self.choices]
        return (chat_body if self.call.is_chat else completion_body)(self.call, self.head, answers)

    def _send(
        self,
        choice: Choice,
        text: str,
        token_id: int,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> None:
        """Write the event of a token that is not plain, and what comes before the first one."""
        call, request, events = self.call, choice.request, choice.events
        assert events is not None  # noqa: S101 - only streams come here
        shown: Sequence[int] = (token_id,)
        prompt_token_ids = None
        if request.output_token_count == 1:
            prompt = call.prompts[choice.prompt_index]
            if call.is_chat:
                self._send_roles(prompt)
            elif call.echo:
                before = "" if call.return_token_ids else call.prompt_texts[choice.prompt_index]
                text = before if call.echo_only else before + text
                prompt_token_ids = prompt
            elif call.return_token_ids:
                prompt_token_ids = prompt
            choice.plain = choice.stop_texts is None and call.logprobs is None
        delta = Delta(text, shown, finish_reason, stop_reason, prompt_token_ids, choice.text_offset)
        self.write(events.delta(delta, request.output_token_count))
        choice.text_offset += len(TOKEN_TEXTS[token_id])

    def _send_roles(self, prompt: Sequence[int]) -> None:
        if self._role_sent:
            return
        self._role_sent = True
        for choice in self.choices:
            if choice.events is not None:
                self.write(choice.events.role(prompt if self.call.return_token_ids else None))

    def _end_choice(self, choice: Choice, reason: str, stop_reason: str | int | None) -> None:
        choice.plain = False
        choice.finish_reason = reason
        choice.stop_reason = stop_reason
        self._open_choice_count -= 1
        if self._open_choice_count:
            return
        if self.call.stream:
            if self.call.include_usage:
                prompt_tokens = sum(len(prompt) for prompt in self.call.prompts)
                output_tokens = sum(choice.request.output_token_count for choice in self.choices)
                self.write(usage_event(self.call, self.head, prompt_tokens, output_tokens))
            self.write(DONE_EVENT)
        self._complete()

    def _fire(self, kind: str) -> None:
        if kind == "die":
            self._host.die()
        elif kind == "cut":
            self.leave_engine()
            # What was written before must still reach the client: close after the loop has sent it.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._drop)
        elif kind == "eof":
            self.leave_engine()
            self._close()
        elif kind == "hang":
            for choice in self.choices:
                self._host.model.stall(choice.request.request_id)
                choice.silence()
        elif kind == "abort":
            self.abort()
        elif kind == "error":
            self.fail()
        elif not self.call.stream:
            # Without a stream there is no [DONE] to send early.
            self.spoiled = kind != "done"
        elif kind == "done":
            self.leave_engine()
            self.write(DONE_EVENT)
            self._complete()
        else:
            self.write(frame(_GARBAGE if kind == "garbage" else _BAD_JSON))

    def _complete(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
