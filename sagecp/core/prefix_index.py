"""Which instance has which leading blocks of which prompts in its cache.

Our own dispatches tell, and where they do, the engines themselves.

Engines with prefix caching keep the key and value blocks of past prompts until
others need the room, least recently used first (vLLM's automatic prefix
caching: a finished request's blocks go to the end of the free queue, its last
block first). The index does the same with the blocks of every dispatch, so
that it needs no report from the engines. Where an engine reports its cache, what
it says holds: blocks that it stored stay until it says that they are gone.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

# What a match names at most: beyond the best few, holders are as good as any instance.
HOLDER_LIMIT = 16


class _Cache:
    """The blocks of one instance.

    Attributes:
        generation: Counts the caches that were begun, over all instances.
        bit: The instance's bit in the index's masks; one object, so that blocks
            held by it alone share it.
        block_count: Blocks that it has, each counted once.
        evictable: Blocks no running request uses, least recently used first.
        pins: Running requests per block in use.
        reported: Blocks that its engine says it has, the last to come last. They may be
            pinned too, and are never evictable: only the engine knows when they go.
        is_exact: Whether its engine reports.
    """

    __slots__ = (
        "bit",
        "block_count",
        "capacity",
        "evictable",
        "generation",
        "instance_id",
        "is_exact",
        "pins",
        "reported",
        "slot",
    )

    def __init__(self, instance_id: str, generation: int, slot: int, capacity: int) -> None:
        self.instance_id = instance_id
        self.generation = generation
        self.slot = slot
        self.bit = 1 << slot
        self.capacity = capacity
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.pins: dict[int, int] = {}
        self.reported: dict[int, None] = {}
        self.is_exact = False
        self.block_count = 0

    def has(self, block: int) -> bool:
        return block in self.pins or block in self.evictable or block in self.reported


class PrefixIndex:
    """Mirrors the prefix caches of a fleet.

    Blocks are named by hashes that cover everything before them. Per block there
    is a mask with one bit per instance that has it. An instance that has a block
    has all before it, because the last blocks of a prompt are dropped first: so
    masks can only lose bits along a prompt, and a match finds the places where
    they do by bisection, in O(log blocks) look-ups for each of them.

    Blocks of running requests are pinned and may exceed an instance's capacity:
    the engine made room for them, whatever the estimate says. Memory is about
    300 bytes per block that one instance holds, and one bit per instance in the
    mask of a run of blocks that several hold.

    Args:
        max_block_count: Most blocks to keep, a block on two instances counting
            twice. At the bound, instances give up their oldest in turn.
    """

    def __init__(self, max_block_count: int = 2_000_000) -> None:
        self._max_block_count = max_block_count
        self._block_count = 0
        self._masks: dict[int, int] = {}
        self._caches: dict[str, _Cache] = {}
        self._slots: list[_Cache | None] = []
        self._free_slots: list[int] = []
        self._last_generation = 0
        # Where the search for a block to give up goes on.
        self._eviction_slot = 0

    def __len__(self) -> int:
        """Return how many blocks are kept, over all instances."""
        return self._block_count

    def block_count(self, instance_id: str) -> int:
        """Return how many blocks an instance has; 0 for one that is not known."""
        cache = self._caches.get(instance_id)
        return cache.block_count if cache is not None else 0

    def generation(self, instance_id: str) -> int:
        """Return a number that an instance's cache has had since it began empty, and no other; 0: unknown id.

        What was pinned under another generation must not be released: the same
        blocks may be pinned again by requests that came later.
        """
        cache = self._caches.get(instance_id)
        return cache.generation if cache is not None else 0

    def add_instance(
        self, instance_id: str, capacity_block_count: int, *, keep_reported: bool = False
    ) -> None:
        """Begin with an empty cache; one that is known has restarted, and has lost everything.

        Args:
            instance_id: Which.
            capacity_block_count: Blocks that fit it; a negative number counts as 0.
            keep_reported: All but what its engine reports: of that it tells by itself.
        """
        before = self._caches.get(instance_id)
        self.remove_instance(instance_id)
        # The lowest free slot keeps the masks short.
        slot = heapq.heappop(self._free_slots) if self._free_slots else len(self._slots)
        self._last_generation += 1
        cache = _Cache(instance_id, self._last_generation, slot, capacity_block_count)
        if slot == len(self._slots):
            self._slots.append(cache)
        else:
            self._slots[slot] = cache
        self._caches[instance_id] = cache
        if before is not None and before.is_exact and keep_reported:
            self.note_stored(instance_id, before.reported)

    def remove_instance(self, instance_id: str) -> None:
        """Forget all that an instance had. Costs as much as that is; unknown ids are ignored."""
        cache = self._caches.pop(instance_id, None)
        if cache is None:
            return
        for block in cache.evictable:
            self._clear(block, cache)
        for block in cache.pins:
            self._clear(block, cache)
        for block in cache.reported:
            if block not in cache.pins:
                self._clear(block, cache)
        self._slots[cache.slot] = None
        heapq.heappush(self._free_slots, cache.slot)

    def resize(self, instance_id: str, capacity_block_count: int) -> None:
        """Change how many blocks fit an instance, dropping those that no longer do."""
        cache = self._caches.get(instance_id)
        if cache is not None:
            cache.capacity = capacity_block_count
            self._trim(cache)

    def match(self, block_hashes: Sequence[int]) -> Mapping[str, int]:
        """Return how many leading blocks the best holders have, longest first.

        At most ``HOLDER_LIMIT`` are named, and only such that have the first
        block. Among equals the prompt decides who is named, so that a start
        that every instance has does not always lead to the same few.
        """
        masks = self._masks
        found: dict[str, int] = {}
        if not block_hashes or block_hashes[0] not in masks:
            return found
        # How many leading blocks anyone has.
        low, high = 1, len(block_hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if block_hashes[middle - 1] in masks:
                low = middle
            else:
                high = middle - 1
        depth = low
        named = 0
        while True:
            mask = masks.get(block_hashes[depth - 1], 0)
            self._name(mask & ~named, depth, block_hashes[0], found)
            named |= mask
            if len(found) == HOLDER_LIMIT or masks.get(block_hashes[0], 0) == mask:
                return found
            # The longest start that more instances have.
            low, high = 1, depth - 1
            while low < high:
                middle = (low + high + 1) // 2
                if masks.get(block_hashes[middle - 1], 0) != mask:
                    low = middle
                else:
                    high = middle - 1
            depth = low

    def match_one(self, instance_id: str, block_hashes: Sequence[int]) -> int:
        """Return how many leading blocks an instance has."""
        cache = self._caches.get(instance_id)
        if cache is None:
            return 0
        low, high = 0, len(block_hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if cache.has(block_hashes[middle - 1]):
                low = middle
            else:
                high = middle - 1
        return low

    def insert(self, instance_id: str, block_hashes: Sequence[int], pinned: bool) -> int:
        """Take notice that a prompt was sent to an instance: its blocks become the most recent.

        Args:
            instance_id: Which; an unknown one is ignored.
            block_hashes: The prompt's blocks, first to last.
            pinned: Whether the prompt's request runs from now on, until
                :meth:`release`. Otherwise the blocks can be evicted at once, the
                last first.

        Returns:
            How many leading blocks the index took: fewer than all only where
            they do not fit (unpinned), or where ``max_block_count`` leaves no
            room because everything is pinned. Release as many.
        """
        cache = self._caches.get(instance_id)
        if cache is None:
            return 0
        if pinned:
            self._pin(cache, block_hashes)
            self._trim(cache)
            return self._unpin_what_is_too_much(cache, block_hashes)
        new = []
        for block in reversed(block_hashes):
            if block not in cache.pins and block not in cache.reported:
                if block in cache.evictable:
                    cache.evictable.move_to_end(block)
                else:
                    cache.evictable[block] = None
                    new.append(block)
        self._hold(cache, new)
        self._trim(cache)
        while self._block_count > self._max_block_count and self._evict_any():
            pass
        return self.match_one(instance_id, block_hashes)

    def release(self, instance_id: str, block_hashes: Sequence[int]) -> None:
        """Unpin the blocks of a request that ended; they become the most recent that can be evicted.

        Blocks that are not pinned (their instance restarted meanwhile) are left as they are.
        """
        cache = self._caches.get(instance_id)
        if cache is None:
            return
        pins = cache.pins
        for block in reversed(block_hashes):
            count = pins.get(block, 0)
            if count > 1:
                pins[block] = count - 1
            elif count:
                del pins[block]
                if block not in cache.reported:
                    cache.evictable[block] = None
        self._trim(cache)

    # -- what engines report -----------------------------------------------------------

    def is_exact(self, instance_id: str) -> bool:
        """Return whether an instance's engine reports what it has."""
        cache = self._caches.get(instance_id)
        return cache is not None and cache.is_exact

    def note_stored(self, instance_id: str, block_hashes: Iterable[int]) -> None:
        """Take an engine's word that it has blocks: they stay until it says otherwise.

        They do not count against the instance's capacity, which is an estimate.

        Args:
            instance_id: Which; an unknown one is ignored.
            block_hashes: Each after those that it builds on.
        """
        cache = self._caches.get(instance_id)
        if cache is None:
            return
        cache.is_exact = True
        new = []
        for block in block_hashes:
            if block in cache.reported:
                continue
            cache.reported[block] = None
            if block in cache.evictable:
                del cache.evictable[block]
            elif block not in cache.pins:
                new.append(block)
        self._hold(cache, new)
        while self._block_count > self._max_block_count and self._evict_any():
            pass

    def note_removed(self, instance_id: str, block_hashes: Iterable[int]) -> None:
        """Take an engine's word that it has blocks no more.

        Those of running requests stay until :meth:`release`: the engine is about to
        have them again, and no report is as young as a dispatch.

        Args:
            instance_id: Which; an unknown one is ignored.
            block_hashes: Each after those that build on it. One that is not known is ignored.
        """
        cache = self._caches.get(instance_id)
        if cache is None:
            return
        cache.is_exact = True
        for block in block_hashes:
            if block in cache.reported:
                del cache.reported[block]
                if block in cache.pins:
                    continue
            elif block in cache.evictable:
                del cache.evictable[block]
            else:
                continue
            self._clear(block, cache)

    def reset(self, instance_id: str) -> None:
        """Take an engine's word that its cache is to be taken for empty, but for what runs."""
        cache = self._caches.get(instance_id)
        if cache is None:
            return
        cache.is_exact = True
        for block in (*cache.evictable, *cache.reported):
            if block not in cache.pins:
                self._clear(block, cache)
        cache.evictable.clear()
        cache.reported.clear()

    # -- inside ----------------------------------------------------------------------

    def _name(self, mask: int, depth: int, first_block: int, found: dict[str, int]) -> None:
        """Add the holders in a mask to what a match found, up to the limit."""
        first_slot = first_block % len(self._slots)
        from_first = mask >> first_slot << first_slot
        for part in (from_first, mask ^ from_first):
            remaining = part
            while remaining and len(found) < HOLDER_LIMIT:
                lowest = remaining & -remaining
                remaining ^= lowest
                cache = self._slots[lowest.bit_length() - 1]
                if cache is not None:
                    found[cache.instance_id] = depth

    def _pin(self, cache: _Cache, block_hashes: Sequence[int]) -> None:
        pins, evictable = cache.pins, cache.evictable
        new = []
        for block in block_hashes:
            count = pins.get(block)
            if count is not None:
                pins[block] = count + 1
                continue
            pins[block] = 1
            if block in evictable:
                del evictable[block]
            elif block not in cache.reported:
                new.append(block)
        self._hold(cache, new)

    def _hold(self, cache: _Cache, new_blocks: Sequence[int]) -> None:
        """Mark blocks as held by an instance that did not have them."""
        masks, bit = self._masks, cache.bit
        # Blocks of one run have the same holders as a rule: they share the mask object, too.
        before, after = 0, bit
        for block in new_blocks:
            mask = masks.get(block, 0)
            if mask != before:
                before, after = mask, (mask | bit if mask else bit)
            masks[block] = after
        cache.block_count += len(new_blocks)
        self._block_count += len(new_blocks)

    def _unpin_what_is_too_much(self, cache: _Cache, block_hashes: Sequence[int]) -> int:
        """Meet the bound over everything; return how many leading blocks remain pinned."""
        kept = len(block_hashes)
        while self._block_count > self._max_block_count:
            if self._evict_any():
                continue
            kept -= 1
            self.release(cache.instance_id, block_hashes[kept : kept + 1])
        return kept

    def _trim(self, cache: _Cache) -> None:
        evictable, masks, bit = cache.evictable, self._masks, cache.bit
        pop_oldest = evictable.popitem
        excess = len(evictable) + len(cache.pins) - cache.capacity
        for _ in range(min(excess, len(evictable))):
            block = pop_oldest(False)[0]  # The oldest: not from the end.
            if masks[block] is bit:
                # As a rule nobody else has it.
                del masks[block]
                cache.block_count -= 1
                self._block_count -= 1
            else:
                self._clear(block, cache)

    def _evict_any(self) -> bool:
        """Drop the oldest block of the next instance that can spare one; return whether there is one."""
        slot_count = len(self._slots)
        for step in range(slot_count):
            slot = (self._eviction_slot + step) % slot_count
            cache = self._slots[slot]
            if cache is None or not (cache.evictable or cache.reported):
                continue
            if cache.evictable:
                self._clear(cache.evictable.popitem(last=False)[0], cache)
            else:
                # The last to come: what builds on a block always came after it.
                block = cache.reported.popitem()[0]
                if block not in cache.pins:
                    self._clear(block, cache)
            self._eviction_slot = (slot + 1) % slot_count
            return True
        return False

    def _clear(self, block: int, cache: _Cache) -> None:
        cache.block_count -= 1
        self._block_count -= 1
        mask = self._masks.pop(block) ^ cache.bit
        if mask:
            if not mask & (mask - 1):
                # One holder is left: back to the object that all its blocks share.
                last = self._slots[mask.bit_length() - 1]
                mask = last.bit if last is not None else mask
            self._masks[block] = mask
