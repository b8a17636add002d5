"""From an engine's blocks to the blocks of prompt digests.

An engine's block is small and known by its own hash; it names the block before it.
A digest's block has 256 tokens. It is there as long as every engine block that any
of its tokens is in is there, and the digest's block before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from sagecp.agent.kv_events.batch import BlockKey, BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from sagecp.core.prompt_digest import (
    BLOCK_TOKEN_COUNT,
    MAX_BLOCK_COUNT,
    next_token_block,
    token_chain_start,
)

MAX_ENGINE_BLOCK_COUNT = 1_000_000
"""Engine blocks that are followed, about 290 bytes each; with 16 tokens each, a cache of 16 million."""

_DIGEST_BLOCK_BYTES = 4 * BLOCK_TOKEN_COUNT


class ChangeSink(Protocol):
    """Takes what changes, in an order in which blocks never lack the ones before them."""

    def store(self, block_hash: int) -> None:
        """A block of digests is there."""

    def remove(self, block_hash: int) -> None:
        """It is there no more."""

    def clear(self) -> None:
        """None is there any more."""


class _DigestBlock:
    """A block of a digest.

    Attributes:
        depth: How many it is from the start of the prompt; 0: the start itself.
        engine_blocks: Those that have its tokens.
    """

    __slots__ = ("children", "depth", "engine_blocks", "is_live", "parent", "value")

    def __init__(
        self, value: int, parent: _DigestBlock | None, depth: int, engine_blocks: tuple[_EngineBlock, ...]
    ) -> None:
        self.value = value
        self.parent = parent
        self.depth = depth
        self.engine_blocks = engine_blocks
        self.children: dict[int, _DigestBlock] | None = None
        self.is_live = True


class _EngineBlock:
    """A block of the engine's.

    Attributes:
        token_ids: Packed.
        parent: Key of the one before it.
        last: The last block of the digest that ends in it or before it.
        tail_bytes: Of the token ids from there to its end.
        in_blocks: What of the digest has tokens of it: as a rule one block, several where prompts part.
    """

    __slots__ = ("in_blocks", "last", "parent", "tail_bytes", "token_ids")

    def __init__(self, token_ids: bytes, parent: BlockKey | None) -> None:
        self.token_ids = token_ids
        self.parent = parent
        self.last: _DigestBlock
        self.tail_bytes = 0
        self.in_blocks: _DigestBlock | set[_DigestBlock] | None = None

    def enter(self, block: _DigestBlock) -> None:
        if self.in_blocks is None:
            self.in_blocks = block
        elif isinstance(self.in_blocks, set):
            self.in_blocks.add(block)
        else:
            self.in_blocks = {self.in_blocks, block}

    def leave(self, block: _DigestBlock) -> None:
        if isinstance(self.in_blocks, set):
            self.in_blocks.discard(block)
        elif self.in_blocks is block:
            self.in_blocks = None


class BlockChains:
    """Which blocks of digests an engine has cached.

    Args:
        model_name: Served model, which the digests are salted with.
        sink: Is told what changes.
        max_engine_block_count: Beyond it, all is forgotten and begun anew.

    Attributes:
        overflow_count: How often that was.
    """

    def __init__(
        self, model_name: str, sink: ChangeSink, max_engine_block_count: int = MAX_ENGINE_BLOCK_COUNT
    ) -> None:
        self._sink = sink
        self._max_engine_block_count = max_engine_block_count
        self._start_value = token_chain_start(model_name)
        self._start = _DigestBlock(self._start_value, None, 0, ())
        self._engine_blocks: dict[BlockKey, _EngineBlock] = {}
        # The last to come last.
        self._live: dict[int, _DigestBlock] = {}
        self.overflow_count = 0

    @property
    def engine_block_count(self) -> int:
        """Engine blocks that are followed."""
        return len(self._engine_blocks)

    def __len__(self) -> int:
        """Return how many blocks of digests are there."""
        return len(self._live)

    def newest_first(self) -> Iterator[int]:
        """Yield every block: prompts that came last first, the blocks of a prompt from its start."""
        told: set[int] = set()
        for block in reversed(self._live.values()):
            path = []
            each: _DigestBlock | None = block
            while each is not None and each.depth and each.value not in told:
                told.add(each.value)
                path.append(each.value)
                each = each.parent
            yield from reversed(path)

    def take(self, event: CacheEvent) -> None:
        """Follow an event."""
        match event:
            case BlocksStored():
                self._store(event)
            case BlocksRemoved():
                self._remove(event.keys)
            case CacheCleared():
                self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._engine_blocks.clear()
        self._live.clear()
        self._start = _DigestBlock(self._start_value, None, 0, ())
        self._sink.clear()

    def _store(self, event: BlocksStored) -> None:
        parent, size = event.parent, event.block_bytes
        for number, key in enumerate(event.keys):
            token_ids = event.token_ids[number * size : (number + 1) * size]
            if not self._store_one(key, parent, token_ids):
                # It builds on what is not known, and so does what follows.
                return
            parent = key

    def _store_one(self, key: BlockKey, parent_key: BlockKey | None, token_ids: bytes) -> bool:
        """Follow one engine block, if what it builds on is followed; return whether it is."""
        engine_blocks = self._engine_blocks
        known = engine_blocks.get(key)
        if known is not None and known.last.is_live:
            return True
        last, tail_bytes = self._start, 0
        if parent_key is not None:
            parent = engine_blocks.get(parent_key)
            if parent is None or not parent.last.is_live:
                return False
            last, tail_bytes = parent.last, parent.tail_bytes
        if last.depth >= MAX_BLOCK_COUNT:
            return False
        if known is None and len(engine_blocks) >= self._max_engine_block_count:
            self.overflow_count += 1
            self.clear()
            return False
        block = _EngineBlock(token_ids, parent_key)
        block.last, block.tail_bytes = last, tail_bytes + len(token_ids)
        if block.tail_bytes >= _DIGEST_BLOCK_BYTES and not self._complete(block):
            return False
        engine_blocks[key] = block
        return True

    def _complete(self, block: _EngineBlock) -> bool:
        """Add what of digests ends in an engine block; return whether all its tokens are known."""
        covering = [block]
        known_bytes, key = len(block.token_ids), block.parent
        while known_bytes < block.tail_bytes:
            before = None if key is None else self._engine_blocks.get(key)
            if before is None:
                return False
            covering.append(before)
            known_bytes += len(before.token_ids)
            key = before.parent
        token_ids = b"".join(each.token_ids for each in reversed(covering))[-block.tail_bytes :]
        start = 0
        while len(token_ids) - start >= _DIGEST_BLOCK_BYTES and block.last.depth < MAX_BLOCK_COUNT:
            value = next_token_block(block.last.value, token_ids[start : start + _DIGEST_BLOCK_BYTES])
            block.last = self._add(block.last, value, tuple(covering))
            # What comes after the first has all its tokens in this one.
            covering = [block]
            start += _DIGEST_BLOCK_BYTES
        block.tail_bytes = len(token_ids) - start
        return True

    def _add(self, parent: _DigestBlock, value: int, engine_blocks: tuple[_EngineBlock, ...]) -> _DigestBlock:
        children = parent.children
        if children is None:
            children = parent.children = {}
        block = children.get(value)
        if block is None:
            block = children[value] = _DigestBlock(value, parent, parent.depth + 1, engine_blocks)
            self._live[value] = block
            self._sink.store(value)
        else:
            # The same tokens under other keys: it goes with the first of either.
            block.engine_blocks += engine_blocks
        for each in engine_blocks:
            each.enter(block)
        return block

    def _remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            gone = self._engine_blocks.pop(key, None)
            if gone is None or gone.in_blocks is None:
                continue
            blocks = gone.in_blocks if isinstance(gone.in_blocks, set) else {gone.in_blocks}
            # In the order of their hashes, not of their addresses: the same events, the same report.
            for block in sorted(blocks, key=lambda each: (each.depth, each.value)):
                if block.is_live:
                    self._kill(block)

    def _kill(self, block: _DigestBlock) -> None:
        """Remove a block and all that build on it, those first."""
        if block.parent is not None and block.parent.children is not None:
            del block.parent.children[block.value]
        order = [block]
        for each in order:
            if each.children is not None:
                order += each.children.values()
        for each in reversed(order):
            each.is_live = False
            del self._live[each.value]
            for engine_block in each.engine_blocks:
                engine_block.leave(each)
            each.engine_blocks, each.children, each.parent = (), None, None
            self._sink.remove(each.value)
