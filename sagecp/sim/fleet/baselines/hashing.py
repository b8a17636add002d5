"""Consistent hashing: requests of one session, or with one beginning, go to one instance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagecp.core.router.hash_ring import HashRing
from sagecp.sim.fleet.baselines.base import Arrival, Baseline, BaselineParameters
from sagecp.sim.fleet.traces import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistentHashParameters(BaselineParameters):
    """Parameters of :class:`ConsistentHash`.

    Attributes:
        load_bound: An instance takes no request that would give it more than so many
            times the mean number of requests; 0: any number.
        key_block_count: Blocks of the prompt that are the key where there is no session.
        virtual_node_count: Points of each instance on the circle.
    """

    load_bound: float = 1.25
    key_block_count: int = 1
    virtual_node_count: int = 160

    def __post_init__(self) -> None:
        # Named, because a dataclass with slots is another class than the one that this was written in.
        BaselineParameters.__post_init__(self)
        if self.load_bound and self.load_bound < 1.0:
            raise ValueError(f"load_bound must be 0 or at least 1, not {self.load_bound}")
        if self.key_block_count < 1:
            raise ValueError(f"key_block_count must be at least 1, not {self.key_block_count}")


class ConsistentHash(Baseline):
    """The first instance clockwise from the request's key that is not overloaded.

    Karger et al., STOC'97; the bound on loads is of Mirrokni, Thorup and
    Zadimoghaddam, "Consistent hashing with bounded loads", SODA'18.
    """

    registry_name = "consistent_hash"

    def __init__(self, parameters: ConsistentHashParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._load_bound = parameters.load_bound
        self._key_block_count = parameters.key_block_count
        self._ring = HashRing(parameters.virtual_node_count)
        self._index_of: dict[str, int] = {}

    def prepare(self) -> None:
        """Put the instances on the circle."""
        self._index_of = {each.instance_id: index for index, each in enumerate(self.world.instances)}
        self._ring.update(self._index_of)

    def choose(self, arrival: Arrival) -> int:
        """Walk the circle."""
        candidates = set(arrival.candidates)
        most_count = math.inf
        if self._load_bound:
            # With a bound of 1 or more, one candidate at least is below it.
            total = 1 + sum(self.view.request_count(index) for index in arrival.candidates)
            most_count = math.ceil(self._load_bound * total / len(candidates))
        walk = self._ring.walk(affinity_key(arrival.request, self._key_block_count))
        return next(
            index
            for index in map(self._index_of.__getitem__, walk)
            if index in candidates and self.view.request_count(index) < most_count
        )


def affinity_key(request: TraceRequest, block_count: int) -> str:
    """Return what requests that should meet on one instance have in common.

    Its session; else the content of its first blocks; else its user; else nothing but itself.
    """
    if request.session_id:
        return f"session {request.session_id}"
    if request.block_hashes:
        # A block's id covers the blocks before it.
        return f"block {request.block_hashes[:block_count][-1]}"
    if request.user_id:
        return f"user {request.user_id}"
    return f"request {request.request_id}"
