"""How vLLM's layers divide their weights over a tensor parallel group, and where that does not work out.

Sources, in vLLM 0.32: ``ModelConfig.verify_with_parallel_config`` (heads), ``QKVParallelLinear`` and
each model's attention (key-value heads), ``VocabParallelEmbedding`` (padded to 64),
``MergedColumnParallelLinear`` and ``RowParallelLinear`` (widths), ``FusedMoEConfig`` and
``FusedMoEParallelConfig.make`` (experts), ``verify_group_size_divides_partition``,
``BaseAWQLinearMethod``, ``validate_fp8_block_shape`` and ``refine_fp8_moe_block_shape`` (scales).
"""

from __future__ import annotations

import math

from sagecp.core.parallelism.model_description import ExpertShape, ModelDescription, WeightFormat

VOCABULARY_PADDING = 64
"""The embedding and the output head are padded to a multiple of it before they are split."""

# Keep no copies of key-value heads for more GPUs than there are heads.
_WITHOUT_REPLICATED_HEADS = frozenset({"GptOssForCausalLM"})
# Demand at least as many experts as GPUs of a tensor parallel group.
_ONE_EXPERT_PER_GPU = frozenset(
    {
        "Ernie4_5_MoeForCausalLM",
        "ExaoneMoEForCausalLM",
        "Lfm2MoeForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniMaxM2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
    }
)
# Keep whole shared experts on every GPU where tokens are divided among the GPUs instead:
# expert parallelism with both tensor and data parallelism.
_WHOLE_SHARED_EXPERTS = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "Llama4ForConditionalGeneration",
        "Qwen3NextForCausalLM",
    }
)
_USUAL_GROUP_SIZE = {WeightFormat.INT4: 128, WeightFormat.NVFP4: 16}
# Scales of experts are repeated for blocks of as few as this many weights where a split needs it.
_LEAST_REFINED_BLOCK = 32


def split_clashes(model: ModelDescription, tensor: int, data: int, expert_parallel: bool) -> list[str]:
    """Return what cannot be divided, with the numbers that clash; empty: everything can.

    Args:
        model: The model.
        tensor: Tensor parallel size, from 1.
        data: Data parallel size, from 1.
        expert_parallel: Whether whole experts are spread over the GPUs.
    """
    return [
        *_head_clashes(model, tensor),
        *_width_clashes(model, tensor, data, expert_parallel),
        *_scale_clashes(model, tensor, data, expert_parallel),
    ]


def _head_clashes(model: ModelDescription, tensor: int) -> list[str]:
    clashes = []
    if model.attention_head_count % tensor:
        clashes.append(f"{model.attention_head_count} attention heads cannot be split over {tensor} GPUs")
    heads = model.key_value_head_count
    if model.latent_attention is None:
        replicated = tensor > heads
        if (tensor % heads) if replicated else (heads % tensor):
            clashes.append(
                f"{heads} key-value heads can neither be split nor copied evenly over {tensor} GPUs"
            )
        elif replicated and model.architecture in _WITHOUT_REPLICATED_HEADS:
            clashes.append(
                f"{model.architecture} has {heads} key-value heads and cannot copy them for {tensor} GPUs"
            )
    return clashes


def _width_clashes(model: ModelDescription, tensor: int, data: int, expert_parallel: bool) -> list[str]:
    clashes = []
    vocabulary = math.ceil(model.vocabulary_size / VOCABULARY_PADDING) * VOCABULARY_PADDING
    if vocabulary % tensor:
        clashes.append(f"a vocabulary of {vocabulary:,} (padded to 64) cannot be split over {tensor} GPUs")
    if _has_dense_layers(model) and model.intermediate_size % tensor:
        clashes.append(
            f"feed-forward layers of width {model.intermediate_size:,} cannot be split over {tensor} GPUs"
        )
    experts = model.experts
    if experts is None:
        return clashes
    if splits_shared_experts(model, experts, tensor, data, expert_parallel) and (
        experts.shared_intermediate_size % tensor
    ):
        clashes.append(
            f"shared experts of width {experts.shared_intermediate_size:,} cannot be split over {tensor} GPUs"
        )
    if not expert_parallel and experts.intermediate_size % (tensor * data):
        over = f"{tensor} GPUs" if data == 1 else f"{tensor} x {data} GPUs (all copies share them)"
        clashes.append(f"experts of width {experts.intermediate_size:,} cannot be split over {over}")
    if tensor > experts.expert_count and model.architecture in _ONE_EXPERT_PER_GPU:
        clashes.append(f"{experts.expert_count} experts are fewer than {tensor} GPUs")
    return clashes


