"""Step times and throughput of the parallelism planner against published figures of real engines.

    python -m bench.plan_time

Each figure of `bench/data/published_speeds.toml` is predicted from the model's shape, the GPU's data
sheet and the plan alone. Figures marked ``calibrate`` were looked at when the constants of
`sagecp.core.parallelism.step_model` were chosen; those marked ``test`` were held out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.known_models import find_model
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.step_model import PlanStepTime, plan_step_time
from sagecp.core.parallelism.throughput import throughput_at

DATA_PATH = Path(__file__).parent / "data" / "published_speeds.toml"
_MANY = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSpeed:
    """One published figure, and what a prediction of it needs.

    Attributes:
        title: Model, GPUs and situation.
        url: Where it stands.
        held_out: Whether it was kept from the calibration.
        why: Why the prediction is far off, as far as that is known.
        metric: See the data file.
        value: The published figure.
        concurrency: Requests at a time; infinite: as many as the engine takes.
        prompt: Tokens of a prompt.
        output: Tokens of an answer.
        model: What ran.
        pool: On which GPUs.
        config: How it was spread.
        options: Settings of the engine.
    """

    title: str
    url: str
    held_out: bool
    why: str
    metric: str
    value: float
    concurrency: float
    prompt: float
    output: float
    model: ModelDescription
    pool: GpuPool
    config: ParallelismConfig
    options: EngineOptions

    @property
    def is_mixture(self) -> bool:
        """Whether the model is a mixture of experts."""
        return self.model.experts is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedComparison:
    """How much more one plan gives than another on the same GPUs.

    Attributes:
        title: Model, GPUs and plans.
        url: Where it stands.
        value: Rate of the second plan over that of the first.
        speeds: Both.
    """

    title: str
    url: str
    value: float
    speeds: tuple[PublishedSpeed, PublishedSpeed]

    @property
    def predicted(self) -> float:
        """The planner's prediction."""
        base, other = self.speeds
        return predicted(other) / predicted(base)


def published_comparisons(path: Path = DATA_PATH) -> list[PublishedComparison]:
    """Return every comparison of the data file."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    comparisons = []
    for source in data["comparison"]:
        speeds = [
            speed
            for plan in (source["base"], source["other"])
            for speed in _speeds(
                {
                    **source,
                    **plan,
                    "use": "calibrate",
                    "figures": [{"metric": "total_per_s", "concurrency": 0, "value": plan["value"]}],
                },
                data["models"],
            )
        ]
        comparisons.append(
            PublishedComparison(
                title=source["title"],
                url=source["url"],
                value=speeds[1].value / speeds[0].value,
                speeds=(speeds[0], speeds[1]),
            )
        )
    return comparisons


def published_speeds(path: Path = DATA_PATH) -> list[PublishedSpeed]:
    """Return every figure of the data file."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return [speed for source in data["source"] for speed in _speeds(source, data["models"])]


def _speeds(source: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]) -> list[PublishedSpeed]:
    nodes = source.get("nodes", 1)
    config = ParallelismConfig(
        tensor_parallel_size=source.get("tensor", 1),
        pipeline_parallel_size=source.get("pipeline", 1),
        expert_parallel_size=source.get("expert", 1),
    )
    pool = GpuPool(
        gpu=require_gpu(source["gpu"]), gpus_per_node_count=config.gpus_per_replica // nodes, node_count=nodes
    )
    options = EngineOptions(
        max_batch_token_count=source.get("max_tokens", 8192),
        max_running_request_count=source.get("max_requests", 256),
    )
    model = _model(source, shapes)
    return [
        PublishedSpeed(
            title=source["title"],
            url=source["url"],
            held_out=source["use"] == "test",
            why=source.get("why", ""),
            metric=figure["metric"],
            value=figure["value"],
            concurrency=figure["concurrency"] or math.inf,
            prompt=figure.get("prompt", source.get("prompt")),
            output=figure.get("output", source.get("output")),
            model=model,
            pool=pool,
            config=config,
            options=options,
        )
        for figure in source["figures"]
    ]


def _model(source: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]) -> ModelDescription:
    name = source["model"]
    shape = shapes.get(name)
    model = find_model(name) if shape is None else parse_model_config(shape, name=name)
    if model is None:
        raise ValueError(f"{name} is neither a known model nor in {DATA_PATH.name}")
    if "format" not in source:
        return model
    return replace(
        model,
        weight_format=WeightFormat(source["format"]),
        weight_group_size=None,
        unquantized_names=frozenset(),
    )


