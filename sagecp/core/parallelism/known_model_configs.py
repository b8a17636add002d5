"""Widely used public models: the fields that matter of each published ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.core.parallelism.known_model_families import (
    MISTRAL_VOCABULARY,
    QWEN_VOCABULARY,
    TEKKEN_VOCABULARY,
    KnownModel,
    deepseek,
    deepseek_v2_lite,
    gemma_2,
    gemma_3,
    glm_4_moe,
    gpt_oss,
    llama,
    llama_2,
    llama_4,
    mistral,
    mixtral,
    model_config,
    of_organisation,
    qwen_2,
    qwen_3,
    qwen_3_moe,
)

_LLAMA_8B = llama(32, 4096, 14_336, (32, 8))
_LLAMA_70B = llama(80, 8192, 28_672, (64, 8))
_LLAMA_405B = llama(126, 16_384, 53_248, (128, 8))
_QWEN_14B = qwen_2(48, 5120, 13_824, (40, 8), 131_072)
_QWEN_32B = qwen_2(64, 5120, 27_648, (40, 8), 131_072)
_QWEN_30B_A3B = (48, 2048, 6144, (32, 4), 768)
_QWEN_235B_A22B = (94, 4096, 12_288, (64, 4), 1536)
# The layers' widths of these checkpoints are padded, so that groups of 128 divide over more GPUs.
_PADDED_72B = {"intermediate_size": 29_696}
_META_FP8 = {
    "quant_method": "fbgemm_fp8",
    # All attention, and the first and the last layer.
    "modules_to_not_convert": ["self_attn", "model.layers.0", "model.layers.125", "lm_head"],
}

KNOWN_MODELS: Mapping[str, KnownModel] = {
    "Llama-2-7b-hf": llama_2(32, 4096, 11_008, (32, 32)),
    "Llama-2-13b-hf": llama_2(40, 5120, 13_824, (40, 40)),
    "Llama-2-70b-hf": llama_2(80, 8192, 28_672, (64, 8)),
    "Meta-Llama-3-8B": of_organisation("meta-llama", _LLAMA_8B, max_position_embeddings=8192),
    "Meta-Llama-3-70B": of_organisation("meta-llama", _LLAMA_70B, max_position_embeddings=8192),
    "Llama-3.1-8B": _LLAMA_8B,
    "Llama-3.1-70B": _LLAMA_70B,
    "Llama-3.1-405B": _LLAMA_405B,
    "Llama-3.1-405B-Instruct-FP8": of_organisation("meta-llama", _LLAMA_405B, quantization_config=_META_FP8),
    "Llama-3.1-405B-FP8": of_organisation("meta-llama", _LLAMA_405B, quantization_config=_META_FP8),
    "Llama-3.2-1B": llama(16, 2048, 8192, (32, 8), head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": llama(28, 3072, 8192, (24, 8), head_dim=128, tie_word_embeddings=True),
    "Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Llama-4-Scout-17B-16E": llama_4(16, 1, 262_144),
    "Llama-4-Scout-17B-16E-Instruct": llama_4(16, 1, 10_485_760),
    "Llama-4-Maverick-17B-128E": llama_4(128, 2, 262_144),
    "Llama-4-Maverick-17B-128E-Instruct": llama_4(128, 2, 1_048_576),
    "Qwen2.5-0.5B": qwen_2(24, 896, 4864, (14, 2), 32_768, tied=True, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-1.5B-Instruct": qwen_2(28, 1536, 8960, (12, 2), 32_768, tied=True, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-3B": qwen_2(36, 2048, 11_008, (16, 2), 32_768, tied=True, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-7B": qwen_2(28, 3584, 18_944, (28, 4), 131_072),
    "Qwen2.5-7B-Instruct": qwen_2(28, 3584, 18_944, (28, 4), 32_768),
    "Qwen2.5-14B": _QWEN_14B,
    "Qwen2.5-14B-Instruct": qwen_2(48, 5120, 13_824, (40, 8), 32_768),
    "Qwen2.5-32B": _QWEN_32B,
    "Qwen2.5-32B-Instruct": qwen_2(64, 5120, 27_648, (40, 8), 32_768),
    "Qwen2.5-72B": qwen_2(80, 8192, 29_568, (64, 8), 131_072, four_bit_fields=_PADDED_72B),
    "Qwen2.5-72B-Instruct": qwen_2(80, 8192, 29_568, (64, 8), 32_768, four_bit_fields=_PADDED_72B),
    "Qwen3-0.6B": qwen_3(28, 1024, 3072, (16, 8), tied=True),
    "Qwen3-1.7B": qwen_3(28, 2048, 6144, (16, 8), tied=True),
    "Qwen3-4B": qwen_3(36, 2560, 9728, (32, 8), tied=True),
    "Qwen3-8B": qwen_3(36, 4096, 12_288, (32, 8)),
    "Qwen3-14B": qwen_3(40, 5120, 17_408, (40, 8)),
    "Qwen3-32B": qwen_3(64, 5120, 25_600, (64, 8)),
    "Qwen3-30B-A3B": qwen_3_moe(*_QWEN_30B_A3B),
    "Qwen3-30B-A3B-Instruct-2507": qwen_3_moe(*_QWEN_30B_A3B, context=262_144),
    "Qwen3-30B-A3B-Thinking-2507": qwen_3_moe(*_QWEN_30B_A3B, context=262_144),
    "Qwen3-Coder-30B-A3B-Instruct": qwen_3_moe(*_QWEN_30B_A3B, context=262_144),
    "Qwen3-235B-A22B": qwen_3_moe(*_QWEN_235B_A22B),
    "Qwen3-235B-A22B-Instruct-2507": qwen_3_moe(*_QWEN_235B_A22B, context=262_144),
    "Qwen3-235B-A22B-Thinking-2507": qwen_3_moe(*_QWEN_235B_A22B, context=262_144),
    "Qwen3-Coder-480B-A35B-Instruct": qwen_3_moe(62, 6144, 8192, (96, 8), 2560, context=262_144, experts=160),
    "Mistral-7B-v0.1": mistral(32, 4096, 14_336, (32, 8), 32_000, 32_768, sliding_window=4096),
    "Mistral-7B-Instruct-v0.2": mistral(32, 4096, 14_336, (32, 8), 32_000, 32_768),
    "Mistral-7B-v0.3": mistral(32, 4096, 14_336, (32, 8), MISTRAL_VOCABULARY, 32_768),
    "Mistral-Nemo-Instruct-2407": mistral(
        40, 5120, 14_336, (32, 8), TEKKEN_VOCABULARY, 131_072, head_dim=128
    ),
    "Mistral-Small-24B-Instruct-2501": mistral(
        40, 5120, 32_768, (32, 8), TEKKEN_VOCABULARY, 32_768, head_dim=128
    ),
    "Mistral-Large-Instruct-2407": mistral(
        88, 12_288, 28_672, (96, 8), MISTRAL_VOCABULARY, 131_072, head_dim=128
    ),
    "Mixtral-8x7B-v0.1": mixtral(32, 4096, 14_336, (32, 8), 32_000, 32_768),
    "Mixtral-8x22B-v0.1": mixtral(56, 6144, 16_384, (48, 8), 32_000, 65_536),
    "Mixtral-8x22B-Instruct-v0.1": mixtral(56, 6144, 16_384, (48, 8), MISTRAL_VOCABULARY, 65_536),
    "DeepSeek-V2-Lite": deepseek_v2_lite(),
    "DeepSeek-V3": deepseek("deepseek-ai"),
    "DeepSeek-V3.1": deepseek("deepseek-ai"),
    "DeepSeek-R1": deepseek("deepseek-ai"),
    "DeepSeek-R1-Distill-Llama-8B": of_organisation("deepseek-ai", _LLAMA_8B),
    "DeepSeek-R1-Distill-Llama-70B": of_organisation("deepseek-ai", _LLAMA_70B),
    "DeepSeek-R1-Distill-Qwen-14B": of_organisation(
        "deepseek-ai", qwen_2(48, 5120, 13_824, (40, 8), 131_072)
    ),
    "DeepSeek-R1-Distill-Qwen-32B": of_organisation(
        "deepseek-ai", qwen_2(64, 5120, 27_648, (40, 8), 131_072)
    ),
    "Kimi-K2-Instruct": deepseek(
        "moonshotai",
        kind="kimi_k2",
        experts=384,
        dense_layers=1,
        heads=64,
        vocabulary=163_840,
        context=131_072,
    ),
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
    "gemma-2-2b": gemma_2(26, 2304, 9216, (8, 4), 256),
    "gemma-2-9b": gemma_2(42, 3584, 14_336, (16, 8), 256),
    "gemma-2-27b": gemma_2(46, 4608, 36_864, (32, 16), 128),
    "gemma-3-4b-it": gemma_3(34, 2560, 10_240, (8, 4), 256),
    "gemma-3-12b-it": gemma_3(48, 3840, 15_360, (16, 8), 256),
    "gemma-3-27b-it": gemma_3(62, 5376, 21_504, (32, 16), 128),
    "phi-4": KnownModel(
        organisation="microsoft",
        config=model_config(
            "phi3", "Phi3ForCausalLM", 40, 5120, 17_920, (40, 10), 100_352, 16_384, sliding_window=None
        ),
    ),
    "GLM-4.5": glm_4_moe(92, 5120, 12_288, 1536, 160, 3),
    "GLM-4.5-Air": glm_4_moe(46, 4096, 10_944, 1408, 128, 1),
}
"""By their names on the Hugging Face hub, without the organisation."""

SHORT_NAMES: Mapping[str, str] = {
    "llama-3.3-70b": "Llama-3.3-70B-Instruct",
    "llama-4-scout": "Llama-4-Scout-17B-16E-Instruct",
    "llama-4-maverick": "Llama-4-Maverick-17B-128E-Instruct",
    "qwen2.5-1.5b": "Qwen2.5-1.5B-Instruct",
    "mistral-7b": "Mistral-7B-v0.3",
    "mistral-7b-instruct": "Mistral-7B-v0.3",
    "mistral-nemo": "Mistral-Nemo-Instruct-2407",
    "mistral-small": "Mistral-Small-24B-Instruct-2501",
    "mistral-small-24b": "Mistral-Small-24B-Instruct-2501",
    "mistral-small-24b-base-2501": "Mistral-Small-24B-Instruct-2501",
    "mistral-large": "Mistral-Large-Instruct-2407",
    "mistral-large-123b": "Mistral-Large-Instruct-2407",
    "mistral-large-instruct-2411": "Mistral-Large-Instruct-2407",
    "mixtral-8x7b": "Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "Mixtral-8x22B-v0.1",
    "deepseek-v3-0324": "DeepSeek-V3",
    "deepseek-r1-0528": "DeepSeek-R1",
    "kimi-k2": "Kimi-K2-Instruct",
    "gemma-3-4b": "gemma-3-4b-it",
    "gemma-3-12b": "gemma-3-12b-it",
    "gemma-3-27b": "gemma-3-27b-it",
    "gpt-oss": "gpt-oss-120b",
}
"""Other names that people use, in lower case."""
