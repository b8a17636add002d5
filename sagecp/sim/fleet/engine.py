"""A continuous-batching engine for simulations of whole fleets: exact step times, few operations.

The same engine as :class:`sagecp.sim.engine_model.EngineModel`: decodes first,
then chunks of prefill up to the token budget, paged KV with a prefix cache,
recompute preemption of the newest. It never looks at tokens, though, and it
does not go step by step. At most one sequence is partly prefilled at the end of
a step, and it is the newest, because what it leaves of the budget is nothing.
So between two events (the end of a sequence or of a prefill, an arrival that
can be admitted, an abort, a lack of blocks) all steps have the same ``n``
decodes and at most one chunk of the same ``c`` tokens, and by

    step = o + max(a0 + a1*T, b0 + b1*T) + g*KV + d*sum(c*(p + c/2))

each lasts ``g*n + d*c*c`` longer than the one before. Such a *run* of steps is
planned once, ends at a time in closed form, and its effects are applied together.
"""

from __future__ import annotations

import math

from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.engine_batch import Chunks, EngineBatch
from sagecp.sim.fleet.engine_job import EngineJob, EngineSequence, FleetCounters, News, NewsKind
from sagecp.sim.profiles import StepProfile

__all__ = ["EngineJob", "FleetCounters", "FleetEngine", "News", "NewsKind"]


