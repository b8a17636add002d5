"""Shortest predicted latency, from what was learned of each instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer

# What a request takes on an instance nobody has measured, in seconds. Only
# ratios matter, so the value shows only while the whole fleet is unmeasured.
PRIOR_LATENCY_S = 1.0
# An instance that got none of this many dispatches per candidate is measured anew.
NEGLECTED_DISPATCH_COUNT = 64


class PredictedLatencyBalancer(LoadBalancer):
    """Learned latency of an instance, times the number of requests it would then have.

    ``latency * (in_flight + 1)``, the shortest expected delay: the capacity of
    an engine is shared by what runs on it, so a burst spreads over the fleet in
    proportion to speed, however small it is beside the limits.

    An instance without history is given the mean of those with one, so that
    newcomers are tried. An old measurement may be wrong by now, and an instance
    that looks slow gets no new one: after many dispatches to others it counts as
    fast as the fastest, once. A step-time model per GPU type replaces this
    estimate once the core has one.
    """

    name: ClassVar[str] = "predicted_latency"

    def scores(self, request: RequestRecord, candidates: Sequence[InstanceView]) -> list[float]:
        """Return the predicted latency of each, in seconds."""
        known = [c.latency_estimate_s for c in candidates if c.latency_estimate_s is not None]
        newcomer_s = sum(known) / len(known) if known else PRIOR_LATENCY_S
        fastest_s = min(known, default=PRIOR_LATENCY_S)
        last = max(c.last_dispatch_sequence for c in candidates)
        neglected_before = last - NEGLECTED_DISPATCH_COUNT * len(candidates)
        return [
            (
                newcomer_s
                if c.latency_estimate_s is None
                else fastest_s
                if c.last_dispatch_sequence < neglected_before
                else c.latency_estimate_s
            )
            * (c.in_flight_count + 1)
            for c in candidates
        ]

    def reason(self, request: RequestRecord, best: InstanceView, score: float) -> str:
        """Return why ``best`` won."""
        return f"predicted_latency: {score:.3f} s with {best.in_flight_count} in flight"
