"""A continuous-batching engine as a state machine over virtual time.

No clock, no I/O: the caller passes the time. A server drives it with the real
clock, a simulator with a virtual one.

    engine.add(request, now)
    end = engine.begin_step(now)        # when the step in progress ends; None when idle
    outputs = engine.finish_step(end)   # one token for each request that got one

A step takes the decodes of all running requests first, then chunks of prefill
up to the token budget, admitting waiting requests in order of arrival. When the
KV cache is full, the newest running request is preempted: it loses its blocks,
goes back to the head of the queue and computes everything again.
"""

from __future__ import annotations

from collections import deque

from sagecp.sim.engine_types import EngineCounters, EngineLimits, EngineRequest, RequestState, TokenOutput
from sagecp.sim.kv_cache import KvCache
from sagecp.sim.profiles import StepProfile

# A step that ends later than planned, because the process was busy, does not
# delay the next one, up to this many seconds: the average pace stays exact.
_CATCH_UP_S = 0.05


class EngineModel:
    """The engine: a waiting queue, a running batch, and a KV cache.

    Args:
        profile: What a step costs.
        limits: What fits.

    Attributes:
        slowness: Factor on every duration; changes apply from the next step on.
        counters: Totals since the start.
        cache: The KV cache.
        last_step_tokens: Tokens of the step that finished last.
    """

    def __init__(self, profile: StepProfile, limits: EngineLimits) -> None:
        self.profile = profile
        self.limits = limits
        self.slowness = 1.0
        self.counters = EngineCounters()
        self.last_step_tokens = 0
        self.cache = KvCache(
            limits.kv_token_capacity // limits.block_size,
            limits.block_size,
            prefix_caching=limits.prefix_caching,
        )
        self._requests: dict[str, EngineRequest] = {}
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._stalled_count = 0
        self._plan: list[EngineRequest] | None = None
        self._planned_tokens = 0
        self._step_end_s = 0.0
        # When a step has just ended: the time from which the next one counts.
        self._resume_s: float | None = None

    @property
    def running_count(self) -> int:
        """Requests that hold a place in the batch."""
        return len(self._running) + self._stalled_count

    @property
    def waiting_count(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def request_count(self) -> int:
        """Requests that have not finished."""
        return len(self._requests)

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue a request. It runs from the next step on.

        Raises:
            ValueError: The id is in use, or the request can never fit.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if not request.tokens or request.max_tokens < 1:
            raise ValueError("a request needs at least one prompt token and one token to generate")
        length = request.prompt_token_count + request.max_tokens
        capacity = self.cache.block_count * self.cache.block_size
        if length > capacity:
            raise ValueError(f"a request of up to {length} tokens does not fit in a KV cache of {capacity}")
        request.arrival_s = now
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str, reason: str = "abort") -> bool:
        """End a request at once, giving its blocks back; return whether it was alive."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._leave(request)
        self._finish(request, reason)
        return True

    def stall(self, request_id: str) -> bool:
        """Keep a request and its blocks, but never run it again: an engine's silent failure."""
        request = self._requests.get(request_id)
        if request is None or request.state is RequestState.STALLED:
            return False
        self._leave(request)
        request.state = RequestState.STALLED
        self._stalled_count += 1
        return True

    def begin_step(self, now: float) -> float | None:
        """Start a step unless one is in progress; return when it ends, or None without work."""
        if self._plan is None:
            start, self._resume_s = self._resume_s, None
            if start is None or now - start > _CATCH_UP_S:
                start = now
            if not self._begin(start):
                return None
        return self._step_end_s

    def finish_step(self, now: float) -> list[TokenOutput]:
        """End the step in progress and return its tokens.

        Args:
            now: The time, not before the step's end.
        """
        plan, self._plan = self._plan, None
        if plan is None:
            return []
        self._resume_s = self._step_end_s
        self.counters.steps += 1
        self.last_step_tokens = self._planned_tokens
        outputs: list[TokenOutput] = []
        for request in plan:
            if request.state is not RequestState.RUNNING:
                continue  # It was aborted or stalled during the step.
            request.computed += request.chunk
            if request.computed >= request.next_commit:
                self._commit(request)
            if request.computed == len(request.tokens):
                outputs.append(self._emit(request, now))
        return outputs

    def _begin(self, now: float) -> bool:
        """Choose the step's work: decodes, then started prefills, then new requests.

        Returns:
            Whether there is any. Without it requests may still wait, for room
            that stalled requests hold: the next abort makes it worth another try.
        """
        plan: list[EngineRequest] = []
        prefills: list[EngineRequest] = []
        budget = self.limits.max_batch_tokens
        context_tokens, token_pairs = 0, 0.0
        preemptions = self.counters.preemptions
        running = self._running
        index = 0
        while index < len(running):  # Preemption shortens the list at its end.
            request = running[index]
            index += 1
            if len(request.tokens) - request.computed != 1 or request.computed < request.prompt_token_count:
                prefills.append(request)
            elif budget and (request.computed < request.capacity or self._grow(request, 1)):
                request.chunk = 1
                plan.append(request)
                budget -= 1
                context_tokens += request.computed + 1
        for request in prefills:
            chunk = min(len(request.tokens) - request.computed, budget)
            if chunk and request.state is RequestState.RUNNING and self._grow(request, chunk):
                request.chunk = chunk
                plan.append(request)
                budget -= chunk
                token_pairs += chunk * (request.computed + chunk / 2)
        if self.counters.preemptions != preemptions:
            plan = [request for request in plan if request.state is RequestState.RUNNING]
        else:
            while budget and self._waiting and self.running_count < self.limits.max_running_requests:
                admitted = self._admit(now, budget)
                if admitted is None:
                    break
                plan.append(admitted)
                budget -= admitted.chunk
                token_pairs += admitted.chunk * (admitted.computed + admitted.chunk / 2)
        if not plan:
            return False
        self._plan = plan
        self._planned_tokens = self.limits.max_batch_tokens - budget
        duration = self.profile.step_s(self._planned_tokens, context_tokens, token_pairs)
        self._step_end_s = now + duration * self.slowness
        return True

    def _admit(self, now: float, budget: int) -> EngineRequest | None:
        """Move the head of the queue into the batch, if its first chunk fits."""
        request = self._waiting[0]
        prefix = self.cache.match(request.tokens)
        cached = len(prefix) * self.cache.block_size
        chunk = min(len(request.tokens) - cached, budget)
        table = self.cache.open(prefix, cached + chunk)
        if table is None:
            return None
        self._waiting.popleft()
        self._running.append(request)
        request.state = RequestState.RUNNING
        request.table = table
        request.capacity = len(table.block_ids) * self.cache.block_size
        request.computed = cached
        request.next_commit = cached + self.cache.block_size
        request.chunk = chunk
        if request.scheduled_s < 0:
            request.scheduled_s = now
            request.cached_token_count = cached
            self.counters.prefix_queries += request.prompt_token_count
            self.counters.prefix_hits += cached
        return request

    def _grow(self, request: EngineRequest, chunk: int) -> bool:
        """Make room for a chunk, preempting the newest; False when the request itself had to go."""
        assert request.table is not None  # noqa: S101 - every running request has one
        while not self.cache.grow(request.table, request.computed + chunk):
            newest = self._running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        request.capacity = len(request.table.block_ids) * self.cache.block_size
        return True

    def _preempt(self, request: EngineRequest) -> None:
        self._running.remove(request)
        self._release(request)
        request.state = RequestState.WAITING
        request.preemption_count += 1
        self.counters.preemptions += 1
        self._waiting.appendleft(request)

    def _commit(self, request: EngineRequest) -> None:
        assert request.table is not None  # noqa: S101 - every running request has one
        self.cache.commit(request.table, request.tokens, request.computed)
        block_size = self.cache.block_size
        request.next_commit = (request.computed // block_size + 1) * block_size

    def _emit(self, request: EngineRequest, now: float) -> TokenOutput:
        """Choose the request's next token, and end it where the token says so."""
        count = request.output_token_count
        may_end = count >= request.min_tokens
        token_id = request.chooser.next_token(may_end)
        request.tokens.append(token_id)
        request.output_token_count = count = count + 1
        if count == 1:
            request.first_token_s = now
            self.counters.prompt_tokens += request.prompt_token_count
            self.counters.cached_prompt_tokens += max(0, request.cached_token_count)
        else:
            request.token_gap_s = now - request.last_token_s
        request.last_token_s = now
        self.counters.generation_tokens += 1
        finish_reason = ""
        if may_end and token_id in request.end_token_ids:
            finish_reason = "stop"
            request.stop_token_id = token_id
        elif count >= request.max_tokens:
            finish_reason = "length"
        if finish_reason:
            self._leave(request)
            self._finish(request, finish_reason)
        return request, token_id, finish_reason

    def _leave(self, request: EngineRequest) -> None:
        """Take a request out of the list that its state says it is in."""
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
        elif request.state is RequestState.WAITING:
            self._waiting.remove(request)
        elif request.state is RequestState.STALLED:
            self._stalled_count -= 1

    def _finish(self, request: EngineRequest, reason: str) -> None:
        self._release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self._requests[request.request_id]

    def _release(self, request: EngineRequest) -> None:
        if request.table is not None:
            self.cache.close(request.table)
            request.table = None
        request.computed = request.capacity = request.chunk = 0
