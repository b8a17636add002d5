"""The traffic that a plan must carry, and what it is to achieve."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthSample:
    """One kind of request of the traffic.

    Attributes:
        prompt_token_count: Tokens of its prompt.
        output_token_count: Tokens of its answer.
        cached_token_count: Leading tokens of the prompt that a prefix cache would have.
        weight: Its share, relative to the others'.
    """

    prompt_token_count: int
    output_token_count: int
    cached_token_count: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Traffic.

    Attributes:
        samples: What requests look like; at least one.
        request_rate: Requests per second to carry; ``None``: as many as can be.
        arrival_variation: Standard deviation of the time between requests, relative to its
            mean. 1: at random (Poisson); above: in bursts.
        name: Where it came from, for people.
    """

    samples: tuple[LengthSample, ...]
    request_rate: float | None = None
    arrival_variation: float = 1.0
    name: str = ""

    @property
    def mean_prompt_token_count(self) -> float:
        """Mean tokens of a prompt."""
        return self._mean([sample.prompt_token_count for sample in self.samples])

    @property
    def mean_cached_token_count(self) -> float:
        """Mean tokens of a prompt that need no work."""
        return self._mean([sample.cached_token_count for sample in self.samples])

    @property
    def mean_output_token_count(self) -> float:
        """Mean tokens of an answer."""
        return self._mean([sample.output_token_count for sample in self.samples])

    @property
    def max_context_token_count(self) -> int:
        """Longest prompt with its answer."""
        return max(sample.prompt_token_count + sample.output_token_count for sample in self.samples)

    def _mean(self, values: list[int]) -> float:
        weights = [sample.weight for sample in self.samples]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanObjectives:
    """What a good request is, as the simulator counts it, too.

    Attributes:
        ttft_s: Most seconds to the first token; ``None``: any.
        tpot_s: Most seconds per further token; ``None``: any.
        attainment: Share of the requests that must meet both.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = 0.9


class PlanGoal(enum.Enum):
    """What the best plan is best at."""

    GOODPUT_PER_USD = "goodput_per_usd"
    """Most good requests for the money."""
    LOWEST_TTFT = "lowest_ttft"
    """Soonest first token that carries the traffic."""
    CHEAPEST = "cheapest"
    """Fewest dollars per hour that carries the traffic within the objectives."""
    HIGHEST_THROUGHPUT = "highest_throughput"
    """Most tokens per second of all GPUs, objectives aside."""
