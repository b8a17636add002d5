"""Who waits, who runs and who holds which blocks in an engine, as seen between two steps."""

from __future__ import annotations

from collections import OrderedDict

from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.block_cache import BlockCache
from sagecp.sim.fleet.decode_batch import DecodeBatch
from sagecp.sim.fleet.engine_job import EngineSequence, FleetCounters, Stage

Chunks = list[tuple[EngineSequence, int]]
"""The prefill of one step: sequences, and how many tokens of each."""


class EngineBatch:
    """The queue, the running batch and the KV cache of one engine; it knows no durations.

    Args:
        limits: What fits.

    Attributes:
        limits: What fits.
        cache: The KV cache.
        decodes: The running sequences that decode.
        counters: Totals since the start.
        waiting: The queue, its head first.
        running: The running sequences in order of admission.
        prefilling: The running sequence whose prefill is partly done. There is at most one,
            and it is the newest: what it leaves of the budget is nothing.
        queued_prefill_token_count: Tokens to prefill, of all sequences.
    """

    __slots__ = (
        "_admission_count",
        "_block_size",
        "cache",
        "counters",
        "decodes",
        "limits",
        "prefilling",
        "queued_prefill_token_count",
        "running",
        "waiting",
    )

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.cache = BlockCache(limits.kv_token_capacity // limits.block_size)
        self.decodes = DecodeBatch(limits.block_size)
        self.counters = FleetCounters()
        self.waiting: OrderedDict[str, EngineSequence] = OrderedDict()
        self.running: dict[str, EngineSequence] = {}
        self.prefilling: EngineSequence | None = None
        self.queued_prefill_token_count = 0
        self._admission_count = 0
        self._block_size = limits.block_size

    def enqueue(self, sequence: EngineSequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting[sequence.job.request_id] = sequence
        self.queued_prefill_token_count += sequence.target_token_count

    def next_chunk(self, budget: int) -> tuple[int, int]:
        """Return the tokens of the prefilling sequence's next chunk, and the blocks that it needs."""
        sequence = self.prefilling
        if sequence is None:
            return 0, 0
        computed = sequence.computed_token_count
        size = min(sequence.target_token_count - computed, budget)
        return size, -(-(computed + size) // self._block_size) + (-computed // self._block_size)

    def make_room(self) -> int:
        """Take the blocks of a step for which there are not enough, preempting the newest.

        Each decode in order of admission gets the block that it needs, then the chunk its own.

        Returns:
            The tokens of the chunk; 0 when there is none, or its sequence had to go.
        """
        cache, decodes = self.cache, self.decodes
        for sequence in list(self.running.values()):
            if sequence.stage is not Stage.DECODE or not decodes.needs_block(sequence):
                continue
            while not cache.free_block_count and sequence.stage is Stage.DECODE:
                self._preempt(next(reversed(self.running.values())))
            if sequence.stage is Stage.DECODE:
                cache.take(1)
        size, block_count = self.next_chunk(self.limits.max_batch_tokens - decodes.count)
        if block_count > cache.free_block_count:
            assert self.prefilling is not None  # noqa: S101 - it has a chunk
            self._preempt(self.prefilling)
            return 0
        cache.take(block_count)
        return size

    def admit(self, now: float, budget: int, chunks: Chunks) -> tuple[int, float, int]:
        """Admit from the head of the queue while budget, places and blocks last.

        Args:
            now: When the step begins.
            budget: Tokens left in it.
            chunks: Takes the first chunks of those admitted.

        Returns:
            What is left of the budget; the token pairs of the chunks; and, if
            the head did not find enough blocks, how many unheld ones it would revive.
        """
        cache, block_size, waiting, running = self.cache, self._block_size, self.waiting, self.running
        token_pairs = 0.0
        while budget and waiting and len(running) < self.limits.max_running_requests:
            request_id, sequence = next(iter(waiting.items()))
            job, contents, target = sequence.job, sequence.contents, sequence.target_token_count
            # At least one token has to be computed.
            held = cache.match(contents, (target - 1) // block_size) if contents else []
            cached = len(held) * block_size
            size = min(target - cached, budget)
            if not cache.open(held, -(-(cached + size) // block_size) - len(held)):
                return budget, token_pairs, cache.unheld_count(held)
            del waiting[request_id]
            running[request_id] = sequence
            self._admission_count += 1
            sequence.stage = Stage.PREFILL
            sequence.order = self._admission_count
            sequence.held = held
            sequence.committed_block_count = len(held)
            sequence.computed_token_count = cached
            self.queued_prefill_token_count -= cached
            if job.scheduled_s < 0:
                job.scheduled_s = now
                job.cached_token_count = cached
                self.counters.prefix_query_tokens += job.prompt_token_count
                self.counters.prefix_hit_tokens += cached
            chunks.append((sequence, size))
            budget -= size
            token_pairs += size * (cached + size / 2)
        return budget, token_pairs, 0

    def steps_with_room(self, step_count: int, chunks: Chunks, revived_block_count: int) -> int:
        """Return how many steps after the next find their blocks, at most so many.

        Args:
            step_count: At most this many.
            chunks: The one or no chunk of each of those steps.
            revived_block_count: What :meth:`admit` returned.
        """
        cache = self.cache
        bound = self.decodes.count * (step_count // self._block_size + 1)
        if chunks:
            bound += chunks[0][1] * step_count // self._block_size + 1
        if bound > cache.free_block_count:
            step_count = self._steps_within(cache.free_block_count, step_count, chunks)
        if revived_block_count > 1 and bound > cache.blank_block_count:
            # The head of the queue waits for blocks. When one of those that it would revive loses
            # its contents, fewer may do: a step that takes one is planned anew, and looks again.
            step_count = self._steps_within(cache.blank_block_count, step_count, chunks)
        return step_count

    def run_steps(self, step_count: int, begun_count: int, chunks: Chunks) -> None:
        """Apply steps that are over.

        Args:
            step_count: How many.
            begun_count: How many have begun since then, after the first of which the blocks are taken.
            chunks: The chunks of each step; at most one when ``begun_count`` is not 0.
        """
        cache, decodes = self.cache, self.decodes
        block_count = self._later_block_count(begun_count, chunks) if begun_count else 0
        if chunks:
            if block_count > cache.blank_block_count and self._recomputes_known(step_count, chunks):
                # Contents are lost that the chunks have, too: before the chunk is computed, or after it?
                for _ in range(begun_count):
                    block_count = self._later_block_count(1, chunks)
                    self._compute(1, chunks)
                    cache.take(block_count)
                    decodes.tick += 1
                step_count -= begun_count
                block_count = 0
            self._compute(step_count, chunks)
        if block_count:
            cache.take(block_count)
        decodes.tick += step_count

    def end_prefill(self, chunks: Chunks) -> list[EngineSequence]:
        """Sort the sequences of finished chunks by what comes next; return those that get a token now."""
        complete: list[EngineSequence] = []
        self.prefilling = None
        for sequence, _ in chunks:
            rest = sequence.target_token_count - sequence.computed_token_count
            if not rest:
                complete.append(sequence)
            elif rest == 1 and sequence.computed_token_count >= sequence.job.prompt_token_count:
                # Computed again after a preemption, up to its latest token: that one is a decode.
                self.queued_prefill_token_count -= 1
                self.decodes.join(sequence, sequence.computed_token_count)
            else:
                self.prefilling = sequence
        return complete

    def drop(self, sequence: EngineSequence, chunks: Chunks, *, during_step: bool) -> Chunks:
        """Take out a sequence before its end, its blocks included.

        Args:
            sequence: The sequence.
            chunks: The chunks of the step in progress.
            during_step: Whether a step is in progress: its blocks are taken already.

        Returns:
            The chunks without it.
        """
        request_id = sequence.job.request_id
        if sequence.stage is Stage.WAITING:
            del self.waiting[request_id]
            self.queued_prefill_token_count -= sequence.target_token_count
            return chunks
        del self.running[request_id]
        if sequence.stage is Stage.DECODE:
            token_count = self.decodes.leave(sequence) + during_step
        else:
            token_count = sequence.computed_token_count
            self.queued_prefill_token_count -= sequence.target_token_count - token_count
            token_count += sum(size for chunked, size in chunks if chunked is sequence)
            if self.prefilling is sequence:
                self.prefilling = None
        self._close(sequence, token_count)
        return [chunk for chunk in chunks if chunk[0] is not sequence]

    def finish(self, sequence: EngineSequence) -> None:
        """Take out a sequence that has its last token."""
        del self.running[sequence.job.request_id]
        self._close(sequence, sequence.computed_token_count)

    def _preempt(self, sequence: EngineSequence) -> None:
        """Send the newest running sequence back to the head of the queue, without its blocks."""
        request_id = sequence.job.request_id
        del self.running[request_id]
        if sequence.stage is Stage.DECODE:
            token_count = self.decodes.leave(sequence)
            sequence.target_token_count = sequence.job.prompt_token_count + sequence.produced_token_count
            self.queued_prefill_token_count += sequence.target_token_count
        else:
            token_count = sequence.computed_token_count
            self.queued_prefill_token_count += token_count
            self.prefilling = None
        self._close(sequence, token_count)
        sequence.stage = Stage.WAITING
        sequence.computed_token_count = 0
        sequence.job.preemption_count += 1
        self.counters.preemptions += 1
        self.waiting[request_id] = sequence
        self.waiting.move_to_end(request_id, last=False)

    def _close(self, sequence: EngineSequence, token_count: int) -> None:
        """Give back the blocks of a sequence that has room for so many tokens."""
        held = sequence.held
        self.cache.close(held, -(-token_count // self._block_size) - len(held))
        sequence.held = []
        sequence.committed_block_count = 0

    def _steps_within(self, block_count: int, step_count: int, chunks: Chunks) -> int:
        """Return how many steps after the next need no more than so many blocks, at most so many."""
        low, high = 0, step_count
        while low < high:
            middle = (low + high + 1) // 2
            if self._later_block_count(middle, chunks) <= block_count:
                low = middle
            else:
                high = middle - 1
        return low

    def _later_block_count(self, step_count: int, chunks: Chunks) -> int:
        """Return how many blocks so many steps take, after one step that has its own."""
        block_count = self.decodes.new_block_count(1, step_count)
        for sequence, size in chunks:
            computed = sequence.computed_token_count + size
            after = computed + step_count * size
            block_count += -(-after // self._block_size) + (-computed // self._block_size)
        return block_count

    def _recomputes_known(self, step_count: int, chunks: Chunks) -> bool:
        """Return whether anything that the chunks compute is known already."""
        return any(
            self.cache.knows_any(
                sequence.contents[
                    sequence.committed_block_count : (sequence.computed_token_count + size * step_count)
                    // self._block_size
                ]
            )
            for sequence, size in chunks
        )

    def _compute(self, step_count: int, chunks: Chunks) -> None:
        """Compute the chunks of so many steps, and make their full blocks known."""
        for sequence, size in chunks:
            token_count = size * step_count
            sequence.computed_token_count = computed = sequence.computed_token_count + token_count
            self.queued_prefill_token_count -= token_count
            contents, committed = sequence.contents, sequence.committed_block_count
            full = min(computed // self._block_size, len(contents))
            if full > committed:
                self.cache.commit(contents[committed:full], sequence.held)
                sequence.committed_block_count = full
