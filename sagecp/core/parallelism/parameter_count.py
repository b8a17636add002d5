"""How many parameters a model has, part by part, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of a model by part, because parts are spread over GPUs in different ways.

    Attributes:
        embedding: Input embedding.
        output_head: Output embedding; 0 where it is the input embedding.
        query_output_per_layer: Attention's query and output projections, split by heads.
        key_value_per_layer: Key and value projections, split by key-value heads.
        replicated_attention_per_layer: What every tensor rank has whole: MLA's projections to latents.
        dense_layer: Feed-forward part of a layer without experts.
        expert: One routed expert.
        shared_experts_per_layer: What every token visits in a layer with experts.
        router_per_layer: Chooses the experts; every rank has it whole.
        norms: All norms.
        layer_count: Layers.
        dense_layer_count: Layers without experts.
        expert_layer_count: Layers with experts.
        expert_count: Routed experts per layer.
        active_expert_count: Those that a token visits.
    """

    embedding: int
    output_head: int
    query_output_per_layer: int
    key_value_per_layer: int
    replicated_attention_per_layer: int
    dense_layer: int
    expert: int
    shared_experts_per_layer: int
    router_per_layer: int
    norms: int
    layer_count: int
    dense_layer_count: int
    expert_layer_count: int
    expert_count: int
    active_expert_count: int

    @property
    def attention_per_layer(self) -> int:
        """The whole attention part of a layer."""
        return self.query_output_per_layer + self.key_value_per_layer + self.replicated_attention_per_layer

    @property
    def routed_experts(self) -> int:
        """All routed experts of all layers."""
        return self.expert * self.expert_count * self.expert_layer_count

    @property
    def outside_experts(self) -> int:
        """Everything but the routed experts."""
        return (
            self.embedding
            + self.output_head
            + self.norms
            + self.attention_per_layer * self.layer_count
            + self.dense_layer * self.dense_layer_count
            + (self.shared_experts_per_layer + self.router_per_layer) * self.expert_layer_count
        )

    @property
    def total(self) -> int:
        """All parameters."""
        return self.outside_experts + self.routed_experts

    @property
    def active(self) -> int:
        """Parameters that one token meets: both embeddings, and the experts that it visits."""
        return self.outside_experts + self.expert * self.active_expert_count * self.expert_layer_count


def count_parameters(model: ModelDescription) -> ParameterCounts:
    """Count the parameters from the model's shape; norms count, biases (below 0.1 %) do not.

    Where the model states how many there are, its layers' parts are scaled alike until they add up to it.
    """
    hidden = model.hidden_size
    queries = model.attention_head_count
    latent = model.latent_attention
    replicated = 0
    # Two norms of the residual stream per layer.
    norms = (2 * model.layer_count + 1) * hidden
    if latent is None:
        query_output = hidden * queries * (model.head_size + model.value_head_size)
        key_value = hidden * model.key_value_head_count * (model.head_size + model.value_head_size)
    else:
        head = latent.plain_head_size + latent.rope_head_size
        query_input = hidden if latent.query_rank is None else latent.query_rank
        query_output = query_input * queries * head + queries * model.value_head_size * hidden
        # From the latent to each head's keys and values.
        key_value = latent.key_value_rank * queries * (latent.plain_head_size + model.value_head_size)
        replicated = hidden * (latent.key_value_rank + latent.rope_head_size)
        norms += model.layer_count * latent.key_value_rank
        if latent.query_rank is not None:
            replicated += hidden * latent.query_rank
            norms += model.layer_count * latent.query_rank
    matrices = 3 if model.gated else 2
    experts = model.experts
    embedding = model.vocabulary_size * hidden
    counts = ParameterCounts(
        embedding=embedding,
        output_head=0 if model.tied_embeddings else embedding,
        query_output_per_layer=query_output,
        key_value_per_layer=key_value,
        replicated_attention_per_layer=replicated,
        dense_layer=matrices * hidden * model.intermediate_size,
        expert=matrices * hidden * experts.intermediate_size if experts else 0,
        shared_experts_per_layer=matrices * hidden * experts.shared_intermediate_size if experts else 0,
        router_per_layer=hidden * experts.expert_count if experts else 0,
        norms=norms,
        layer_count=model.layer_count,
        dense_layer_count=model.dense_layer_count,
        expert_layer_count=experts.layer_count if experts else 0,
        expert_count=experts.expert_count if experts else 0,
        active_expert_count=experts.active_expert_count if experts else 0,
    )
    return counts if model.parameter_count is None else _scaled(counts, model.parameter_count)


def _scaled(counts: ParameterCounts, total: int) -> ParameterCounts:
    plain = _plain(counts)
    factor = (total - plain) / (counts.total - plain)
    if factor <= 0.0:
        # Fewer than the embeddings alone: the shape is the better witness.
        return counts
    return replace(
        counts,
        query_output_per_layer=round(counts.query_output_per_layer * factor),
        key_value_per_layer=round(counts.key_value_per_layer * factor),
        replicated_attention_per_layer=round(counts.replicated_attention_per_layer * factor),
        dense_layer=round(counts.dense_layer * factor),
        expert=round(counts.expert * factor),
        shared_experts_per_layer=round(counts.shared_experts_per_layer * factor),
    )


def _plain(counts: ParameterCounts) -> int:
    """Return the parameters that no format stores in fewer than 16 bits."""
    routers = counts.router_per_layer * counts.expert_layer_count
    return counts.embedding + counts.output_head + counts.norms + routers


def part_format(model: ModelDescription, part: str) -> WeightFormat:
    """Return how a part is stored: ``attention``, ``experts``, ``dense`` or ``shared``.

    What stays in 16 bits in a quantized model is in ``model.unquantized_names``.
    """
    return WeightFormat.BFLOAT16 if part in model.unquantized_names else model.weight_format


def part_bits(model: ModelDescription, part: str) -> float:
    """Return the bits of one weight of a part, its share of scales and zeros included."""
    form = part_format(model, part)
    if form is not WeightFormat.INT4 or model.weight_group_size is None:
        return form.bits_per_weight
    # A 16-bit scale and a 4-bit zero for each group; those of whole channels do not count.
    return 4.0 + (20.0 / model.weight_group_size if model.weight_group_size else 0.0)


def plain_format(model: ModelDescription) -> WeightFormat:
    """Return how embeddings, head, norms and routers are stored: in 16 bits, unless all is in 32."""
    return WeightFormat.FLOAT32 if model.weight_format is WeightFormat.FLOAT32 else WeightFormat.BFLOAT16


def weight_bytes(model: ModelDescription) -> int:
    """Return the bytes of all weights, each stored once."""
    counts = count_parameters(model)
    parts = (
        (counts.attention_per_layer * counts.layer_count, part_bits(model, "attention")),
        (counts.dense_layer * counts.dense_layer_count, part_bits(model, "dense")),
        (counts.shared_experts_per_layer * counts.expert_layer_count, part_bits(model, "shared")),
        (counts.routed_experts, part_bits(model, "experts")),
        (_plain(counts), plain_format(model).bits_per_weight),
    )
    return round(sum(count * bits / 8.0 for count, bits in parts))
