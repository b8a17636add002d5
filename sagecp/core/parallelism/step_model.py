"""How long a step of a planned engine takes: a roofline over weights, experts, contexts and links.

With ``T`` tokens in a step of one copy (one tensor group with all its stages):

    step = o + layers + max(R(T) + 0.35 F(T), 0.55 R(T) + F(T)) + attention

``R`` is the time to read the weights that the step touches, ``F`` that of their
matrix products and of sending activations. The two arms stand for a smooth
change from one bound to the other; their weights are those of Vidur's profiles
(MLSys'24), which the measured constants of ``prediction.priors`` come from. Of a
mixture of experts a step of ``T`` tokens with ``k`` of ``E`` experts each reads

    E * (1 - (1 - k/E) ** T)

of every layer, if tokens choose alike. Efficiencies are calibrated; `bench/plan_time.py`
holds the result against published figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sagecp.core.parallelism.communication import all_reduce, all_to_all, hand_over, small_kernel_slowness
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import count_parameters, part_format, plain_format
from sagecp.core.parallelism.request_classes import Vector
from sagecp.core.prediction.step_time import StepTimeParameters

_MS, _US = 1e-3, 1e-6

# Host time of a step that the GPU waits for: scheduling, sampling, launching a graph.
_OVERHEAD_S, _TENSOR_OVERHEAD_S, _STAGE_OVERHEAD_S = 1.5 * _MS, 0.4 * _MS, 0.3 * _MS
# Kernels of a layer, however small, each launched by itself without CUDA graphs; those of routing to
# experts; and those that MLA adds.
_LAYER_S, _EAGER_LAYER_S, _EXPERT_LAYER_S, _LATENT_LAYER_S = 20 * _US, 100 * _US, 35 * _US, 100 * _US
# Host time of each request of a batch of decodes; prefill hides it.
_REQUEST_S = 10 * _US
_MEMORY_SHARE, _COMPUTE_SHARE = 0.35, 0.55

_READ_EFFICIENCY = {16: 0.86, 32: 0.86, 8: 0.8, 4: 0.65}
_FLOP_EFFICIENCY = {16: 0.65, 32: 0.65, 8: 0.55, 4: 0.45}
# Weights that are widened before the product.
_WIDENING_EFFICIENCY = 0.85
# Grouped products of experts: their share of the dense ones' rate if experts are wide, and the width,
# after any split, that halves it.
_EXPERT_READ_EFFICIENCY, _EXPERT_FLOP_SHARE, _EXPERT_HALF_WIDTH = 0.75, 0.75, 300
# Kernels for experts in fewer bits gain less than those of dense layers do.
_QUANTIZED_EXPERT_SHARE = 0.6
# The rank with the most tokens works so much longer than the mean, when whole experts are spread; with it
# expert parallelism is a little slower within a node than tensor parallelism, as it is measured to be.
_EXPERT_IMBALANCE = 1.6
# A batch with prefill keeps the other batches' stages waiting.
_PIPELINE_BUBBLES = 1.3
_CONTEXT_READ_EFFICIENCY = 0.8
_ATTENTION_EFFICIENCY = 0.55
_LATENT_EFFICIENCY = 0.5
# FP8 products need an architecture from here on; INT8 ones from Turing on.
_FP8_CAPABILITY = 8.9
# The formula of mixtures is fitted over so many sizes of steps from here on, bases and slopes; it cannot
# meet single streams, too.
_FIT_LEAST_TOKENS, _FIT_POINT_COUNT, _FIT_GRID = 4.0, 32, 20
# Where the constants are told that depend on the length of contexts.
_REFERENCE_CONTEXT_TOKEN_COUNT = 2048


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the weights on one rank: parameters, and how they are stored."""

    parameters: float
    format: WeightFormat

    @property
    def stored_bytes(self) -> float:
        return self.parameters * self.format.bits_per_weight / 8.0


