"""Made-up log probabilities: shaped as vLLM's, the same for the same token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sagecp.sim.tokenizer import GENERATED_IDS, token_name

_ALL = -1
_MOST = 20


def _alternatives(token_id: int, top: int) -> list[tuple[int, float]]:
    """Return the token and less likely ones, with their log probabilities."""
    count = _MOST if top == _ALL else max(1, top)
    first = -0.05 - (token_id % 97) / 64
    others = [GENERATED_IDS[(token_id * 31 + step * 7) % len(GENERATED_IDS)] for step in range(1, count * 2)]
    distinct = list(dict.fromkeys([token_id, *others]))[:count]
    return [(other, round(first - rank * 0.4375, 6)) for rank, other in enumerate(distinct)]


def completion_logprobs(
    token_ids: Sequence[int], top: int, *, text_offset: int = 0, unknown_first: bool = False
) -> dict[str, list[Any]]:
    """Return the ``logprobs`` object of a completion.

    Args:
        token_ids: The tokens shown.
        top: Alternatives per token.
        text_offset: Where the first token's text begins.
        unknown_first: The first token begins the prompt, and so has no probability.
    """
    offsets: list[int] = []
    names: list[str] = []
    values: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    for position, token_id in enumerate(token_ids):
        name = token_name(token_id)
        offsets.append(text_offset)
        text_offset += len(name)
        names.append(name)
        if unknown_first and position == 0:
            values.append(None)
            alternatives.append(None)
            continue
        ranked = _alternatives(token_id, top)
        values.append(ranked[0][1])
        alternatives.append({token_name(other): value for other, value in ranked})
    return {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": names,
        "top_logprobs": alternatives,
    }


def chat_logprobs(token_ids: Sequence[int], top: int) -> dict[str, list[Any]]:
    """Return the ``logprobs`` object of a chat answer."""
    content = []
    for token_id in token_ids:
        ranked = _alternatives(token_id, top)
        entry = _entry(*ranked[0])
        entry["top_logprobs"] = [_entry(*pair) for pair in ranked] if top else []
        content.append(entry)
    return {"content": content}


def _entry(token_id: int, value: float) -> dict[str, Any]:
    name = token_name(token_id)
    return {"token": name, "logprob": value, "bytes": list(name.encode())}
