"""Whose time an engine's time was: what it did, shared among the requests it did it for.

An engine is *busy* while it has at least one attempt, and costs its price whether it
is or not. Busy time is shared completely; the rest is idle time, which is nobody's.

An engine runs steps, and a step serves many requests. With the step-time model of
:mod:`sagecp.core.prediction.step_time`, a step of ``n`` decodes with ``KV`` tokens of
context and a chunk of ``c`` prompt tokens takes about

    o + max(a0 + a1*(n+c), b0 + b1*(n+c)) + g*KV + d*pairs

and is shared by what each causes:

* *Decodes alone.* ``o + a0 + a1*n`` is the same for all of them: each pays an equal part. ``g*KV``
  is reading contexts: each pays by its own.
* *A step with a chunk.* Tokens of a full step cost ``(o + b0)/B + b1`` each, those of decodes as well
  as those of the chunk: decodes pay ``n`` of these and ``g*KV``, and the prompt the rest.
* *Several prompts* that an engine has at once pay for the time of their chunks by their
  modelled work. Cached tokens are no work, and so cost nothing.

Only proportions come from the model: what is shared is the time that really passed. So
the shares on an engine never add up to more than its busy time, however wrong the model.

Each share is an integral over time, kept as the difference of two running sums that all
decodes have in common: per decode and per token of context. An event costs O(1) that way,
however many requests run.
"""

from __future__ import annotations

from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT
from sagecp.core.prediction.step_time import StepTimeParameters

# A prompt of which everything is cached still takes part in a step.
_LEAST_WORK_S = 1e-9
_HOUR_S = 3600.0


class _Attempt:
    """A request on the engine, and what it was charged so far."""

    __slots__ = (
        "begun_context_s",
        "begun_decode_s",
        "choice_count",
        "context",
        "paid_s",
        "pairs",
        "uncached",
        "work_s",
    )

    def __init__(
        self, uncached: int, prompt: int, output_tokens: float, choice_count: int, work_s: float
    ) -> None:
        self.uncached = uncached
        self.pairs = uncached * max(0.0, prompt - uncached / 2)
        self.work_s = max(_LEAST_WORK_S, work_s)
        self.choice_count = choice_count
        # In the mean over its life, of all its choices.
        self.context = choice_count * (prompt + output_tokens / 2)
        self.paid_s = 0.0
        self.begun_decode_s = 0.0
        self.begun_context_s = 0.0


# How time is shared: by prompts together, by each decode, and by each token of context.
_Parts = tuple[float, float, float]


