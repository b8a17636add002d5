"""What the control plane has not been told yet of an engine's cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice

from sagecp.core.engine_state import KvCacheUpdate

MAX_HASHES_PER_UPDATE = 2_000
"""Hashes in one update, which makes 16 KiB of a heartbeat."""
MAX_BACKLOG = 200_000
"""Changes that wait; beyond, half as many are told anew instead: the newest blocks that are there."""


class Backlog:
    """Changes in the order in which they happened, each block once.

    Args:
        everything: Yields all blocks that are there, in an order in which they can be told.
    """

    def __init__(self, everything: Callable[[], Iterable[int]]) -> None:
        self._everything = everything
        # Whether the block is there now.
        self._changes: OrderedDict[int, bool] = OrderedDict()
        self._is_reset_due = False
        self._sequence = 0

    def __len__(self) -> int:
        """Return how many changes wait."""
        return len(self._changes)

    def begin(self) -> None:
        """Tell everything anew: nobody knows anything."""
        self._changes = OrderedDict.fromkeys(islice(self._everything(), MAX_BACKLOG // 2), True)
        self._is_reset_due = True

    def store(self, block_hash: int) -> None:
        """Note that a block is there."""
        self._note(block_hash, is_there=True)

    def remove(self, block_hash: int) -> None:
        """Note that it is there no more."""
        self._note(block_hash, is_there=False)

    def clear(self) -> None:
        """Note that none is there any more."""
        self._changes.clear()
        self._is_reset_due = True

    def take_update(self) -> KvCacheUpdate | None:
        """Return what to tell next; ``None``: nothing."""
        if not self._changes and not self._is_reset_due:
            return None
        stored: list[int] = []
        removed: list[int] = []
        for _ in range(min(len(self._changes), MAX_HASHES_PER_UPDATE)):
            block_hash, is_there = self._changes.popitem(last=False)
            (stored if is_there else removed).append(block_hash)
        self._sequence = 1 if self._is_reset_due else self._sequence + 1
        update = KvCacheUpdate(self._sequence, self._is_reset_due, tuple(stored), tuple(removed))
        self._is_reset_due = False
        return update

    def _note(self, block_hash: int, *, is_there: bool) -> None:
        self._changes[block_hash] = is_there
        # A change of mind happens now, after what happened meanwhile to the blocks before it.
        self._changes.move_to_end(block_hash)
        if len(self._changes) > MAX_BACKLOG:
            self.begin()
