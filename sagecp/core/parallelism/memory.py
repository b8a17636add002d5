"""How much memory a plan takes on its fullest GPU, and how many tokens of KV cache that leaves.

The engine takes a share of each GPU. It loads the weights, runs one step of as many tokens and
requests as it allows, adds what the CUDA graphs will take (vLLM 0.21 and later; before, they came
on top of the share), and gives the rest to the KV cache. This module predicts each part.

Where the constants come from: they are fitted to the parts that vLLM 0.19.0 logged on H100s for
Llama-3.1-8B, Gemma-2-2B and -27B, CodeLlama-7B, Llama-3.3-70B-FP8 and Qwen1.5-MoE (the figures of
llm-d-planner's accuracy report and logs), and tested on the other figures that
``tests/data/vllm_kv_cache_figures.toml`` cites. What differs between engines and is not modelled:
before vLLM 0.17, and without FlashInfer's or Triton's sampler, sampling sorted all logits and took
39 bytes for each instead of 14; encoders of images are only counted as far as the model's
parameters say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.estimates import MemoryEstimate
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.key_value_memory import (
    key_value_bytes_per_token,
    longest_context,
    token_capacity,
)
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import plain_format
from sagecp.core.parallelism.pipeline_stages import PipelineStage, pipeline_stages
from sagecp.core.parallelism.weight_memory import stage_weight_bytes, weight_bytes_per_gpu

__all__ = ["estimate_memory", "key_value_bytes_per_token", "weight_bytes_per_gpu"]

_MIB = 1 << 20
_GIB = 1 << 30

# Per request and token of the vocabulary: logits in 16 bits and in 32, their scaled copy, the
# probabilities, and the sampler's workspace.
_SAMPLER_BYTES = 14.45
# The runner's own buffers: block tables, positions, token ids.
_RUNNER_BYTES = 62 * _MIB
# Residual stream, its normed copy, and the layer's output, at the peak of a layer.
_HIDDEN_COPIES = 3
# A stage receives hidden states and residual from the one before.
_HANDED_OVER_COPIES = 2

_RUNTIME_BYTES = 256 * _MIB
# NCCL's buffers are there before the engine measures; what comes later is the custom all-reduce's.
_TENSOR_PARALLEL_BYTES = 150 * _MIB
# FlashInfer's fused all-reduce and norm, on Hopper and data center Blackwell with NVLink.
_FUSED_ALL_REDUCE_BYTES = 1870 * _MIB
_FUSED_ALL_REDUCE_CAPABILITIES = (9.0, 11.0)

# The first graph of each kind brings the pool that the others share; each adds a little per layer,
# once whole and once in pieces.
_FIRST_GRAPH_BYTES = 200 * _MIB
_GRAPH_BYTES_PER_LAYER = 0.42 * _MIB
_MOST_GRAPH_TOKENS = 512


def estimate_memory(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> MemoryEstimate:
    """Predict the memory of a plan; it must be valid.

    Each stage has KV cache for its own layers, and the stage that fits the fewest tokens bounds
    all of them: it is the one that is described.

    Args:
        model: What runs.
        pool: The GPUs.
        config: How the model is spread.
        options: Settings of the engine.
    """
    total = int(pool.gpu.memory_gib * _GIB * options.gpu_memory_utilization)
    needs = [
        _stage_memory(model, pool, config, options, stage, total)
        for stage in pipeline_stages(model, config.pipeline_parallel_size)
    ]
    # Where nothing fits on several, the one that misses most.
    fullest = min(needs, key=lambda need: (need.token_capacity, -need.fixed_bytes))
    return MemoryEstimate(
        total_bytes=total,
        weight_bytes=fullest.weight_bytes,
        activation_bytes=fullest.activation_bytes,
        cuda_graph_bytes=fullest.cuda_graph_bytes,
        runtime_bytes=fullest.runtime_bytes,
        key_value_bytes_per_token=key_value_bytes_per_token(model, config, options),
        key_value_token_capacity=fullest.token_capacity,
        max_context_token_count=longest_context(model, options),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StageMemory:
    weight_bytes: int
    activation_bytes: int
    cuda_graph_bytes: int
    runtime_bytes: int
    token_capacity: int

    @property
    def fixed_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.cuda_graph_bytes + self.runtime_bytes


def _stage_memory(
    model: ModelDescription,
    pool: GpuPool,
    config: ParallelismConfig,
    options: EngineOptions,
    stage: PipelineStage,
    total_bytes: int,
) -> _StageMemory:
    weights = stage_weight_bytes(model, config, stage)
    activations = _activation_bytes(model, config, options, stage)
    graphs = _cuda_graph_bytes(options, stage)
    runtime = _runtime_bytes(pool, config)
    left = total_bytes - weights - activations - graphs - runtime
    return _StageMemory(
        weight_bytes=weights,
        activation_bytes=activations,
        cuda_graph_bytes=graphs,
        runtime_bytes=runtime,
        token_capacity=token_capacity(model, config, stage, options, left),
    )


def _activation_bytes(
    model: ModelDescription, config: ParallelismConfig, options: EngineOptions, stage: PipelineStage
) -> int:
    """Most that a step holds: a layer, or sampling, whichever takes more, and the experts' workspace."""
    element = plain_format(model).bits_per_weight / 8.0
    tokens = options.max_batch_token_count
    hidden = tokens * model.hidden_size * element
    layer = _HIDDEN_COPIES * hidden + tokens * _layer_width(model, config, stage) * element
    sampling = 0.0
    if stage.is_last:
        # All tokens' hidden states are kept, and the logits are gathered from all GPUs.
        requests = min(options.max_running_request_count, tokens)
        sampling = hidden + requests * model.vocabulary_size * _SAMPLER_BYTES
    size = max(layer, sampling) + _expert_workspace_bytes(model, config, options, stage) + _RUNNER_BYTES
    if config.pipeline_parallel_size > 1:
        size += _HANDED_OVER_COPIES * hidden
    return round(size)