def predicted(speed: PublishedSpeed) -> float:
    """Return the planner's prediction, in the unit of the figure."""
    step_time = plan_step_time(speed.model, speed.pool, speed.config, speed.options)
    if speed.metric == "batch_s":
        return _batch_s(step_time, speed)
    memory = estimate_memory(speed.model, speed.pool, speed.config, speed.options)
    capacity = memory.key_value_token_capacity if math.isinf(speed.concurrency) else _MANY
    state = throughput_at(
        step_time,
        speed.concurrency,
        capacity,
        speed.prompt,
        speed.output,
        speed.options,
        stage_count=speed.config.pipeline_parallel_size,
    )
    if speed.metric == "output_per_s":
        return state.output_tokens_per_second
    if speed.metric == "total_per_s":
        return state.output_tokens_per_second * (1.0 + speed.prompt / speed.output)
    # A request's own prompt is not part of its time per token.
    count = state.running_request_count
    context = count * (speed.prompt + speed.output / 2.0)
    own_s = step_time.step_s(count + speed.prompt, context, speed.prompt**2 / 2.0)
    own_s -= step_time.step_s(count, context)
    return (state.step_s - own_s / speed.output) * 1e3


def _batch_s(step_time: PlanStepTime, speed: PublishedSpeed) -> float:
    """All prompts in as few steps as the budget allows, then all answers token by token."""
    count, prompt, output = speed.concurrency, speed.prompt, speed.output
    chunks = math.ceil(count * prompt / speed.options.max_batch_token_count)
    pairs = count * prompt**2 / 2.0
    prefill_s = chunks * step_time.step_s(count * prompt / chunks, 0.0, pairs / chunks)
    return prefill_s + (output - 1.0) * step_time.step_s(count, count * (prompt + output / 2.0))


def relative_error(speed: PublishedSpeed) -> float:
    """Return by how much of the figure the prediction is above it."""
    return predicted(speed) / speed.value - 1.0


def _load(speed: PublishedSpeed) -> str:
    return "saturated" if math.isinf(speed.concurrency) else f"{speed.concurrency:.0f} at a time"


def median_absolute_error(speeds: list[PublishedSpeed]) -> float:
    """Return the median over figures of how far off the prediction is, relative to the figure."""
    return statistics.median(abs(relative_error(speed)) for speed in speeds)


def main() -> int:
    """Print every figure beside its prediction, and the errors."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    speeds = published_speeds()
    print(f"{'':44} {'figure':>9} {'predicted':>9} {'error':>7}")
    title = ""
    for speed in speeds:
        if speed.title != title:
            title = speed.title
            print(f"\n{title} ({'held out' if speed.held_out else 'calibration'})\n  {speed.url}")
        print(
            f"  {_load(speed):12} {speed.prompt:5.0f} + {speed.output:4.0f} tokens  {speed.metric:12} "
            f"{speed.value:9.6g} {predicted(speed):9.4g} {relative_error(speed):+7.0%}"
        )
    for comparison in published_comparisons():
        print(f"\n{comparison.title}\n  {comparison.url}")
        print(f"  {'ratio of the rates':42} {comparison.value:9.2f} {comparison.predicted:9.2f}")
    print("\nFurthest off:")
    for speed in sorted(speeds, key=lambda speed: -abs(math.log(1.0 + relative_error(speed))))[:12]:
        print(f"  {relative_error(speed):+5.0%}  {speed.title} ({_load(speed)}): {speed.why or 'unknown'}")
    print()
    groups = {
        "all": speeds,
        "calibration": [speed for speed in speeds if not speed.held_out],
        "held out": [speed for speed in speeds if speed.held_out],
        "held out, dense": [speed for speed in speeds if speed.held_out and not speed.is_mixture],
        "held out, mixtures": [speed for speed in speeds if speed.held_out and speed.is_mixture],
        "one stream or batch of one": [speed for speed in speeds if speed.concurrency == 1],
        "saturated": [speed for speed in speeds if math.isinf(speed.concurrency)],
    }
    for name, group in groups.items():
        errors = sorted(abs(relative_error(speed)) for speed in group)
        print(
            f"{name:28} {len(group):3} figures: median absolute error {statistics.median(errors):4.0%}, "
            f"nine in ten within {errors[math.ceil(0.9 * len(errors)) - 1]:4.0%}, worst {errors[-1]:4.0%}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
