"""What a model's configuration tells of its experts."""

from __future__ import annotations

from sagecp.core.parallelism.model_config_fields import ConfigFields
from sagecp.core.parallelism.model_config_refusals import MAX_LISTED_LAYERS
from sagecp.core.parallelism.model_description import ExpertShape

_MAX_EXPERT_COUNT = 100_000
_MAX_WIDTH = 10_000_000
_COUNT_NAMES = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_ACTIVE_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_SHARED_COUNT_NAMES = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
MODELS_WITH_WIDE_EXPERTS = frozenset({"llama4", "llama4_text"})
"""Types of models whose ``intermediate_size`` is an expert's width; dense layers have their own field."""


def expert_shape(
    fields: ConfigFields, model_type: str, layer_count: int, intermediate_size: int | None
) -> ExpertShape | None:
    """Return the mixture of experts; ``None``: the model has none."""
    count = fields.first_integer(*_COUNT_NAMES, most=_MAX_EXPERT_COUNT, least=0)
    if count is None or count < 2:
        return None
    active = fields.first_integer(*_ACTIVE_NAMES, most=_MAX_EXPERT_COUNT)
    if active is None and fields.present(*_ACTIVE_NAMES) is None:
        fields.reject("num_experts_per_tok", f"is missing; each token visits how many of {count:,} experts?")
    width = fields.first_integer("moe_intermediate_size", "expert_ffn_hidden_size", most=_MAX_WIDTH)
    width = width or intermediate_size
    if not width:
        fields.reject("moe_intermediate_size", "is missing; it is the width of an expert")
    layers = _expert_layer_count(fields, layer_count)
    if active is None or not width or not layers:
        return None
    return ExpertShape(
        expert_count=count,
        active_expert_count=active,
        intermediate_size=width,
        shared_intermediate_size=_shared_width(fields, model_type, width),
        layer_count=layers,
    )


def _shared_width(fields: ConfigFields, model_type: str, width: int) -> int:
    together = fields.integer(
        "shared_expert_intermediate_size", "shared_intermediate_size", most=_MAX_WIDTH, least=0
    )
    if together is not None:
        return together
    if model_type in MODELS_WITH_WIDE_EXPERTS:
        return width
    shared = fields.first_integer(*_SHARED_COUNT_NAMES, most=_MAX_EXPERT_COUNT, least=0) or 0
    return shared * width


def _expert_layer_count(fields: ConfigFields, layer_count: int) -> int:
    """Return how many layers have experts, by whichever of the ways to say so the configuration uses."""
    if fields.present("mlp_layer_types"):
        kinds = fields.texts("mlp_layer_types", MAX_LISTED_LAYERS) or ()
        return sum(kind == "sparse" for kind in kinds[:layer_count])
    if fields.present("moe_layers"):
        listed = fields.whole_numbers("moe_layers", MAX_LISTED_LAYERS) or ()
        return len({each for each in listed if 0 <= each < layer_count})
    interleaved = fields.integer("interleave_moe_layer_step", most=MAX_LISTED_LAYERS)
    if interleaved:
        return layer_count // interleaved
    if fields.present("moe_layer_start_index"):
        return _within(fields, layer_count)
    if fields.present("decoder_sparse_step", "mlp_only_layers"):
        step = fields.integer("decoder_sparse_step", most=MAX_LISTED_LAYERS) or 1
        dense = set(fields.whole_numbers("mlp_only_layers", MAX_LISTED_LAYERS) or ())
        return sum((each + 1) % step == 0 and each not in dense for each in range(layer_count))
    first = fields.integer("first_k_dense_replace", "num_dense_layers", most=layer_count, least=0) or 0
    frequency = fields.value("moe_layer_freq")
    if isinstance(frequency, list):
        listed = fields.whole_numbers("moe_layer_freq", MAX_LISTED_LAYERS) or ()
        return sum(1 for each in listed[:layer_count] if each)
    every = fields.integer("moe_layer_freq", most=MAX_LISTED_LAYERS) or 1
    return sum(each >= first and each % every == 0 for each in range(layer_count))


def _within(fields: ConfigFields, layer_count: int) -> int:
    """Ernie: experts from one layer to another, every so many."""
    start = fields.first_integer("moe_layer_start_index", most=MAX_LISTED_LAYERS, least=0) or 0
    end = fields.first_integer("moe_layer_end_index", most=MAX_LISTED_LAYERS, least=-1)
    last = layer_count - 1 if end is None or end < 0 else end
    every = fields.integer("moe_layer_interval", most=MAX_LISTED_LAYERS) or 1
    return sum(start <= each <= last and (each + 1) % every == 0 for each in range(layer_count))