def _scale_clashes(model: ModelDescription, tensor: int, data: int, expert_parallel: bool) -> list[str]:
    """Return which layers a split would cut within weights that share a scale."""
    group = _group_size(model)
    if not group:
        return []
    whole = model.unquantized_names
    experts = model.experts
    widths: list[tuple[str, int]] = []
    if "attention" not in whole:
        heads = model.attention_head_count
        widths.append(("attention outputs", heads * model.value_head_size))
        latent = model.latent_attention
        if latent and model.weight_format is WeightFormat.FP8:
            # Blocks have a height, too, and these are the layers with a single split output.
            widths.append(("queries", heads * (latent.plain_head_size + latent.rope_head_size)))
            widths.append(("keys and values", heads * (latent.plain_head_size + model.value_head_size)))
    if _has_dense_layers(model) and "dense" not in whole:
        widths.append(("feed-forward layers", model.intermediate_size))
    if (
        experts
        and "shared" not in whole
        and splits_shared_experts(model, experts, tensor, data, expert_parallel)
    ):
        widths.append(("shared experts", experts.shared_intermediate_size))
    format_name = model.weight_format.value
    clashes = [
        f"{name} of width {width:,} in {format_name} cannot be split over {tensor} GPUs: "
        f"{width // tensor:,} is no multiple of the {group} weights that share a scale"
        for name, width in widths
        if tensor > 1 and width % tensor == 0 and (width // tensor) % group
    ]
    if experts and "experts" not in whole:
        parts = 1 if expert_parallel else tensor * data
        clash = _expert_scale_clash(model, experts, parts, group)
        if clash:
            clashes.append(clash)
    return clashes


def halved_scales(model: ModelDescription, tensor: int, data: int, expert_parallel: bool) -> str | None:
    """Return why a split of four-bit experts runs on slow kernels only, if it does.

    Where a split cuts the weights that share a scale, vLLM halves the groups of AWQ and GPTQ and
    leaves its fast kernels; checkpoints of compressed-tensors it refuses.
    """
    experts = model.experts
    group = _group_size(model)
    parts = 1 if expert_parallel else tensor * data
    if experts is None or model.weight_format is not WeightFormat.INT4 or not group or parts == 1:
        return None
    part = experts.intermediate_size // parts
    if experts.intermediate_size % parts or part % group == 0:
        return None
    return (
        f"experts of width {experts.intermediate_size:,} in int4 over {parts} GPUs leave {part:,} each, "
        f"no multiple of the {group} weights that share a scale: slow kernels at best; use expert "
        "parallelism, which keeps experts whole, or fewer GPUs"
    )


def _expert_scale_clash(model: ModelDescription, experts: ExpertShape, parts: int, group: int) -> str | None:
    width = experts.intermediate_size
    if parts == 1 or width % parts or (width // parts) % group == 0:
        return None
    finest = math.gcd(group, width // parts, model.hidden_size)
    # Kernels for four-bit floats pad instead.
    may_refine = model.weight_format in (WeightFormat.FP8, WeightFormat.INT4)
    if not may_refine or finest >= _LEAST_REFINED_BLOCK:
        return None
    return (
        f"experts of width {width:,} in {model.weight_format.value} cannot be split over {parts} GPUs: "
        f"{width // parts:,} is no multiple of the {group} weights that share a scale; "
        "expert parallelism keeps them whole"
    )


def _group_size(model: ModelDescription) -> int:
    """Return how many weights share a scale, 0 if whole channels do."""
    if model.weight_group_size is not None:
        return model.weight_group_size
    return _USUAL_GROUP_SIZE.get(model.weight_format, 0)


def _has_dense_layers(model: ModelDescription) -> bool:
    return model.dense_layer_count > 0 and model.intermediate_size > 0


def splits_shared_experts(
    model: ModelDescription, experts: ExpertShape, tensor: int, data: int, expert_parallel: bool
) -> bool:
    """Return whether the experts that every token visits are divided over the tensor parallel group."""
    if not experts.shared_intermediate_size:
        return False
    whole = expert_parallel and tensor > 1 and data > 1 and model.architecture in _WHOLE_SHARED_EXPERTS
    return not whole
