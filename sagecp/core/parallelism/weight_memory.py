"""How many bytes of weights each GPU of a plan holds, as vLLM's layers divide them."""

from __future__ import annotations

import math

from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import count_parameters, part_format, plain_format
from sagecp.core.parallelism.pipeline_stages import PipelineStage, pipeline_stages
from sagecp.core.parallelism.tensor_split import VOCABULARY_PADDING, splits_shared_experts

_ABSORBED_BYTES = 2


def weight_bytes_per_gpu(model: ModelDescription, config: ParallelismConfig) -> int:
    """Return the bytes of weights on the GPU that has most of them.

    Data-parallel copies each hold everything but the experts, which they share.
    """
    stages = pipeline_stages(model, config.pipeline_parallel_size)
    return max(stage_weight_bytes(model, config, stage) for stage in stages)


def stage_weight_bytes(model: ModelDescription, config: ParallelismConfig, stage: PipelineStage) -> int:
    """Return the bytes of weights on each GPU of a stage.

    Split over the tensor parallel group: embedding and head (padded to 64 tokens), attention
    by heads, feed-forward layers. Whole on each GPU: norms, routers, MLA's projections to
    latents, and key-value heads where there are fewer than GPUs. Experts: whole ones over the
    tensor and data parallel GPUs with expert parallelism, otherwise a slice of each on all of them.
    Those in MXFP4 are padded to the tiles of the kernel that every GPU can run.
    Beside the checkpoint's weights there are two of vLLM's own: the table of rotary positions,
    and for MLA the 16-bit copies of the projections from the latent that decoding uses.
    """
    counts = count_parameters(model)
    tensor, data = config.tensor_parallel_size, config.data_parallel_size
    plain = plain_format(model).bits_per_weight / 8.0
    latent = model.latent_attention

    # Key-value heads are copied where there are fewer than GPUs; MLA's have as many as queries.
    key_value_share = 1 / tensor if latent else max(1 / tensor, 1 / model.key_value_head_count)
    attention = (
        counts.query_output_per_layer / tensor
        + counts.key_value_per_layer * key_value_share
        + counts.replicated_attention_per_layer
    )
    size = stage.layer_count * attention * _bytes(model, "attention")
    size += stage.dense_layer_count * counts.dense_layer / tensor * _bytes(model, "dense")
    size += stage.expert_layer_count * _expert_layer_bytes(model, tensor, data, config.expert_parallel_size)
    size += counts.norms * stage.layer_count / model.layer_count * plain

    table = _rounded_up(model.vocabulary_size, VOCABULARY_PADDING) * model.hidden_size / tensor * plain
    if stage.is_first:
        size += table
    # A tied head is the embedding itself, unless that is on another stage's GPUs.
    if stage.is_last and not (model.tied_embeddings and stage.is_first):
        size += table
    if model.parameter_count is not None:
        size *= model.parameter_count / counts.total

    rotary_size = latent.rope_head_size if latent else model.head_size
    size += model.max_context_token_count * rotary_size * plain
    if latent:
        size += stage.layer_count * counts.key_value_per_layer * key_value_share * _ABSORBED_BYTES
    return round(size)


def _expert_layer_bytes(model: ModelDescription, tensor: int, data: int, expert: int) -> float:
    experts = model.experts
    if experts is None:
        return 0.0
    counts = count_parameters(model)
    spread = expert > 1
    parts = 1 if spread else tensor * data
    held = (math.ceil(experts.expert_count / expert) if spread else experts.expert_count) / parts
    if part_format(model, "experts") is WeightFormat.MXFP4:
        held *= _mxfp4_padding(model.hidden_size, experts.intermediate_size, parts)
    split = splits_shared_experts(model, experts, tensor, data, spread)
    return (
        counts.expert * held * _bytes(model, "experts")
        + counts.shared_experts_per_layer / (tensor if split else 1) * _bytes(model, "shared")
        + counts.router_per_layer * plain_format(model).bits_per_weight / 8.0
    )


def _mxfp4_padding(hidden_size: int, width: int, parts: int) -> float:
    """By how much experts grow because each GPU's part is rounded up to tiles of vLLM's Marlin kernel."""
    part = width / parts
    return _rounded_up(hidden_size, 256) / hidden_size * _rounded_up(part, 128) / part


def _rounded_up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _bytes(model: ModelDescription, part: str) -> float:
    return part_format(model, part).bits_per_weight / 8.0
