"""Requests of one session go to one instance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, RoutingStrategy, ScorerContext
from sagecp.core.router.hash_ring import HashRing
from sagecp.core.router.packed_extra import pack, unpack

# Added to the place of an instance that has too much to do: it comes after all others.
TOO_LOADED = 1_000_000.0
# Instances that must be among the candidates if they can take a request: the first may be too
# loaded, or serve another model.
_WANTED_COUNT = 32


class AffinityStrategy(RoutingStrategy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA'18).

    The key is the session, or else the user; a request with neither is left to
    the balancer. Each key has its order of instances, from a hash ring, so that
    nothing is remembered per session, and only keys of instances that come or
    go move. The first takes the request that can, and that has less than
    ``affinity.load_bound`` times what candidates have on average, this request
    on each of them included: ``in_flight < bound * (mean + 1)``.

    The ``extra`` of a request with a key is negative: ``-(1 + place + r / (1 + r))``,
    with the candidate's place in the key's order, from 0, and its relative load
    ``r = in_flight / (mean + 1)``. Without a key it is the balancer's, which is not
    negative.
    """

    name: ClassVar[str] = "affinity"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "affinity.load_bound",
            1.25,
            1.0,
            1000.0,
            "Most load of an instance, as a multiple of the mean, before its sessions go to the next.",
        ),
    )

    def __init__(self, context: ScorerContext, balancer: LoadBalancer) -> None:
        super().__init__(context, balancer)
        self._ring = HashRing()

    def wants(self, request: RequestRecord) -> Sequence[str]:
        """Return the first instances in the order of the request's key; none without a key."""
        key = _key_of(request)
        return tuple(itertools.islice(self._ring.walk(key), _WANTED_COUNT)) if key else ()

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Return each candidate's place and relative load, or the balancer's extras."""
        key = _key_of(request)
        if not key:
            return self.balancer.extras(request, instances)
        distances = self._ring.distances(key, [instance.instance_id for instance in instances])
        order = sorted(range(len(instances)), key=distances.__getitem__)
        level = sum(instance.in_flight_count for instance in instances) / len(instances) + 1.0
        extras = [0.0] * len(instances)
        for place, index in enumerate(order):
            extras[index] = -1.0 - pack(place, instances[index].in_flight_count / level)
        return extras

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return the place in the key's order, after all others for instances above the bound."""
        if candidate.extra >= 0.0:
            return self.balancer.score(request, candidate, parameters)
        place, relative_load = unpack(-1.0 - candidate.extra)
        return place if relative_load < parameters["affinity.load_bound"] else place + TOO_LOADED

    def terms(
        self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the place and the relative load, or the balancer's terms."""
        if candidate.extra >= 0.0:
            return self.balancer.terms(request, candidate, parameters)
        place, relative_load = unpack(-1.0 - candidate.extra)
        return {"place": float(place), "relative_load": relative_load}

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        if best.extra >= 0.0:
            return self.balancer.reason(request, best, score)
        place, relative_load = unpack(-1.0 - best.extra)
        passed = f", after {place} with too much to do" if place else ""
        return f"affinity: where its session or user belongs{passed}; {relative_load:.2f} of the mean load"

    def note_dispatch(self, request: RequestRecord, instance_id: str) -> None:
        """Tell the balancer of what it chose."""
        if not _key_of(request):
            self.balancer.note_dispatch(request, instance_id)

    def note_fleet(self, instance_ids: Sequence[str]) -> None:
        """Give newcomers their places, and take back those of instances that left."""
        self._ring.update(instance_ids)
        self.balancer.note_fleet(instance_ids)


def _key_of(request: RequestRecord) -> str:
    metadata = request.metadata
    if metadata.session_id:
        return f"session {metadata.session_id}"
    return f"user {metadata.user_id}" if metadata.user_id else ""
