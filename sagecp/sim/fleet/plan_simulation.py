"""A parallelism plan in the simulator: the goodput that its engines really have."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.step_model import PlanStepTime
from sagecp.core.parallelism.workload import LengthSample, PlanObjectives, Workload
from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.engine import EngineJob, FleetEngine
from sagecp.sim.profiles import StepProfile

_BISECTION_COUNT = 8
# Answers one after the other until the engines are as full as they will be.
_WARM_UP_ANSWERS = 2.0
# Rates are looked for up to this many times the first guess, and down to as little.
_LARGEST_DOUBLING_COUNT = 12


@dataclass(frozen=True, slots=True)
class SimulatedPlan:
    """What a plan did in one simulation.

    Attributes:
        rate: Requests per second that were offered.
        attainment: Share of them within the objectives.
        ttft_s: Time to first token that the wanted share stayed below, seconds.
        tpot_s: Likewise, per further token.
    """

    rate: float
    attainment: float
    ttft_s: float
    tpot_s: float


class _PlanProfile(StepProfile):
    """Steps as long as the planner says: of a mixture of experts, too, whose reading no constants tell."""

    __slots__ = ("_step_time",)

    _step_time: PlanStepTime

    def __init__(self, step_time: PlanStepTime) -> None:
        constants = step_time.parameters
        super().__init__(
            "plan",
            constants.overhead_s,
            constants.memory_base_s,
            constants.memory_per_token_s,
            constants.compute_base_s,
            constants.compute_per_token_s,
            constants.context_per_token_s,
            constants.attention_per_token_pair_s,
            kv_token_capacity=1,
        )
        object.__setattr__(self, "_step_time", step_time)

    def step_s(self, token_count: int, decode_context_tokens: int = 0, token_pairs: float = 0.0) -> float:
        return self._step_time.step_s(token_count, decode_context_tokens, token_pairs)


class PlanSimulation:
    """Simulates a plan: each copy an engine, and one for each of its pipeline stages.

    A copy with ``p`` stages has ``p`` batches on their way, each of which takes the whole depth;
    so it is simulated as ``p`` engines with ``1/p`` of its KV cache and batch each. Requests go
    to the engine with the least tokens to prefill, then to the one with the fewest requests.

    Args:
        step_time: Of one copy.
        key_value_token_capacity: Of one copy.
        config: The plan.
        options: Settings of the engine.
        workload: What requests look like; cached tokens count as already computed.
        objectives: What a good request is.
        request_count: Requests of one simulation at least; it also lasts for several answers, so
            that what is judged is a steady state.
        seed: Of arrivals and lengths; the same for every plan, so that plans are compared on
            the same traffic.
    """

    def __init__(
        self,
        step_time: PlanStepTime,
        key_value_token_capacity: int,
        config: ParallelismConfig,
        options: EngineOptions,
        workload: Workload,
        objectives: PlanObjectives,
        *,
        request_count: int = 1000,
        seed: int = 0,
    ) -> None:
        stages = config.pipeline_parallel_size
        self._engine_count = config.copy_count * stages
        running = max(1, options.max_running_request_count // stages)
        self._limits = EngineLimits(
            max(options.block_token_count, key_value_token_capacity // stages),
            running,
            max(running, options.max_batch_token_count),
            options.block_token_count,
            False,
        )
        self._profile = _PlanProfile(step_time)
        self._objectives = objectives
        self._least_count = request_count
        mean_output = workload.mean_output_token_count
        # An answer as slow as it may be, or as a small batch gives it.
        token_s = objectives.tpot_s or 3.0 * step_time.step_s(1, workload.mean_prompt_token_count)
        self._warm_up_s = _WARM_UP_ANSWERS * mean_output * token_s
        self._draw = random.Random(seed)
        self._workload = workload
        self._weights = [sample.weight for sample in workload.samples]
        self._samples: list[LengthSample] = []
        self._gaps: list[float] = []

    def run(self, rate: float) -> SimulatedPlan:
        """Offer so many requests per second; those that come while the engines fill are not counted."""
        warm_up_count = math.ceil(self._warm_up_s * rate)
        count = warm_up_count + max(self._least_count, 2 * warm_up_count)
        self._prepare(count)
        engines = [FleetEngine(self._profile, self._limits) for _ in range(self._engine_count)]
        jobs: list[EngineJob | None] = []
        now = 0.0
        for number, (sample, gap) in enumerate(zip(self._samples[:count], self._gaps[:count], strict=True)):
            now += gap / rate
            for engine in engines:
                engine.advance(now)
            target = min(engines, key=lambda each: (each.queued_prefill_token_count, each.request_count))
            jobs.append(self._add(target, number, sample, now))
        for engine in engines:
            while (next_s := engine.next_event_s()) < math.inf:
                engine.advance(next_s)
        return self._judge(jobs[warm_up_count:], rate)

    def _prepare(self, count: int) -> None:
        """Draw more requests; the first are the same at every rate."""
        missing = count - len(self._samples)
        if missing <= 0:
            return
        draw = self._draw
        # Gamma-distributed gaps have the wanted variation. One draw of each in turn.
        shape = 1.0 / max(1e-3, self._workload.arrival_variation) ** 2
        for _ in range(missing):
            self._samples += draw.choices(self._workload.samples, self._weights)
            self._gaps.append(draw.gammavariate(shape, 1.0 / shape))

    def goodput(self, first_guess: float) -> float:
        """Return the largest rate at which the wanted share of requests is good; 0: there is none."""
        wanted = self._objectives.attainment
        low, high = 0.0, max(1e-3, first_guess)
        for _ in range(_LARGEST_DOUBLING_COUNT):
            if self.run(high).attainment < wanted:
                break
            low, high = high, high * 2.0
        if not low:
            low = high
            for _ in range(_LARGEST_DOUBLING_COUNT):
                low /= 2.0
                if self.run(low).attainment >= wanted:
                    break
                high = low
            else:
                return 0.0
        for _ in range(_BISECTION_COUNT):
            middle = math.sqrt(low * high)
            if self.run(middle).attainment >= wanted:
                low = middle
            else:
                high = middle
        return low

    def _add(self, engine: FleetEngine, number: int, sample: LengthSample, now: float) -> EngineJob | None:
        """Queue a request; ``None``: it can never fit."""
        # The engine model has no cache that is warm from the start: what is cached is left out
        # of the prompt.
        computed = max(1, sample.prompt_token_count - sample.cached_token_count)
        job = EngineJob(str(number), computed, max(1, sample.output_token_count))
        if job.prompt_token_count + job.output_token_count > engine.kv_token_capacity:
            return None
        engine.add(job, now)
        return job

    def _judge(self, jobs: Sequence[EngineJob | None], rate: float) -> SimulatedPlan:
        ttft, tpot, good = [], [], 0
        objectives = self._objectives
        for job in jobs:
            if job is None:
                ttft.append(math.inf)
                tpot.append(math.inf)
                continue
            first_s = job.first_token_s - job.added_s
            further = job.output_token_count - 1
            each_s = (job.finish_s - job.first_token_s) / further if further else 0.0
            ttft.append(first_s)
            tpot.append(each_s)
            good += (objectives.ttft_s is None or first_s <= objectives.ttft_s) and (
                objectives.tpot_s is None or each_s <= objectives.tpot_s
            )
        place = min(len(jobs) - 1, math.ceil(objectives.attainment * len(jobs)) - 1)
        return SimulatedPlan(rate, good / len(jobs), sorted(ttft)[place], sorted(tpot)[place])
