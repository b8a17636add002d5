"""What public models of one family have in common, as their published ``config.json`` tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LLAMA_VOCABULARY = 128_256
QWEN_VOCABULARY = 151_936
_LARGE_QWEN_VOCABULARY = 152_064
MISTRAL_VOCABULARY = 32_768
TEKKEN_VOCABULARY = 131_072
_FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """One published model.

    Attributes:
        organisation: Who publishes it on the Hugging Face hub.
        config: The fields of its configuration that matter.
        fp8_blocks: Whether its publisher's fp8 checkpoints have scales by blocks of 128.
        four_bit_fields: What differs in its publisher's AWQ and GPTQ checkpoints.
    """

    organisation: str
    config: Mapping[str, Any]
    fp8_blocks: bool = False
    four_bit_fields: Mapping[str, Any] = field(default_factory=dict)


def model_config(
    kind: str,
    architecture: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    vocabulary: int,
    context: int,
    **more: object,
) -> dict[str, Any]:
    """Return the fields that every model has; ``heads``: query heads, and key-value heads."""
    return {
        "model_type": kind,
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    *,
    vocabulary: int = _LLAMA_VOCABULARY,
    context: int = 131_072,
    **more: object,
) -> KnownModel:
    """Return a Llama 3, or what is built like one."""
    config = model_config(
        "llama", "LlamaForCausalLM", layers, hidden, intermediate, heads, vocabulary, context, **more
    )
    return KnownModel(organisation="meta-llama", config=config)


def llama_2(layers: int, hidden: int, intermediate: int, heads: tuple[int, int]) -> KnownModel:
    """Return a Llama 2."""
    return llama(layers, hidden, intermediate, heads, vocabulary=32_000, context=4096, torch_dtype="float16")


def llama_4(experts: int, every: int, context: int) -> KnownModel:
    """Return the language model of a Llama 4; every so many layers have experts."""
    text = model_config(
        "llama4_text",
        "Llama4ForCausalLM",
        48,
        5120,
        8192,
        (40, 8),
        202_048,
        context,
        head_dim=128,
        intermediate_size_mlp=16_384,
        num_local_experts=experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=every,
        attention_chunk_size=8192,
    )
    whole = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "text_config": text,
    }
    return KnownModel(organisation="meta-llama", config=whole)


def qwen_2(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    context: int,
    *,
    tied: bool = False,
    vocabulary: int = _LARGE_QWEN_VOCABULARY,
    four_bit_fields: Mapping[str, Any] | None = None,
) -> KnownModel:
    """Return a dense Qwen 2 or 2.5."""
    config = model_config(
        "qwen2",
        "Qwen2ForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary,
        context,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        sliding_window=131_072,
    )
    return KnownModel(organisation="Qwen", config=config, four_bit_fields=four_bit_fields or {})


def qwen_3(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], *, tied: bool = False
) -> KnownModel:
    """Return a dense Qwen 3."""
    config = model_config(
        "qwen3",
        "Qwen3ForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        QWEN_VOCABULARY,
        40_960,
        head_dim=128,
        tie_word_embeddings=tied,
        use_sliding_window=False,
    )
    return KnownModel(organisation="Qwen", config=config, fp8_blocks=True)


def qwen_3_moe(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    width: int,
    *,
    context: int = 40_960,
    experts: int = 128,
) -> KnownModel:
    """Return a Qwen 3 with experts of a width."""
    config = model_config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        QWEN_VOCABULARY,
        context,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=width,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return KnownModel(organisation="Qwen", config=config, fp8_blocks=True)


def mistral(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    vocabulary: int,
    context: int,
    **more: object,
) -> KnownModel:
    """Return a Mistral."""
    config = model_config(
        "mistral", "MistralForCausalLM", layers, hidden, intermediate, heads, vocabulary, context, **more
    )
    return KnownModel(organisation="mistralai", config=config)


def mixtral(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], vocabulary: int, context: int
) -> KnownModel:
    """Return a Mixtral."""
    config = model_config(
        "mixtral",
        "MixtralForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary,
        context,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return KnownModel(organisation="mistralai", config=config)


def deepseek(
    organisation: str,
    *,
    kind: str = "deepseek_v3",
    experts: int = 256,
    dense_layers: int = 3,
    heads: int = 128,
    vocabulary: int = 129_280,
    context: int = 163_840,
) -> KnownModel:
    """Return a DeepSeek-V3, or what is built like one."""
    config = model_config(
        kind,
        "DeepseekV3ForCausalLM",
        61,
        7168,
        18_432,
        (heads, heads),
        vocabulary,
        context,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=dense_layers,
        moe_layer_freq=1,
        quantization_config=_FP8_BLOCKS,
    )
    return KnownModel(organisation=organisation, config=config)


def deepseek_v2_lite() -> KnownModel:
    """Return DeepSeek-V2-Lite."""
    config = model_config(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        27,
        2048,
        10_944,
        (16, 16),
        102_400,
        163_840,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        moe_layer_freq=1,
    )
    return KnownModel(organisation="deepseek-ai", config=config)


def gpt_oss(layers: int, experts: int) -> KnownModel:
    """Return a gpt-oss, whose experts are stored in four bits."""
    config = model_config(
        "gpt_oss",
        "GptOssForCausalLM",
        layers,
        2880,
        2880,
        (64, 8),
        201_088,
        131_072,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    )
    return KnownModel(organisation="openai", config=config)


def gemma_2(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], head_size: int
) -> KnownModel:
    """Return a Gemma 2: every other layer looks back only so far."""
    config = model_config(
        "gemma2",
        "Gemma2ForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        256_000,
        8192,
        head_dim=head_size,
        sliding_window=4096,
        tie_word_embeddings=True,
    )
    return KnownModel(organisation="google", config=config)


def gemma_3(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], head_size: int
) -> KnownModel:
    """Return a Gemma 3 that sees; as in its configuration, what its class assumes is left out."""
    text = {
        "model_type": "gemma3_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_size,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    whole = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "text_config": text,
    }
    return KnownModel(organisation="google", config=whole)


def glm_4_moe(
    layers: int, hidden: int, intermediate: int, width: int, experts: int, dense_layers: int
) -> KnownModel:
    """Return a GLM 4.5 with experts of a width."""
    config = model_config(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        layers,
        hidden,
        intermediate,
        (96, 8),
        151_552,
        131_072,
        head_dim=128,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=width,
        first_k_dense_replace=dense_layers,
    )
    return KnownModel(organisation="zai-org", config=config)


def of_organisation(organisation: str, model: KnownModel, **changes: object) -> KnownModel:
    """Return a model of another organisation with the shape of one."""
    return KnownModel(organisation=organisation, config={**model.config, **changes})
