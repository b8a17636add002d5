"""vLLM's KV-cache events as they come over ZeroMQ, in every layout that its versions have had.

A batch is a MessagePack array of a time, events and, maybe, a rank. An event is a
map with a type or, in earlier versions, an array that begins with one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

BlockKey = int | bytes
"""An engine's own hash of a block."""

# Of an event that is an array, in order.
_STORED_FIELDS = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
    "extra_keys", "group_idx",
)  # fmt: skip
_REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")
_FIELDS = {"BlockStored": _STORED_FIELDS, "BlockRemoved": _REMOVED_FIELDS, "AllBlocksCleared": ()}


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks that follow each other are cached.

    Attributes:
        keys: First to last.
        parent: The block before the first; ``None``: it begins a prompt.
        token_ids: Of all of them, four bytes each in this machine's order.
        block_bytes: Of one block's token ids.
    """

    keys: Sequence[BlockKey]
    parent: BlockKey | None
    token_ids: bytes
    block_bytes: int


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks are cached no more."""

    keys: Sequence[BlockKey]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing is cached."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class Batch:
    """What happened in one step of an engine.

    Attributes:
        time_s: When, in Unix seconds of the engine's host.
        events: What, in order; without what says nothing of plain prompts.
    """

    time_s: float
    events: Sequence[CacheEvent]


def decode_batch(payload: bytes) -> Batch:
    """Return a batch.

    Left out are blocks of LoRA adapters, of other media than the engine's own
    memory, of further cache groups, those that more than tokens went into (images,
    a salt) together with what follows them, and events of unknown types.

    Raises:
        ValueError: It is none, or a field of it is of another type than it should be.
    """
    try:
        content = msgspec.msgpack.decode(payload)
        time_s, events = content[:2]
        found = [event for each in events if (event := _event(each)) is not None]
        return Batch(float(time_s), found)
    except (msgspec.DecodeError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"no batch of KV-cache events: {error}") from None


def _event(content: Any) -> CacheEvent | None:  # noqa: ANN401 - whatever MessagePack can say
    if isinstance(content, list):
        name, values = content[0], content[1:]
        # Later versions append fields; trailing ones may be left out.
        fields = dict(zip(_FIELDS.get(name, ()), values, strict=False))
    else:
        name, fields = content["type"], content
    if name == "AllBlocksCleared":
        return CacheCleared()
    if name not in _FIELDS or fields.get("medium") not in {None, "GPU"} or fields.get("group_idx"):
        return None
    keys = fields["block_hashes"]
    if not isinstance(keys, list) or not all(isinstance(key, (int, bytes)) for key in keys):
        raise ValueError("block_hashes are no list of hashes")
    return BlocksRemoved(keys) if name == "BlockRemoved" else _stored(keys, fields)


def _stored(keys: list[BlockKey], fields: dict[str, Any]) -> BlocksStored | None:
    if fields.get("lora_id") is not None or fields.get("lora_name") is not None:
        return None
    extra_keys = fields.get("extra_keys")
    if extra_keys:
        plain = next((number for number, each in enumerate(extra_keys) if each), len(keys))
        keys = keys[:plain]
    token_ids, block_size, parent = fields["token_ids"], fields["block_size"], fields["parent_block_hash"]
    if not isinstance(block_size, int) or not (parent is None or isinstance(parent, (int, bytes))):
        raise ValueError("block_size is no number, or parent_block_hash no hash")
    # Fewer blocks than tokens: some are not kept, such as those outside of a sliding window.
    is_whole = len(token_ids) == block_size * len(fields["block_hashes"])
    if not keys or not is_whole or block_size < 1:
        return None
    packed = array("i", token_ids)
    return BlocksStored(keys, parent, packed.tobytes(), block_size * packed.itemsize)
