"""Shortest time to first token of late, times the load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer


class LeastResponseTimeBalancer(LoadBalancer):
    """Observed mean time to first token, times the requests there would be.

    ``ttft * (in_flight + 1)``, with the exponentially weighted mean that the
    fleet keeps, as load balancers with a least-response-time method do.

    An instance that was never measured is tried at once, by one request; while
    that runs, ``least_response_time.prior_s`` stands for its time. One that
    looked slow gets no new measurement by itself, and may have recovered: after
    ``least_response_time.retest_after`` dispatches per candidate to others it is
    tried in the same way.

    The ``extra`` is the number of dispatches to others since its own, per candidate.
    """

    name: ClassVar[str] = "least_response_time"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "least_response_time.prior_s",
            1.0,
            0.001,
            3600.0,
            "Time to first token of an instance that was never measured and is busy.",
        ),
        Parameter(
            "least_response_time.retest_after",
            64.0,
            1.0,
            1_000_000.0,
            "Dispatches per candidate after which an idle instance without any is measured again.",
        ),
    )

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Return for how many dispatches per candidate each was left out."""
        newest = max(instance.last_dispatch_sequence for instance in instances)
        return [(newest - instance.last_dispatch_sequence) / len(instances) for instance in instances]

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the expected time, in seconds; 0: to be measured."""
        measured = not math.isinf(candidate.ttft_estimate_s)
        if candidate.in_flight_count == 0 and (
            not measured or candidate.extra > parameters["least_response_time.retest_after"]
        ):
            return 0.0
        ttft_s = candidate.ttft_estimate_s if measured else parameters["least_response_time.prior_s"]
        return ttft_s * (candidate.in_flight_count + 1)

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        if score == 0.0:
            return "least_response_time: to be measured"
        return f"least_response_time: {score:.3f} s with {best.in_flight_count} in flight"
