"""Chooses how to spread a model over the GPUs of an instance.

This version decides from the number of GPUs and the rules of thumb below; a
memory and cost model takes their place when the planner grows.
"""

from __future__ import annotations

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata

# GPUs that share a fast link in common servers (one NVLink domain).
FAST_LINK_GPU_COUNT = 8


class ParallelismOptimizer:
    """Chooses a strategy for a request on an instance."""

    def select_strategy(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> tuple[ParallelismType, ParallelismConfig]:
        """Choose how to use ``gpu_count`` GPUs.

        A hint of the request decides where it can. Otherwise: one GPU needs
        nothing; up to eight in a power of two are split by tensor, because that
        shortens every step and they share a fast link; other counts combine the
        largest power of two with whole copies; more than one node adds pipeline
        stages between nodes.

        Raises:
            InvalidRequestError: ``gpu_count`` is below one.
        """
        if gpu_count < 1:
            raise InvalidRequestError(
                [FieldViolation("gpu_count", f"is {gpu_count}; at least one GPU is needed")]
            )
        if request.parallelism_hint is not None:
            return self._hinted(request.parallelism_hint, gpu_count)
        if gpu_count == 1:
            return ParallelismType.DATA, ParallelismConfig(rationale="one GPU: nothing to split")
        tensor = _largest_power_of_two(min(gpu_count, FAST_LINK_GPU_COUNT), gpu_count)
        rest = gpu_count // tensor
        if rest == 1:
            return ParallelismType.TENSOR, ParallelismConfig(
                tensor_parallel_size=tensor,
                rationale=f"{tensor} GPUs on one fast link: tensor parallelism shortens every step",
            )
        if gpu_count > FAST_LINK_GPU_COUNT and instance.tensor_parallel_size >= FAST_LINK_GPU_COUNT:
            return ParallelismType.HYBRID, ParallelismConfig(
                tensor_parallel_size=tensor,
                pipeline_parallel_size=rest,
                rationale=f"the model fills {tensor} GPUs already: pipeline stages across {rest} groups",
            )
        return ParallelismType.HYBRID, ParallelismConfig(
            tensor_parallel_size=tensor,
            data_parallel_size=rest,
            rationale=f"tensor parallelism within {tensor} GPUs, {rest} copies for throughput",
        )

    def _hinted(self, hint: ParallelismType, gpu_count: int) -> tuple[ParallelismType, ParallelismConfig]:
        rationale = f"the request asks for {hint.value} parallelism"
        if hint is ParallelismType.PIPELINE:
            return hint, ParallelismConfig(pipeline_parallel_size=gpu_count, rationale=rationale)
        if hint is ParallelismType.DATA:
            return hint, ParallelismConfig(data_parallel_size=gpu_count, rationale=rationale)
        tensor = _largest_power_of_two(min(gpu_count, FAST_LINK_GPU_COUNT), gpu_count)
        copies = gpu_count // tensor
        if hint is ParallelismType.EXPERT:
            return hint, ParallelismConfig(
                tensor_parallel_size=tensor,
                data_parallel_size=copies,
                expert_parallel_size=gpu_count,
                rationale=rationale,
            )
        if hint is ParallelismType.TENSOR and copies > 1:
            return ParallelismType.HYBRID, ParallelismConfig(
                tensor_parallel_size=tensor,
                data_parallel_size=copies,
                rationale=f"{rationale}; {gpu_count} GPUs allow {tensor} per copy",
            )
        if hint is ParallelismType.HYBRID and copies == 1 and tensor > 1:
            tensor, copies = tensor // 2, 2
        return hint, ParallelismConfig(
            tensor_parallel_size=tensor, data_parallel_size=copies, rationale=rationale
        )


def _largest_power_of_two(limit: int, divides: int) -> int:
    """Return the largest power of two that is at most ``limit`` and divides ``divides``."""
    size = 1
    while size * 2 <= limit and divides % (size * 2) == 0:
        size *= 2
    return size
