"""What a planner needs to know of a model: its shape, as its architecture and its configuration tell it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class WeightFormat(enum.Enum):
    """How the weights of the linear layers are stored. Embeddings and norms stay in 16 bits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    """Four-bit weights with 16-bit arithmetic: AWQ, GPTQ, w4a16; scales and zeros included in its bits."""
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight, its share of group scales included."""
        return _BITS[self]

    @property
    def arithmetic_bits(self) -> int:
        """Bits of the matrix products: 16 where weights are only stored smaller."""
        return _ARITHMETIC_BITS[self]


_BITS = {
    WeightFormat.FLOAT32: 32.0,
    WeightFormat.FLOAT16: 16.0,
    WeightFormat.BFLOAT16: 16.0,
    WeightFormat.FP8: 8.0,
    WeightFormat.INT8: 8.0,
    # Groups of 128 with a 16-bit scale and a 4-bit zero.
    WeightFormat.INT4: 4.16,
    # Groups of 32 with an 8-bit scale; of 16 with an 8-bit scale.
    WeightFormat.MXFP4: 4.25,
    WeightFormat.NVFP4: 4.5,
}
_ARITHMETIC_BITS = {
    WeightFormat.FLOAT32: 32,
    WeightFormat.FLOAT16: 16,
    WeightFormat.BFLOAT16: 16,
    WeightFormat.FP8: 8,
    WeightFormat.INT8: 8,
    WeightFormat.INT4: 16,
    WeightFormat.MXFP4: 16,
    WeightFormat.NVFP4: 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one latent per token.

    Attributes:
        key_value_rank: Size of the latent that keys and values are made from.
        rope_head_size: Size of the key part that carries positions, shared by all heads.
        plain_head_size: Size of a head's part without positions.
        query_rank: Size of the latent that queries are made from; ``None``: none.
    """

    key_value_rank: int
    rope_head_size: int
    plain_head_size: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """The mixture of experts of a model.

    Attributes:
        expert_count: Routed experts per layer.
        active_expert_count: Those that each token visits.
        intermediate_size: Width of one routed expert.
        shared_intermediate_size: Width of the experts that every token visits, together; 0: none.
        layer_count: Layers that have experts; the others are dense.
    """

    expert_count: int
    active_expert_count: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    layer_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """Shape of a model. Sizes in elements.

    Attributes:
        name: For people, and for the commands.
        architecture: Name of its class, for example ``LlamaForCausalLM``; ``""``: unknown.
        layer_count: Transformer layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the dense layers' feed-forward part; 0: every layer has experts.
        gated: Whether the feed-forward part has a gate: three matrices, otherwise two.
        attention_head_count: Query heads.
        key_value_head_count: Key and value heads, before any replication.
        head_size: Of a query or key head.
        value_head_size: Of a value head.
        latent_attention: Set for MLA.
        experts: Set for mixtures of experts.
        vocabulary_size: Tokens it knows.
        tied_embeddings: Whether input and output embedding are one.
        max_context_token_count: Longest context it was made for.
        sliding_window_token_count: Window of the layers that look back only so far; ``None``: no such layers.
        sliding_layer_count: Number of those layers.
        weight_format: How the linear layers are stored.
        weight_group_size: Weights along a layer's input that share a scale, which a split must not
            cut: 128 for most AWQ and GPTQ and for fp8 in blocks. 0: whole channels or tensors
            share one; ``None``: as usual for the format.
        unquantized_names: Parts that stay in 16 bits although the rest is quantized, in words of
            ``attention``, ``experts``, ``dense``, ``shared``; embeddings, head and norms always do.
        parameter_count: All parameters where they are stated and better known than from the
            shape; ``None``: they are counted from it.
    """

    name: str
    architecture: str = ""
    layer_count: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    attention_head_count: int
    key_value_head_count: int
    head_size: int
    value_head_size: int
    latent_attention: LatentAttention | None = None
    experts: ExpertShape | None = None
    vocabulary_size: int
    tied_embeddings: bool = False
    max_context_token_count: int
    sliding_window_token_count: int | None = None
    sliding_layer_count: int = 0
    weight_format: WeightFormat = WeightFormat.BFLOAT16
    weight_group_size: int | None = None
    unquantized_names: frozenset[str] = frozenset()
    parameter_count: int | None = None

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.experts is not None

    @property
    def dense_layer_count(self) -> int:
        """Layers without experts."""
        return self.layer_count - (self.experts.layer_count if self.experts else 0)
