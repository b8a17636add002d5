"""The sequences that decode together, kept so that many steps of them cost as much as one.

Every step gives each of them one token. So instead of counting tokens per
sequence there is one count of steps, the *tick*: a sequence that joins at tick
``c`` with ``m`` tokens to go ends at tick ``c + m``, and the tokens it has
computed are the tick plus a constant.
"""

from __future__ import annotations

from heapq import heappop, heappush

from sagecp.sim.fleet.engine_job import EngineSequence, Stage


class DecodeBatch:
    """The decoding sequences of one engine.

    Args:
        block_size: Tokens in a KV block.

    Attributes:
        count: Sequences in it.
        tick: Decode steps so far.
    """

    __slots__ = ("_block_size", "_ends", "_offset_sum", "_phases", "count", "tick")

    def __init__(self, block_size: int) -> None:
        self.count = 0
        self.tick = 0
        self._block_size = block_size
        self._offset_sum = 0
        # How many need a new block in the step from tick t to t + 1, by t modulo the block size.
        self._phases = [0] * block_size
        # (end tick, order, sequence); those that left early stay until they reach the top.
        self._ends: list[tuple[int, int, EngineSequence]] = []

    @property
    def context_token_count(self) -> int:
        """Tokens computed, summed over the sequences."""
        return self._offset_sum + self.count * self.tick

    @property
    def next_block_count(self) -> int:
        """Blocks that the next step needs."""
        return self._phases[self.tick % self._block_size]

    def join(self, sequence: EngineSequence, computed_token_count: int) -> None:
        """Let a sequence decode from the next step on."""
        remaining = sequence.job.output_token_count - sequence.produced_token_count
        sequence.stage = Stage.DECODE
        sequence.tick_offset = offset = computed_token_count - self.tick
        sequence.end_tick = end_tick = self.tick + remaining
        self.count += 1
        self._offset_sum += offset
        self._phases[-offset % self._block_size] += 1
        heappush(self._ends, (end_tick, sequence.order, sequence))

    def leave(self, sequence: EngineSequence) -> int:
        """Take a sequence out, noting what it produced; return how many tokens it has computed."""
        self._forget(sequence)
        sequence.stage = Stage.WAITING
        sequence.produced_token_count = sequence.job.output_token_count - (sequence.end_tick - self.tick)
        return sequence.tick_offset + self.tick

    def needs_block(self, sequence: EngineSequence) -> bool:
        """Return whether the sequence's next token begins a block."""
        return (sequence.tick_offset + self.tick) % self._block_size == 0

    def steps_to_next_end(self) -> int:
        """Return after how many steps the first sequence ends; there must be one."""
        ends = self._ends
        while True:
            end_tick, order, sequence = ends[0]
            if sequence.stage is Stage.DECODE and sequence.order == order:
                return end_tick - self.tick
            heappop(ends)

    def pop_ended(self) -> list[EngineSequence]:
        """Take out the sequences that have their last token, in order of admission."""
        ended: list[EngineSequence] = []
        ends, tick = self._ends, self.tick
        while ends and ends[0][0] <= tick:
            _, order, sequence = heappop(ends)
            if sequence.stage is Stage.DECODE and sequence.order == order:
                self._forget(sequence)
                sequence.computed_token_count = sequence.tick_offset + tick
                ended.append(sequence)
        return ended

    def new_block_count(self, skipped_step_count: int, step_count: int) -> int:
        """Return how many blocks so many steps need in all, after skipping some."""
        if not self.count:
            return 0
        size, phases = self._block_size, self._phases
        cycle_count, rest = divmod(step_count, size)
        total = cycle_count * self.count
        start = (self.tick + skipped_step_count) % size
        stop = start + rest
        if stop <= size:
            return total + sum(phases[start:stop])
        return total + sum(phases[start:]) + sum(phases[: stop - size])

    def _forget(self, sequence: EngineSequence) -> None:
        self.count -= 1
        self._offset_sum -= sequence.tick_offset
        self._phases[-sequence.tick_offset % self._block_size] -= 1
