"""A paged KV cache with prefix sharing: who holds which block, and what may be reused.

Only the bookkeeping: no keys or values exist. Blocks are handed out from a free
list in least-recently-freed order. A full block whose contents are known is
registered under a hash chained over all tokens before it, keeps its contents
when it is freed, and can be taken again until another request needs its room.
Hashes of integers do not depend on the process, so runs repeat exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

# The chain starts here; any constant does.
_ROOT_HASH = 0x5A6E_C0DE


@dataclass(slots=True)
class BlockTable:
    """The blocks that one request holds, in order of position.

    Attributes:
        block_ids: The blocks.
        hashed_block_count: Leading blocks whose chained hash is known.
        last_hash: The hash of the last of those.
    """

    block_ids: list[int] = field(default_factory=list)
    hashed_block_count: int = 0
    last_hash: int = _ROOT_HASH


class KvCache:
    """Blocks, their holders, and the contents that freed blocks still have.

    Args:
        block_count: Blocks in the cache.
        block_size: Tokens in a block.
        prefix_caching: Whether blocks are shared and kept for reuse.
    """

    def __init__(self, block_count: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if block_count < 1 or block_size < 1:
            raise ValueError(f"a cache of {block_count} blocks of {block_size} tokens cannot hold anything")
        self.block_count = block_count
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._holders = [0] * block_count
        self._hash_of: list[int | None] = [None] * block_count
        self._block_of: dict[int, int] = {}
        # The first is the next to be given away; contents of the last live longest.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(block_count))

    @property
    def free_block_count(self) -> int:
        """Blocks that nobody holds, whether or not they still have contents."""
        return len(self._free)

    @property
    def used_block_count(self) -> int:
        """Blocks held by at least one request."""
        return self.block_count - len(self._free)

    @property
    def cached_block_count(self) -> int:
        """Blocks whose contents can be found by hash, held or not."""
        return len(self._block_of)

    @property
    def usage(self) -> float:
        """Share of blocks that are held, from 0 to 1."""
        return self.used_block_count / self.block_count

    def blocks_for(self, token_count: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-token_count // self.block_size)

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Return the hashes of the longest cached prefix, leaving at least one token to compute."""
        if not self.prefix_caching or len(token_ids) <= self.block_size:
            return []
        block_of, block_size = self._block_of, self.block_size
        hashes, parent = [], _ROOT_HASH
        for start in range(0, (len(token_ids) - 1) // block_size * block_size, block_size):
            parent = hash((parent, *token_ids[start : start + block_size]))
            if parent not in block_of:
                break
            hashes.append(parent)
        return hashes

    def open(self, prefix_hashes: Sequence[int], token_count: int) -> BlockTable | None:
        """Give a request its first blocks, sharing a cached prefix.

        Args:
            prefix_hashes: What :meth:`match` returned, with nothing freed or taken since.
            token_count: Tokens the table must hold, the prefix included.

        Returns:
            The table, or ``None`` when not enough blocks are free.
        """
        shared = [self._block_of[block_hash] for block_hash in prefix_hashes]
        revived = sum(1 for block_id in shared if self._holders[block_id] == 0)
        if self.blocks_for(token_count) - len(shared) > len(self._free) - revived:
            return None
        for block_id in shared:
            if self._holders[block_id] == 0:
                del self._free[block_id]
            self._holders[block_id] += 1
        table = BlockTable(shared, len(shared), prefix_hashes[-1] if prefix_hashes else _ROOT_HASH)
        self._take(table, self.blocks_for(token_count) - len(shared))
        return table

    def grow(self, table: BlockTable, token_count: int) -> bool:
        """Make room for so many tokens in all; return False, and change nothing, if there is none."""
        needed = self.blocks_for(token_count) - len(table.block_ids)
        if needed > len(self._free):
            return False
        self._take(table, needed)
        return True

    def commit(self, table: BlockTable, token_ids: Sequence[int], computed_token_count: int) -> None:
        """Register the full blocks of a request's computed tokens, so that others find them."""
        if not self.prefix_caching:
            return
        block_size = self.block_size
        for index in range(table.hashed_block_count, computed_token_count // block_size):
            start = index * block_size
            block_hash = hash((table.last_hash, *token_ids[start : start + block_size]))
            table.last_hash = block_hash
            block_id = table.block_ids[index]
            # A block with the same contents may exist; the first one stays the one that is found.
            if block_hash not in self._block_of:
                self._block_of[block_hash] = block_id
                self._hash_of[block_id] = block_hash
            table.hashed_block_count = index + 1

    def close(self, table: BlockTable) -> None:
        """Take back every block; the end of the sequence will be given away first."""
        for block_id in reversed(table.block_ids):
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    # Without contents there is nothing to keep: reuse it before those that have some.
                    self._free.move_to_end(block_id, last=False)
        table.block_ids.clear()
        table.hashed_block_count = 0
        table.last_hash = _ROOT_HASH

    def clear(self) -> None:
        """Forget the contents of every block that nobody holds."""
        for block_id in self._free:
            self._forget(block_id)

    def check(self) -> None:
        """Verify the bookkeeping; for tests.

        Raises:
            AssertionError: Something does not add up.
        """
        unheld = {block_id for block_id, holders in enumerate(self._holders) if holders == 0}
        if unheld != set(self._free):
            raise AssertionError("free list and holders disagree")
        for block_hash, block_id in self._block_of.items():
            if self._hash_of[block_id] != block_hash:
                raise AssertionError(f"block {block_id} is found under a hash that is not its own")
        if sum(value is not None for value in self._hash_of) != len(self._block_of):
            raise AssertionError("a block has a hash under which it is not found")

    def _take(self, table: BlockTable, count: int) -> None:
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            self._forget(block_id)
            self._holders[block_id] = 1
            table.block_ids.append(block_id)

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None
