"""How much is lost by believing the planner: its choice against every plan tried in the simulator.

For each small space of plans (a model, GPUs, traffic and objectives) every valid
plan's goodput is found by simulation: Poisson arrivals at rates that are bisected
until just the wanted share of the requests is within the objectives. The plan with
the most simulated goodput per dollar is the best there is; the regret is the share
of it that the planner's first choice lacks. Beside it: how far the planner's own
figure for a plan's goodput is from the simulated one, over all plans that have any;
and the regret when a plan's closer look at its best four has the last word
(`sagecp plan --check`)::

    python -m bench.plan_regret               # minutes
    python -m bench.plan_regret --quick       # three spaces
    python -m bench.plan_regret --random 20   # spaces that nobody chose
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import PlanEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.known_models import find_model
from sagecp.core.parallelism.search import search_plans
from sagecp.core.parallelism.step_model import plan_step_time
from sagecp.core.parallelism.workload import LengthSample, PlanGoal, PlanObjectives, Workload
from sagecp.sim.fleet.plan_simulation import PlanSimulation

TARGET = 0.05


@dataclass(frozen=True, slots=True)
class Space:
    """A question to the planner that is small enough to try every answer."""

    model: str
    gpu: str
    gpu_count: int
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float
    arrival_variation: float = 1.0
    spread: float = 0.6

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.gpu_count} x {self.gpu}, {self.prompt_tokens:g} in, {self.output_tokens:g} "
            f"out, TTFT {self.ttft_s:g} s, TPOT {1000 * self.tpot_s:g} ms"
            + (f", bursts of {self.arrival_variation:g}" if self.arrival_variation != 1 else "")
        )

    def workload(self) -> Workload:
        """Return log-normal lengths, prompts and answers independent."""
        draw = random.Random(1)
        location = -self.spread * self.spread / 2

        def length(mean: float) -> int:
            return max(1, round(mean * draw.lognormvariate(location, self.spread)))

        samples = tuple(
            LengthSample(length(self.prompt_tokens), length(self.output_tokens)) for _ in range(200)
        )
        return Workload(samples=samples, arrival_variation=self.arrival_variation)


SPACES = (
    Space("llama-3.1-8b", "H100-SXM-80GB", 4, 1000, 300, 1.0, 0.05),
    Space("llama-3.1-8b", "H100-SXM-80GB", 4, 4000, 200, 1.0, 0.03),
    Space("llama-3.1-8b", "H100-SXM-80GB", 4, 500, 100, 0.1, 0.012),
    Space("llama-3.1-8b", "A100-SXM-80GB", 4, 500, 500, 0.5, 0.03),
    Space("llama-3.1-8b", "A100-SXM-80GB", 4, 8000, 200, 4.0, 0.1),
    Space("llama-3.1-8b", "L4-24GB", 4, 300, 200, 2.0, 0.15),
    Space("llama-3.1-8b", "A100-SXM-80GB", 4, 1000, 200, 1.0, 0.04, arrival_variation=3.0),
    Space("llama-3.1-70b", "H100-SXM-80GB", 8, 1000, 300, 1.0, 0.05),
    Space("llama-3.1-70b", "H100-SXM-80GB", 8, 4000, 300, 3.0, 0.1),
    Space("llama-3.1-70b", "H100-SXM-80GB", 8, 2000, 300, 0.5, 0.03),
    Space("llama-3.1-70b", "A100-SXM-80GB", 8, 1500, 250, 4.0, 0.15),
    Space("qwen2.5-32b", "L40S-48GB", 8, 1000, 300, 4.0, 0.2),
    Space("mixtral-8x7b", "H100-SXM-80GB", 8, 1000, 300, 1.0, 0.05),
    Space("mixtral-8x7b", "A100-SXM-80GB", 4, 2000, 200, 2.0, 0.1),
    Space("qwen3-30b-a3b", "H100-SXM-80GB", 4, 2000, 500, 1.0, 0.03),
)
QUICK = SPACES[:1] + SPACES[7:8] + SPACES[12:13]

# Of each: a model, a GPU and how many of them.
_RANDOM_FLEETS = (
    ("llama-3.2-3b", "L4-24GB", 4),
    ("qwen2.5-7b", "A10G-24GB", 8),
    ("llama-3.1-8b", "H100-SXM-80GB", 4),
    ("llama-3.1-8b", "A100-SXM-80GB", 8),
    ("llama-3.1-8b", "L40S-48GB", 4),
    ("qwen2.5-14b", "A100-SXM-40GB", 4),
    ("qwen2.5-32b", "H100-SXM-80GB", 4),
    ("llama-3.1-70b", "H100-SXM-80GB", 8),
    ("llama-3.1-70b", "H200", 8),
    ("llama-3.1-70b", "A100-SXM-80GB", 8),
    ("mixtral-8x7b", "A100-SXM-80GB", 8),
    ("qwen3-30b-a3b", "H100-SXM-80GB", 4),
)


def random_spaces(count: int, seed: int) -> Iterator[Space]:
    """Yield spaces with lengths, objectives and arrivals drawn on logarithmic scales."""
    draw = random.Random(seed)

    def between(low: float, high: float) -> float:
        return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.2g}")

    for _ in range(count):
        model, gpu, gpu_count = draw.choice(_RANDOM_FLEETS)
        yield Space(
            model,
            gpu,
            gpu_count,
            between(100, 8000),
            between(20, 1000),
            between(0.2, 5.0),
            between(0.015, 0.2),
            draw.choice((1.0, 1.0, 2.0)),
            between(0.3, 1.0),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one space.

    Attributes:
        plan_count: Valid plans.
        chosen: The planner's choice.
        best: The best by simulation.
        regret: Share of the best's goodput per dollar that the choice lacks.
        checked_regret: The same of the best of the planner's first four by simulation.
        errors: Relative errors of predicted goodputs.
    """

    plan_count: int
    chosen: PlanEstimate
    best: PlanEstimate
    regret: float
    checked_regret: float
    errors: tuple[float, ...]


