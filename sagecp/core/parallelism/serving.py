"""What a plan gives its users: times and rates of engines that batch continuously, in closed form.

Load is spread evenly over the plan's engines (each copy counts once per pipeline
stage, with its share of the KV cache). At ``r`` requests per second and engine
with ``u`` prompt tokens to compute and ``O`` output tokens each:

* ``n = r O s`` requests decode (Little's law), where ``s`` is the mean duration
  of a step: each step gives every one of them a token.
* A prompt is computed in ``k = ceil(u / (B - n))`` chunks. Those that come during
  one step share the next: ``q = 1 - exp(-r k s)`` of the steps have prefill, each
  of ``x = r u s / q`` tokens, at most ``B - n``. So ``s = q t(n + x) + (1 - q) t(n)``.
* While prompts wait, each step has ``B - n`` of their tokens, so that prefill
  keeps up if ``rho = r u t_B / (B - n) < 1``. Waiting for it, and for room in the
  batch or the KV cache, is that of ``c`` servers (Sakasegawa, "An approximation
  formula", 1977, with Kingman's correction for variation):

      W = X rho ** (sqrt(2 (c + 1)) - 1) / (c (1 - rho)) * (C_a^2 + C_s^2) / 2

  A request that waits at all does so for an exponentially distributed time.
* The time to the first token is the rest of the step in progress, the wait and
  the request's own prefill. The time per token of one request differs from the
  mean by how many prompts it happens to meet, a Poisson number, each of which
  holds it up for ``D`` and lets ``r D`` more come meanwhile, and by how many decodes
  run beside it, Poisson as well.

`bench/plan_regret.py` holds it against the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import MemoryEstimate, PlanEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.request_classes import RequestClasses, Vector
from sagecp.core.parallelism.step_model import PlanStepTime, plan_step_time
from sagecp.core.parallelism.throughput import saturated_throughput
from sagecp.core.parallelism.workload import PlanObjectives, Workload

# Blocks that are filled before requests wait for others.
_USABLE_MEMORY_SHARE = 0.95
_BISECTION_COUNT, _FIXED_POINT_COUNT = 24, 30
# A rate this close to what an engine can do at most is no steady state.
_LARGEST_UTILISATION = 0.995


@dataclass(frozen=True, slots=True)
class _State:
    """An engine at a steady rate.

    Attributes:
        decode_count: Requests that decode.
        token_s: Mean step.
        residual_s: Mean rest of the step in progress when a request comes.
        wait_s: Mean wait for other prefills, of requests that wait for them.
        wait_probability: Share of those.
        room_wait_s: Mean wait for room in batch and memory, likewise.
        room_probability: Share of those.
        own_prefill_s: Prefill of each kind of request.
        delay_s: How long the prompt of each kind holds the decodes up.
        arrival_rate: Requests per second.
    """

    decode_count: float
    token_s: float
    residual_s: float
    wait_s: float
    wait_probability: float
    room_wait_s: float
    room_probability: float
    own_prefill_s: Vector
    delay_s: Vector
    arrival_rate: float


class PlanServing:
    """The steady states of a plan.

    Args:
        step_time: Of one copy.
        key_value_token_capacity: Of one copy.
        config: How many copies and stages there are.
        options: Settings of the engine.
        classes: The traffic.
        objectives: What a good request is.
    """

    def __init__(
        self,
        step_time: PlanStepTime,
        key_value_token_capacity: float,
        config: ParallelismConfig,
        options: EngineOptions,
        classes: RequestClasses,
        objectives: PlanObjectives,
    ) -> None:
        stages = config.pipeline_parallel_size
        self._step = step_time
        self._classes = classes
        self._objectives = objectives
        self.engine_count = config.copy_count * stages
        self._budget = float(options.max_batch_token_count)
        self._mean_computed = classes.mean(classes.computed)
        self._mean_output = classes.mean(classes.outputs)
        # What a request holds on average while it decodes, weighed by how long it does.
        held = classes.prompts + classes.outputs / 2.0
        self._mean_context = classes.mean(held * classes.outputs) / self._mean_output
        by_memory = _USABLE_MEMORY_SHARE * key_value_token_capacity / stages / max(1.0, self._mean_context)
        by_batch = options.max_running_request_count / stages
        self._room = max(0.0, min(by_memory, by_batch))
        self._room_name = "memory" if by_memory < by_batch else "batch"

    @property
    def mean_held_token_count(self) -> float:
        """Tokens that a decoding request holds, in the mean over time: long answers count for longer."""
        return self._mean_context

    def attainment(self, rate: float) -> float:
        """Return the share of requests within both objectives at so many requests per second in all."""
        state = self._state(rate)
        if state is None:
            return 0.0
        return float(self._classes.shares @ (self._on_time(state) * self._fluent(state)))

    def goodput(self) -> tuple[float, str]:
        """Return the largest rate whose attainment is as wanted, and what bounds it."""
        wanted = self._objectives.attainment
        highest = self._highest_rate()
        least = highest * 1e-4
        if highest <= 0.0 or self.attainment(least) < wanted:
            return 0.0, self._reason(least)
        low, high = least, highest
        if self.attainment(high) >= wanted:
            return high, self._reason(high * 1.02)
        for _ in range(_BISECTION_COUNT):
            middle = (low + high) / 2.0
            if self.attainment(middle) >= wanted:
                low = middle
            else:
                high = middle
        return low, self._reason(high)

    def times_at(self, rate: float) -> tuple[float, float, float]:
        """Return TTFT and TPOT that the wanted share stays below, and requests per engine, at a rate.

        All infinite where the plan cannot keep up with it.
        """
        state = self._state(rate)
        if state is None:
            return math.inf, math.inf, math.inf
        wanted = self._objectives.attainment
        ttft_s = _quantile(lambda limit_s: self._on_time(state, limit_s), self._classes.shares, wanted)
        tpot_s = _quantile(lambda limit_s: self._fluent(state, limit_s), self._classes.shares, wanted)
        return ttft_s, tpot_s, state.decode_count

    def idle_times(self) -> tuple[float, float]:
        """Return TTFT and TPOT of a mean request that is alone, seconds."""
        classes = self._classes
        ttft_s = classes.mean(self._prefill_s(0.0))
        return ttft_s, self._step.step_s(1.0, self._mean_context)

    def _highest_rate(self) -> float:
        """The rate of the whole plan at which its engines are always busy."""
        low, high = 0.0, self.engine_count * 1e6 / max(1.0, self._mean_computed + self._mean_output)
        for _ in range(2 * _BISECTION_COUNT):
            middle = (low + high) / 2.0
            if self._state(middle) is None:
                high = middle
            else:
                low = middle
        return low

    def _state(self, rate: float) -> _State | None:
        """Find the steady state by iteration; ``None``: the engines cannot keep up."""
        classes, step = self._classes, self._step
        per_engine = rate / self.engine_count
        if self._room < 1.0 or per_engine <= 0.0:
            return None
        decode_count = token_s = 0.0
        full_step_s = decode_step_s = prefill_step_s = prefill_share = prefill_tokens = utilisation = 0.0
        pairs_per_token = classes.mean(classes.pairs) / self._mean_computed
        for iteration in range(_FIXED_POINT_COUNT):
            free = self._budget - decode_count
            if free < 1.0 or decode_count > self._room:
                return None
            contexts = decode_count * self._mean_context
            # Pairs of a step: as many as its tokens have on average.
            full_step_s = step.step_s(self._budget, contexts, free * pairs_per_token)
            utilisation = per_engine * self._mean_computed * full_step_s / free
            if utilisation >= _LARGEST_UTILISATION:
                return None
            decode_step_s = step.step_s(max(1.0, decode_count), contexts)
            token_s = token_s or decode_step_s
            chunks = per_engine * token_s * classes.mean(np.ceil(classes.computed / free))
            prefill_share = max(1e-12, 1.0 - math.exp(-chunks))
            prefill_tokens = min(free, per_engine * self._mean_computed * token_s / prefill_share)
            prefill_share = min(1.0, per_engine * self._mean_computed * token_s / prefill_tokens)
            prefill_step_s = step.step_s(
                decode_count + prefill_tokens, contexts, prefill_tokens * pairs_per_token
            )
            mean_step_s = prefill_share * prefill_step_s + (1.0 - prefill_share) * decode_step_s
            # At first it was alone.
            settled = bool(iteration) and abs(mean_step_s - token_s) < 1e-4 * mean_step_s
            # Half of the way, so that it does not swing.
            token_s += 0.5 * (mean_step_s - token_s) if iteration else mean_step_s - token_s
            decode_count = per_engine * self._mean_output * token_s
            if settled:
                break
        occupancy = decode_count / self._room
        if occupancy >= _LARGEST_UTILISATION:
            return None
        work_s = classes.computed * full_step_s / max(1.0, self._budget - decode_count)
        wait_s, wait_probability = _wait(
            utilisation, self.engine_count, classes.mean(work_s), self._variation(work_s)
        )
        room_wait_s, room_probability = _wait(
            occupancy,
            max(1, math.floor(self._room * self.engine_count)),
            self._mean_output * token_s,
            self._variation(classes.outputs * token_s),
        )
        # Long steps are met more often than short ones; an idle engine has none in progress.
        squares = prefill_share * prefill_step_s**2 + (1.0 - prefill_share) * decode_step_s**2
        return _State(
            decode_count,
            token_s,
            min(1.0, decode_count) * squares / (2.0 * token_s),
            wait_s,
            wait_probability,
            room_wait_s,
            room_probability,
            self._prefill_s(decode_count),
            classes.computed * (prefill_step_s - decode_step_s) / prefill_tokens,
            per_engine,
        )

    def _variation(self, service_s: Vector) -> float:
        """Half of the squared variations of arrivals and of a service: Kingman's factor."""
        mean = self._classes.mean(service_s)
        variance = self._classes.mean((service_s - mean) ** 2)
        return (self._classes.arrival_variation**2 + variance / mean**2) / 2.0

    def _prefill_s(self, decode_count: float) -> Vector:
        """Return how long each kind's prompt takes beside so many decodes."""
        step, classes = self._step, self._classes
        free = max(1.0, self._budget - decode_count)
        full = np.ceil(classes.computed / free) - 1.0
        rest = classes.computed - full * free + decode_count
        contexts_s = step.context_per_token_s * decode_count * self._mean_context
        return np.asarray(
            (full + 1.0) * contexts_s
            + full * step.linear_s(np.array(self._budget))
            + step.linear_s(rest)
            + step.attention_per_token_pair_s * classes.pairs
        )

    def _on_time(self, state: _State, limit_s: float | None = None) -> Vector:
        """Probability of each kind to have its first token in time."""
        if limit_s is None:
            limit_s = self._objectives.ttft_s
        if limit_s is None:
            return np.ones_like(self._classes.shares)
        left_s = limit_s - state.own_prefill_s - state.residual_s
        return np.where(
            left_s <= 0.0,
            0.0,
            _waited_less(left_s, state.wait_s, state.wait_probability)
            * _waited_less(left_s, state.room_wait_s, state.room_probability),
        )

    def _fluent(self, state: _State, limit_s: float | None = None) -> Vector:
        """Probability of each kind to have its further tokens in time."""
        if limit_s is None:
            limit_s = self._objectives.tpot_s
        outputs = self._classes.outputs
        if limit_s is None:
            return np.ones_like(outputs)
        further = np.maximum(1.0, outputs - 1.0)
        met = state.arrival_rate * further * state.token_s
        # What holds it up lets more prompts come meanwhile.
        stretch = 1.0 / max(1e-3, 1.0 - state.arrival_rate * self._classes.mean(state.delay_s))
        spread_s = np.sqrt(met * self._classes.mean(state.delay_s**2)) * stretch / further
        # And the number of decodes beside it, Poisson as well, changes slowly.
        more_s = self._step.step_s(
            state.decode_count + 1.0, (state.decode_count + 1.0) * self._mean_context
        ) - self._step.step_s(max(1.0, state.decode_count), state.decode_count * self._mean_context)
        spread_s = np.hypot(spread_s, max(0.0, more_s) * math.sqrt(state.decode_count)) + 1e-9
        probability = _normal_below((limit_s - state.token_s) / spread_s)
        # An answer of one token has no further ones.
        return np.where(outputs <= 1.0, 1.0, probability)

    def _reason(self, rate: float) -> str:
        """What keeps the plan from a rate a little above its goodput."""
        state = self._state(rate)
        if state is None:
            occupied = self._state(0.98 * rate)
            if self._room < 1.0 or (occupied is not None and occupied.decode_count > 0.9 * self._room):
                return self._room_name
            return "compute"
        shares = self._classes.shares
        on_time = float(shares @ self._on_time(state))
        fluent = float(shares @ self._fluent(state))
        if on_time > 0.999 and fluent > 0.999:
            return "compute"
        if on_time < fluent:
            return self._room_name if state.room_wait_s > max(state.wait_s, 1e-3) else "ttft"
        return "tpot"


