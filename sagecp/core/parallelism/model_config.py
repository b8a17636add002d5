"""Understands the ``config.json`` of a Hugging Face checkpoint by its fields, whatever its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sagecp.core.errors import FieldViolation
from sagecp.core.parallelism.model_config_attention import (
    context_token_count,
    latent_attention,
    sliding_layers,
)
from sagecp.core.parallelism.model_config_experts import MODELS_WITH_WIDE_EXPERTS, expert_shape
from sagecp.core.parallelism.model_config_fields import (
    ROOT,
    ConfigFields,
    ModelConfigError,
    printable,
    shown,
)
from sagecp.core.parallelism.model_config_quantization import (
    refuse_unknown_quantization,
    stored_format,
)
from sagecp.core.parallelism.model_config_refusals import refuse_unsupported
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat

__all__ = ["MAX_CONFIG_BYTES", "ModelConfigError", "model_config_notes", "parse_model_config"]

MAX_CONFIG_BYTES = 256 << 10
"""Most bytes of a configuration; a larger file is something else."""
MAX_LAYER_COUNT = 2_000
_MAX_HIDDEN_SIZE = 1_000_000
_MAX_INTERMEDIATE_SIZE = 10_000_000
_MAX_HEAD_COUNT = 10_000
_MAX_HEAD_SIZE = 100_000
_MAX_VOCABULARY_SIZE = 100_000_000
_MAX_NAME_LENGTH = 256

# Where models of several kinds of input keep their language model.
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
# What their classes assume where such a part is silent (transformers' configuration classes).
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"vocab_size": 262_208, "max_position_embeddings": 131_072, "head_dim": 256},
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
    },
}
# Model types whose feed-forward part has two matrices: no gate.
_WITHOUT_GATE = frozenset(
    {
        "apertus",
        "arcee",
        "biogpt",
        "bloom",
        "codegen",
        "falcon",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "jais2",
        "mpt",
        "nanochat",
        "nemotron",
        "opt",
        "persimmon",
        "phi",
        "starcoder2",
    }
)
# Model types whose output embedding is the input embedding unless they say otherwise.
_TIED_BY_DEFAULT = frozenset(
    {
        "bloom",
        "cohere",
        "cohere2",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "mpt",
        "opt",
        "starcoder2",
    }
)
# Model types whose feed-forward part is four times as wide as the hidden state unless they say otherwise.
_FOUR_TIMES_WIDER = frozenset(
    {"bloom", "codegen", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt"}
)


def parse_model_config(
    config: Mapping[str, Any], *, name: str = "", weight_format: WeightFormat | None = None
) -> ModelDescription:
    """Return what the planner needs to know of a model, from its ``config.json``.

    Read by the names of its fields: Llama, Qwen, Mistral, Mixtral, DeepSeek, gpt-oss, Gemma, Phi, GLM,
    Kimi and what is built like them, and the older names of GPT-2, GPT-NeoX, OPT, Falcon and BLOOM.
    Of a model that also sees or hears, the language model counts alone; `model_config_notes` tells
    what is left out.

    Args:
        config: The JSON object.
        name: What to call it; ``""``: what it calls itself.
        weight_format: How the weights are stored, where that is known better than by the configuration.

    Raises:
        ModelConfigError: Fields are missing or absurd, or the model is of a kind that the planner
            cannot size. Names all of them, as ``model_config.num_attention_heads``.
    """
    whole, fields = _language_model(config)
    refuse_unsupported(whole, fields)
    model_type = fields.text("model_type") or whole.text("model_type")

    layers = fields.required(
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", most=MAX_LAYER_COUNT, what="how many layers"
    )
    hidden = fields.required(
        "hidden_size",
        "n_embd",
        "n_embed",
        "d_model",
        most=_MAX_HIDDEN_SIZE,
        what="the width of its hidden state",
    )
    heads = fields.required(
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        most=_MAX_HEAD_COUNT,
        what="how many query heads a layer has",
    )
    vocabulary = fields.required(
        "vocab_size", "padded_vocab_size", most=_MAX_VOCABULARY_SIZE, what="how many tokens it knows"
    )
    key_value_heads = _key_value_heads(fields, model_type, heads)
    intermediate = _intermediate_size(fields, model_type, hidden)
    latent, latent_value_size = latent_attention(fields)
    head_size = _head_size(fields, hidden, heads)
    context = context_token_count(fields, model_type)
    window, sliding_count = sliding_layers(fields, model_type, layers, context)
    experts = expert_shape(fields, model_type, layers, intermediate)
    if intermediate is None and experts is None:
        fields.reject(
            "intermediate_size",
            "is missing; it is the width of the feed-forward part. Is this the config.json of a "
            "language model?",
        )
    tied = whole.flag("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)
    if fields is not whole and fields.present("tie_word_embeddings"):
        tied = fields.flag("tie_word_embeddings", tied)
    architectures = whole.texts("architectures", 16) or fields.texts("architectures", 16) or ("",)
    called = name or whole.text("_name_or_path") or fields.text("_name_or_path") or model_type or "model"
    whole.raise_if_bad()

    has_dense = experts is None or experts.layer_count < layers
    dense_size = (intermediate or 0) if has_dense else 0
    if model_type in MODELS_WITH_WIDE_EXPERTS and has_dense:
        dense_size = fields.integer("intermediate_size_mlp", most=_MAX_INTERMEDIATE_SIZE) or dense_size
    if latent is not None:
        head_size = latent.plain_head_size + latent.rope_head_size
    model = ModelDescription(
        name=printable(called[:_MAX_NAME_LENGTH]),
        architecture=printable(architectures[0][:_MAX_NAME_LENGTH]),
        layer_count=layers,
        hidden_size=hidden,
        intermediate_size=dense_size,
        gated=_is_gated(fields, model_type),
        attention_head_count=heads,
        key_value_head_count=key_value_heads,
        head_size=head_size,
        value_head_size=latent_value_size or head_size,
        latent_attention=latent,
        experts=experts,
        vocabulary_size=vocabulary,
        tied_embeddings=tied,
        max_context_token_count=context,
        sliding_window_token_count=window,
        sliding_layer_count=sliding_count,
    )
    _check_sizes(model, fields)
    if weight_format is None:
        refuse_unknown_quantization(whole, fields)
    stored = stored_format(whole, fields, model)
    whole.raise_if_bad()
    if weight_format is None:
        return replace(
            model,
            weight_format=stored.weight_format,
            weight_group_size=stored.group_size,
            unquantized_names=stored.unquantized_names,
        )
    # The parts left in 16 bits are known only where the checkpoint itself is in that format.
    same = weight_format is stored.weight_format
    return replace(
        model,
        weight_format=weight_format,
        weight_group_size=stored.group_size if same else None,
        unquantized_names=stored.unquantized_names if same else frozenset(),
    )


def model_config_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what `parse_model_config` leaves out of a configuration that it accepts; one sentence each.

    Raises:
        ModelConfigError: It is no object.
    """
    whole, fields = _language_model(config)
    notes = []
    if fields is not whole:
        notes.append(
            "only the language model is planned for: its encoders for images or sound, usually below 3 % "
            "of the weights, and the tokens that they add to prompts are left out"
        )
    if isinstance(fields.value("num_nextn_predict_layers"), int) and fields.value("num_nextn_predict_layers"):
        notes.append(
            "the layers that predict several tokens at once are left out: engines load them only for "
            "speculative decoding"
        )
    if fields.present("index_topk", "index_n_heads"):
        notes.append(
            "attention is taken as full: the model looks at chosen tokens only, so long contexts are faster "
            "than estimated, and its index takes a little more memory"
        )
    if str(whole.value("torch_dtype") or whole.value("dtype") or "") in ("float32", "torch.float32"):
        notes.append("the checkpoint is in 32 bits; engines serve it in 16, which is planned for")
    return tuple(notes)


