"""Late binding alone, for ablation: one queue, an order, and instances that are given work when they need it.

What the production scheduler has beyond this: a smooth expected loss in both
objectives, pacing by the time per token, a share for long requests, learned models.
"""

from __future__ import annotations

import abc
import dataclasses
import heapq
from dataclasses import dataclass

from sagecp.sim.fleet.baselines.base import Arrival, BaselineParameters
from sagecp.sim.fleet.baselines.predicted import PredictingBaseline
from sagecp.sim.fleet.controller import Objectives
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.traces import TraceRequest

# Heads of the queue that are looked at when the first cannot be placed well.
_SCAN_COUNT = 32
# A time to first token as long as its objective costs so much of a miss.
_TTFT_WEIGHT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LateBindingParameters(BaselineParameters):
    """Parameters of :class:`LateBinding`.

    Attributes:
        backlog_limit_s: An instance takes more while its backlog is less than so many seconds of prefill ...
        kv_limit: ... and its KV blocks are held to less than this share.
        look_every_s: How often the instances are looked at while requests wait.
        work_weight_per_s: What a second of engine time costs, in misses: it makes cached prefixes count.
        tolerance: A request waits for a better instance that cannot take more yet if it is
            better by more than this, in misses.
    """

    backlog_limit_s: float = 0.1
    kv_limit: float = 0.85
    look_every_s: float = 0.05
    work_weight_per_s: float = 0.25
    tolerance: float = 0.05


class LateBinding(PredictingBaseline, abc.ABC):
    """Requests wait in one queue, in order of :meth:`key`, until an instance runs out of work.

    The head goes to the best instance that can take more, by a miss of the objective,
    engine time and predicted time to first token. It waits if another that cannot is
    clearly better; then the next is looked at. What would miss everywhere is served
    after all others.
    """

    def __init__(self, parameters: LateBindingParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._limits = parameters
        # By key, then by arrival.
        self._queue: list[tuple[float, int, Arrival]] = []
        self._hopeless: list[tuple[float, int, Arrival]] = []
        self._arrival_count = 0
        self._timer_s: float | None = None

    @abc.abstractmethod
    def key(self, arrival: Arrival) -> float:
        """Return the place in the queue; the least is the first."""

    def choose(self, arrival: Arrival) -> int | None:
        """Never asked: :meth:`on_arrival` queues, and :meth:`on_timer` places."""
        raise AssertionError("requests are placed from the queue")

    def least_prefill_s(self, arrival: Arrival) -> float:
        """Return the time of a prompt's prefill where it is least, on an idle instance."""
        prompt = arrival.request.prompt_token_count
        return min(
            self.step_times[index].prefill_s(
                prompt - self.prefixes.cached_token_count(index, arrival.request), prompt
            )
            for index in arrival.candidates
        )

    def on_arrival(self, request: TraceRequest, objectives: Objectives, now: float) -> None:
        """Queue a request."""
        candidates = self.candidates(request)
        if not candidates:
            self.world.end(request.request_id, OutcomeState.REJECTED)
            return
        arrival = Arrival(request, objectives, candidates, now)
        self._arrival_count += 1
        heapq.heappush(self._queue, (self.key(arrival), self._arrival_count, arrival))
        # Not at once: other events of this time come first.
        self._timer_s = now

    def on_first_token(self, request_id: str, now: float) -> None:
        """Look at the instances."""
        super().on_first_token(request_id, now)
        self._timer_s = now

    def on_finished(
        self, request_id: str, output_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """Look at the instances."""
        super().on_finished(request_id, output_token_count, cached_token_count, now)
        self._timer_s = now

    def next_timer_s(self) -> float | None:
        """Return when to look at the instances: while requests wait."""
        return self._timer_s if self._queue or self._hopeless else None

    def on_timer(self, now: float) -> None:
        """Give work to the instances that need it."""
        open_indices = {index for index in range(len(self.ledgers)) if self._is_open(index, now)}
        waiting = self._serve(self._queue, open_indices, now, may_give_up=True)
        if not waiting:
            self._serve(self._hopeless, open_indices, now, may_give_up=False)
        self._timer_s = now + self._limits.look_every_s

    def _cost(
        self, arrival: Arrival, index: int, ttft_s: float, uncached_token_count: int, left_s: float
    ) -> float:
        """Return how bad an instance is: a miss counts 1, engine time and waiting little."""
        objective_s, limits = arrival.objectives.ttft_s, self._limits
        work_s = self.step_times[index].work_s(uncached_token_count, arrival.request.prompt_token_count)
        return (
            (1.0 if ttft_s > left_s else 0.0)
            + limits.work_weight_per_s * work_s
            + _TTFT_WEIGHT * ttft_s / objective_s
        )

    def _is_open(self, index: int, now: float) -> bool:
        state, step_time = self.view.state(index, now), self.step_times[index]
        backlog_s = step_time.compute_per_token_s * state.backlog.token_count
        backlog_s += step_time.attention_per_token_pair_s * state.backlog.token_pairs
        return (
            state.slowness * backlog_s < self._limits.backlog_limit_s
            and state.kv_usage < self._limits.kv_limit
        )

    def _serve(
        self,
        queue: list[tuple[float, int, Arrival]],
        open_indices: set[int],
        now: float,
        *,
        may_give_up: bool,
    ) -> bool:
        """Place from the head of a queue while instances are open; return whether any wait on."""
        aside: list[tuple[float, int, Arrival]] = []
        while queue and open_indices and len(aside) < _SCAN_COUNT:
            entry = heapq.heappop(queue)
            arrival = dataclasses.replace(entry[2], now=now)
            predictions = {index: self.predict(arrival, index) for index in arrival.candidates}
            left_s = arrival.objectives.ttft_s - (now - entry[2].now)
            if may_give_up and min(each.ttft_s for each in predictions.values()) > left_s:
                heapq.heappush(self._hopeless, entry)
                continue
            prompt = arrival.request.prompt_token_count
            costs = {
                index: self._cost(arrival, index, each.ttft_s, prompt - each.cached_token_count, left_s)
                for index, each in predictions.items()
            }
            usable = [index for index in arrival.candidates if index in open_indices]
            best = self.least(usable, costs.__getitem__) if usable else None
            if best is None or (may_give_up and costs[best] > min(costs.values()) + self._limits.tolerance):
                aside.append(entry)
                continue
            self.place(arrival.request, best, now)
            if not self._is_open(best, now):
                open_indices.discard(best)
        for entry in aside:
            heapq.heappush(queue, entry)
        return bool(queue)


class EdfLate(LateBinding):
    """The one that must start earliest first: by objective, less the time of its prefill."""

    registry_name = "edf_late"

    def key(self, arrival: Arrival) -> float:
        """Return the latest time at which its prefill may begin."""
        return arrival.now + arrival.objectives.ttft_s - self.least_prefill_s(arrival)


class SjfLate(LateBinding):
    """The shortest prefill first."""

    registry_name = "sjf_late"

    def key(self, arrival: Arrival) -> float:
        """Return the time of its prefill."""
        return self.least_prefill_s(arrival)