class PlanStepTime:
    """Step times of one copy of a plan: a tensor group with all its pipeline stages.

    With ``p`` stages, ``p`` batches are on their way at a time, and each takes the whole depth: such
    a copy serves as ``p`` engines do that share the weights and have ``1/p`` of its KV cache each.
    With experts shared among copies these step together; the others are taken to have as many
    tokens in the step.

    Args:
        model: What runs.
        pool: On which GPUs.
        config: How it is spread.
        options: Settings of the engine.
    """

    def __init__(
        self, model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
    ) -> None:
        self._model = model
        self._options = options
        gpu = pool.gpu
        ranks = config.tensor_parallel_size
        stages = config.pipeline_parallel_size
        self._bytes_per_s = gpu.memory_gb_per_s * 1e9
        self._gpu = gpu
        experts = model.experts
        layers_s = model.layer_count * _LAYER_S
        if model.latent_attention is not None:
            layers_s += model.layer_count * _LATENT_LAYER_S
        if experts is not None:
            layers_s += experts.layer_count * _EXPERT_LAYER_S
        layers_s *= small_kernel_slowness(gpu)
        if not options.cuda_graphs:
            layers_s += model.layer_count * _EAGER_LAYER_S
        communication = (
            all_reduce(model, pool, ranks) + hand_over(model, pool, config) + all_to_all(model, pool, config)
        )
        self._fixed_s = layers_s + communication.fixed_s
        self._overhead_s = (
            _OVERHEAD_S + (_TENSOR_OVERHEAD_S if ranks > 1 else 0.0) + (stages - 1) * _STAGE_OVERHEAD_S
        )
        body, head, expert = _parts(model, ranks)
        self._plain_read_s = sum(map(self._read_s, body)) + self._read_s(head)
        self._plain_flop_s = sum(map(self._flop_s, body))
        # All experts of a rank, if each were read; and the products of one token's experts.
        self._expert_read_s = self._expert_flop_s = 0.0
        self._choice_share = 0.0
        self._copies = 1
        if experts is not None:
            self._choice_share = experts.active_expert_count / experts.expert_count
            spread = config.expert_parallel_size > 1
            # A rank has the whole of some experts or a slice of each: as many bytes. Copies share
            # them either way, so that tokens of all copies come to them.
            self._copies = config.data_parallel_size
            per_rank = experts.layer_count / (ranks * self._copies)
            whole = _Part(expert.parameters * experts.expert_count * per_rank, expert.format)
            self._expert_read_s = self._read_s(whole) * _READ_EFFICIENCY[16] / _EXPERT_READ_EFFICIENCY
            # Of the copy's tokens a rank computes 1/ranks, or as much for the other copies.
            visited = _Part(
                expert.parameters * experts.active_expert_count * experts.layer_count / ranks, expert.format
            )
            width = experts.intermediate_size / (1 if spread else ranks * self._copies)
            self._expert_flop_s = (
                self._flop_s(visited)
                * (1.0 + _EXPERT_HALF_WIDTH / width)
                / (
                    _EXPERT_FLOP_SHARE
                    * (1.0 if expert.format.bits_per_weight >= 16 else _QUANTIZED_EXPERT_SHARE)
                )
                * (_EXPERT_IMBALANCE if spread else 1.0)
            )
        self._flop_per_token_s = self._plain_flop_s + self._expert_flop_s + communication.per_token_s
        if stages > 1:
            self._flop_per_token_s *= _PIPELINE_BUBBLES
        self._memory_per_token_s = _REQUEST_S + _MEMORY_SHARE * self._flop_per_token_s
        self._context_s, self._pair_s = self._attention(ranks)

    def step_s(
        self, token_count: float, decode_context_tokens: float = 0.0, token_pairs: float = 0.0
    ) -> float:
        """Return the duration of one step, in seconds: that of a batch from the first stage to the last.

        Args:
            token_count: Scheduled tokens of the copy, decodes and prefill chunks together.
            decode_context_tokens: Sum of the contexts of the decodes.
            token_pairs: ``sum(c * (p + c/2))`` over the prefill chunks.
        """
        if token_count <= 0:
            return self._overhead_s
        read_s = self._plain_read_s + self._expert_read_s * self._touched_share(token_count)
        memory_s = read_s + self._memory_per_token_s * token_count
        compute_s = _COMPUTE_SHARE * read_s + self._flop_per_token_s * token_count
        return (
            self._overhead_s
            + self._fixed_s
            + max(memory_s, compute_s)
            + self._context_s * decode_context_tokens
            + self._pair_s * token_pairs
        )

    def linear_s(self, token_counts: Vector) -> Vector:
        """Return the durations of steps with so many tokens each, without attention, in seconds."""
        touched = 1.0 - (1.0 - self._choice_share) ** (token_counts * self._copies)
        read_s = self._plain_read_s + self._expert_read_s * touched
        memory_s = read_s + self._memory_per_token_s * token_counts
        compute_s = _COMPUTE_SHARE * read_s + self._flop_per_token_s * token_counts
        return np.asarray(self._overhead_s + self._fixed_s + np.maximum(memory_s, compute_s))

    @property
    def context_per_token_s(self) -> float:
        """Seconds for each token of the decodes' contexts."""
        return self._context_s

    @property
    def attention_per_token_pair_s(self) -> float:
        """Seconds for each pair of a prefill token and a token before it."""
        return self._pair_s

    @cached_property
    def parameters(self) -> StepTimeParameters:
        """The constants of the formula that the scheduler and the simulator use.

        Exact for dense models. A mixture's steps bend down as more and more experts are read,
        which the formula cannot do: its compute arm has all experts in it and is exact where
        that bounds, and its memory arm is the line that errs least over the sizes of steps from
        a few requests on. Single streams of mixtures are two to four times faster than it says.
        """
        all_read_s = self._plain_read_s + self._expert_read_s
        compute_base_s = self._fixed_s + _COMPUTE_SHARE * all_read_s
        memory_base_s, memory_per_token_s = self._fixed_s + self._plain_read_s, self._memory_per_token_s
        if self._expert_read_s:
            memory_base_s, memory_per_token_s = self._memory_arm(compute_base_s)
        return StepTimeParameters(
            overhead_s=self._overhead_s,
            memory_base_s=memory_base_s,
            memory_per_token_s=memory_per_token_s,
            compute_base_s=compute_base_s,
            compute_per_token_s=self._flop_per_token_s,
            context_per_token_s=self._context_s,
            attention_per_token_pair_s=self._pair_s,
        )

    def _memory_arm(self, compute_base_s: float) -> tuple[float, float]:
        """Return base and slope of the memory arm that errs least, relative to each step's duration."""
        largest = max(16, self._options.max_running_request_count, self._options.max_batch_token_count)
        counts = np.geomspace(_FIT_LEAST_TOKENS, largest, _FIT_POINT_COUNT)
        exact_s = self.linear_s(counts) - self._overhead_s
        compute_s = compute_base_s + self._flop_per_token_s * counts
        least_s = self._fixed_s + self._plain_read_s
        bases_s = np.geomspace(least_s, least_s + self._expert_read_s, _FIT_GRID)
        steepest_s = (exact_s[1:] - exact_s[0]) / (counts[1:] - counts[0])
        slopes_s = np.geomspace(self._memory_per_token_s, float(steepest_s.max()), _FIT_GRID)
        memory_s = bases_s[:, None, None] + slopes_s[:, None] * counts
        errors = (np.log(np.maximum(memory_s, compute_s) / exact_s) ** 2).sum(axis=-1)
        base_index, slope_index = np.unravel_index(int(errors.argmin()), errors.shape)
        return float(bases_s[base_index]), float(slopes_s[slope_index])

    def _touched_share(self, token_count: float) -> float:
        """Share of the experts that a step reads."""
        if not self._choice_share:
            return 0.0
        tokens = token_count * self._copies
        return float(1.0 - (1.0 - self._choice_share) ** tokens)

    def _read_s(self, part: _Part) -> float:
        bits = 4 if part.format.bits_per_weight < 8 else round(part.format.bits_per_weight)
        return part.stored_bytes / (_READ_EFFICIENCY[bits] * self._bytes_per_s)

    def _flop_s(self, part: _Part) -> float:
        """Seconds per token of the part's matrix products."""
        bits = self._arithmetic_bits(part.format)
        tflops = {8: self._gpu.eight_bit_tflops, 4: self._gpu.four_bit_tflops}.get(bits)
        if tflops is None:
            tflops, bits = self._gpu.dense_tflops, 16
        efficiency = _FLOP_EFFICIENCY[bits]
        if part.format.bits_per_weight < bits:
            efficiency *= _WIDENING_EFFICIENCY
        return 2.0 * part.parameters / (efficiency * tflops * 1e12)

    def _arithmetic_bits(self, stored: WeightFormat) -> int:
        bits = stored.arithmetic_bits
        if bits == 4 and self._gpu.four_bit_tflops is None:
            return 16
        if stored is WeightFormat.FP8 and self._gpu.compute_capability < _FP8_CAPABILITY:
            return 16
        return bits

    def _attention(self, ranks: int) -> tuple[float, float]:
        """Seconds per token of decode context, and per pair of prefill token and token before it."""
        model = self._model
        flops_per_s = self._gpu.dense_tflops * 1e12
        heads = model.attention_head_count / ranks
        pair_flops = 2.0 * heads * (model.head_size + model.value_head_size)
        latent = model.latent_attention
        layers = float(model.layer_count)
        if model.sliding_window_token_count is not None:
            seen = min(1.0, model.sliding_window_token_count / _REFERENCE_CONTEXT_TOKEN_COUNT)
            layers -= model.sliding_layer_count * (1.0 - seen)
        element_bytes = self._options.key_value_bytes
        if latent is None:
            kept_heads = max(1.0, model.key_value_head_count / ranks)
            read_bytes = kept_heads * (model.head_size + model.value_head_size) * element_bytes
            read_s = read_bytes / (_CONTEXT_READ_EFFICIENCY * self._bytes_per_s)
        else:
            # Every rank reads the whole latent, and every head works on it: with many heads
            # decoding is bound by products, too.
            width = latent.key_value_rank + latent.rope_head_size
            read_s = width * element_bytes / (_CONTEXT_READ_EFFICIENCY * self._bytes_per_s)
            flops = 2.0 * heads * (width + latent.key_value_rank)
            read_s = max(read_s, flops / (_LATENT_EFFICIENCY * flops_per_s))
        return layers * read_s, layers * pair_flops / (_ATTENTION_EFFICIENCY * flops_per_s)


