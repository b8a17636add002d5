"""The sizes of a plan: GPUs that share each layer, each stage and each expert, and copies."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.types import ExecutionInstance, ParallelismType


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelismConfig:
    """How a model is spread over GPUs.

    Attributes:
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: Stages that the layers are divided into.
        data_parallel_size: Copies behind one endpoint. With expert parallelism they share
            the experts, and copies of the rest work in step.
        expert_parallel_size: GPUs that the experts are spread over: tensor times data
            parallel size, as vLLM does it; 1: experts are split by tensor as the rest is.
        replica_count: Endpoints, each of the sizes above.
        idle_gpu_count: GPUs that were offered and are not used.
        rationale: Why, in a sentence.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    replica_count: int = 1
    idle_gpu_count: int = 0
    rationale: str = ""

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one endpoint."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def gpu_count(self) -> int:
        """GPUs in use."""
        return self.gpus_per_replica * self.replica_count

    @property
    def copy_count(self) -> int:
        """Copies of the attention layers, each of which has a KV cache of its own."""
        return self.data_parallel_size * self.replica_count

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Tensor, pipeline, data, expert sizes and replicas: what tells two plans apart."""
        return (
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.data_parallel_size,
            self.expert_parallel_size,
            self.replica_count,
        )

    @property
    def type(self) -> ParallelismType:
        """What kind of plan it is: the one way that is used, or hybrid."""
        if self.expert_parallel_size > 1 and self.pipeline_parallel_size == 1:
            return ParallelismType.EXPERT
        ways = [
            way
            for way, size in (
                (ParallelismType.TENSOR, self.tensor_parallel_size),
                (ParallelismType.PIPELINE, self.pipeline_parallel_size),
                (ParallelismType.DATA, self.copy_count),
            )
            if size > 1
        ]
        if not ways:
            return ParallelismType.DATA
        return ways[0] if len(ways) == 1 else ParallelismType.HYBRID

    def __str__(self) -> str:
        parts = [f"TP{self.tensor_parallel_size}"]
        if self.pipeline_parallel_size > 1:
            parts.append(f"PP{self.pipeline_parallel_size}")
        if self.data_parallel_size > 1:
            parts.append(f"DP{self.data_parallel_size}")
        if self.expert_parallel_size > 1:
            parts.append(f"EP{self.expert_parallel_size}")
        text = " ".join(parts)
        return f"{self.replica_count} x {text}" if self.replica_count > 1 else text


def config_of(spec: ExecutionInstance) -> ParallelismConfig:
    """Return the sizes of an instance as those of a plan with one replica."""
    return ParallelismConfig(
        tensor_parallel_size=max(1, spec.tensor_parallel_size),
        pipeline_parallel_size=max(1, spec.pipeline_parallel_size),
        data_parallel_size=max(1, spec.data_parallel_size),
        expert_parallel_size=max(1, spec.expert_parallel_size),
    )
