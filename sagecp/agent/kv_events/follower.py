"""Follows the numbered batches of one publisher: notices what was missed, and what began anew."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from sagecp.agent.kv_events.backlog import Backlog
from sagecp.agent.kv_events.batch import decode_batch
from sagecp.agent.kv_events.chains import BlockChains
from sagecp.core.engine_state import KvCacheUpdate


class Taken(Enum):
    """What became of a batch."""

    TAKEN = "taken"
    KNOWN_ALREADY = "known already"
    """It came before, by another way."""
    AFTER_A_GAP = "after a gap"
    """Batches before it are missing; it was not taken."""


class EventFollower:
    """What an engine has cached, as its batches tell.

    Whatever may be wrong is forgotten: an expectation of cached blocks that are not
    there misplaces requests, while one that is missing is made good by the next
    report. What an engine had cached before its first batch that is seen is not known.

    Args:
        model_name: Served model.

    Attributes:
        next_sequence: Number that the next batch should have; ``None``: any.
        batch_count: Batches taken.
        reset_count: How often everything was forgotten.
        trouble: Why the last batch could not be read; ``""``: it could.
    """

    def __init__(self, model_name: str) -> None:
        self._backlog = Backlog(self._everything)
        self._chains = BlockChains(model_name, self._backlog)
        self._last_time_s = float("-inf")
        self.next_sequence: int | None = None
        self.batch_count = 0
        self.reset_count = 0
        self.trouble = ""

    @property
    def block_count(self) -> int:
        """Blocks of digests that the engine has cached."""
        return len(self._chains)

    def take(self, sequence: int, payload: bytes, *, skip_gap: bool = False) -> Taken:
        """Follow a batch.

        Args:
            sequence: Its number.
            payload: The batch.
            skip_gap: What is missing before it cannot be had: forget what was known.
        """
        expected = self.next_sequence
        if expected is not None and sequence > expected and not skip_gap:
            return Taken.AFTER_A_GAP
        try:
            batch = decode_batch(payload)
        except ValueError as error:
            self.trouble = str(error)
            self.reset()
            self.next_sequence = sequence + 1
            return Taken.TAKEN
        if expected is not None and sequence < expected and batch.time_s <= self._last_time_s:
            return Taken.KNOWN_ALREADY
        if expected is not None and sequence != expected:
            # Some are missing for good, or a publisher counts from the start: its engine is another.
            self.reset()
        self.trouble = ""
        self.next_sequence = sequence + 1
        self._last_time_s = batch.time_s
        self.batch_count += 1
        for event in batch.events:
            self._chains.take(event)
        return Taken.TAKEN

    def reset(self) -> None:
        """Forget everything, and take any batch for the next: the engine may be another."""
        self.next_sequence = None
        self._last_time_s = float("-inf")
        self.reset_count += 1
        self._chains.clear()

    def _everything(self) -> Iterator[int]:
        return self._chains.newest_first()

    def tell_everything(self) -> None:
        """Have the next updates tell all there is: whoever is told from now on knows nothing."""
        self._backlog.begin()

    def take_update(self) -> KvCacheUpdate | None:
        """Return what to tell next; ``None``: nothing."""
        return self._backlog.take_update()
