"""How long a step of a planned engine takes: a roofline over weights, experts, contexts and links.

With ``T`` tokens in a step of one copy (one tensor group with all its stages):

    step = o + layers + max(R(T) + 0.35 F(T), 0.55 R(T) + F(T)) + C(T) + attention

``R`` is the time to read the weights that the step touches, ``F`` that of their
matrix products, ``C`` that of communication. The two arms stand for a smooth
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

from sagecp.core.parallelism.communication import all_reduce, all_to_all, hand_over
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import count_parameters, part_format, plain_format
from sagecp.core.parallelism.request_classes import Vector
from sagecp.core.prediction.step_time import StepTimeParameters

_MS, _US = 1e-3, 1e-6

# Host time of a step that the GPU waits for: scheduling, sampling, launching a graph.
_OVERHEAD_S, _TENSOR_OVERHEAD_S, _STAGE_OVERHEAD_S = 2.0 * _MS, 0.5 * _MS, 0.3 * _MS
# Kernels of a layer, however small; each launched by itself without CUDA graphs; and routing to experts.
_LAYER_S, _EAGER_LAYER_S, _EXPERT_LAYER_S = 22 * _US, 100 * _US, 25 * _US
_MEMORY_SHARE, _COMPUTE_SHARE = 0.35, 0.55

_READ_EFFICIENCY = {16: 0.86, 32: 0.86, 8: 0.8, 4: 0.75}
_FLOP_EFFICIENCY = {16: 0.65, 32: 0.65, 8: 0.55, 4: 0.45}
# Weights that are widened before the product.
_WIDENING_EFFICIENCY = 0.85
_EXPERT_READ_EFFICIENCY, _EXPERT_FLOP_EFFICIENCY = 0.65, 0.45
# The rank with the most tokens works so much longer than the mean, when whole experts are spread.
_EXPERT_IMBALANCE = 1.25
_CONTEXT_READ_EFFICIENCY = 0.8
_ATTENTION_EFFICIENCY = 0.55
_LATENT_EFFICIENCY = 0.5
# FP8 products need an architecture from here on; INT8 ones from Turing on.
_FP8_CAPABILITY = 8.9
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
        layer_s = _LAYER_S + (0.0 if options.cuda_graphs else _EAGER_LAYER_S)
        communication = (
            all_reduce(model, pool, ranks) + hand_over(model, pool, config) + all_to_all(model, pool, config)
        )
        self._fixed_s = (
            model.layer_count * layer_s
            + (experts.layer_count * _EXPERT_LAYER_S if experts else 0.0)
            + communication.fixed_s
        )
        self._overhead_s = (
            _OVERHEAD_S + (_TENSOR_OVERHEAD_S if ranks > 1 else 0.0) + (stages - 1) * _STAGE_OVERHEAD_S
        )
        body, head, expert = _parts(model, ranks)
        self._plain_read_s = sum(map(self._read_s, body)) + self._read_s(head)
        self._plain_flop_s = sum(map(self._flop_s, body))
        self._communication_per_token_s = communication.per_token_s
        # All experts of a rank, if each were read; and the products of one token's experts.
        self._expert_read_s = self._expert_flop_s = 0.0
        self._choice_share = 0.0
        self._copies = 1
        if experts is not None:
            self._choice_share = experts.active_expert_count / experts.expert_count
            group = max(1, config.expert_parallel_size)
            spread = group > 1
            # Under tensor parallelism a rank has a slice of every expert, under expert
            # parallelism the whole of some: as many bytes, but tokens of all copies come to them.
            self._copies = group // ranks if spread else 1
            per_layer = expert.parameters * experts.expert_count / (group if spread else ranks)
            whole = _Part(per_layer * experts.layer_count, expert.format)
            self._expert_read_s = self._read_s(whole) * _READ_EFFICIENCY[16] / _EXPERT_READ_EFFICIENCY
            visited = _Part(
                expert.parameters * experts.active_expert_count * experts.layer_count / ranks, expert.format
            )
            self._expert_flop_s = (
                self._flop_s(visited)
                * (_FLOP_EFFICIENCY[16] / _EXPERT_FLOP_EFFICIENCY)
                * (_EXPERT_IMBALANCE if spread else 1.0)
            )
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
        flop_s = (self._plain_flop_s + self._expert_flop_s) * token_count
        flop_s += self._communication_per_token_s * token_count
        return (
            self._overhead_s
            + self._fixed_s
            + max(read_s + _MEMORY_SHARE * flop_s, _COMPUTE_SHARE * read_s + flop_s)
            + self._context_s * decode_context_tokens
            + self._pair_s * token_pairs
        )

    def linear_s(self, token_counts: Vector) -> Vector:
        """Return the durations of steps with so many tokens each, without attention, in seconds."""
        touched = 1.0 - (1.0 - self._choice_share) ** (token_counts * self._copies)
        read_s = self._plain_read_s + self._expert_read_s * touched
        flop_s = (self._plain_flop_s + self._expert_flop_s + self._communication_per_token_s) * token_counts
        return np.asarray(
            self._overhead_s
            + self._fixed_s
            + np.maximum(read_s + _MEMORY_SHARE * flop_s, _COMPUTE_SHARE * read_s + flop_s)
        )

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

        Exact for dense models. A mixture's reading bends with the number of tokens: its memory
        arm is the line through one token and a full batch of decodes that errs least, its compute
        arm has all experts in it.
        """
        flop_s = self._plain_flop_s + self._expert_flop_s + self._communication_per_token_s
        base_s, per_token_s = self._plain_read_s, 0.0
        if self._expert_read_s:
            counts = np.geomspace(1, max(2, self._options.max_running_request_count), 24)
            reads = self._plain_read_s + self._expert_read_s * np.array(
                [self._touched_share(count) for count in counts]
            )
            # Relative errors count, so that a single stream is met as well as a full batch.
            weights = 1.0 / (self._fixed_s + reads)
            design = np.stack([weights, weights * counts], axis=1)
            (base_s, per_token_s), *_ = np.linalg.lstsq(design, weights * reads, rcond=None)
            base_s, per_token_s = max(0.0, float(base_s)), max(0.0, float(per_token_s))
        return StepTimeParameters(
            overhead_s=self._overhead_s,
            memory_base_s=self._fixed_s + base_s,
            memory_per_token_s=per_token_s + _MEMORY_SHARE * flop_s,
            compute_base_s=self._fixed_s + _COMPUTE_SHARE * (self._plain_read_s + self._expert_read_s),
            compute_per_token_s=flop_s,
            context_per_token_s=self._context_s,
            attention_per_token_pair_s=self._pair_s,
        )

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
