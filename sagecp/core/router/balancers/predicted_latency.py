"""Shortest predicted latency, from what was learned of each instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer

# What a request takes on an instance nobody has measured, in seconds. Only
# ratios matter, so the value shows only while the whole fleet is unmeasured.
PRIOR_LATENCY_S = 1.0


class PredictedLatencyBalancer(LoadBalancer):
    """Learned latency of an instance, stretched by the load it would have.

    ``latency * (1 + (in_flight + 1) / limit)``: continuous batching slows every
    request as the batch grows; to first order a full batch doubles the time of
    a lone request. An instance without history is given the mean of those with
    one, so that newcomers are tried. A step-time model per GPU type replaces
    this estimate once the core has one.
    """

    name: ClassVar[str] = "predicted_latency"

    def scores(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> list[float]:
        """Return the predicted latency of each, in seconds."""
        known = [c.latency_estimate_s for c in candidates if c.latency_estimate_s is not None]
        default_s = sum(known) / len(known) if known else PRIOR_LATENCY_S
        return [
            (default_s if c.latency_estimate_s is None else c.latency_estimate_s)
            * (1.0 + (c.in_flight_count + 1) / c.concurrency_limit)
            for c in candidates
        ]

    def reason(self, request: RequestRecord, best: InstanceView, score: float) -> str:
        """Return why ``best`` won."""
        return f"predicted_latency: {score:.3f} s with {best.in_flight_count} in flight"
