"""Baselines that weigh cached prefixes against load, by fixed weights: llm-d, Dynamo, SGLang."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.sim.fleet.baselines.base import Arrival, Baseline, BaselineParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdDefaultParameters(BaselineParameters):
    """Weights of :class:`LlmdDefault`; the defaults are those of its chart.

    Attributes:
        queue_weight: Of a short queue.
        kv_weight: Of free KV memory.
        prefix_weight: Of a cached prefix.
    """

    queue_weight: float = 2.0
    kv_weight: float = 2.0
    prefix_weight: float = 3.0


class LlmdDefault(Baseline):
    """The largest weighted sum of three scores between 0 and 1, as in llm-d's endpoint picker.

    ``(max - queue)/(max - min)``, ``1 - KV usage``, and the share of the prompt that is cached.
    """

    registry_name = "llmd_default"

    def __init__(self, parameters: LlmdDefaultParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._weights = parameters

    def choose(self, arrival: Arrival) -> int:
        """Return the candidate of the largest sum."""
        weights, request = self._weights, arrival.request
        states = {index: self.view.state(index, arrival.now) for index in arrival.candidates}
        shortest = min(state.waiting_count for state in states.values())
        longest = max(state.waiting_count for state in states.values())

        def cost(index: int) -> float:
            state = states[index]
            queue = (longest - state.waiting_count) / (longest - shortest) if longest > shortest else 1.0
            prefix = self.prefixes.cached_token_count(index, request) / request.prompt_token_count
            return -(
                weights.queue_weight * queue
                + weights.kv_weight * (1.0 - state.kv_usage)
                + weights.prefix_weight * prefix
            )

        return self.least(arrival.candidates, cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoParameters(BaselineParameters):
    """Parameters of :class:`Dynamo`; the defaults are the product's.

    Attributes:
        overlap_weight: How many blocks to prefill a cached block saves.
        prefill_weight: How many held blocks a block to prefill is worth.
    """

    overlap_weight: float = 1.0
    prefill_weight: float = 1.0


class Dynamo(Baseline):
    """The least sum of blocks to prefill and blocks in use, as in Dynamo's KV router at temperature 0.

    ``prefill_weight * max(0, (queued + prompt)/b - overlap_weight * overlap) + blocks in
    use``, the latter with the request's own. Here in tokens: the size ``b`` of a block
    is the same on all instances, so that it decides nothing.
    """

    registry_name = "dynamo"

    def __init__(self, parameters: DynamoParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._overlap_weight = parameters.overlap_weight
        self._prefill_weight = parameters.prefill_weight

    def choose(self, arrival: Arrival) -> int:
        """Return the candidate of the least sum."""
        prompt = arrival.request.prompt_token_count

        def cost(index: int) -> float:
            state = self.view.state(index, arrival.now)
            cached = self.prefixes.cached_token_count(index, arrival.request)
            queued = state.backlog.token_count
            to_prefill = max(0.0, queued + prompt - self._overlap_weight * cached)
            in_use = state.held_token_count + queued + prompt - cached
            return self._prefill_weight * to_prefill + in_use

        return self.least(arrival.candidates, cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareParameters(BaselineParameters):
    """Thresholds of :class:`CacheAware`; the defaults are the product's.

    Attributes:
        balance_abs: Loads are out of balance when the largest exceeds the smallest by more than this ...
        balance_rel: ... and by more than this factor.
        match_threshold: Share of the prompt from which on a cached prefix decides.
    """

    balance_abs: int = 64
    balance_rel: float = 1.5
    match_threshold: float = 0.3


class CacheAware(Baseline):
    """The best match, or the smallest cache, or the least load, as in SGLang's and vLLM's routers.

    While loads are out of balance, the instance with the fewest requests. Otherwise
    the longest match if it is long enough, and else the instance with the smallest tree:
    the fewest prompt tokens that were sent there and were new to it. The product cuts its
    trees at some 10 million tokens, more than one instance prefills in half an hour; here they grow.
    """

    registry_name = "cache_aware"

    def __init__(self, parameters: CacheAwareParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._thresholds = parameters
        self._tree_token_counts: list[int] = []

    def prepare(self) -> None:
        """Begin with empty trees."""
        self._tree_token_counts = [0] * len(self.ledgers)

    def choose(self, arrival: Arrival) -> int:
        """Return a candidate by the first rule that applies, and let its tree grow."""
        cached = {
            index: self.prefixes.cached_token_count(index, arrival.request) for index in arrival.candidates
        }
        index = self._choice(arrival, cached)
        self._tree_token_counts[index] += arrival.request.prompt_token_count - cached[index]
        return index

    def _choice(self, arrival: Arrival, cached: dict[int, int]) -> int:
        thresholds, request, candidates = self._thresholds, arrival.request, arrival.candidates
        counts = [self.view.request_count(index) for index in candidates]
        least_count, largest_count = min(counts), max(counts)
        if (
            largest_count - least_count > thresholds.balance_abs
            and largest_count > thresholds.balance_rel * least_count
        ):
            return self.least(candidates, self.view.request_count)
        if max(cached.values()) > thresholds.match_threshold * request.prompt_token_count:
            return self.least(candidates, lambda index: -cached[index])
        return self.least(candidates, self._tree_token_counts.__getitem__)