def try_all(space: Space, *, request_count: int = 1500) -> Outcome:
    """Plan for a space, and simulate every plan."""
    model = find_model(space.model)
    assert model is not None
    gpu = require_gpu(space.gpu)
    pool = GpuPool(gpu=gpu, gpus_per_node_count=space.gpu_count, usd_per_gpu_hour=gpu.usd_per_hour)
    objectives = PlanObjectives(ttft_s=space.ttft_s, tpot_s=space.tpot_s)
    options = EngineOptions()
    workload = space.workload()
    result = search_plans(model, (pool,), workload, objectives, PlanGoal.GOODPUT_PER_USD, options)
    assert result.recommended is not None, result.summary
    per_usd: list[tuple[float, PlanEstimate]] = []
    errors = []
    for plan in result.plans:
        simulation = PlanSimulation(
            plan_step_time(model, pool, plan.config, options),
            plan.memory.key_value_token_capacity,
            plan.config,
            options,
            workload,
            objectives,
            request_count=request_count,
        )
        goodput = simulation.goodput(plan.goodput or 0.1)
        per_usd.append((goodput / plan.usd_per_hour, plan))
        if goodput > 0.0:
            errors.append(plan.goodput / goodput - 1.0)
    best, best_plan = max(per_usd, key=lambda each: each[0])
    by_plan = {id(plan): value for value, plan in per_usd}
    checked = max(by_plan.get(id(plan), 0.0) for plan in result.plans[:4])
    if best <= 0.0:
        return Outcome(len(result.plans), result.plans[0], best_plan, 0.0, 0.0, ())
    return Outcome(
        len(result.plans),
        result.plans[0],
        best_plan,
        1.0 - by_plan[id(result.plans[0])] / best,
        1.0 - checked / best,
        tuple(errors),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold the planner's choices against the simulator.")
    parser.add_argument("--quick", action="store_true", help="three spaces")
    parser.add_argument("--random", type=int, metavar="COUNT", help="so many spaces drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    arguments = parser.parse_args()
    outcomes = []
    spaces: Iterable[Space] = QUICK if arguments.quick else SPACES
    if arguments.random:
        spaces = random_spaces(arguments.random, arguments.seed)
    for space in spaces:
        start_s = time.process_time()
        outcome = try_all(space)
        outcomes.append(outcome)
        same = outcome.chosen.config.sizes == outcome.best.config.sizes
        print(
            f"{space}\n  {outcome.plan_count} plans; chosen {outcome.chosen.config}, "
            f"{'the best' if same else f'best {outcome.best.config}'}; regret {outcome.regret:.1%}, "
            f"with a check {outcome.checked_regret:.1%}; goodput predicted within "
            f"{statistics.median(map(abs, outcome.errors)) if outcome.errors else math.nan:.1%} (median), "
            f"{max(map(abs, outcome.errors), default=math.nan):.1%} (most); "
            f"{time.process_time() - start_s:.0f} s of CPU",
            flush=True,
        )
    regrets = [outcome.regret for outcome in outcomes]
    errors = [abs(error) for outcome in outcomes for error in outcome.errors]
    met = sum(regret <= TARGET for regret in regrets)
    print(
        f"\nregret: mean {statistics.mean(regrets):.1%}, most {max(regrets):.1%}; at most {TARGET:.0%} in "
        f"{met} of {len(regrets)} spaces; with a check at most "
        f"{max(outcome.checked_regret for outcome in outcomes):.1%}"
    )
    error = statistics.median(errors)
    print(f"goodput of {len(errors)} plans: median error {error:.1%}, most {max(errors):.1%}")


if __name__ == "__main__":
    main()
