"""Plans in words and figures, for the terminal and for the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sagecp.cli import render

if TYPE_CHECKING:
    from sagecp.v1 import parallelism_pb2

_GIB = 2.0**30
GOAL_WORDS = {
    "goodput_per_usd": "most good requests for the money",
    "lowest_ttft": "soonest first token",
    "cheapest": "fewest dollars per hour",
    "highest_throughput": "most tokens per second",
}


def sizes_text(sizes: parallelism_pb2.ParallelSizes, replica_count: int) -> str:
    """Return the sizes of a plan: `2 x TP4 PP2`."""
    parts = [f"TP{max(1, sizes.tensor_parallel_size)}"]
    for name, size in (
        ("PP", sizes.pipeline_parallel_size),
        ("DP", sizes.data_parallel_size),
        ("EP", sizes.expert_parallel_size),
    ):
        if size > 1:
            parts.append(f"{name}{size}")
    text = " ".join(parts)
    return f"{replica_count} x {text}" if replica_count > 1 else text


def plan_name(plan: parallelism_pb2.ParallelismPlan, *, with_gpu: bool = False) -> str:
    """Return what a plan is called, with the kind of its GPUs where there are several."""
    text = sizes_text(plan.sizes, plan.replica_count)
    return f"{text}, {gpu_kind(plan.gpu_name)}" if with_gpu else text


def gpu_kind(gpu_name: str) -> str:
    """Return a kind of GPU in as few characters as tell it from the others: H100, A100 40GB."""
    from sagecp.core.gpu_specifications import find_gpu

    gpu = find_gpu(gpu_name)
    return " ".join(gpu.words).upper() if gpu else gpu_name


def usd(value: float) -> str:
    """Return dollars with three digits; 0 is unknown."""
    if value <= 0.0:
        return render.NONE
    if value >= 1000.0:
        return f"{value:,.0f}"
    return f"{value:.2f}" if 0.1 <= value < 100.0 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Return a duration; an infinite one is none."""
    return render.duration(value) if math.isfinite(value) else render.NONE


def number(value: float) -> str:
    """Return a figure with three digits, or all of its whole part."""
    if not math.isfinite(value):
        return render.NONE
    return f"{value:,.0f}" if abs(value) >= 100.0 else f"{value:.3g}"


def gib(value: float) -> str:
    """Return bytes in GiB."""
    return f"{value / _GIB:.1f}"


def parameters(count: int) -> str:
    """Return a number of parameters as models are called by it: 8.03B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:,}"


def memory_parts(memory: parallelism_pb2.PlanMemory) -> list[tuple[str, int]]:
    """Return what the memory of the fullest GPU is for, in bytes; all of it together is what may be taken."""
    return [
        ("weights", memory.weight_bytes),
        ("activations", memory.activation_bytes),
        ("CUDA graphs", memory.cuda_graph_bytes),
        ("runtime", memory.runtime_bytes),
        ("KV cache", memory.key_value_bytes),
    ]
