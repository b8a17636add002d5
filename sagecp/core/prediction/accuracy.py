"""How right predictions were: bias, error and coverage, for metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sagecp.core.prediction.histogram import LogHistogram

QUANTITIES = ("ttft", "tpot", "latency", "output_tokens", "cost")
"""What is predicted."""

# Errors from a tenth of a percent to about 100,000 %, in steps of a tenth.
_LEAST_ERROR, _ERROR_RATIO, _ERROR_BUCKET_COUNT = 1e-3, 1.1, 145
# Beyond a million times, more says no more.
_LARGEST_RATIO = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantityAccuracy:
    """How right the recent predictions of one quantity were.

    Attributes:
        count: Predictions compared since the start.
        bias_ratio: Geometric mean of actual by predicted; above 1, things take
            longer than predicted.
        median_error_ratio: Median of ``|predicted - actual| / actual``, within 5 %.
        p90_error_ratio: Its 90 % quantile.
        upper_coverage: Share of the actual values at or below the predicted
            upper bound; ``None``: none was given.
    """

    count: int
    bias_ratio: float
    median_error_ratio: float
    p90_error_ratio: float
    upper_coverage: float | None


class PredictionAccuracy:
    """Compares predictions with what came, forgetting old ones.

    Args:
        forgetting: Weight left to old comparisons by each new one; 0.999 is a
            memory of about 1000.
    """

    def __init__(self, *, forgetting: float = 0.999) -> None:
        self._ledgers = {quantity: _Ledger(forgetting) for quantity in QUANTITIES}

    def record(self, quantity: str, predicted: float, actual: float, upper: float | None = None) -> None:
        """Compare one prediction; values that are not positive and finite are ignored.

        Args:
            quantity: One of ``QUANTITIES``.
            predicted: The prediction.
            actual: What came, in the same unit.
            upper: An upper bound that was predicted with it.

        Raises:
            ValueError: The quantity is not known.
        """
        ledger = self._ledgers.get(quantity)
        if ledger is None:
            raise ValueError(f"unknown quantity {quantity!r}; choose one of: {', '.join(QUANTITIES)}")
        if 0.0 < predicted < math.inf and 0.0 < actual < math.inf:
            ledger.record(predicted, actual, upper)

    def summary(self) -> Mapping[str, QuantityAccuracy]:
        """Return the accuracy of each quantity of which something was compared."""
        return {
            quantity: ledger.summary()
            for quantity, ledger in self._ledgers.items()
            if ledger.errors.observation_count
        }


class _Ledger:
    """What is kept of one quantity."""

    __slots__ = ("_bound_count", "_covered", "_forgetting", "_log_bias", "errors")

    def __init__(self, forgetting: float) -> None:
        self.errors = LogHistogram(
            _ERROR_BUCKET_COUNT, least=_LEAST_ERROR, ratio=_ERROR_RATIO, forgetting=forgetting
        )
        self._forgetting = forgetting
        self._log_bias = 0.0
        self._covered = 0.0
        self._bound_count = 0

    def record(self, predicted: float, actual: float, upper: float | None) -> None:
        predicted = min(max(predicted, actual / _LARGEST_RATIO), actual * _LARGEST_RATIO)
        self.errors.add(min(abs(predicted - actual) / actual, _LARGEST_RATIO))
        log_ratio = math.log(actual) - math.log(predicted)
        self._log_bias += (log_ratio - self._log_bias) * self._share(self.errors.observation_count)
        if upper is not None and not math.isnan(upper):
            self._bound_count += 1
            covered = 1.0 if actual <= upper else 0.0
            self._covered += (covered - self._covered) * self._share(self._bound_count)

    def summary(self) -> QuantityAccuracy:
        return QuantityAccuracy(
            count=self.errors.observation_count,
            bias_ratio=math.exp(self._log_bias),
            median_error_ratio=self.errors.quantile(0.5),
            p90_error_ratio=self.errors.quantile(0.9),
            upper_coverage=self._covered if self._bound_count else None,
        )

    def _share(self, count: int) -> float:
        """Weight of the latest of ``count`` values in their mean."""
        return max(1.0 - self._forgetting, 1.0 / count)
