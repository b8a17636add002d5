"""What sets one instance apart from the model of its type."""

from __future__ import annotations

import math

_LARGEST_LOG = math.log(50.0)
_JUMP_LOG = math.log(2.0)
_JUMP_COUNT = 3
_LEAST_SIGMA = 0.05
# No observation is farther from the mean than both are from 0.
LARGEST_SIGMA = 2.0 * _LARGEST_LOG
_PRIOR_SIGMA = 0.35
# The prior spread counts as this many observations.
_PRIOR_SIGMA_COUNT = 2
# From this many observations on, one that is far off is doubted first.
_SETTLED_COUNT = 3


class Residual:
    """A multiplicative correction: how many times its prediction an instance takes.

    An exponentially weighted mean of ``log(observed / predicted)``, where the
    first observations count alike. An observation more than twice off moves it
    as one twice off would; three in a row on the same side are a jump, and
    the mean goes to theirs at once: an instance that becomes ten times slower,
    or recovers, is seen after three requests.

    Without observations the factor returns to 1, so that an instance that is
    shunned for being slow is tried again. The next observation then decides
    what the time without any meant: the mean starts from the value nearest to
    it between what it was and what it had decayed to.

    Args:
        smoothing: Weight of a new observation once settled.
        half_life_s: Time without observations after which the logarithm of the
            factor has halved.
    """

    __slots__ = (
        "_half_life_s",
        "_log_mean",
        "_log_variance",
        "_observed_s",
        "_run_count",
        "_run_sum",
        "_smoothing",
        "_weight_count",
        "observation_count",
        "sigma",
    )

    def __init__(self, *, smoothing: float = 0.1, half_life_s: float = 60.0) -> None:
        if not 0.0 < smoothing <= 1.0:
            raise ValueError(f"smoothing is {smoothing}; it must be above 0 and at most 1")
        if not half_life_s > 0.0:
            raise ValueError(f"half_life_s is {half_life_s}; it must be above 0")
        self._smoothing = smoothing
        self._half_life_s = half_life_s
        self._log_mean = 0.0
        self._log_variance = _PRIOR_SIGMA**2
        self.sigma = _sigma_of(self._log_variance)
        """Standard deviation of the logarithm of observed by corrected prediction."""
        self._observed_s = -math.inf
        # Observations since the start or the last jump; the reciprocal weights the next.
        self._weight_count = 0
        self.observation_count = 0
        """Observations taken in; those that made no sense are not counted."""
        # Observations in a row that are far off on one side; negative: below.
        self._run_count = 0
        self._run_sum = 0.0

    def factor(self, now: float) -> float:
        """Return what to multiply a prediction by, between 1/50 and 50."""
        return math.exp(self._decayed(now)) if self._log_mean else 1.0

    def observe(self, predicted_s: float, observed_s: float, now: float) -> None:
        """Learn from one request.

        Args:
            predicted_s: What the type's model predicted, without this correction.
            observed_s: What it took.
            now: When it was observed.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < observed_s < math.inf):
            return
        # A difference of logarithms: a quotient could overflow.
        log_ratio = math.log(observed_s) - math.log(predicted_s)
        log_ratio = max(-_LARGEST_LOG, min(_LARGEST_LOG, log_ratio))
        decayed = self._decayed(now)
        nearest, farthest = sorted((decayed, self._log_mean))
        mean = min(farthest, max(nearest, log_ratio))
        error = log_ratio - mean
        self.observation_count += 1
        self._weight_count += 1
        self._observed_s = max(self._observed_s, now)
        if self._follows_jump(error, log_ratio):
            return
        if self._weight_count > _SETTLED_COUNT:
            error = max(-_JUMP_LOG, min(_JUMP_LOG, error))
        self._log_mean = mean + max(self._smoothing, 1.0 / self._weight_count) * error
        weight = max(self._smoothing, 1.0 / (self._weight_count + _PRIOR_SIGMA_COUNT))
        self._log_variance += weight * (error * error - self._log_variance)
        self.sigma = _sigma_of(self._log_variance)

    def _decayed(self, now: float) -> float:
        idle_s = now - self._observed_s
        if self._log_mean == 0.0 or idle_s <= 0.0:
            return self._log_mean
        return self._log_mean * math.pow(0.5, idle_s / self._half_life_s)

    def _follows_jump(self, error: float, log_ratio: float) -> bool:
        """Count observations that are far off on one side; take over their mean after a few."""
        if abs(error) <= _JUMP_LOG:
            self._run_count, self._run_sum = 0, 0.0
            return False
        side = 1 if error > 0.0 else -1
        if self._run_count * side < 0:
            self._run_count, self._run_sum = 0, 0.0
        self._run_count += side
        self._run_sum += log_ratio
        if abs(self._run_count) < _JUMP_COUNT:
            return False
        self._log_mean = self._run_sum / _JUMP_COUNT
        self._log_variance = _PRIOR_SIGMA**2
        self.sigma = _sigma_of(self._log_variance)
        # What comes next counts as much as each of these did.
        self._weight_count = _JUMP_COUNT
        self._run_count, self._run_sum = 0, 0.0
        return True


def _sigma_of(log_variance: float) -> float:
    return max(_LEAST_SIGMA, math.sqrt(log_variance))
