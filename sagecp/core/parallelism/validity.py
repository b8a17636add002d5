"""Which plans can be: what vLLM accepts, what the GPUs allow, and what is not worth trying.

The rules are those of vLLM 0.32: its configuration checks (``ModelConfig``, ``ParallelConfig``,
``SchedulerConfig``), and the divisions that its layers assert when they are built, which it
reports as bare assertion errors after the weights' download. A table of models and plans is
judged both here and by vLLM's own code in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import MemoryEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import estimate_memory
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_placement import gpus_per_node_of_replica, required_node_count
from sagecp.core.parallelism.tensor_split import halved_scales, split_clashes

IMPOSSIBLE = "impossible: "
"""Begins what no engine could do."""
REFUSED = "vLLM refuses: "
"""Begins what vLLM does not start with."""
UNWISE = "unwise: "
"""Begins what vLLM would start with and what is left out all the same."""

# Models that vLLM cannot cut into stages (no `SupportsPP`).
_WITHOUT_STAGES = frozenset(
    {
        "AriaForConditionalGeneration",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "HrmTextForCausalLM",
        "IQuestLoopCoderForCausalLM",
        "Idefics3ForConditionalGeneration",
        "Mamba2ForCausalLM",
        "PaddleOCRVLForConditionalGeneration",
        "Phi4MMForCausalLM",
        "SmolVLMForConditionalGeneration",
        "WhisperForConditionalGeneration",
        "Zamba2ForCausalLM",
    }
)
# `get_min_capability` of vLLM's quantization methods: fp8, AWQ, compressed tensors, mxfp4, modelopt.
_LEAST_COMPUTE_CAPABILITY = {
    WeightFormat.FP8: 7.5,
    WeightFormat.INT8: 7.5,
    WeightFormat.INT4: 7.5,
    WeightFormat.MXFP4: 8.0,
    WeightFormat.NVFP4: 7.5,
}
_KEY_VALUE_BYTES = (1.0, 2.0, 4.0)
_LISTED_SIZES = 12
_STAGE_DOUBLINGS = 5
_USUAL_NODE_SIZE = 8
_MOST_TIMES_NODES = 16


def violations(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> tuple[str, ...]:
    """Return every reason why a plan cannot be or should not, each with what would make it possible.

    Memory is not looked at. Each begins with :data:`IMPOSSIBLE`, :data:`REFUSED` or :data:`UNWISE`.
    """
    impossible = impossibilities(pool, config)
    if pool.gpu_count < 1 or any(size < 1 for size in config.sizes):
        # Nothing else means anything then.
        return tuple(IMPOSSIBLE + reason for reason in impossible)
    return (
        *(IMPOSSIBLE + reason for reason in impossible),
        *(REFUSED + reason for reason in refusals(model, config, options)),
        *(REFUSED + reason for reason in gpu_refusals(model, pool)),
        *(UNWISE + reason for reason in doubts(model, pool, config)),
    )


def impossibilities(pool: GpuPool, config: ParallelismConfig) -> list[str]:
    """Return why the GPUs there are do not suffice for the plan, whatever the engine."""
    named = zip(("tensor", "pipeline", "data", "expert"), config.sizes[:4], strict=True)
    reasons = [f"the {name} parallel size is {size}; the least is 1" for name, size in named if size < 1]
    if config.replica_count < 1:
        reasons.append(f"there are {config.replica_count} replicas; the least is 1")
    if pool.gpu_count < 1:
        reasons.append("there are no GPUs")
    if reasons:
        return reasons
    if config.gpu_count > pool.gpu_count:
        reasons.append(
            f"{config} takes {config.gpu_count} GPUs and there are {pool.gpu_count}; "
            f"add {config.gpu_count - pool.gpu_count} or use "
            + (
                f"{pool.gpu_count // config.gpus_per_replica} replicas"
                if config.gpus_per_replica <= pool.gpu_count
                else "smaller sizes"
            )
        )
    elif (needed := required_node_count(pool.gpus_per_node_count, config)) > pool.node_count:
        size = gpus_per_node_of_replica(pool.gpus_per_node_count, config)
        each = f"{size[0]} GPUs" if len(size) == 1 else f"{len(size)} nodes"
        nodes = "1 node" if pool.node_count == 1 else f"{pool.node_count} nodes"
        reasons.append(
            f"each replica takes {each}, so {config} takes {needed} nodes of {pool.gpus_per_node_count} "
            f"GPUs and there are {nodes}; use sizes that divide {pool.gpus_per_node_count} or add nodes"
        )
    return reasons


def refusals(model: ModelDescription, config: ParallelismConfig, options: EngineOptions) -> list[str]:
    """Return why vLLM would not start, whatever the GPUs."""
    tensor, pipeline, data, expert, _ = config.sizes
    experts_spread = expert > 1
    reasons = []
    if clashes := split_clashes(model, tensor, data, experts_spread):
        reasons.append("; ".join([*clashes, _sizes_hint(model, data, experts_spread)]))
    if experts_spread and model.experts is None:
        reasons.append(
            f"{_name(model)} has no experts to spread over {expert} GPUs; use expert parallel size 1"
        )
    elif expert not in (1, tensor * data):
        reasons.append(
            f"experts are spread over all tensor x data parallel GPUs, {tensor} x {data} here, "
            f"and not over {expert}; use expert parallel size {tensor * data}, or 1"
        )
    if pipeline > 1 and model.architecture in _WITHOUT_STAGES:
        reasons.append(f"{model.architecture} cannot be cut into stages; use pipeline parallel size 1")
    return reasons + _option_refusals(model, options)


def gpu_refusals(model: ModelDescription, pool: GpuPool) -> list[str]:
    """Return why vLLM would not start on GPUs of this kind."""
    least = _LEAST_COMPUTE_CAPABILITY.get(model.weight_format, 0.0)
    if pool.gpu.compute_capability >= least:
        return []
    reason = (
        f"{model.weight_format.value} weights need a GPU of compute capability {least} and "
        f"{pool.gpu.name} has {pool.gpu.compute_capability}; use 16-bit weights or newer GPUs"
    )
    return [reason]


def doubts(model: ModelDescription, pool: GpuPool, config: ParallelismConfig) -> list[str]:
    """Return why a plan that vLLM would start with is not worth it."""
    tensor, pipeline, data, expert, _ = config.sizes
    reasons = []
    if tensor > pool.gpus_per_node_count:
        reasons.append(
            f"tensor parallel size {tensor} reaches over nodes of {pool.gpus_per_node_count} GPUs, and every "
            f"layer would wait for the network; keep it within {pool.gpus_per_node_count} and use pipeline "
            "stages or copies between nodes"
        )
    if pipeline > model.layer_count:
        reasons.append(
            f"{model.layer_count} layers leave some of {pipeline} stages without a layer; "
            f"use at most {model.layer_count} stages"
        )
    slow = halved_scales(model, tensor, data, expert > 1)
    if slow:
        reasons.append(slow)
    experts = model.experts
    if experts and expert > 1 and experts.expert_count % expert:
        fitting = _divisors(experts.expert_count)
        reasons.append(
            f"{experts.expert_count} experts cannot be spread evenly over {expert} GPUs, and the fullest "
            f"holds up the others; expert parallel sizes that fit are {_listed(fitting)}"
        )
    return reasons


def fit_violation(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    estimate: MemoryEstimate,
) -> str:
    """Return by how much a plan is short of memory, and every single change that would make it fit.

    Args:
        model: The model.
        pool: The GPUs; changes of sizes stay within them, and more GPUs are named apart.
        config: A plan without other violations.
        options: Settings of the engine.
        estimate: What :func:`estimate_memory` says of it, which does not fit.
    """
    needed = estimate.max_context_token_count
    if estimate.key_value_token_capacity > 0:
        short = (
            f"only {estimate.key_value_token_capacity:,} tokens of KV cache fit beside the weights "
            f"and a context may have {needed:,}"
        )
    else:
        taken = estimate.total_bytes - estimate.key_value_bytes
        short = (
            f"each {pool.gpu.name} has {_gib(estimate.total_bytes)} to give and would need {_gib(taken)} "
            f"({_gib(estimate.weight_bytes)} of weights) before any KV cache"
        )
    changes = list(_fitting_changes(model, pool, config, options, estimate))
    if not changes:
        return f"{IMPOSSIBLE}{config} does not fit: {short}; no single change makes it fit, use larger GPUs"
    return f"{IMPOSSIBLE}{config} does not fit: {short}; it would fit with {' or '.join(changes)}"


def _fitting_changes(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    estimate: MemoryEstimate,
) -> Iterator[str]:
    single = replace(config, replica_count=1)
    tensor, pipeline, data, expert, _ = config.sizes
    sizes = tensor_parallel_sizes(model, data, expert > 1)
    stages = (pipeline << doublings for doublings in range(1, _STAGE_DOUBLINGS + 1))
    wider = (
        replace(single, tensor_parallel_size=size, expert_parallel_size=size * data if expert > 1 else 1)
        for size in sizes
        if size > tensor
    )
    deeper = (replace(single, pipeline_parallel_size=size) for size in stages)
    changed = []
    for name, candidates in (("tensor", wider), ("pipeline", deeper)):
        reachable = (each for each in candidates if each.gpu_count <= pool.gpu_count)
        found = next((each for each in reachable if _fits(model, pool, each, options)), None)
        if found:
            size = found.tensor_parallel_size if name == "tensor" else found.pipeline_parallel_size
            changed.append(f"{name} parallel size {size}")
    yield from changed
    if not changed:
        yield from _larger_pools(model, pool, single, options)
    for smaller in (WeightFormat.FP8, WeightFormat.INT4):
        stored = replace(model, weight_format=smaller, weight_group_size=None)
        if smaller.bits_per_weight < model.weight_format.bits_per_weight and _fits(
            stored, pool, config, options
        ):
            yield f"{smaller.value} weights"
            break
    if 0 < estimate.key_value_token_capacity < estimate.max_context_token_count:
        yield f"a context of {estimate.key_value_token_capacity:,} tokens"
    if options.key_value_bytes > 1.0 and _fits(model, pool, config, replace(options, key_value_bytes=1.0)):
        yield "an fp8 KV cache"


def _larger_pools(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> Iterator[str]:
    """Yield how many more GPUs would do: in one node, and in more nodes."""
    data, spread = config.data_parallel_size, config.expert_parallel_size > 1
    for size in tensor_parallel_sizes(model, data, spread):
        if config.tensor_parallel_size < size <= _USUAL_NODE_SIZE:
            wider = replace(
                config, tensor_parallel_size=size, expert_parallel_size=size * data if spread else 1
            )
            if _fits(model, replace(pool, gpus_per_node_count=wider.gpu_count, node_count=1), wider, options):
                yield f"{wider.gpu_count} GPUs in a node and tensor parallel size {size}"
                break
    for stages in range(config.pipeline_parallel_size + 1, model.layer_count + 1):
        deeper = replace(config, pipeline_parallel_size=stages)
        nodes = required_node_count(pool.gpus_per_node_count, deeper)
        if nodes > _MOST_TIMES_NODES * pool.node_count:
            return
        if _fits(model, replace(pool, node_count=nodes), deeper, options):
            yield f"{nodes} such nodes and pipeline parallel size {stages}"
            return


def _fits(model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions) -> bool:
    return not violations(model, pool, config, options) and estimate_memory(model, pool, config, options).fits


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"


@lru_cache(maxsize=1024)
def tensor_parallel_sizes(
    model: ModelDescription, data_parallel_size: int = 1, expert_parallel: bool = False
) -> tuple[int, ...]:
    """Return every tensor parallel size that vLLM can split the model by, smallest first.

    Args:
        model: The model.
        data_parallel_size: Copies behind one endpoint; without expert parallelism they share
            each expert's columns, too.
        expert_parallel: Whether whole experts are spread over the GPUs.
    """
    return tuple(
        size
        for size in _divisors(model.attention_head_count)
        if not split_clashes(model, size, data_parallel_size, expert_parallel)
    )


def _option_refusals(model: ModelDescription, options: EngineOptions) -> list[str]:
    reasons = []
    if not 0.0 < options.gpu_memory_utilization <= 1.0:
        reasons.append(
            f"the share of GPU memory is {options.gpu_memory_utilization:g}; it must be above 0 and at most 1"
        )
    if options.max_running_request_count < 1:
        reasons.append(f"a batch of {options.max_running_request_count} requests; the least is 1")
    elif options.max_batch_token_count < options.max_running_request_count:
        reasons.append(
            f"a step of {options.max_batch_token_count:,} tokens is too small for "
            f"{options.max_running_request_count:,} running requests; each needs at least one token of it"
        )
    context = options.max_context_token_count
    if context is not None and context < 1:
        reasons.append(f"a context of {context} tokens; the least is 1")
    elif context is not None and context > model.max_context_token_count:
        reasons.append(
            f"a context of {context:,} tokens is longer than the {model.max_context_token_count:,} that "
            f"{_name(model)} was made for; ask for at most that"
        )
    if options.key_value_bytes not in _KEY_VALUE_BYTES:
        reasons.append(
            f"there is no KV cache of {options.key_value_bytes:g} bytes per element; use 2, or 1 for fp8"
        )
    return reasons


def _sizes_hint(model: ModelDescription, data_parallel_size: int, expert_parallel: bool) -> str:
    sizes = tensor_parallel_sizes(model, data_parallel_size, expert_parallel)
    copies = f" with data parallel size {data_parallel_size}" if data_parallel_size > 1 else ""
    if len(sizes) > 1:
        return f"tensor parallel sizes that fit{copies} are {_listed(sizes)}"
    if sizes:
        return f"only tensor parallel size 1 fits{copies}; use pipeline stages or replicas"
    return f"no tensor parallel size fits{copies}; use fewer copies and more replicas"


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _listed(sizes: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(str(size) for size in sizes[:_LISTED_SIZES])
    return f"{shown} and so on, up to {sizes[-1]}" if len(sizes) > _LISTED_SIZES else shown


def _name(model: ModelDescription) -> str:
    return model.name or "the model"
