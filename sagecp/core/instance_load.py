"""What an instance has to do, estimated from our own dispatches and from what came back.

Nothing here waits for an engine's metrics: they are late, and the first token
of a request says exactly when its prefill was over. The engine is taken to
prefill in order of arrival, beside the decodes of what it runs already.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sagecp.core.prediction.book import InstanceKind
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT
from sagecp.core.prediction.residual import Residual
from sagecp.core.prediction.step_time_accuracy import RunningRatio

# Time constant of the share of time that goes to prefill.
PREFILL_SHARE_TIME_S = 5.0
# First tokens this close together came from one step.
_SAME_STEP_S = 1e-3
# A stretch of prefill this long is taken as an observation of its own.
_LONG_STRETCH_STEPS = 4
# Shorter decodes say little about the time of a step.
_LEAST_DECODE_STEPS = 8
# Beside more prefill than this the time of a decode step is the small difference of two large figures.
_MOST_PREFILL_SHARE = 0.3
# An instance this far from its kind is a case of its own: the kind learns nothing from it,
# unless what is known of the kind is a guess.
_TYPICAL = (0.5, 2.0)


class _Prefill:
    """A request whose first token has not come."""

    __slots__ = (
        "context",
        "decodes",
        "expected_s",
        "pairs",
        "predicted_s",
        "prompt",
        "steps",
        "uncached",
    )

    def __init__(self, prompt: int, uncached: int, decodes: int, context: float) -> None:
        self.prompt = prompt
        self.uncached = uncached
        self.decodes = decodes
        self.context = context
        self.steps = math.ceil(uncached / max(1, BATCH_TOKEN_COUNT - decodes))
        self.pairs = uncached * (prompt - uncached / 2)
        self.predicted_s = 0.0
        self.expected_s = 0.0


class _Decode:
    """A request that produces tokens, with the instance's totals when it began."""

    __slots__ = (
        "begun_tokens",
        "context_integral",
        "count_integral",
        "first_token_s",
        "prefill_busy_s",
        "prefill_steps",
        "prompt",
    )

    def __init__(self, prompt: int, first_token_s: float) -> None:
        self.prompt = prompt
        self.first_token_s = first_token_s
        self.count_integral = 0.0
        self.context_integral = 0.0
        self.prefill_busy_s = 0.0
        self.prefill_steps = 0
        self.begun_tokens = 0.0


