"""Data parallelism: whole copies of the model."""

from __future__ import annotations

from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.strategy import ParallelismStrategy
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata


class DataParallelism(ParallelismStrategy):
    """Copies the model, so that throughput grows by as much as GPUs do, and no step gets shorter.

    By rule of thumb: one copy per GPU.
    """

    type = ParallelismType.DATA

    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return one copy per GPU."""
        return ParallelismConfig(
            data_parallel_size=gpu_count,
            rationale=f"{gpu_count} whole copies: most throughput for a model that fits one GPU",
        )
