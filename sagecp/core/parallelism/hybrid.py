"""Hybrid parallelism: tensor, pipeline and data parallelism together."""

from __future__ import annotations

from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.strategy import USUAL_TENSOR_SIZE, ParallelismStrategy
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata


class HybridParallelism(ParallelismStrategy):
    """Tensor parallelism within a fast link, stages between hosts, copies with what is left.

    By rule of thumb, from 16 GPUs on four share each layer of two stages, from eight on four
    share each layer, below that two do; copies fill the rest.
    """

    type = ParallelismType.HYBRID

    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return tensor groups, in two stages where there are enough GPUs, and copies of them."""
        tensor = USUAL_TENSOR_SIZE if gpu_count >= USUAL_GPUS_PER_NODE_COUNT else min(2, gpu_count)
        stages = 2 if gpu_count >= 2 * USUAL_GPUS_PER_NODE_COUNT else 1
        copies = gpu_count // (tensor * stages)
        parts = [f"{tensor} GPUs share each layer"]
        if stages > 1:
            parts.append(f"{stages} stages")
        if copies > 1:
            parts.append(f"{copies} copies for throughput")
        return ParallelismConfig(
            tensor_parallel_size=tensor,
            pipeline_parallel_size=stages,
            data_parallel_size=copies,
            idle_gpu_count=gpu_count - tensor * stages * copies,
            rationale=", ".join(parts),
        )