def _layer_width(model: ModelDescription, config: ParallelismConfig, stage: PipelineStage) -> float:
    """Elements per token of the widest part of a layer on one GPU, beside the hidden states."""
    tensor = config.tensor_parallel_size
    heads = model.attention_head_count / tensor
    key_value_heads = heads if model.latent_attention else max(1.0, model.key_value_head_count / tensor)
    attention = (heads + key_value_heads) * (model.head_size + model.value_head_size)
    # Gate and up projection, or the latter alone, and their product.
    projections = 3 if model.gated else 2
    widths = [attention]
    if stage.dense_layer_count:
        widths.append(projections * model.intermediate_size / tensor)
    if model.experts and stage.expert_layer_count:
        widths.append(projections * model.experts.shared_intermediate_size / tensor)
    return max(widths)


def _expert_workspace_bytes(
    model: ModelDescription, config: ParallelismConfig, options: EngineOptions, stage: PipelineStage
) -> float:
    """What vLLM's fused experts work in, kept between steps.

    Per token and expert that it visits: the projections, in whose place the results come
    later, and their product.
    """
    experts = model.experts
    if experts is None or not stage.expert_layer_count:
        return 0.0
    parts = 1
    if config.expert_parallel_size == 1:
        parts = config.tensor_parallel_size * config.data_parallel_size
    width = experts.intermediate_size / parts
    projected = (2 if model.gated else 1) * width
    element = plain_format(model).bits_per_weight / 8.0
    visits = options.max_batch_token_count * experts.active_expert_count
    return visits * (max(projected, model.hidden_size) + width) * element


def _cuda_graph_bytes(options: EngineOptions, stage: PipelineStage) -> int:
    if not options.cuda_graphs:
        return 0
    most = min(2 * options.max_running_request_count, _MOST_GRAPH_TOKENS, options.max_batch_token_count)
    # vLLM captures 1, 2, 4, multiples of 8 up to 256, and of 16 beyond.
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, _MOST_GRAPH_TOKENS + 1, 16)]
    count = sum(1 for size in sizes if size <= most)
    return round(_FIRST_GRAPH_BYTES + count * stage.layer_count * _GRAPH_BYTES_PER_LAYER)


def _runtime_bytes(pool: GpuPool, config: ParallelismConfig) -> int:
    size = _RUNTIME_BYTES
    if config.tensor_parallel_size > 1:
        size += _TENSOR_PARALLEL_BYTES
        least, beyond = _FUSED_ALL_REDUCE_CAPABILITIES
        fast = config.tensor_parallel_size <= min(pool.gpu.fast_link_gpu_count, pool.gpus_per_node_count)
        if fast and least <= pool.gpu.compute_capability < beyond:
            size += _FUSED_ALL_REDUCE_BYTES - _TENSOR_PARALLEL_BYTES
    return size