def plan_step_time(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> PlanStepTime:
    """Return the step times of one copy of a plan."""
    return PlanStepTime(model, pool, config, options)


def _parts(model: ModelDescription, ranks: int) -> tuple[list[_Part], _Part, _Part]:
    """What one rank reads in a step: layers without routed experts, the head; and one whole expert."""
    counts = count_parameters(model)
    # Key and value heads are not split further: beyond their number each rank keeps a copy.
    key_value_ranks = min(ranks, model.key_value_head_count) if model.latent_attention is None else ranks
    attention = counts.layer_count * (
        counts.query_output_per_layer / ranks
        + counts.key_value_per_layer / key_value_ranks
        + counts.replicated_attention_per_layer
    )
    body = [
        _Part(attention, part_format(model, "attention")),
        _Part(counts.dense_layer * counts.dense_layer_count / ranks, part_format(model, "dense")),
        _Part(
            counts.shared_experts_per_layer * counts.expert_layer_count / ranks, part_format(model, "shared")
        ),
        _Part(counts.router_per_layer * counts.expert_layer_count, plain_format(model)),
    ]
    # The input embedding is looked up row by row; the output embedding is read whole.
    head = _Part((counts.output_head or counts.embedding) / ranks, plain_format(model))
    return body, head, _Part(counts.expert, part_format(model, "experts"))