def estimate_plan(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    workload: Workload,
    objectives: PlanObjectives,
    *,
    classes: RequestClasses | None = None,
    memory: MemoryEstimate | None = None,
) -> PlanEstimate:
    """Predict what a plan gives and costs.

    Args:
        model: What runs.
        pool: The GPUs that it may use.
        config: How it is spread; must be valid and fit.
        options: Settings of the engine.
        workload: The traffic.
        objectives: What a good request is.
        classes: The same traffic, reduced before; ``None``: it is reduced here.
        memory: Its memory, estimated before; likewise.
    """
    classes = classes or RequestClasses.of(workload)
    memory = memory or estimate_memory(model, pool, config, options)
    step_time = plan_step_time(model, pool, config, options)
    serving = PlanServing(step_time, memory.key_value_token_capacity, config, options, classes, objectives)
    goodput, limited_by = serving.goodput()
    rate = goodput if workload.request_rate is None else workload.request_rate
    ttft_s, tpot_s, decode_count = serving.times_at(rate) if rate > 0.0 else (math.inf,) * 3
    single_ttft_s, single_tpot_s = serving.idle_times()
    full = saturated_throughput(
        step_time,
        memory.key_value_token_capacity,
        classes.mean(classes.prompts),
        classes.mean(classes.outputs),
        options,
        cached_token_count=classes.mean(classes.prompts - classes.computed),
        stage_count=config.pipeline_parallel_size,
        held_token_count=serving.mean_held_token_count,
    )
    usd_per_hour = pool.price_usd * config.gpu_count
    output_per_hour = goodput * classes.mean(classes.outputs) * 3600.0
    return PlanEstimate(
        config=config,
        gpu_name=pool.gpu.name,
        memory=memory,
        step_time=step_time.parameters,
        single_ttft_s=single_ttft_s,
        single_tpot_s=single_tpot_s,
        goodput=goodput,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        request_rate=rate,
        concurrent_request_count=decode_count * config.pipeline_parallel_size,
        output_tokens_per_second=full.output_tokens_per_second * config.copy_count,
        usd_per_hour=usd_per_hour,
        usd_per_million_output_tokens=(
            usd_per_hour * 1e6 / output_per_hour if output_per_hour > 0.0 else math.inf
        ),
        limited_by=limited_by,
        carries_load=goodput > 0.0 and goodput >= (workload.request_rate or 0.0),
    )


