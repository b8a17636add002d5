"""Predicted against printed KV cache: what the planner's memory model makes of cited vLLM logs.

`python -m bench.plan_memory`: a line per case, the parts where the source states them, and the
errors of the cases that the constants were fitted to, of those that they were not, and of those
that are known to miss. Cases: `tests/data/vllm_kv_cache_figures.toml`.
"""

from __future__ import annotations

import statistics
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import MemoryEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.parallelism_config import ParallelismConfig

FIGURES = Path(__file__).parent.parent / "tests" / "data" / "vllm_kv_cache_figures.toml"
_GIB = 1 << 30
_SETTINGS = (
    "gpu_memory_utilization",
    "max_batch_token_count",
    "max_running_request_count",
    "max_context_token_count",
    "key_value_bytes",
)
_PARTS = ("weight_gib", "activation_gib", "runtime_gib", "graph_gib", "request_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """What an engine printed once.

    Attributes:
        name: Model, GPUs and sizes, for people.
        source: Where the figures are from.
        role: ``fitted`` or ``held_out``.
        within: What the prediction must be within; 0: known to miss.
        reason: Why it misses.
        missed_by: The largest error then.
        figures: What was printed, by name: tokens, and GiB per GPU.
        memory: What is predicted.
        graph_bytes: What is predicted of the CUDA graphs, counted or not.
    """

    name: str
    source: str
    role: str
    within: float
    reason: str
    missed_by: float
    figures: dict[str, float]
    memory: MemoryEstimate
    graph_bytes: int

    @property
    def predicted(self) -> dict[str, float]:
        """The same figures as they are predicted."""
        memory = self.memory
        return {
            "key_value_tokens": memory.key_value_token_capacity,
            "key_value_gib": memory.key_value_bytes / _GIB,
            "request_gib": memory.key_value_bytes_per_token * memory.max_context_token_count / _GIB,
            "weight_gib": memory.weight_bytes / _GIB,
            "activation_gib": memory.activation_bytes / _GIB,
            "runtime_gib": memory.runtime_bytes / _GIB,
            "graph_gib": self.graph_bytes / _GIB,
        }

    @property
    def error(self) -> float | None:
        """Relative error of the tokens, or else of the bytes, of the KV cache; ``None``: not stated."""
        for name in ("key_value_tokens", "key_value_gib"):
            if name in self.figures:
                return self.predicted[name] / self.figures[name] - 1.0
        return None


def load_cases(path: Path = FIGURES) -> tuple[MemoryCase, ...]:
    """Read the cited cases and predict each."""
    with path.open("rb") as file:
        document = tomllib.load(file)
    return tuple(_case(entry, document["models"]) for entry in document["cases"])


def _case(entry: dict[str, Any], models: dict[str, Any]) -> MemoryCase:
    gpu = require_gpu(entry["gpu"])
    gpu = replace(gpu, memory_gib=entry.get("gpu_memory_gib", gpu.memory_gib))
    config = ParallelismConfig(
        tensor_parallel_size=entry.get("tensor_parallel_size", 1),
        pipeline_parallel_size=entry.get("pipeline_parallel_size", 1),
        data_parallel_size=entry.get("data_parallel_size", 1),
        expert_parallel_size=entry.get("expert_parallel_size", 1),
    )
    # Before vLLM 0.21 graphs came on top of the share, as if there were none.
    options = EngineOptions(
        **{name: entry[name] for name in _SETTINGS if name in entry},
        cuda_graphs=entry.get("graphs_counted", False),
    )
    pool = GpuPool(gpu=gpu, gpus_per_node_count=8)
    model = parse_model_config(models[entry["model"]], name=entry["model"])
    return MemoryCase(
        name=entry["name"],
        source=entry["source"],
        role=entry["role"],
        within=entry["within"],
        reason=entry.get("reason", ""),
        missed_by=entry.get("missed_by", 0.0),
        figures={name: value for name, value in entry.items() if name.endswith(("_gib", "_tokens"))},
        memory=estimate_memory(model, pool, config, options),
        graph_bytes=estimate_memory(model, pool, config, replace(options, cuda_graphs=True)).cuda_graph_bytes,
    )


def main() -> int:
    """Print them all; return 1 if one that must be within its bound is not."""
    cases = load_cases()
    print(f"{'case':42} {'printed':>11} {'predicted':>11} {'error':>7}  parts: predicted / printed, GiB")
    for case in cases:
        name = next((name for name in ("key_value_tokens", "key_value_gib") if name in case.figures), None)
        printed, predicted = _shown(case.figures, name), _shown(case.predicted, name)
        error = "" if case.error is None else f"{case.error:+.1%}"
        parts = ", ".join(
            f"{part.removesuffix('_gib')} {case.predicted[part]:.2f} / {case.figures[part]:.2f}"
            for part in _PARTS
            if part in case.figures
        )
        print(f"{case.name:42} {printed:>11} {predicted:>11} {error:>7}  {parts}")
    for role in ("fitted", "held_out"):
        _print_errors(role, [case for case in cases if case.role == role and case.within])
    missing = [case for case in cases if not case.within]
    _print_errors("known to miss", missing)
    for case in missing:
        print(f"  {case.name}: {case.reason}")
    return int(any(case.within and abs(case.error or 0.0) > case.within for case in cases))


def _shown(figures: dict[str, float], name: str | None) -> str:
    if name is None:
        return ""
    return f"{figures[name]:,.0f}" if name == "key_value_tokens" else f"{figures[name]:.2f} GiB"


def _print_errors(title: str, cases: Iterable[MemoryCase]) -> None:
    errors = [abs(case.error) for case in cases if case.error is not None]
    print(
        f"{title}: {len(errors)} cases, median error {statistics.median(errors):.1%}, worst {max(errors):.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
