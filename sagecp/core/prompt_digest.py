"""What a prompt is, as numbers: which blocks it begins with, without its text.

Engines cache prefixes by content; equal digests of leading blocks tell which
prompts can share. A digest approximates the engine's own blocks: it is taken
before any tokenizer or chat template, but in the order in which templates
write (tools, then messages), so that a shared system prompt is a shared start.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sagecp.core.prompt_size import BYTES_PER_TOKEN, estimate_prompt_token_count
from sagecp.core.types import OpenAiApi, PromptDigest, RequestMetadata

BLOCK_TOKEN_COUNT = 256
"""Tokens per block: one block of text is 1,024 characters."""
MAX_BLOCK_COUNT = 1024
"""Blocks after these are not told apart; they cover 262,144 tokens."""
MAX_PARSED_BYTES = 512 * 1024
"""Opaque bodies above this are not parsed, which costs about 5 us per KiB, and have no blocks."""

_BLOCK_CHARACTERS = BLOCK_TOKEN_COUNT * BYTES_PER_TOKEN
_MAX_CHARACTERS = MAX_BLOCK_COUNT * _BLOCK_CHARACTERS
_DIGEST_BYTES = 8
_IDS_KIND = "token ids"
# Between messages, and between the fields of one; JSON and prose hold neither.
_MESSAGE_START, _FIELD_START = "\x1e", "\x1f"


def digest_prompt(metadata: RequestMetadata, model: str = "", token_count: int = 0) -> PromptDigest:
    """Return the digest of a request's prompt.

    Hashes are chained: a block's covers all before it, the model's name and the
    kind of prompt. So prompts share the blocks of their common start, and a
    longer prompt has all the blocks of a shorter one that it begins with. Only
    full blocks count, as in vLLM. They are the same in every process.

    Texts, conversations and token ids are told apart even where a template
    would make them equal. Opaque bodies of moderate size are parsed, and equal
    their typed forms; others, and what is not JSON, have a length only.

    Args:
        metadata: The request. A digest that it brings along is returned as it is.
        model: The served model; empty: the one that the metadata name.
        token_count: Tokens of the prompt, where the caller has counted; 0: they
            are estimated.
    """
    if metadata.prompt_digest is not None:
        return metadata.prompt_digest
    if token_count <= 0:
        token_count = estimate_prompt_token_count(metadata)
    cache_salt = metadata.sampling.engine_extras.get("cache_salt")
    salt = [model or metadata.model_name, "" if cache_salt is None else str(cache_salt)]
    hashes: tuple[int, ...]
    if metadata.prompt_token_ids:
        hashes = _token_id_hashes(metadata.prompt_token_ids, salt)
    elif metadata.prompt is not None:
        hashes = _text_hashes("text", metadata.prompt, salt)
    elif metadata.messages:
        hashes = _text_hashes("chat", _conversation(metadata.tools, metadata.messages), salt)
    elif metadata.openai_body:
        hashes = _body_hashes(metadata.openai_body, metadata.openai_api, salt)
    else:
        hashes = ()
    # Estimates of tokens and blocks may differ a little; a prompt has no more blocks than tokens for them.
    return PromptDigest(token_count, hashes[: token_count // BLOCK_TOKEN_COUNT], BLOCK_TOKEN_COUNT)


def token_chain_start(model: str) -> int:
    """Return what stands before the first block of a prompt of token ids, for :func:`next_token_block`.

    Args:
        model: The served model.
    """
    return _chain_start(_IDS_KIND, [model, ""])


def next_token_block(previous_hash: int, token_ids: bytes) -> int:
    """Return the hash of a block of token ids, as :func:`digest_prompt` has it for such prompts.

    Args:
        previous_hash: Of the block before it, or :func:`token_chain_start`.
        token_ids: ``BLOCK_TOKEN_COUNT`` ids, four bytes each in this machine's order.
    """
    return _next_hash(previous_hash, token_ids)


def token_block_hashes(token_ids: Sequence[int], model: str) -> tuple[int, ...]:
    """Return the blocks of a prompt of token ids without a salt.

    Args:
        token_ids: As an engine reads the prompt; four times as fast as an ``array("I")``.
        model: The served model.
    """
    salt = [model, ""]
    if isinstance(token_ids, array) and token_ids.typecode in {"i", "I"}:
        return _packed_hashes(token_ids, salt)
    return _token_id_hashes(token_ids, salt)


def has_cache_salt(metadata: RequestMetadata) -> bool:
    """Return whether a request shares no cache with those of others; true where a body might say so."""
    return "cache_salt" in metadata.sampling.engine_extras or b'"cache_salt"' in metadata.openai_body


def _chain_start(kind: str, salt: Sequence[str]) -> int:
    start = "\0".join([kind, *salt]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=_DIGEST_BYTES).digest(), "big")


def _next_hash(previous_hash: int, block: bytes) -> int:
    content = previous_hash.to_bytes(_DIGEST_BYTES, "big") + block
    return int.from_bytes(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest(), "big")


def _chained(
    kind: str, salt: Sequence[str], block_count: int, block: Callable[[int], bytes]
) -> tuple[int, ...]:
    """Return the hashes of some blocks, each over the one before it and its own bytes."""
    value = _chain_start(kind, salt)
    hashes = []
    for number in range(min(block_count, MAX_BLOCK_COUNT)):
        value = _next_hash(value, block(number))
        hashes.append(value)
    return tuple(hashes)


def _text_hashes(kind: str, text: str, salt: Sequence[str]) -> tuple[int, ...]:
    def block(number: int) -> bytes:
        start = number * _BLOCK_CHARACTERS
        return text[start : start + _BLOCK_CHARACTERS].encode("utf-8", "surrogatepass")

    return _chained(kind, salt, len(text) // _BLOCK_CHARACTERS, block)


def _token_id_hashes(token_ids: Sequence[int], salt: Sequence[str]) -> tuple[int, ...]:
    try:
        ids = array("i", token_ids[: MAX_BLOCK_COUNT * BLOCK_TOKEN_COUNT])
    except (OverflowError, TypeError):
        # No token has such an id; the engine will say so.
        return ()
    return _packed_hashes(ids, salt)


def _packed_hashes(ids: array[int], salt: Sequence[str]) -> tuple[int, ...]:
    def block(number: int) -> bytes:
        start = number * BLOCK_TOKEN_COUNT
        return ids[start : start + BLOCK_TOKEN_COUNT].tobytes()

    return _chained(_IDS_KIND, salt, len(ids) // BLOCK_TOKEN_COUNT, block)


def _body_hashes(body: bytes, api: OpenAiApi | None, salt: Sequence[str]) -> tuple[int, ...]:
    if len(body) > MAX_PARSED_BYTES:
        return ()
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(content, dict):
        return ()
    if "cache_salt" in content:
        salt = [salt[0], str(content["cache_salt"])]
    if api is OpenAiApi.CHAT_COMPLETIONS:
        messages, tools = content.get("messages"), content.get("tools")
        if not isinstance(messages, list):
            return ()
        return _text_hashes("chat", _conversation(tools if isinstance(tools, list) else (), messages), salt)
    prompt = content.get("prompt")
    if isinstance(prompt, str):
        return _text_hashes("text", prompt, salt)
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return _token_id_hashes(prompt, salt)
    # Several prompts in one body share nothing as a whole.
    return ()


def _conversation(tools: Sequence[Any], messages: Sequence[Any]) -> str:
    """Return tools and messages as one text; one more message only appends to it."""
    pieces = []
    length = 0
    for piece in _conversation_pieces(tools, messages):
        pieces.append(piece)
        length += len(piece)
        if length >= _MAX_CHARACTERS:
            break
    return "".join(pieces)


def _conversation_pieces(tools: Sequence[Any], messages: Sequence[Any]) -> Iterator[str]:
    for tool in tools:
        yield _MESSAGE_START
        yield _json(tool)
    for message in messages:
        yield _MESSAGE_START
        if not isinstance(message, Mapping):
            yield _json(message)
            continue
        yield str(message.get("role", ""))
        yield _FIELD_START
        yield from _content_pieces(message.get("content"))
        # Calls of tools, names, reasoning: templates write them after the content.
        further = [(str(name), value) for name, value in message.items() if name not in {"role", "content"}]
        for name, value in sorted(further, key=itemgetter(0)):
            yield _FIELD_START
            yield name
            yield _FIELD_START
            yield _json(value)


def _content_pieces(content: Any) -> Iterator[str]:  # noqa: ANN401  # the OpenAI form: text, parts, or nothing
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, tuple)):
        for part in content:
            if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                yield part["text"]
            else:
                yield _FIELD_START
                yield _json(part)
    elif content is not None:
        yield _json(content)


def _json(value: Any) -> str:  # noqa: ANN401  # whatever JSON can say
    """Return a value as JSON, the same for equal values; what JSON cannot say looks all the same."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        # The engine call fails on it, and says so.
        return "?"
