"""Kinds of models that the planner cannot size, told by their fields; better refused than guessed."""

from __future__ import annotations

from sagecp.core.parallelism.model_config_fields import ConfigFields

_WHAT_FITS = "the planner knows decoders whose layers all have attention over a KV cache"
_REFUSED_FIELDS = {
    "linear_num_value_heads": "has layers of linear attention, which keep a state instead of a KV cache",
    "linear_attn_config": "has layers of linear attention, which keep a state instead of a KV cache",
    "full_attention_interval": "has layers without full attention, which keep a state instead of a KV cache",
    "attn_type_list": "has layers of linear attention, which keep a state instead of a KV cache",
    "ssm_state_size": "has layers with a state space, which have no KV cache",
    "state_size": "has layers with a state space, which have no KV cache",
    "mamba_d_state": "has layers with a state space, which have no KV cache",
    "mamba_num_heads": "has layers with a state space, which have no KV cache",
    "mamba_n_heads": "has layers with a state space, which have no KV cache",
    "hybrid_override_pattern": "has layers of different kinds",
    "layers_block_type": "has layers of different kinds",
    "block_configs": "has layers of different sizes",
    "cross_attention_layers": "has layers that look at an image instead of the text",
    "hidden_size_per_layer_input": "has embeddings for every layer",
    "conv_L_cache": "has layers of convolutions, which have no KV cache",
    "lru_width": "has recurrent layers, which have no KV cache",
    "type_vocab_size": "tells two texts apart, as encoders do",
    "zero_expert_num": "has experts that do nothing, and two attentions in each layer",
    "global_head_dim": "has heads of different sizes",
    "compress_ratios": "compresses its KV cache by a different ratio in each layer",
    "attention_k_eq_v": "has layers whose keys are their values, and heads of different sizes",
}
# Indexed attention looks at chosen tokens of a whole cache: it is taken as full.
_KNOWN_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
)
MAX_LISTED_LAYERS = 4_096


def refuse_unsupported(whole: ConfigFields, fields: ConfigFields) -> None:
    """Raise if the model is of a kind that the planner cannot size.

    Raises:
        ModelConfigError: It is; says by which fields.
    """
    if whole.value("is_encoder_decoder") is True or fields.value("is_encoder_decoder") is True:
        fields.reject("is_encoder_decoder", f"is true: the model has an encoder, too; {_WHAT_FITS}")
    for name, reason in _REFUSED_FIELDS.items():
        value = fields.value(name)
        # An empty or false value is how a configuration says that it does without.
        if value not in (None, False, 0, "", [], {}):
            fields.reject(name, f"is set: the model {reason}; {_WHAT_FITS}")
    kinds = fields.texts("layer_types", MAX_LISTED_LAYERS) or ()
    strange = sorted(set(kinds) - _KNOWN_LAYER_TYPES)
    if strange:
        named = ", ".join(each[:40] for each in strange[:4])
        fields.reject("layer_types", f"has layers of {named}; {_WHAT_FITS}")
    fields.raise_if_bad()
