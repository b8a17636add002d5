"""What a model's configuration tells of its attention: latents, windows, and the longest context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sagecp.core.parallelism.model_config_fields import ConfigFields, shown
from sagecp.core.parallelism.model_config_refusals import MAX_LISTED_LAYERS
from sagecp.core.parallelism.model_description import LatentAttention

_MAX_RANK = 1_000_000
_MAX_HEAD_SIZE = 100_000
_MAX_CONTEXT_TOKEN_COUNT = 1_000_000_000
_MAX_ROPE_FACTOR = 1_000_000.0
# What vLLM assumes where the configuration is silent.
_DEFAULT_CONTEXT_TOKEN_COUNT = 2048
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
    "n_ctx",
)
# Ways to stretch positions after which the stated length is the stretched one already (vLLM 0.32,
# `_get_and_verify_max_len`); with the others the factor is still to be applied.
_STRETCHED_ALREADY = frozenset(
    {"default", "su", "longrope", "llama3", "mrope", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
)
# Every how many layers one sees everything, where the configuration does not list them.
_USUAL_PATTERN = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "gemma3": 6, "gemma3_text": 6}
_CHUNKED_PATTERN = 4
_LOCAL_KINDS = frozenset({"sliding_attention", "chunked_attention"})


def latent_attention(fields: ConfigFields) -> tuple[LatentAttention | None, int | None]:
    """Return the shape of MLA and the size of its value heads; ``None``: the model has ordinary heads."""
    if fields.present("kv_lora_rank") is None:
        return None, None
    rank = fields.required("kv_lora_rank", most=_MAX_RANK, what="the rank of MLA's keys and values")
    rope = fields.required("qk_rope_head_dim", most=_MAX_HEAD_SIZE, what="the part of a key with positions")
    plain = fields.required(
        "qk_nope_head_dim", most=_MAX_HEAD_SIZE, what="the part of a key head without positions"
    )
    value_size = fields.required("v_head_dim", most=_MAX_HEAD_SIZE, what="the size of a value head")
    query_rank = fields.integer("q_lora_rank", most=_MAX_RANK)
    latent = LatentAttention(
        key_value_rank=rank, rope_head_size=rope, plain_head_size=plain, query_rank=query_rank
    )
    return latent, value_size


def context_token_count(fields: ConfigFields, model_type: str) -> int:
    """Return the longest context the model was made for, stretched as vLLM stretches it."""
    lengths = [
        length
        for name in _CONTEXT_NAMES
        if (length := fields.integer(name, most=_MAX_CONTEXT_TOKEN_COUNT)) is not None
    ]
    length = min(lengths, default=_DEFAULT_CONTEXT_TOKEN_COUNT)
    if "gemma3" in model_type:
        # Stated as stretched.
        return length
    return min(_MAX_CONTEXT_TOKEN_COUNT, round(length * _rope_factor(fields)))


def sliding_layers(
    fields: ConfigFields, model_type: str, layer_count: int, context: int
) -> tuple[int | None, int]:
    """Return the window of the layers that look back only so far, and how many they are."""
    chunk = fields.integer("attention_chunk_size", most=_MAX_CONTEXT_TOKEN_COUNT)
    window = chunk or fields.integer(
        "sliding_window", "sliding_window_size", most=_MAX_CONTEXT_TOKEN_COUNT, least=-1
    )
    used = fields.flag("use_sliding_window", not model_type.startswith("qwen"))
    kinds = fields.texts("layer_types", MAX_LISTED_LAYERS)
    if kinds is not None and len(kinds) != layer_count:
        fields.reject("layer_types", f"lists {len(kinds):,} layers; the model has {layer_count:,}")
    if window is None or window <= 0 or window >= context or not used:
        return None, 0
    if kinds is not None:
        count = sum(kind in _LOCAL_KINDS for kind in kinds)
    elif chunk:
        count = _chunked_layer_count(fields, layer_count)
    else:
        count = _patterned_layer_count(fields, model_type, layer_count)
    return (window, count) if count else (None, 0)


def _chunked_layer_count(fields: ConfigFields, layer_count: int) -> int:
    """Llama 4: layers with rotated positions look at their chunk only, the others at everything."""
    listed = fields.whole_numbers("no_rope_layers", MAX_LISTED_LAYERS)
    if listed:
        return sum(1 for each in listed[:layer_count] if each)
    interval = fields.integer("no_rope_layer_interval", most=MAX_LISTED_LAYERS) or _CHUNKED_PATTERN
    return layer_count - layer_count // interval


def _patterned_layer_count(fields: ConfigFields, model_type: str, layer_count: int) -> int:
    pattern = fields.value("sliding_window_pattern")
    if isinstance(pattern, str):
        # Exaone: a letter per layer, repeated; L looks back only so far.
        letters = (pattern * layer_count)[:layer_count] if 0 < len(pattern) <= MAX_LISTED_LAYERS else ""
        return letters.count("L")
    every = fields.integer(
        "sliding_window_pattern", "_sliding_window_pattern", most=MAX_LISTED_LAYERS
    ) or _USUAL_PATTERN.get(model_type)
    if every:
        return layer_count - layer_count // every
    if model_type.startswith("qwen"):
        first = fields.integer("max_window_layers", most=MAX_LISTED_LAYERS, least=0)
        return max(0, layer_count - (first or 0))
    return layer_count


def _rope_factor(fields: ConfigFields) -> float:
    name = fields.present("rope_scaling", "rope_parameters")
    if name is None:
        return 1.0
    scaling = fields.value(name)
    if not isinstance(scaling, Mapping):
        fields.reject(name, f"is {shown(scaling)}; must be an object")
        return 1.0
    # Newer configurations keep one object for each kind of layer.
    nested = [each for each in scaling.values() if isinstance(each, Mapping)]
    return max((_factor(fields, name, each) for each in nested or [scaling]), default=1.0)


def _factor(fields: ConfigFields, name: str, scaling: Mapping[str, Any]) -> float:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor = scaling.get("factor")
    if factor is None or (isinstance(kind, str) and kind in _STRETCHED_ALREADY):
        return 1.0
    good = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not good or not 0.0 < factor <= _MAX_ROPE_FACTOR:
        fields.reject(
            f"{name}.factor", f"is {shown(factor)}; must be a number above 0, and at most 1,000,000"
        )
        return 1.0
    return float(factor)