class _Stretch:
    """Prefill work that an engine did without a pause: one observation of its speed.

    Requests whose chunks share a step end together; only over several steps
    does the number of steps follow from the number of tokens.
    """

    __slots__ = ("_context_sum", "_decode_sum", "_groups", "_uncached", "count", "end_s", "pairs", "start_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.end_s = start_s
        self.pairs = 0.0
        self.count = 0
        self._groups = 0
        self._uncached = 0
        self._decode_sum = 0
        self._context_sum = 0.0

    def add(self, prefill: _Prefill, now: float) -> None:
        """Take in a prefill that ended now."""
        if not self.count or now - self.end_s > _SAME_STEP_S:
            self._groups += 1
        self.end_s = now
        self.count += 1
        self.pairs += prefill.pairs
        self._uncached += prefill.uncached
        self._decode_sum += prefill.decodes
        self._context_sum += prefill.context

    @property
    def is_long(self) -> bool:
        """Whether it has steps enough to be told from the step before it."""
        return self._uncached > _LONG_STRETCH_STEPS * BATCH_TOKEN_COUNT

    @property
    def step_count(self) -> int:
        """Steps it took, by estimate."""
        if not self.count:
            return 0
        room = max(1.0, BATCH_TOKEN_COUNT - self._decode_sum / self.count)
        return max(self._groups, math.ceil(self._uncached / room))

    @property
    def token_count(self) -> float:
        """Tokens of all those steps, decodes included."""
        return self._uncached + self._decode_sum / self.count * self.step_count if self.count else 0.0

    @property
    def mean_context(self) -> float:
        """Mean of what the decodes beside it held."""
        return self._context_sum / self.count if self.count else 0.0


class LoadView(NamedTuple):
    """A load at one moment, as :class:`InstanceLoad` says it piece by piece."""

    backlog_s: float
    decode_count: int
    context_token_count: float
    prefill_share: float
    ttft_factor: float
    tpot_factor: float
    ttft_sigma: float


class InstanceLoad:
    """Prefill backlog, decodes and held tokens of one instance, and how it differs from its kind.

    All times in seconds on the core's clock.

    Args:
        kind: What is known of instances like it.
        now: The time.

    Attributes:
        planned_ratio: Observed by planned step time of this instance alone.
    """

    __slots__ = (
        "_clock_s",
        "_context_integral",
        "_count_integral",
        "_decode_prompt_tokens",
        "_decodes",
        "_prefill_busy_s",
        "_prefill_free_s",
        "_prefill_steps",
        "_prefills",
        "_produced_tokens",
        "_progress_tokens",
        "_share",
        "_stretch",
        "_token_gap_s",
        "_view",
        "_view_s",
        "kind",
        "planned_ratio",
        "tpot",
        "ttft",
    )

    def __init__(self, kind: InstanceKind, now: float) -> None:
        self.kind = kind
        self.ttft = Residual()
        self.tpot = Residual()
        self.planned_ratio = RunningRatio()
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, _Decode] = {}
        self._prefill_free_s = now
        # Aggregates over the decodes: tokens are estimated, not counted.
        self._decode_prompt_tokens = 0
        self._produced_tokens = 0.0
        self._token_gap_s = max(1e-4, kind.model.parameters.decode_step_s(1, 0.0))
        # Integrals up to the clock.
        self._clock_s = now
        self._share = 0.0
        self._prefill_busy_s = 0.0
        self._prefill_steps = 0
        # Tokens that a decode which never ended would have produced since the start.
        self._progress_tokens = 0.0
        self._count_integral = 0.0
        self._context_integral = 0.0
        self._stretch = _Stretch(now)
        # What was last asked for, and for which time: heads that are looked at together see the same.
        self._view: LoadView
        self._view_s = math.nan

    # -- reading ---------------------------------------------------------------

    @property
    def decode_count(self) -> int:
        """Requests that produce tokens."""
        return len(self._decodes)

    @property
    def prefill_count(self) -> int:
        """Requests whose first token has not come."""
        return len(self._prefills)

    def backlog_s(self, now: float) -> float:
        """Return the predicted seconds until the prefill work it has is done.

        Work that is overdue by some time is expected to take as long again: an
        engine that became slow, or froze, is not fed at its old pace.
        """
        if not self._prefills:
            return 0.0
        oldest = next(iter(self._prefills.values()))
        return max(0.0, self._prefill_free_s - now) + max(0.0, now - oldest.expected_s)

    def view(self, now: float) -> LoadView:
        """Return everything that a placement needs to know."""
        if self._view_s != now:
            self._view_s = now
            has_prefills, decode_count = bool(self._prefills), len(self._decodes)
            self._view = LoadView(
                self.backlog_s(now) if has_prefills else 0.0,
                decode_count,
                self.context_token_count(now) if decode_count else 0.0,
                self.prefill_share(now) if has_prefills or self._share else 0.0,
                self.ttft.factor(now),
                self.tpot.factor(now),
                self.ttft.sigma,
            )
        return self._view

    def context_token_count(self, now: float) -> float:
        """Return the tokens that decodes hold, by estimate."""
        since = len(self._decodes) * (now - self._clock_s) / self._token_gap_s
        return self._decode_prompt_tokens + (self._produced_tokens + since)

    def produced_token_count(self, now: float) -> float:
        """Return the tokens that requests which still run have produced, by estimate."""
        since = len(self._decodes) * (now - self._clock_s) / self._token_gap_s
        return self._produced_tokens + since

    def prefill_share(self, now: float) -> float:
        """Return the share of recent time that went to prefill, 0 to 1."""
        elapsed_s = now - self._clock_s
        if elapsed_s <= 0.0:
            return self._share
        busy = 1.0 if self._prefills else 0.0
        return busy + (self._share - busy) * math.exp(-elapsed_s / PREFILL_SHARE_TIME_S)

    # -- what happens ------------------------------------------------------------

    def note_dispatch(self, request_id: str, prompt_tokens: int, cached_tokens: int, now: float) -> None:
        """A request was sent to the instance."""
        self._advance(now)
        context = self.context_token_count(now)
        prefill = _Prefill(prompt_tokens, max(1, prompt_tokens - cached_tokens), len(self._decodes), context)
        step = self.kind.model.parameters
        raw_s = step.prefill_s(prefill.uncached, prompt_tokens, prefill.decodes, context, BATCH_TOKEN_COUNT)
        prefill.predicted_s = raw_s * self.ttft.factor(now)
        start_s = now
        if self._prefills:
            start_s = max(now, self._prefill_free_s)
        elif self._decodes:
            # The step in progress, one of decodes alone, ends first.
            start_s = now + self._token_gap_s / 2
        self._prefill_free_s = prefill.expected_s = start_s + prefill.predicted_s
        if not self._prefills:
            self._stretch = _Stretch(start_s)
        self._prefills[request_id] = prefill
        self._settle_gap(now)

    def note_first_token(self, request_id: str, now: float) -> None:
        """The first token of a request came: its prefill is done."""
        prefill = self._prefills.get(request_id)
        if prefill is None:
            return
        self._advance(now)
        if now - self._stretch.end_s > _SAME_STEP_S and self._stretch.is_long:
            self._learn_prefill(now)
        self._stretch.add(prefill, now)
        self._prefill_steps += prefill.steps
        del self._prefills[request_id]
        self._reschedule(now)
        if not self._prefills:
            self._learn_prefill(now)
        decode = _Decode(prefill.prompt, now)
        decode.count_integral = self._count_integral
        decode.context_integral = self._context_integral
        decode.prefill_busy_s = self._prefill_busy_s
        decode.prefill_steps = self._prefill_steps
        decode.begun_tokens = self._progress_tokens
        self._decodes[request_id] = decode
        self._decode_prompt_tokens += prefill.prompt
        self._settle_gap(now)

    def note_end(self, request_id: str, output_tokens: float, now: float, *, learn: bool) -> None:
        """A request left the instance.

        Args:
            request_id: Which.
            output_tokens: What it produced, per choice.
            now: The time.
            learn: Whether it ran to its end, so that its times say something.
        """
        self._advance(now)
        prefill = self._prefills.pop(request_id, None)
        if prefill is not None:
            self._reschedule(now)
            return
        decode = self._decodes.pop(request_id, None)
        if decode is None:
            return
        if self._decodes:
            self._decode_prompt_tokens -= decode.prompt
            # As many as were counted for it: what is left does not drift, whatever the error.
            counted = self._progress_tokens - decode.begun_tokens
            self._produced_tokens = max(0.0, self._produced_tokens - counted)
        else:
            self._decode_prompt_tokens, self._produced_tokens = 0, 0.0
        if learn:
            self._learn_decode(decode, output_tokens, now)
        self._settle_gap(now)

    def forget(self, now: float) -> None:
        """The engine restarted: it holds nothing, and may differ in another way than before."""
        self._advance(now)
        self._prefills.clear()
        self._decodes.clear()
        self._prefill_free_s = now
        self._decode_prompt_tokens, self._produced_tokens = 0, 0.0
        self._stretch = _Stretch(now)
        self.ttft = Residual()
        self.tpot = Residual()
        self.planned_ratio = RunningRatio()

    # -- inside --------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Bring shares and integrals up to the time. What is seen may change from here on."""
        self._view_s = math.nan
        elapsed_s = now - self._clock_s
        if elapsed_s <= 0.0:
            return
        self._share = self.prefill_share(now)
        if self._prefills:
            self._prefill_busy_s += elapsed_s
        count = len(self._decodes)
        if count:
            self._count_integral += count * elapsed_s
            produced = count * elapsed_s / self._token_gap_s
            held = self._decode_prompt_tokens + self._produced_tokens + produced / 2
            self._context_integral += held * elapsed_s
            self._produced_tokens += produced
        self._progress_tokens += elapsed_s / self._token_gap_s
        self._clock_s = now

    def _reschedule(self, now: float) -> None:
        """Expect the remaining prefills one after the other from now on."""
        expected_s = now
        for prefill in self._prefills.values():
            expected_s += prefill.predicted_s
            prefill.expected_s = expected_s
        self._prefill_free_s = expected_s

    def _settle_gap(self, now: float) -> None:
        """Estimate the present time between tokens. The clock must be at ``now``."""
        count = len(self._decodes)
        if not count:
            return
        step, context = self.kind.model.parameters, self.context_token_count(now)
        if self._prefills:
            oldest = next(iter(self._prefills.values()))
            tokens = min(BATCH_TOKEN_COUNT, count + oldest.uncached)
            gap_s = step.step_s(tokens, context) * self.ttft.factor(now)
        else:
            gap_s = step.decode_step_s(count, context) * self.tpot.factor(now)
        self._token_gap_s = max(1e-5, gap_s)

    def _learn_prefill(self, now: float) -> None:
        """Learn from a stretch of prefill, and begin the next where it ended."""
        stretch = self._stretch
        self._stretch = _Stretch(stretch.end_s)
        duration_s = stretch.end_s - stretch.start_s
        if duration_s <= _SAME_STEP_S or not stretch.step_count:
            return
        step = self.kind.model.parameters
        steps, tokens = stretch.step_count, stretch.token_count
        context = stretch.mean_context * steps
        # Short prompts do not fill a step: it takes as long as the weights take to read.
        raw_s = steps * step.step_s(tokens / steps, stretch.mean_context)
        raw_s += step.attention_per_token_pair_s * stretch.pairs
        if raw_s > 0.0:
            self.kind.accuracy.observe_prefill(
                duration_s, steps, tokens, stretch.mean_context, stretch.pairs, self.planned_ratio
            )
            self.ttft.observe(raw_s, duration_s, now)
            if not self.kind.trusted or _TYPICAL[0] < self.ttft.factor(now) < _TYPICAL[1]:
                self.kind.model.observe_prefill(duration_s, steps, tokens, context, stretch.pairs)

    def _learn_decode(self, decode: _Decode, output_tokens: float, now: float) -> None:
        steps = output_tokens - 1
        duration_s = now - decode.first_token_s
        if steps < _LEAST_DECODE_STEPS or duration_s <= 0.0:
            return
        prefill_s = self._prefill_busy_s - decode.prefill_busy_s
        decode_steps = steps - (self._prefill_steps - decode.prefill_steps)
        if decode_steps < _LEAST_DECODE_STEPS or prefill_s > _MOST_PREFILL_SHARE * duration_s:
            return
        step_s = (duration_s - prefill_s) / decode_steps
        count = (self._count_integral - decode.count_integral) / duration_s
        context = (self._context_integral - decode.context_integral) / duration_s
        predicted_s = self.kind.model.parameters.decode_step_s(count, context)
        if predicted_s > 0.0:
            self.kind.accuracy.observe_decode(step_s, count, context, self.planned_ratio)
            self.tpot.observe(predicted_s, step_s, now)
            if not self.kind.trusted or _TYPICAL[0] < self.tpot.factor(now) < _TYPICAL[1]:
                self.kind.model.observe_decode(step_s, count, context)
