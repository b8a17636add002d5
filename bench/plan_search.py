"""How long the planner takes, from one GPU to 64 in eight nodes, with models up to 671B::

python -m bench.plan_search
"""

from __future__ import annotations

import random
import statistics
import time

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.known_models import find_model
from sagecp.core.parallelism.search import search_plans
from sagecp.core.parallelism.workload import LengthSample, PlanGoal, PlanObjectives, Workload

TARGET_S = 2.0
REPETITION_COUNT = 5
CASES = (
    ("llama-3.1-8b", "L4-24GB", 1, 1),
    ("llama-3.1-8b", "H100-SXM-80GB", 8, 1),
    ("llama-3.1-70b", "H100-SXM-80GB", 8, 2),
    ("llama-3.1-405b", "H100-SXM-80GB", 8, 4),
    ("mixtral-8x7b", "A100-SXM-80GB", 8, 1),
    ("qwen3-235b-a22b", "H100-SXM-80GB", 8, 4),
    ("deepseek-v3", "H200", 8, 2),
    ("deepseek-v3", "H100-SXM-80GB", 8, 8),
)


def workload() -> Workload:
    """Return a thousand kinds of requests, as a trace gives them."""
    draw = random.Random(1)
    samples = tuple(
        LengthSample(
            max(1, round(draw.lognormvariate(7.0, 1.0))), max(1, round(draw.lognormvariate(5.5, 0.8)))
        )
        for _ in range(1000)
    )
    return Workload(samples=samples, request_rate=20.0)


def main() -> None:
    traffic = workload()
    objectives = PlanObjectives(ttft_s=2.0, tpot_s=0.05)
    print(f"{'model':>18} {'GPUs':>28} | {'plans':>5} {'rejected':>8} | CPU, median of {REPETITION_COUNT}")
    for name, gpu, count, nodes in CASES:
        model = find_model(name)
        assert model is not None
        pool = GpuPool(gpu=require_gpu(gpu), gpus_per_node_count=count, node_count=nodes)
        times = []
        for _ in range(REPETITION_COUNT):
            start_s = time.process_time()
            result = search_plans(
                model, (pool,), traffic, objectives, PlanGoal.GOODPUT_PER_USD, EngineOptions()
            )
            times.append(time.process_time() - start_s)
        median_s = statistics.median(times)
        verdict = (
            f"target {TARGET_S:g} s: {'met' if median_s <= TARGET_S else 'MISSED'}" if nodes == 8 else ""
        )
        counts = f"{len(result.plans):5} {len(result.rejected):8}"
        print(f"{name:>18} {pool!s:>28} | {counts} | {median_s:.2f} s  {verdict}")


if __name__ == "__main__":
    main()
