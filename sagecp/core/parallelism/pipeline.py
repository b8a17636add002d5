"""Pipeline parallelism: the layers in stages, one after the other."""

from __future__ import annotations

from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.strategy import ParallelismStrategy
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata


class PipelineParallelism(ParallelismStrategy):
    """Puts some of the layers on each GPU, so that models fit where links are slow.

    A token takes as long as on one GPU; throughput grows as long as every stage has a batch of its
    own to work on. By rule of thumb: as many stages as GPUs.
    """

    type = ParallelismType.PIPELINE

    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return one stage per GPU."""
        return ParallelismConfig(
            pipeline_parallel_size=gpu_count,
            rationale=f"{gpu_count} stages: room for a large model over slow links",
        )
