"""Goes on with a request on another engine, from its prompt and the output there is.

An engine that is given the prompt's and the output's token ids as one prompt
computes the same next token as the lost engine would have. This module says
for which requests that holds, and how its answer becomes the whole request's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from sagecp.core.types import RequestMetadata
from sagecp.runtime.engines.base import EngineOutcome

COMPLETIONS_DEFAULT_MAX_TOKENS = 16
"""What the completions API generates at most when it is told no bound."""

# Extras that shape the prompt, which a continuation has as token ids already.
PROMPT_EXTRAS = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "truncation_side",
    }
)
# Extras that change neither the prompt nor the choice of tokens.
_NEUTRAL_EXTRAS = frozenset({"cache_salt", "metadata", "priority", "session_id", "user"})


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the next attempt goes on after.

    Attributes:
        prompt_token_ids: The prompt.
        output_token_ids: Every token that exists.
        output_text: Their text, as far as it was delivered.
    """

    prompt_token_ids: tuple[int, ...] = field(repr=False)
    output_token_ids: tuple[int, ...] = field(repr=False)
    output_text: str = field(repr=False)


def why_not_continued(metadata: RequestMetadata) -> str:
    """Return why a request of this shape cannot go on from token ids; ``""``: it can.

    The phrase completes "the request cannot be continued, because ...".

    Whatever an engine keeps beside the token ids is lost with it: the state of a
    grammar, a tool parser's, probabilities. Three cases are less plain. vLLM
    applies the presence and the frequency penalty to output tokens alone, and
    a continuation's earlier output is part of its prompt, so the penalties
    would forget it. (The repetition penalty looks at the prompt, too, and
    stays exact.) A forbidden word of several tokens is recognised by the output
    before its last one, so one across the splice would slip through. And a seed
    makes a continuation repeatable, but not equal to the unbroken run: the
    engine's random numbers begin anew. That is allowed, since sampled output
    stays within the same distribution.

    Extras that this module does not know are taken for a change of decoding.
    """
    sampling = metadata.sampling
    if metadata.openai_body or metadata.include_openai_events:
        return "its engine events are passed through"
    if metadata.choice_count > 1:
        return f"it asks for {metadata.choice_count} choices"
    if metadata.tools or metadata.tool_choice is not None:
        return "it uses tools"
    if not all(_is_text(message) for message in metadata.messages):
        return "its prompt holds more than text"
    if sampling.structured_output:
        return "its output is restricted by a grammar"
    if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
        return "it asks for log probabilities"
    if sampling.echo:
        return "it echoes the prompt"
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "its presence or frequency penalty counts output tokens"
    if sampling.bad_words:
        return "it forbids words"
    unknown = sorted(sampling.engine_extras.keys() - PROMPT_EXTRAS - _NEUTRAL_EXTRAS)
    if unknown:
        return f"its engine extra {unknown[0]!r} may change how tokens are chosen"
    return ""


def _is_text(message: Mapping[str, object]) -> bool:
    content = message.get("content")
    if message.get("tool_calls"):
        return False
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list | tuple) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") == "text")
        for part in content
    )


def remaining_token_count(metadata: RequestMetadata, output_token_count: int) -> int | None:
    """Return how many tokens may follow the output there is; ``None``: as many as the context holds.

    Never negative. With 0 the request is complete, with finish reason ``length``.
    Without a bound the completions API has one of its own, the chat API has none.
    """
    max_tokens = metadata.max_tokens
    if max_tokens is None:
        if metadata.messages:
            return None
        max_tokens = COMPLETIONS_DEFAULT_MAX_TOKENS
    return max(0, max_tokens - output_token_count)


def usage_after(outcome: EngineOutcome, continuation: Continuation | None) -> EngineOutcome:
    """Return an attempt's outcome as the whole request's: its prompt held earlier output."""
    if continuation is None:
        return outcome
    earlier = len(continuation.output_token_ids)
    prompt, completion = outcome.prompt_token_count, outcome.completion_token_count
    cached = outcome.cached_token_count
    if prompt is not None:
        prompt = max(0, prompt - earlier)
    return dataclasses.replace(
        outcome,
        prompt_token_count=prompt,
        completion_token_count=None if completion is None else completion + earlier,
        # What was cached beyond the prompt was output.
        cached_token_count=cached if cached is None or prompt is None else min(cached, prompt),
    )