class EngineTimeMeter:
    """Shares an engine's busy time among its attempts, and adds up what it and its idle time cost.

    All times in seconds on the core's clock. Attempts are told apart by request id: at
    most one of a request runs.

    Args:
        usd_per_hour: Price of the instance; 0: unknown.
        now: The time.
    """

    __slots__ = (
        "_busy_s",
        "_busy_usd",
        "_clock_s",
        "_context_s",
        "_decode_context",
        "_decode_count",
        "_decode_s",
        "_decodes",
        "_idle_s",
        "_idle_usd",
        "_pending",
        "_pending_pairs",
        "_pending_tokens",
        "_pending_work_s",
        "_priced_busy_s",
        "_priced_idle_s",
        "_prompts_s",
        "_step",
        "_unpaid",
        "_unpaid_work_s",
        "_usd_per_hour",
    )

    def __init__(self, usd_per_hour: float, now: float) -> None:
        self._usd_per_hour = usd_per_hour
        self._clock_s = now
        self._busy_s = self._idle_s = 0.0
        # Up to when the price last changed.
        self._busy_usd = self._idle_usd = 0.0
        self._priced_busy_s = self._priced_idle_s = 0.0
        self._step: StepTimeParameters | None = None
        # Prompts that have no token yet, in order of arrival, and what that is together.
        self._pending: dict[str, _Attempt] = {}
        self._pending_work_s = 0.0
        self._pending_tokens = 0
        self._pending_pairs = 0.0
        # Time that prompts have to pay for, and those of them that are done and have not paid.
        self._prompts_s = 0.0
        self._unpaid: dict[str, _Attempt] = {}
        self._unpaid_work_s = 0.0
        self._decodes: dict[str, _Attempt] = {}
        self._decode_count = 0
        self._decode_context = 0.0
        # Running sums since the engine was last empty.
        self._decode_s = 0.0
        self._context_s = 0.0

    # -- reading ---------------------------------------------------------------

    @property
    def usd_per_hour(self) -> float:
        """Price of the instance; 0: unknown."""
        return self._usd_per_hour

    def busy_s(self, now: float) -> float:
        """Return how long it had something to do."""
        return self._busy_s + (max(0.0, now - self._clock_s) if self._is_busy else 0.0)

    def idle_s(self, now: float) -> float:
        """Return how long it had nothing to do."""
        return self._idle_s + (0.0 if self._is_busy else max(0.0, now - self._clock_s))

    def busy_usd(self, now: float) -> float:
        """Return what its busy time cost."""
        return self._busy_usd + (self.busy_s(now) - self._priced_busy_s) * self._usd_per_hour / _HOUR_S

    def idle_usd(self, now: float) -> float:
        """Return what its idle time cost."""
        return self._idle_usd + (self.idle_s(now) - self._priced_idle_s) * self._usd_per_hour / _HOUR_S

    def spent_s(self, request_id: str, now: float) -> float:
        """Return the engine time of an attempt that runs, so far.

        Its prompt counts once it is done, and with others' that are done by then.
        """
        attempt = self._decodes.get(request_id)
        if attempt is None:
            return 0.0
        _, decode_s, context_s = self._parts(max(0.0, now - self._clock_s))
        return attempt.paid_s + _decoded_s(attempt, self._decode_s + decode_s, self._context_s + context_s)

    @property
    def _is_busy(self) -> bool:
        return bool(self._pending or self._decodes)

    # -- what happens ------------------------------------------------------------

    def set_price(self, usd_per_hour: float, now: float) -> None:
        """Take another price from now on."""
        self._advance(now)
        self._busy_usd, self._idle_usd = self.busy_usd(now), self.idle_usd(now)
        self._priced_busy_s, self._priced_idle_s = self._busy_s, self._idle_s
        self._usd_per_hour = usd_per_hour

    def begin(
        self,
        request_id: str,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: float,
        choice_count: int,
        work_s: float,
        step: StepTimeParameters,
        now: float,
    ) -> None:
        """An attempt was sent to the engine.

        Args:
            request_id: Whose.
            prompt_tokens: Of its prompt.
            cached_tokens: Of those, what the engine has already.
            output_tokens: Expected, per choice.
            choice_count: Answers to the one prompt.
            work_s: Predicted engine time of the prompt's uncached part; only proportions count.
            step: Times of the engine's steps.
            now: The time.
        """
        self._advance(now)
        self._step = step
        uncached = max(1, prompt_tokens - cached_tokens)
        attempt = _Attempt(uncached, prompt_tokens, output_tokens, choice_count, work_s)
        self._pending[request_id] = attempt
        self._pending_work_s += attempt.work_s
        self._pending_tokens += attempt.uncached
        self._pending_pairs += attempt.pairs

    def note_first_token(self, request_id: str, now: float) -> None:
        """The first token of an attempt came: its prompt is done."""
        attempt = self._pending.get(request_id)
        if attempt is None:
            return
        self._advance(now)
        self._leave_pending(request_id, attempt)
        self._owe(request_id, attempt)
        attempt.begun_decode_s, attempt.begun_context_s = self._decode_s, self._context_s
        self._decodes[request_id] = attempt
        self._decode_count += attempt.choice_count
        self._decode_context += attempt.context
        if not self._pending:
            self._settle()

    def end(self, request_id: str, now: float) -> float:
        """An attempt is over, however it went; return the engine time that was its own."""
        self._advance(now)
        attempt = self._pending.get(request_id)
        if attempt is not None:
            self._give_up(request_id, attempt)
            return attempt.paid_s
        attempt = self._decodes.pop(request_id, None)
        if attempt is None:
            return 0.0
        if request_id in self._unpaid:
            self._settle()
        attempt.paid_s += _decoded_s(attempt, self._decode_s, self._context_s)
        if self._decodes:
            self._decode_count -= attempt.choice_count
            self._decode_context = max(0.0, self._decode_context - attempt.context)
        else:
            # Sums that only grow would lose their last digits.
            self._decode_count, self._decode_context = 0, 0.0
            self._decode_s = self._context_s = 0.0
        return attempt.paid_s

    # -- inside --------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        elapsed_s = now - self._clock_s
        if elapsed_s <= 0.0:
            return
        self._clock_s = now
        if not (self._pending or self._decodes):
            self._idle_s += elapsed_s
            return
        self._busy_s += elapsed_s
        prompts_s, decode_s, context_s = self._parts(elapsed_s)
        self._prompts_s += prompts_s
        self._decode_s += decode_s
        self._context_s += context_s

    def _parts(self, elapsed_s: float) -> _Parts:
        """Return how time in which nothing changed is shared."""
        count, step = self._decode_count, self._step
        if not count or step is None:
            return elapsed_s, 0.0, 0.0
        reading_s = step.context_per_token_s * self._decode_context
        decodes_s = elapsed_s
        if self._pending:
            decodes_s *= self._decode_share(count, reading_s, step)
        linear_s = step.overhead_s + step.memory_base_s + step.memory_per_token_s * count
        whole_s = linear_s + reading_s
        if whole_s <= 0.0:
            return elapsed_s - decodes_s, decodes_s / count, 0.0
        return (
            elapsed_s - decodes_s,
            decodes_s * linear_s / whole_s / count,
            decodes_s * step.context_per_token_s / whole_s,
        )

    def _decode_share(self, count: int, reading_s: float, step: StepTimeParameters) -> float:
        """Return the part of a step that is the decodes', beside a chunk of the prompts."""
        chunk = max(1, min(BATCH_TOKEN_COUNT - count, self._pending_tokens))
        per_token_s = step.full_step_token_s(BATCH_TOKEN_COUNT)
        pairs = chunk * self._pending_pairs / max(1, self._pending_tokens)
        whole_s = step.step_s(count + chunk, self._decode_context, pairs)
        return min(1.0, (count * per_token_s + reading_s) / whole_s) if whole_s > 0.0 else 0.0

    def _leave_pending(self, request_id: str, attempt: _Attempt) -> None:
        del self._pending[request_id]
        if self._pending:
            self._pending_work_s = max(0.0, self._pending_work_s - attempt.work_s)
            self._pending_tokens -= attempt.uncached
            self._pending_pairs = max(0.0, self._pending_pairs - attempt.pairs)
        else:
            self._pending_work_s, self._pending_tokens, self._pending_pairs = 0.0, 0, 0.0

    def _owe(self, request_id: str, attempt: _Attempt) -> None:
        self._unpaid[request_id] = attempt
        self._unpaid_work_s += attempt.work_s

    def _give_up(self, request_id: str, attempt: _Attempt) -> None:
        """End an attempt whose prompt is not done: engines prefill in order, so only the first has begun."""
        is_first = next(iter(self._pending)) == request_id
        self._leave_pending(request_id, attempt)
        begun_s = min(attempt.work_s, self._prompts_s - self._unpaid_work_s) if is_first else 0.0
        if begun_s > 0.0:
            attempt.work_s = begun_s
            self._owe(request_id, attempt)
            self._settle()
        elif not self._pending:
            self._settle()

    def _settle(self) -> None:
        """Have the prompts that are done pay for the time of prompts, in proportion to their work.

        Time beyond their own work went, as far as it can be told, into those that are not done.
        """
        if self._unpaid_work_s > 0.0:
            begun_s = max(0.0, min(self._pending_work_s, self._prompts_s - self._unpaid_work_s))
            rate = self._prompts_s / (self._unpaid_work_s + begun_s)
            for attempt in self._unpaid.values():
                attempt.paid_s += rate * attempt.work_s
            self._prompts_s = rate * begun_s
            self._unpaid.clear()
            self._unpaid_work_s = 0.0
        if not self._pending:
            # What is left was for prompts of which nothing came: busy, and nobody's.
            self._prompts_s = 0.0


def _decoded_s(attempt: _Attempt, decode_s: float, context_s: float) -> float:
    """Return what an attempt has to pay for its decodes, by the running sums."""
    return attempt.choice_count * (decode_s - attempt.begun_decode_s) + attempt.context * (
        context_s - attempt.begun_context_s
    )
