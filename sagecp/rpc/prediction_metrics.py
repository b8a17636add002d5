"""Prometheus metrics of how right predictions were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sagecp.core.prediction.accuracy import QuantityAccuracy


class PredictionCollector(Collector):
    """Reads the accuracy of predictions whenever it is scraped.

    Scrapes come from another thread than the one that changes the figures.
    They are read without a lock: each is a few numbers, and one that is half a
    comparison old is as good.

    Args:
        read: Returns the accuracy by quantity.
    """

    def __init__(self, read: Callable[[], Mapping[str, QuantityAccuracy]]) -> None:
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the present figures."""
        count = CounterMetricFamily(
            "sagecp_predictions_compared", "Predictions compared with what came.", labels=["quantity"]
        )
        error = GaugeMetricFamily(
            "sagecp_prediction_error_ratio",
            "How wrong recent predictions were: bias is the geometric mean of actual by predicted, "
            "median and p90 are quantiles of |predicted - actual| / actual.",
            labels=["quantity", "stat"],
        )
        coverage = GaugeMetricFamily(
            "sagecp_prediction_coverage_ratio",
            "Share of actual values at or below the predicted upper bound.",
            labels=["quantity"],
        )
        for quantity, accuracy in self._read().items():
            count.add_metric([quantity], accuracy.count)
            error.add_metric([quantity, "bias"], accuracy.bias_ratio)
            error.add_metric([quantity, "median"], accuracy.median_error_ratio)
            error.add_metric([quantity, "p90"], accuracy.p90_error_ratio)
            if accuracy.upper_coverage is not None:
                coverage.add_metric([quantity], accuracy.upper_coverage)
        yield count
        yield error
        yield coverage