class FleetEngine:
    """One engine: a waiting queue, a running batch, and a KV cache.

    Time is the caller's and never goes back. A step begins as late as
    possible: what is added at the very time at which a step ends still joins
    the next one, unless :meth:`next_event_s` was asked in between.

    Args:
        profile: What a step costs.
        limits: What fits. The block size is that of the jobs' content ids.
        slowness: Factor on every duration.

    Raises:
        ValueError: The token budget is smaller than the number of running
            requests, so that a step could not give each its token (vLLM
            refuses this, too).
    """

    def __init__(self, profile: StepProfile, limits: EngineLimits, *, slowness: float = 1.0) -> None:
        if limits.max_batch_tokens < limits.max_running_requests:
            raise ValueError(
                f"a budget of {limits.max_batch_tokens} tokens does not give each of "
                f"{limits.max_running_requests} running requests one; raise max_batch_tokens"
            )
        self.profile = profile
        self.limits = limits
        self._slowness = _checked_slowness(slowness)
        self._batch = EngineBatch(limits)
        self._sequences: dict[str, EngineSequence] = {}
        self._news: list[News] = []
        self._now_s = 0.0
        # Without a run in progress: when the next one may begin.
        self._boundary_s = 0.0
        # The run in progress: how many steps (0: none), how many of them are over,
        # how long the first lasts and how much longer each next one, and its chunks.
        self._step_count = 0
        self._done_count = 0
        self._start_s = 0.0
        self._end_s = 0.0
        self._first_step_s = 0.0
        self._step_growth_s = 0.0
        self._chunks: Chunks = []
        self._busy_before_s = 0.0

    @property
    def slowness(self) -> float:
        """Factor on every duration; a change applies to steps that begin after the last time given."""
        return self._slowness

    @slowness.setter
    def slowness(self, value: float) -> None:
        self._slowness = _checked_slowness(value)
        self._cut()

    @property
    def running_count(self) -> int:
        """Jobs that hold a place in the batch."""
        return len(self._batch.running)

    @property
    def waiting_count(self) -> int:
        """Jobs in the queue."""
        return len(self._batch.waiting)

    @property
    def request_count(self) -> int:
        """Jobs that have not ended."""
        return len(self._sequences)

    @property
    def decode_count(self) -> int:
        """Running jobs whose next step yields one token."""
        return self._batch.decodes.count

    @property
    def decode_context_token_count(self) -> int:
        """Tokens computed, summed over the decoding jobs: ``KV`` in the formula of a step."""
        self._settle_now()
        return self._batch.decodes.context_token_count

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that are held, from 0 to 1."""
        self._settle_now()
        cache = self._batch.cache
        return cache.used_block_count / cache.block_count

    @property
    def kv_token_count(self) -> int:
        """Tokens that the held KV blocks have room for; shared blocks count once."""
        self._settle_now()
        return self._batch.cache.used_block_count * self.limits.block_size

    @property
    def kv_token_capacity(self) -> int:
        """Tokens that all KV blocks have room for."""
        return self._batch.cache.block_count * self.limits.block_size

    @property
    def queued_prefill_token_count(self) -> int:
        """Tokens still to prefill, of waiting and running jobs; before admission the whole prompt counts."""
        self._settle_now()
        return self._batch.queued_prefill_token_count

    @property
    def counters(self) -> FleetCounters:
        """Totals up to the last time given."""
        self._settle_now()
        return self._batch.counters

    def add(self, job: EngineJob, now: float) -> None:
        """Queue a job; it runs from the next step on.

        Raises:
            ValueError: The id is in use, or the job can never fit.
        """
        self._run_until(now)
        if job.request_id in self._sequences:
            raise ValueError(f"request id {job.request_id!r} is in use")
        if job.prompt_token_count < 1 or job.output_token_count < 1:
            raise ValueError("a job needs at least one prompt token and one token to generate")
        length = job.prompt_token_count + job.output_token_count
        if length > self.kv_token_capacity:
            raise ValueError(
                f"a job of {length} tokens does not fit in a KV cache of {self.kv_token_capacity}"
            )
        job.added_s = now
        job.scheduled_s = job.first_token_s = job.finish_s = -1.0
        job.cached_token_count = -1
        job.preemption_count = 0
        contents: tuple[int, ...] = ()
        if self.limits.prefix_caching:
            contents = job.block_hashes[: job.prompt_token_count // self.limits.block_size]
            if len(set(contents)) < len(contents):
                contents = _up_to_repetition(contents)
        batch = self._batch
        if not self._step_count:
            self._boundary_s = now
        elif (
            # Otherwise no step of the run could admit it: those before it wait for
            # one to end, and so does it, or the chunks leave nothing of the budget.
            not batch.waiting and not self._chunks and len(batch.running) < self.limits.max_running_requests
        ):
            self._cut()
        sequence = EngineSequence(job, contents)
        self._sequences[job.request_id] = sequence
        batch.enqueue(sequence)

    def abort(self, request_id: str, now: float) -> bool:
        """End a job at once, giving its blocks back; return whether it was alive."""
        self._run_until(now)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        # The step in progress keeps its duration.
        self._settle_now()
        self._cut()
        self._chunks = self._batch.drop(sequence, self._chunks, during_step=self._step_count > 0)
        return True

    def next_event_s(self) -> float:
        """Return when something may happen next if nothing is added before; infinity when idle.

        Ask after adding what there is to add at this time: a step that is due begins.
        """
        if self._news:
            return self._news[0].time_s
        if not self._step_count:
            if not self._sequences:
                return math.inf
            self._begin()
        return self._end_s

    def advance(self, now: float) -> list[News]:
        """Run up to and including a time; return what happened, in order."""
        self._run_until(now)
        if not self._news:
            return []
        news, self._news = self._news, []
        return news

    def _run_until(self, now: float) -> None:
        self._now_s = max(self._now_s, now)
        while True:
            if self._step_count:
                if self._end_s > now:
                    return
                self._finish_run()
            elif self._sequences and self._boundary_s < now:
                self._begin()
            else:
                return

    def _begin(self) -> None:
        """Plan the steps that begin at the boundary, taking the blocks of the first."""
        batch, profile, token_budget = self._batch, self.profile, self.limits.max_batch_tokens
        decodes, prefilling = batch.decodes, batch.prefilling
        chunks: Chunks = []
        token_pairs = 0.0
        size, block_count = batch.next_chunk(token_budget - decodes.count)
        block_count += decodes.next_block_count
        has_room = block_count <= batch.cache.free_block_count
        if has_room:
            batch.cache.take(block_count)
        else:
            size = batch.make_room()
        decode_count = decodes.count
        budget = token_budget - decode_count
        if size and prefilling is not None:
            chunks.append((prefilling, size))
            token_pairs = size * (prefilling.computed_token_count + size / 2)
            budget -= size
        revived_block_count = 0
        # Nobody is admitted to a step that preempted.
        if has_room and batch.waiting:
            budget, admitted_pairs, revived_block_count = batch.admit(self._boundary_s, budget, chunks)
            token_pairs += admitted_pairs
        self._first_step_s = self._slowness * profile.step_s(
            token_budget - budget, decodes.context_token_count + decode_count, token_pairs
        )
        self._step_growth_s = 0.0
        step_count, size = 1, 0
        if not chunks:
            step_count = decodes.steps_to_next_end()
        elif len(chunks) == 1 and not budget:
            sequence, size = chunks[0]
            # The last chunk is a step of its own: it ends with a token.
            step_count = (sequence.target_token_count - sequence.computed_token_count - 1) // size
            if step_count > 1 and decode_count:
                step_count = min(step_count, decodes.steps_to_next_end())
        if step_count > 1 and has_room:
            step_count = 1 + batch.steps_with_room(step_count - 1, chunks, revived_block_count)
            self._step_growth_s = self._slowness * (
                profile.context_per_token_s * decode_count + profile.attention_per_token_pair_s * size * size
            )
        else:
            step_count = 1
        self._chunks = chunks
        self._step_count = step_count
        self._done_count = 0
        self._start_s = self._boundary_s
        self._end_s = self._step_end_s(step_count)

    def _step_end_s(self, step_count: int) -> float:
        """Return when so many steps of the run are over."""
        return (
            self._start_s
            + self._first_step_s * step_count
            + self._step_growth_s * (step_count * (step_count - 1) // 2)
        )

    def _steps_over(self) -> int:
        """Return how many steps of the run in progress are over now; not all are."""
        last = self._step_count - 1
        if self._done_count >= last:
            return last
        now = self._now_s
        growth = self._step_growth_s
        # Of start + first*k + growth*k*(k - 1)/2 = now, solved for k; then mended for rounding.
        linear = self._first_step_s - growth / 2
        elapsed = now - self._start_s
        root = linear + math.sqrt(linear * linear + 2 * growth * elapsed)
        done = min(max(int(2 * elapsed / root) if root else 0, self._done_count), last)
        while done < last and self._step_end_s(done + 1) <= now:
            done += 1
        while done > self._done_count and self._step_end_s(done) > now:
            done -= 1
        return done

    def _cut(self) -> None:
        """Let the run in progress end with the step in progress."""
        if self._step_count > 1:
            self._step_count = self._steps_over() + 1
            self._end_s = self._step_end_s(self._step_count)

    def _settle_now(self) -> None:
        """Apply the steps that are over now."""
        if self._step_count > 1:
            done = self._steps_over()
            if done != self._done_count:
                self._settle(done)

    def _settle(self, done_count: int) -> None:
        """Apply the run's steps up to this one, and take the blocks of the one that began after it."""
        batch = self._batch
        counters = batch.counters
        step_count = done_count - self._done_count
        begun_count = min(done_count, self._step_count - 1) - self._done_count
        counters.steps += step_count
        counters.generation_tokens += step_count * batch.decodes.count
        counters.busy_s = self._busy_before_s + (self._step_end_s(done_count) - self._start_s)
        batch.run_steps(step_count, begun_count, self._chunks)
        self._done_count = done_count

    def _finish_run(self) -> None:
        """End the run in progress: last tokens first, then those that end a prefill."""
        self._settle(self._step_count)
        batch, now, chunks = self._batch, self._end_s, self._chunks
        self._step_count = 0
        self._boundary_s = now
        self._busy_before_s = batch.counters.busy_s
        for sequence in batch.decodes.pop_ended():
            self._finish(sequence, now)
        if chunks:
            self._chunks = []
            for sequence in batch.end_prefill(chunks):
                self._emit(sequence, now)

    def _emit(self, sequence: EngineSequence, now: float) -> None:
        """Give a sequence the token that ends its prefill."""
        job, counters = sequence.job, self._batch.counters
        sequence.produced_token_count += 1
        counters.generation_tokens += 1
        if sequence.produced_token_count == 1:
            job.first_token_s = now
            counters.prompt_tokens += job.prompt_token_count
            self._news.append(News(now, NewsKind.FIRST_TOKEN, job))
        if sequence.produced_token_count == job.output_token_count:
            self._finish(sequence, now)
        else:
            self._batch.decodes.join(sequence, sequence.computed_token_count)

    def _finish(self, sequence: EngineSequence, now: float) -> None:
        job = sequence.job
        job.finish_s = now
        self._batch.finish(sequence)
        del self._sequences[job.request_id]
        self._news.append(News(now, NewsKind.FINISHED, job))


def _checked_slowness(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"slowness must be finite and above 0, not {value}")
    return value


def _up_to_repetition(contents: tuple[int, ...]) -> tuple[int, ...]:
    seen: set[int] = set()
    for index, content in enumerate(contents):
        if content in seen:
            return contents[:index]
        seen.add(content)
    return contents
