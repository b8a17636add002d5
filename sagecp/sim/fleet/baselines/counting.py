"""Baselines that any load balancer knows: turns, chance, and counts of requests or tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.sim.fleet.baselines.base import Arrival, Baseline, BaselineParameters
from sagecp.sim.fleet.scheduler_controller import step_time_prior


class RoundRobin(Baseline):
    """Each instance in turn."""

    registry_name = "round_robin"

    def __init__(self, parameters: BaselineParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._next = 0

    def choose(self, arrival: Arrival) -> int:
        """Return the first candidate from the next in turn on."""
        index = next((each for each in arrival.candidates if each >= self._next), arrival.candidates[0])
        self._next = (index + 1) % len(self.ledgers)
        return index


class RandomChoice(Baseline):
    """Any instance, all alike."""

    registry_name = "random"

    def choose(self, arrival: Arrival) -> int:
        """Return any candidate."""
        return self.generator.choice(arrival.candidates)


class PowerOfTwo(Baseline):
    """Of two instances drawn at random the one with fewer requests.

    Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
    """

    registry_name = "power_of_two"

    def choose(self, arrival: Arrival) -> int:
        """Return the less loaded of two."""
        count = min(2, len(arrival.candidates))
        return self.least(self.generator.sample(arrival.candidates, count), self.view.request_count)


class LeastConnections(Baseline):
    """The instance with the fewest requests."""

    registry_name = "least_connections"

    def choose(self, arrival: Arrival) -> int:
        """Return the least loaded."""
        return self.least(arrival.candidates, self.view.request_count)


class LeastTokens(Baseline):
    """The instance with the fewest prompt tokens still to prefill."""

    registry_name = "least_tokens"

    def choose(self, arrival: Arrival) -> int:
        """Return the one with the least prefill before a new request."""
        now = arrival.now
        return self.least(arrival.candidates, lambda index: self.view.queued_prefill_token_count(index, now))


class LeastResponseTime(Baseline):
    """The least product of the mean time to first token and the requests that it would have.

    An instance without a first token so far counts as immediate, so that it is tried.
    """

    registry_name = "least_response_time"

    def choose(self, arrival: Arrival) -> int:
        """Return the one with the least product; of several untried ones the least loaded."""
        best = self.least(arrival.candidates, self._cost)
        if self._cost(best) > 0.0:
            return best
        untried = [index for index in arrival.candidates if not self._cost(index)]
        return self.least(untried, self.view.request_count)

    def _cost(self, index: int) -> float:
        return (self.ledgers[index].ttft_s or 0.0) * (self.view.request_count(index) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRoundRobinParameters(BaselineParameters):
    """Parameters of :class:`WeightedRoundRobin`.

    Attributes:
        output_token_count: Tokens that an answer is taken to have until one has ended.
    """

    output_token_count: float = 200.0


class WeightedRoundRobin(Baseline):
    """In turn, more often where the mean request takes less time; smooth, as nginx does it.

    An instance weighs 1 over the engine time of a request of mean lengths:
    ``work_s(L) + O*(a1 + g*(L + O/2))``, a decode in a memory-bound batch.
    """

    registry_name = "weighted_round_robin"

    def __init__(self, parameters: WeightedRoundRobinParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._arrival_count = self._finished_count = 0
        self._prompt_token_count = 0
        self._output_token_count = 0
        self._first_output_token_count = parameters.output_token_count
        self._current: list[float] = []
        self._step_times: list[StepTimeParameters] = []

    def prepare(self) -> None:
        """Take the constants of the instances, and begin with nobody's turn."""
        self._current = [0.0] * len(self.ledgers)
        self._step_times = [step_time_prior(each.profile, 0.0, 0) for each in self.world.instances]

    def choose(self, arrival: Arrival) -> int:
        """Return the candidate whose turn it is most."""
        self._arrival_count += 1
        self._prompt_token_count += arrival.request.prompt_token_count
        weights = {index: self._weight(index) for index in arrival.candidates}
        total = math.fsum(weights.values())
        for index, weight in weights.items():
            self._current[index] += weight / total
        best = max(arrival.candidates, key=lambda index: self._current[index])
        self._current[best] -= 1.0
        return best

    def on_finished(
        self, request_id: str, output_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """Learn the mean length of answers."""
        super().on_finished(request_id, output_token_count, cached_token_count, now)
        self._finished_count += 1
        self._output_token_count += output_token_count

    def _weight(self, index: int) -> float:
        instance, step_time = self.world.instances[index], self._step_times[index]
        prompt = self._prompt_token_count / self._arrival_count
        output = self._first_output_token_count
        if self._finished_count:
            output = self._output_token_count / self._finished_count
        per_output_token_s = step_time.memory_per_token_s + step_time.context_per_token_s * (
            prompt + 0.5 * output
        )
        work_s = step_time.work_s(prompt, prompt, instance.max_batch_tokens) + output * per_output_token_s
        return 1.0 / (instance.slowness * work_s) if work_s > 0.0 else 1.0