def _language_model(config: object) -> tuple[ConfigFields, ConfigFields]:
    """Return the whole configuration, and its part that tells of the language model; often the same."""
    if not isinstance(config, Mapping):
        raise ModelConfigError(
            [FieldViolation(ROOT, f"is {shown(config)}; must be the JSON object of a model's config.json")]
        )
    whole = ConfigFields(config)
    # A model that thinks and talks keeps the two apart; the thinker is the language model.
    outer = whole.child("thinker_config") or whole
    for part in _LANGUAGE_PARTS:
        value = outer.value(part)
        if isinstance(value, Mapping):
            model_type = value.get("model_type")
            defaults = _CLASS_DEFAULTS.get(model_type) if isinstance(model_type, str) else None
            return whole, ConfigFields(value, f"{outer.path}.{part}", whole.violations, defaults)
    return whole, outer


def _key_value_heads(fields: ConfigFields, model_type: str, heads: int) -> int:
    # The first Falcons state a number of heads that only their newer layers have.
    multi_query = fields.flag("multi_query", False) and not fields.flag("new_decoder_architecture", False)
    names = (
        "num_key_value_heads",
        "n_head_kv",
        "num_kv_heads",
        "multi_query_group_num",
        "num_attention_groups",
    )
    if multi_query or model_type == "gpt_bigcode":
        return 1 if fields.flag("multi_query", True) else heads
    return fields.integer(*names, most=_MAX_HEAD_COUNT) or heads


def _head_size(fields: ConfigFields, hidden: int, heads: int) -> int:
    stated = fields.integer(
        "head_dim", "hidden_size_per_head", "kv_channels", "attention_head_size", most=_MAX_HEAD_SIZE, least=0
    )
    return stated or max(1, hidden // heads)


def _intermediate_size(fields: ConfigFields, model_type: str, hidden: int) -> int | None:
    stated = fields.integer(
        "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", most=_MAX_INTERMEDIATE_SIZE, least=0
    )
    if not stated and model_type in _FOUR_TIMES_WIDER:
        return 4 * hidden
    return stated


def _is_gated(fields: ConfigFields, model_type: str) -> bool:
    if model_type == "mpt" or fields.value("activation_function") in ("relu", "gelu", "gelu_new"):
        return False
    return model_type not in _WITHOUT_GATE


def _check_sizes(model: ModelDescription, fields: ConfigFields) -> None:
    """Note what cannot be true of the sizes together."""
    if model.latent_attention is None and model.attention_head_count % model.key_value_head_count:
        fields.reject(
            fields.present("num_key_value_heads", "n_head_kv", "num_kv_heads") or "num_key_value_heads",
            f"is {model.key_value_head_count:,}, which does not divide the {model.attention_head_count:,} "
            "query heads; each key-value head serves equally many",
        )
    experts = model.experts
    if experts is not None and experts.active_expert_count > experts.expert_count:
        fields.reject(
            fields.present("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
            or "num_experts_per_tok",
            f"is {experts.active_expert_count:,}, but a layer has {experts.expert_count:,} experts",
        )
