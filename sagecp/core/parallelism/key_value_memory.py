"""How many bytes the keys and values of a token take on each GPU, and how many tokens fit.

vLLM's cache is made of blocks of so many tokens. Layers of one kind use the same blocks; a model
that has layers with a window beside others has several groups of equally many layers, which draw
blocks from one pool (`_get_kv_cache_groups_uniform_page_size` in vLLM 0.32).
"""

from __future__ import annotations

import math

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.pipeline_stages import PipelineStage, pipeline_stages

# Groups are as small as the rarer kind of layer, unless that leaves the other one half filled.
_MOST_PADDED_RATIO = 1.5


def key_value_bytes_per_token(
    model: ModelDescription, config: ParallelismConfig, options: EngineOptions
) -> float:
    """Return the bytes of KV cache that a token takes on a GPU of the stage with most of them.

    A mean over a request of the longest context: layers with a window keep no more than that.
    """
    context = longest_context(model, options)
    return max(
        _request_blocks(model, stage, options, context) * _block_bytes(model, config, stage, options)
        for stage in pipeline_stages(model, config.pipeline_parallel_size)
    ) / max(1, context)


def token_capacity(
    model: ModelDescription,
    config: ParallelismConfig,
    stage: PipelineStage,
    options: EngineOptions,
    key_value_bytes: int,
) -> int:
    """Return how many tokens of requests of the longest context fit, in whole blocks.

    Args:
        model: What runs.
        config: How it is spread.
        stage: The stage on whose GPUs they are to fit.
        options: Settings of the engine.
        key_value_bytes: What each of these GPUs has for it.
    """
    block_bytes = _block_bytes(model, config, stage, options)
    if key_value_bytes <= 0 or block_bytes <= 0.0:
        return 0
    context = longest_context(model, options)
    requests = int(key_value_bytes / block_bytes) / _request_blocks(model, stage, options, context)
    return int(requests * _blocks(context, options)) * options.block_token_count


def longest_context(model: ModelDescription, options: EngineOptions) -> int:
    """Return the context that one request may have."""
    return options.max_context_token_count or model.max_context_token_count


def _layer_token_bytes(model: ModelDescription, config: ParallelismConfig, options: EngineOptions) -> float:
    """Bytes of a token in one layer on one GPU."""
    latent = model.latent_attention
    if latent:
        # One latent for all heads, whole on every GPU of the tensor parallel group.
        return (latent.key_value_rank + latent.rope_head_size) * options.key_value_bytes
    heads = max(1.0, model.key_value_head_count / config.tensor_parallel_size)
    return heads * (model.head_size + model.value_head_size) * options.key_value_bytes


def _group_size(stage: PipelineStage) -> int:
    """Layers that share a block table."""
    sliding = stage.sliding_layer_count
    kinds = [count for count in (sliding, stage.layer_count - sliding) if count]
    if not kinds:
        return 0
    least, most = min(kinds), max(kinds)
    return most if most < least * _MOST_PADDED_RATIO else least


def _block_bytes(
    model: ModelDescription, config: ParallelismConfig, stage: PipelineStage, options: EngineOptions
) -> float:
    token_bytes = _layer_token_bytes(model, config, options)
    return _group_size(stage) * options.block_token_count * token_bytes


def _request_blocks(
    model: ModelDescription, stage: PipelineStage, options: EngineOptions, context: int
) -> int:
    """Blocks of one request of this context, over all groups."""
    group_size = _group_size(stage)
    if not group_size:
        return 0
    sliding = stage.sliding_layer_count
    whole_groups = math.ceil((stage.layer_count - sliding) / group_size)
    count = whole_groups * _blocks(context, options)
    if sliding:
        window = model.sliding_window_token_count or context
        # What the window has just left is kept until the step that computes is over, and the
        # window rarely begins where a block does.
        kept = min(window - 1 + options.max_batch_token_count, context)
        count += math.ceil(sliding / group_size) * (_blocks(kept, options) + 1)
    return max(1, count)


def _blocks(token_count: int, options: EngineOptions) -> int:
    return math.ceil(token_count / options.block_token_count)
