"""Every plan worth looking at for some GPUs, whether it can be or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_placement import required_node_count


def plan_space(model: ModelDescription, pool: GpuPool) -> Iterator[ParallelismConfig]:
    """Yield plans, each with as many replicas as the pool has room for.

    Tensor sizes are powers of two up to all GPUs, so that it is told why large ones cannot be,
    and every divisor of the attention heads within a node. Pipeline sizes are powers of two,
    the number of nodes, and all up to eight where there are no more GPUs. Copies that share
    the experts are powers of two. Dense models are copied as replicas: behind endpoints of
    their own they fail alone, and the control plane balances them.
    """
    for tensor in _tensor_sizes(model, pool):
        for pipeline in _pipeline_sizes(model, pool, tensor):
            yield from _with_replicas(pool, tensor, pipeline, 1, 1)
            if model.experts is not None and tensor > 1:
                yield from _with_replicas(pool, tensor, pipeline, 1, tensor)
        if model.experts is None:
            continue
        copies = 2
        while tensor * copies <= pool.gpu_count and tensor <= pool.gpus_per_node_count:
            yield from _with_replicas(pool, tensor, 1, copies, tensor * copies)
            copies *= 2


def largest_replica_count(pool: GpuPool, config: ParallelismConfig) -> int:
    """Return how many replicas of these sizes the pool's nodes have room for; at least 1."""

    def has_room(count: int) -> bool:
        resized = replace(config, replica_count=count)
        return required_node_count(pool.gpus_per_node_count, resized) <= pool.node_count

    count = max(1, pool.gpu_count // config.gpus_per_replica)
    while count > 1 and not has_room(count):
        count -= 1
    return count


def with_replica_count(pool: GpuPool, config: ParallelismConfig, count: int) -> ParallelismConfig:
    """Return the plan with so many replicas."""
    resized = replace(config, replica_count=count)
    return replace(resized, idle_gpu_count=max(0, pool.gpu_count - resized.gpu_count))


def _with_replicas(
    pool: GpuPool, tensor: int, pipeline: int, data: int, expert: int
) -> Iterator[ParallelismConfig]:
    one = ParallelismConfig(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel_size=expert,
    )
    if one.gpus_per_replica <= pool.gpu_count:
        yield with_replica_count(pool, one, largest_replica_count(pool, one))


def _tensor_sizes(model: ModelDescription, pool: GpuPool) -> list[int]:
    within_node = min(pool.gpus_per_node_count, pool.gpu_count)
    sizes = {size for size in range(1, within_node + 1) if model.attention_head_count % size == 0}
    size = 1
    while size <= pool.gpu_count:
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def _pipeline_sizes(model: ModelDescription, pool: GpuPool, tensor: int) -> list[int]:
    most = min(pool.gpu_count // tensor, model.layer_count)
    sizes = {1, min(pool.node_count, most)} if most else set()
    sizes |= {size for size in range(2, 9) if size <= most and pool.gpu_count <= 8}
    size = 2
    while size <= most:
        sizes.add(size)
        size *= 2
    return sorted(sizes)