def _wait(utilisation: float, servers: int, service_s: float, variation: float) -> tuple[float, float]:
    """Mean wait of those that wait at all, and the share of those."""
    probability = utilisation ** (math.sqrt(2.0 * (servers + 1)) - 1.0)
    mean_s = service_s * probability / (servers * (1.0 - utilisation)) * variation
    return (mean_s / probability if probability > 0.0 else 0.0), min(1.0, probability)


def _waited_less(limit_s: Vector, mean_s: float, probability: float) -> Vector:
    if mean_s <= 0.0:
        return np.ones_like(limit_s)
    return np.asarray(1.0 - probability * np.exp(-np.maximum(0.0, limit_s) / mean_s))


def _normal_below(deviations: Vector) -> Vector:
    return np.array([0.5 * math.erfc(-each / math.sqrt(2.0)) for each in deviations])


def _quantile(probability: Callable[[float], Vector], shares: Vector, wanted: float) -> float:
    """Return the time that the wanted share stays below, seconds."""
    low, high = 0.0, 1e-3
    while float(shares @ probability(high)) < wanted:
        low, high = high, high * 2.0
        if high > 1e5:
            return math.inf
    for _ in range(_BISECTION_COUNT):
        middle = (low + high) / 2.0
        if float(shares @ probability(middle)) < wanted:
            low = middle
        else:
            high = middle
    return high
