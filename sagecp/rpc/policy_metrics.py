"""Prometheus metrics of the adaptive policy."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sagecp.core.scheduler import Scheduler


class PolicyCollector(Collector):
    """Reads which policy orders the queue whenever it is scraped, in another thread: single values, no lock.

    Args:
        scheduler: The core.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the present figures."""
        book = self._scheduler.adaptation
        in_force = GaugeMetricFamily(
            "sagecp_scheduling_policy_in_force",
            "1 for the policy that orders the queue, which adaptive chooses.",
            labels=["policy"],
        )
        in_force.add_metric([self._scheduler.policy_in_force], 1)
        yield in_force
        yield CounterMetricFamily(
            "sagecp_policy_evaluations", "Replays that adaptive judged by.", value=book.evaluation_count
        )
        yield CounterMetricFamily(
            "sagecp_policy_switches",
            "Times that adaptive let another policy decide.",
            value=book.switch_count,
        )
