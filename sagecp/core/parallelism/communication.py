"""What GPUs have to tell each other in a step: bytes, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.gpu_specifications import GpuSpecification
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import part_format

_US = 1e-6
_ACTIVATION_BYTES = 2.0

# Share of a link's data sheet that collectives reach. NVLink: Vidur's profile of an H100 host,
# 33.5 MB in 0.167 ms over four GPUs and in 0.196 ms over eight, is a third of 900 GB/s.
_LINK_EFFICIENCY = 0.34
# DeepEP's kernels reach 43 and 46 of 50 GB/s over 64 GPUs in 8 nodes (deepseek-ai/DeepEP, docs/legacy.md).
_NODE_LINK_EFFICIENCY = 0.85
_SPREAD_MESSAGE_S = 30 * _US
# A small message: custom all-reduce over NVLink, over PCIe, and between nodes.
_FAST_MESSAGE_S, _SLOW_MESSAGE_S, _NODE_MESSAGE_S = 11 * _US, 30 * _US, 45 * _US
_ALL_REDUCES_PER_LAYER = 2
# Ada's and Hopper's clocks are a third above Ampere's, and their hosts are younger.
_QUICK_CAPABILITY, _SLOWNESS = 8.9, 1.5


@dataclass(frozen=True, slots=True)
class Communication:
    """What a step of one copy spends on it: a fixed part, and one for each of its tokens. Seconds."""

    fixed_s: float
    per_token_s: float

    def __add__(self, other: Communication) -> Communication:
        return Communication(self.fixed_s + other.fixed_s, self.per_token_s + other.per_token_s)


NOTHING = Communication(0.0, 0.0)


def small_kernel_slowness(gpu: GpuSpecification) -> float:
    """Return how much longer kernels with little to do take than on an H100."""
    return 1.0 if gpu.compute_capability >= _QUICK_CAPABILITY else _SLOWNESS


def all_reduce(model: ModelDescription, pool: GpuPool, tensor_parallel_size: int) -> Communication:
    """Two per layer; a ring sends each byte ``2 (n-1)/n`` times."""
    if tensor_parallel_size == 1:
        return NOTHING
    count = _ALL_REDUCES_PER_LAYER * model.layer_count
    sent_bytes = 2.0 * (tensor_parallel_size - 1) / tensor_parallel_size
    sent_bytes *= model.hidden_size * _ACTIVATION_BYTES
    message_s, bytes_per_s = _link(pool, tensor_parallel_size)
    return Communication(count * message_s, count * sent_bytes / bytes_per_s)


def hand_over(model: ModelDescription, pool: GpuPool, config: ParallelismConfig) -> Communication:
    """From each pipeline stage to the next."""
    count = config.pipeline_parallel_size - 1
    if not count:
        return NOTHING
    # Every rank of a stage sends its share.
    sent_bytes = model.hidden_size * _ACTIVATION_BYTES / config.tensor_parallel_size
    message_s, bytes_per_s = _link(pool, config.tensor_parallel_size * config.pipeline_parallel_size)
    return Communication(count * message_s, count * sent_bytes / bytes_per_s)


def all_to_all(model: ModelDescription, pool: GpuPool, config: ParallelismConfig) -> Communication:
    """Tokens to their experts and back, when copies share the experts.

    ``topk * hidden * bytes * (1 - 1/EP)`` per token and layer with experts, there and back, divided
    over the copy's GPUs. What stays in the node takes the fast link, the rest the adapters, at once. Models
    in 8 bits send tokens to the experts in 8 bits. A copy that has all the experts by itself needs
    none: its all-reduce does the work.
    """
    experts = model.experts
    if experts is None or config.expert_parallel_size <= config.tensor_parallel_size:
        return NOTHING
    group = config.expert_parallel_size
    sent_in_bytes = min(_ACTIVATION_BYTES, part_format(model, "experts").arithmetic_bits / 8.0)
    visited = experts.active_expert_count * model.hidden_size * (max(1.0, sent_in_bytes) + _ACTIVATION_BYTES)
    visited /= config.tensor_parallel_size
    near_share = min(1.0, pool.gpus_per_node_count / group)
    far_share = 1.0 - near_share
    near_share -= 1.0 / group
    _, near_bytes_per_s = _link(pool, min(group, pool.gpus_per_node_count))
    message_s = _SPREAD_MESSAGE_S if far_share else _link(pool, group)[0]
    far_bytes_per_s = pool.node_link_gb_per_s * 1e9 * _NODE_LINK_EFFICIENCY
    per_token_s = visited * max(near_share / near_bytes_per_s, far_share / far_bytes_per_s)
    return Communication(2 * experts.layer_count * message_s, experts.layer_count * per_token_s)


def _link(pool: GpuPool, gpu_count: int) -> tuple[float, float]:
    """Seconds of a small message among so many neighbours, and bytes per second of large ones."""
    gpu = pool.gpu
    if gpu_count > pool.gpus_per_node_count:
        return _NODE_MESSAGE_S, pool.node_link_gb_per_s * 1e9 * _NODE_LINK_EFFICIENCY
    if gpu_count <= gpu.fast_link_gpu_count:
        return _FAST_MESSAGE_S * small_kernel_slowness(gpu), gpu.link_gb_per_s * 1e9 * _LINK_EFFICIENCY
    # Beyond the fast link they are joined over PCIe.
    pcie_gb_per_s = min(gpu.link_gb_per_s, _PCIE_GB_PER_S)
    return _SLOW_MESSAGE_S, pcie_gb_per_s * 1e9 * _LINK_EFFICIENCY


_PCIE_GB_PER_S = 64.0
