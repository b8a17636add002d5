"""How a kind of instance keeps to the step times that were planned for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

MEMORY_OBSERVATION_COUNT = 100
"""Observations that a running ratio remembers, exponentially weighted."""
LEAST_OBSERVATION_COUNT = 20
"""Fewer say nothing of a kind of instance."""
LEAST_INSTANCE_OBSERVATION_COUNT = 8
"""Fewer say nothing of one instance of it."""
# An end is told at this share of the drift that is told as a begin.
_END_SHARE = 0.75
# As `StepTimeModel` does: an observation further off than this is a pause of the engine, not its speed.
_PLAUSIBLE_LOG = math.log(3.0)


class StepTimes(Protocol):
    """Durations of steps, by constants or by a planner's own formula."""

    @property
    def attention_per_token_pair_s(self) -> float:
        """Seconds for each pair of a prefill token and a token before it."""

    def step_s(
        self, token_count: float, decode_context_tokens: float = 0.0, token_pairs: float = 0.0
    ) -> float:
        """Return the duration of one step, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStepTime:
    """Step times that were predicted before the first observation, and stay as they are.

    Attributes:
        step_times: Of one copy of the model.
        source: Where they came from, in words for people.
        reliable: Whether an engine can be held to them; a guess is shown, and never called a drift.
        lane_count: Batches that an instance works on at a time: copies times pipeline stages.
            Each has its share of the instance's requests.
    """

    step_times: StepTimes
    source: str
    reliable: bool = True
    lane_count: int = 1


class RunningRatio:
    """Geometric mean of observed by planned, of the latest observations.

    One that is more than three times off the mean counts as three times off, so
    that a single pause moves little and a lasting change prevails.
    """

    __slots__ = ("_log_mean", "count")

    def __init__(self) -> None:
        self._log_mean = 0.0
        self.count = 0
        """Observations taken in."""

    @property
    def value(self) -> float | None:
        """The ratio; above 1: slower than planned. ``None``: nothing was observed."""
        return math.exp(self._log_mean) if self.count else None

    def add(self, log_ratio: float) -> None:
        """Take in the logarithm of one observed by planned time."""
        self.count += 1
        error = log_ratio - self._log_mean
        if error > _PLAUSIBLE_LOG:
            error = _PLAUSIBLE_LOG
        elif error < -_PLAUSIBLE_LOG:
            error = -_PLAUSIBLE_LOG
        self._log_mean += error / min(self.count, MEMORY_OBSERVATION_COUNT)

    def is_off(self, most_drift: float) -> bool:
        """Return whether it differs from 1 by more than a share."""
        return self.count > 0 and abs(math.exp(self._log_mean) - 1.0) > most_drift


class StepTimeAccuracy:
    """Observed by planned step time of one kind of instance.

    Args:
        planned: What it is held to.

    Attributes:
        total: Of all observations.
        decodes: Of steps that only decode.
        prefills: Of prefills. Not observed of instances with several lanes: how many steps a
            prompt took there cannot be told from its time.
        drifting: As :meth:`judge` found last.
    """

    __slots__ = ("decodes", "drifting", "planned", "prefills", "total")

    def __init__(self, planned: PlannedStepTime) -> None:
        self.planned = planned
        self.total = RunningRatio()
        self.decodes = RunningRatio()
        self.prefills = RunningRatio()
        self.drifting = False

    def observe_decode(
        self, step_s: float, decode_count: float, context_tokens: float, own: RunningRatio
    ) -> None:
        """Compare a step without prefill, or the mean of some alike.

        Args:
            step_s: What it took.
            decode_count: Requests that the instance decoded.
            context_tokens: Sum of their contexts.
            own: The ratio of the instance that was observed.
        """
        lanes = self.planned.lane_count
        # A lane with nothing to do takes no step: the one observed had one request at least.
        count, context = max(1.0, decode_count / lanes), context_tokens / min(lanes, max(1.0, decode_count))
        self._add(step_s, self.planned.step_times.step_s(count, context), self.decodes, own)

    def observe_prefill(
        self,
        duration_s: float,
        step_count: float,
        token_count: float,
        mean_context: float,
        token_pairs: float,
        own: RunningRatio,
    ) -> None:
        """Compare a stretch of prefill.

        Args:
            duration_s: What it took.
            step_count: Steps of it, above 0.
            token_count: Tokens of all those steps, decodes included.
            mean_context: What the decodes beside it held, in the mean.
            token_pairs: Pairs of prefill token and token before it.
            own: The ratio of the instance that was observed.
        """
        if self.planned.lane_count > 1:
            return
        times = self.planned.step_times
        planned_s = step_count * times.step_s(token_count / step_count, mean_context)
        planned_s += times.attention_per_token_pair_s * token_pairs
        self._add(duration_s, planned_s, self.prefills, own)

    def judge(self, most_drift: float) -> bool:
        """Bring ``drifting`` up to date; return whether it changed.

        A drift begins beyond ``most_drift`` and ends below three quarters of it.

        Args:
            most_drift: Share of the planned time by which the observed one may differ.
        """
        was = self.drifting
        if self.planned.reliable and self.total.count >= LEAST_OBSERVATION_COUNT:
            self.drifting = self.total.is_off(most_drift * (_END_SHARE if was else 1.0))
        return self.drifting != was

    def _add(self, observed_s: float, planned_s: float, phase: RunningRatio, own: RunningRatio) -> None:
        # Written so that not-a-number fails, too.
        if not (0.0 < observed_s < math.inf and 0.0 < planned_s < math.inf):
            return
        # A difference of logarithms: a quotient could overflow.
        log_ratio = math.log(observed_s) - math.log(planned_s)
        self.total.add(log_ratio)
        phase.add(log_ratio)
        own.add(log_ratio)


def lone_deviant(ratios: Mapping[str, RunningRatio], most_drift: float) -> str:
    """Return the one instance that is off while all others of its kind are not; ``""``: it is not one alone.

    Args:
        ratios: Of each instance of the kind; those that were hardly observed are left out.
        most_drift: As in :meth:`StepTimeAccuracy.judge`.
    """
    known = {
        instance_id: ratio
        for instance_id, ratio in ratios.items()
        if ratio.count >= LEAST_INSTANCE_OBSERVATION_COUNT
    }
    off = [instance_id for instance_id, ratio in known.items() if ratio.is_off(most_drift)]
    return off[0] if len(off) == 1 and len(known) > 1 else ""
