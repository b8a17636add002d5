"""Joins a continuation's text to the text that was delivered before.

Token ids join by themselves; text does not, for two reasons. An engine that
looks for stop strings holds back as many characters as might begin one (the
longest, less one), while their token ids are delivered already. And a
character of several tokens has no text before its last one.

So the text of all tokens is asked of the engine that goes on, and compared
with what was delivered: a difference that cannot be explained ends the attempt
before anything wrong is delivered. A reasoning parser, for example, takes text
out of an answer that a continuation would not take out.

The engine is given no stop strings, because it would not see one that begins
before the splice; they are found here, by its rules: a stop string counts once
the token that completes it is beyond ``min_tokens``, of several the one that is
complete first, and output that might begin one is held back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sagecp.core.types import RequestMetadata, SamplingParameters
from sagecp.runtime.engines.base import (
    EngineClient,
    EngineDelta,
    EngineError,
    EngineOutcome,
    EngineRejectedError,
    EngineSink,
    EngineSpliceError,
    EngineTimeoutError,
    EngineTimeouts,
)
from sagecp.runtime.engines.continuation import Continuation, remaining_token_count
from sagecp.runtime.engines.request_body import make_engine_call

# For questions that an engine answers from its head.
_ASK_TIMEOUT_S = 10.0
# Prompt tokens before the output that settle how its first token is written.
_LEAD_TOKEN_COUNT = 16
# Characters that must agree before a splice is trusted.
_CHECKED_CHARACTER_COUNT = 32
# What a decoder writes for bytes that are not a whole character, or not yet.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class KnownText:
    """The text of a continuation's tokens.

    Attributes:
        output: Text of the output, as far as its characters are complete.
        repeated: What the engine may repeat before its first new text, where the
            output ends inside a character; else ``""``.
    """

    output: str = field(repr=False)
    repeated: str = field(default="", repr=False)


async def read_known_text(
    client: EngineClient, model: str, continuation: Continuation, timeout_s: float
) -> KnownText:
    """Ask an engine for the text of the tokens that it is to go on after.

    Raises:
        EngineSpliceError: It does not know the tokens, or gives no text.
        EngineError: It does not answer.
    """
    prompt, output = continuation.prompt_token_ids, continuation.output_token_ids
    lead_ids = prompt[-_LEAD_TOKEN_COUNT:]
    try:
        lead = await client.detokenize(model, lead_ids, timeout_s)
        text = await client.detokenize(model, lead_ids + output, timeout_s)
        # A prompt that ends inside a character makes the output begin with the rest of it.
        lead = lead.rstrip(_REPLACEMENT)
        if text.startswith(lead):
            text = text[len(lead) :]
        else:
            text = await client.detokenize(model, output, timeout_s)
        repeated = ""
        if text.endswith(_REPLACEMENT):
            repeated = await client.detokenize(model, prompt + output, timeout_s)
    except EngineRejectedError as error:
        raise EngineSpliceError(
            f"the engine does not tell the text of the output so far (/detokenize): {error}"
        ) from error
    return KnownText(text.rstrip(_REPLACEMENT), repeated.rstrip(_REPLACEMENT))


def held_back(known: str, delivered: str, hold_count: int) -> str:
    """Return the text that exists and was not delivered: the last ``hold_count`` characters, or all.

    Raises:
        EngineSpliceError: What was delivered is not the rest.
    """
    start = max(0, len(known) - hold_count)
    count = min(start, len(delivered), _CHECKED_CHARACTER_COUNT)
    if bool(start) != bool(delivered) or known[start - count : start] != delivered[len(delivered) - count :]:
        raise EngineSpliceError(
            "the text delivered so far is not the text of its tokens; another engine cannot go on after it"
        )
    return known[start:]


class SpliceSink:
    """Passes a continuation's output on, joined to the text before it.

    Args:
        sink: Takes the output.
        known: The text before.
        delivered: How much of it was delivered.
        sampling: For the stop strings, as the user gave them.
        min_token_count: Tokens of the continuation before which nothing may stop it.
        on_end: Called once when the engine's work is to be stopped: a stop string
            was found, or the output cannot be joined.

    Attributes:
        token_count: Tokens of the continuation.
        token_ids: Those that were passed on, where a stop string may end the answer.
        stopped: Whether a stop string ended the answer.
        stop_end: How many characters of the last piece's new text that took.
        last: The piece in which it ended, if that holds several tokens: some of
            them may come after the end, and :meth:`finish` is to be told which do not.
        error: Why the output cannot be joined, or ``None``.

    Raises:
        EngineSpliceError: What was delivered does not match.
    """

    def __init__(
        self,
        sink: EngineSink,
        known: KnownText,
        delivered: str,
        sampling: SamplingParameters,
        min_token_count: int,
        on_end: Callable[[], object],
    ) -> None:
        self._sink = sink
        self._stop = sampling.stop
        self._include_stop = bool(sampling.include_stop_str_in_output)
        self._min_token_count = min_token_count
        self._on_end = on_end
        self._repeated = known.repeated
        # Characters that might belong to a stop string that is not complete.
        self._border_count = max((len(text) for text in self._stop), default=1) - 1
        self._hold_count = 0 if self._include_stop else self._border_count
        self._held = held_back(known.output, delivered, self._hold_count)
        self._border = self._end_of(known.output)
        self._passes = not self._stop and not self._repeated
        self.token_count = 0
        self.token_ids: list[int] = []
        self.stopped = False
        self.stop_end = 0
        self.last: EngineDelta | None = None
        self.error: EngineSpliceError | None = None

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Ignore it: this prompt holds output."""

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Take pieces of output; those after the end are dropped."""
        if self._passes:
            self._sink.on_deltas(deltas)
            return
        if self.stopped or self.error is not None:
            return
        joined: list[EngineDelta] = []
        for delta in deltas:
            try:
                piece = self._join(delta)
            except EngineSpliceError as error:
                self.error = error
                self._on_end()
                break
            if self.stopped and len(piece.token_ids or ()) > 1:
                self.last = piece
                break
            self.token_ids.extend(piece.token_ids or ())
            joined.append(piece)
            if self.stopped:
                break
        if joined:
            self._sink.on_deltas(joined)
        if self.stopped:
            self._on_end()

    def finish(self, token_ids: Sequence[int]) -> None:
        """Deliver :attr:`last` with these token ids."""
        last, self.last = self.last, None
        assert last is not None  # noqa: S101 - the caller has looked at it
        self.token_count -= last.token_count - len(token_ids)
        last.token_ids, last.token_count = token_ids, len(token_ids)
        self._sink.on_deltas([last])

    def _join(self, delta: EngineDelta) -> EngineDelta:
        text = delta.text
        if text and self._repeated:
            text = self._without_repetition(text)
            self._repeated = ""
            self._passes = not self._stop
        self.token_count += delta.token_count
        finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        pending = self._held + text
        found = self._find_stop(text)
        if found is not None:
            stop, end = found
            # Counted from the end of what was known, which is where the text begins.
            end -= 0 if self._include_stop else len(stop)
            shown = pending[: len(self._held) + end]
            self.stop_end = found[1]
            finish_reason, stop_reason = "stop", stop
            self.stopped = True
        elif finish_reason:
            shown = pending
        else:
            shown = pending[: max(0, len(pending) - self._hold_count)]
        self._held = pending[len(shown) :]
        self._border = self._end_of(self._border + text)
        return EngineDelta(
            delta.choice_index, shown, delta.token_ids, delta.token_count, finish_reason, stop_reason
        )

    def _find_stop(self, text: str) -> tuple[str, int] | None:
        """Return the stop string that is complete first, and where in the new text it ends."""
        if not text or self.token_count <= self._min_token_count:
            return None
        searched = self._border + text
        best: tuple[str, int] | None = None
        for stop in self._stop:
            start = searched.find(stop, max(0, len(self._border) - len(stop) + 1))
            end = start + len(stop) - len(self._border)
            if start >= 0 and (best is None or end < best[1]):
                best = stop, end
        return best

    def _without_repetition(self, text: str) -> str:
        """Return what is new in an engine's first text after a prompt that ends inside a character.

        vLLM's decoder has no text for such a prompt and so gives the prompt's
        along with the character's. Special tokens are left out there.
        """
        repeated = self._repeated
        if text.startswith(repeated):
            return text[len(repeated) :]
        for count in (_CHECKED_CHARACTER_COUNT, _CHECKED_CHARACTER_COUNT // 4):
            end = repeated[-count:]
            start = text.rfind(end)
            if start >= 0:
                return text[start + len(end) :]
        raise EngineSpliceError("the engine's text does not go on inside the character that was cut")

    def _end_of(self, text: str) -> str:
        return text[-self._border_count :] if self._border_count else ""


async def continue_generation(
    client: EngineClient,
    metadata: RequestMetadata,
    model: str,
    continuation: Continuation,
    sink: EngineSink,
    timeouts: EngineTimeouts,
    *,
    request_id: str = "",
    headers: Mapping[str, str] | None = None,
) -> EngineOutcome:
    """Go on with a request's output on an engine, joined to what was delivered.

    The counts of the outcome are those of this attempt; see
    :func:`~sagecp.runtime.engines.continuation.usage_after`.

    Args:
        client: Of the engine that goes on.
        metadata: What was asked.
        model: The served name.
        continuation: What was produced so far.
        sink: Takes what is new.
        timeouts: For all of it.
        request_id: What the engine shall call the attempt; default: the request's id.
        headers: Further headers of its call, such as a trace context.

    Raises:
        EngineSpliceError: Text and tokens so far do not agree.
        EngineError: As for any call.
        ValueError: The request cannot be continued.
    """
    start_s = time.monotonic()
    ask_timeout_s = min(timeouts.first_token_s, timeouts.total_s, _ASK_TIMEOUT_S)
    output_count = len(continuation.output_token_ids)
    context_token_count = None
    try:
        if remaining_token_count(metadata, output_count) is None:
            context_token_count = await client.context_token_count(model, ask_timeout_s)
        call = make_engine_call(
            metadata,
            model,
            token_ids=True,
            continuation=continuation,
            context_token_count=context_token_count,
            request_id=request_id,
        )
        if headers:
            call = dataclasses.replace(call, headers=headers)
        known = await read_known_text(client, model, continuation, ask_timeout_s)
    except EngineTimeoutError as error:
        if ask_timeout_s < timeouts.total_s:
            raise
        raise EngineTimeoutError("the request's time was up before it could go on", "total") from error
    left_s = max(0.0, timeouts.total_s - (time.monotonic() - start_s))

    work: asyncio.Task[EngineOutcome] | None = None

    def stop_work() -> None:
        assert work is not None  # noqa: S101 - output comes from it
        work.cancel()

    sampling = metadata.sampling
    least = (sampling.min_tokens or 0) - output_count
    splice = SpliceSink(sink, known, continuation.output_text, sampling, least, stop_work)
    work = asyncio.get_running_loop().create_task(
        client.generate(call, splice, dataclasses.replace(timeouts, total_s=left_s))
    )
    outcome: EngineOutcome | None = None
    try:
        outcome = await work
    except (asyncio.CancelledError, EngineError):
        task = asyncio.current_task()
        if (task is not None and task.cancelling()) or not (splice.stopped or splice.error):
            raise
    if splice.error is not None:
        raise splice.error
    if splice.stopped:
        await _end_at_stop(client, model, continuation, splice, ask_timeout_s)
        prompt_count = len(continuation.prompt_token_ids) + output_count
        return EngineOutcome(("stop",), prompt_count, splice.token_count)
    assert outcome is not None  # noqa: S101 - whatever else ends it has raised
    return outcome


async def _end_at_stop(
    client: EngineClient, model: str, continuation: Continuation, splice: SpliceSink, timeout_s: float
) -> None:
    """Deliver the piece that a stop string ended, without the tokens that came after it in that piece.

    An engine that is ahead of its reader gives several tokens at once. It alone
    knows the text of each.
    """
    last = splice.last
    if last is None:
        return
    token_ids = list(last.token_ids or ())
    before = [*continuation.output_token_ids, *splice.token_ids][-_LEAD_TOKEN_COUNT:]
    kept = len(token_ids)
    try:
        start = len((await client.detokenize(model, before, timeout_s)).rstrip(_REPLACEMENT))
        for count in range(1, len(token_ids)):
            text = await client.detokenize(model, before + token_ids[:count], timeout_s)
            if len(text.rstrip(_REPLACEMENT)) - start >= splice.stop_end:
                kept = count
                break
    except EngineError:
        # It died in between. A token too many is better than an answer that is lost.
        kept = len(token_ids)
    splice.finish(token_ids[:kept])
