"""Which GPUs of which nodes the replicas of a plan stand on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.parallelism_config import ParallelismConfig


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The part of a replica that stands on one node.

    Attributes:
        node_index: The node, from 0.
        first_gpu_index: First of its GPUs on that node; the others follow it.
        gpu_count: GPUs of the replica on that node.
        first_copy_index: First of the replica's data-parallel copies that has GPUs there.
        copy_count: Whole copies there; 0: a copy spans nodes.
    """

    node_index: int
    first_gpu_index: int
    gpu_count: int
    first_copy_index: int
    copy_count: int

    @property
    def gpu_indexes(self) -> range:
        """Its GPUs on that node."""
        return range(self.first_gpu_index, self.first_gpu_index + self.gpu_count)


def gpus_per_node_of_replica(gpus_per_node_count: int, config: ParallelismConfig) -> tuple[int, ...]:
    """Return how many GPUs one replica takes on each of its nodes.

    A replica stays on one node if it fits. Otherwise whole copies are put on each node,
    as evenly as can be; a copy that is larger than a node is cut between pipeline stages
    where its tensor parallel groups fit a node, into equal parts either way, because
    vLLM's launcher gives every node the same number of ranks.
    """
    replica = config.gpus_per_replica
    if replica <= gpus_per_node_count:
        return (replica,)
    copy = config.tensor_parallel_size * config.pipeline_parallel_size
    copies = config.data_parallel_size
    if copy <= gpus_per_node_count:
        node_count = -(-copies // (gpus_per_node_count // copy))
        least, more = divmod(copies, node_count)
        return ((least + 1) * copy,) * more + (least * copy,) * (node_count - more)
    divisible = config.pipeline_parallel_size if config.tensor_parallel_size <= gpus_per_node_count else copy
    parts = next(
        count
        for count in range(-(-copy // gpus_per_node_count), divisible + 1)
        if divisible % count == 0 and copy // count <= gpus_per_node_count
    )
    return (copy // parts,) * (parts * copies)


def required_node_count(gpus_per_node_count: int, config: ParallelismConfig) -> int:
    """Return how many nodes all replicas take."""
    if config.gpus_per_replica <= gpus_per_node_count:
        return -(-config.replica_count // (gpus_per_node_count // config.gpus_per_replica))
    return config.replica_count * len(gpus_per_node_of_replica(gpus_per_node_count, config))


def place_replicas(pool: GpuPool, config: ParallelismConfig) -> Iterator[tuple[NodeShare, ...]]:
    """Yield, for each replica, its part of each of its nodes, head node first.

    Nodes are filled in order. The plan must fit the pool.
    """
    node_size = pool.gpus_per_node_count
    copy = config.tensor_parallel_size * config.pipeline_parallel_size
    sizes = gpus_per_node_of_replica(node_size, config)
    per_node = node_size // sizes[0] if len(sizes) == 1 else 1
    for replica in range(config.replica_count):
        first_node = replica // per_node if len(sizes) == 1 else replica * len(sizes)
        first_gpu = (replica % per_node) * sizes[0] if len(sizes) == 1 else 0
        shares, rank = [], 0
        for offset, size in enumerate(sizes):
            shares.append(NodeShare(first_node + offset, first_gpu, size, rank // copy, size // copy))
            rank += size
        yield tuple(shares)
