"""Tensor parallelism: every layer split over GPUs that share a fast link."""

from __future__ import annotations

from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.strategy import ParallelismStrategy, largest_power_of_two
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata


class TensorParallelism(ParallelismStrategy):
    """Splits every layer, so that each step is shorter; each layer ends with an all-reduce.

    By rule of thumb: the largest power of two within a host, because heads and widths of most
    models divide by those only.
    """

    type = ParallelismType.TENSOR

    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return the largest tensor size within a host."""
        tensor = largest_power_of_two(min(gpu_count, USUAL_GPUS_PER_NODE_COUNT))
        return ParallelismConfig(
            tensor_parallel_size=tensor,
            idle_gpu_count=gpu_count - tensor,
            rationale=f"{tensor} GPUs on one fast link: tensor parallelism shortens every step",
        )
