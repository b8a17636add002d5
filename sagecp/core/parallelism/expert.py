"""Expert parallelism: whole experts of a mixture on each GPU."""

from __future__ import annotations

from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.strategy import USUAL_TENSOR_SIZE, ParallelismStrategy, largest_power_of_two
from sagecp.core.prediction.model_size import model_size_from_name
from sagecp.core.types import ExecutionInstance, ParallelismType, RequestMetadata


class ExpertParallelism(ParallelismStrategy):
    """Spreads whole experts over the GPUs of all copies, which step together.

    vLLM has one group for it: expert parallel size = tensor x data parallel size. By rule of
    thumb: four GPUs share the attention of each copy, and there are as many GPUs in a group as
    the model has experts, within the GPUs there are.
    """

    type = ParallelismType.EXPERT

    def usual(
        self, request: RequestMetadata, instance: ExecutionInstance, gpu_count: int
    ) -> ParallelismConfig:
        """Return groups of as many GPUs as there are experts."""
        tensor = largest_power_of_two(min(gpu_count, USUAL_TENSOR_SIZE))
        experts = expert_count_of(request, instance)
        if experts:
            tensor = min(tensor, largest_power_of_two(experts))
        copies = max(1, min(gpu_count, experts or gpu_count) // tensor)
        group = tensor * copies
        groups = gpu_count // group
        return ParallelismConfig(
            tensor_parallel_size=tensor,
            data_parallel_size=copies,
            expert_parallel_size=group,
            replica_count=groups,
            idle_gpu_count=gpu_count - groups * group,
            rationale=(f"{experts} experts over {group} GPUs" if experts else f"experts over {group} GPUs")
            + f", attention over {tensor}",
        )


def expert_count_of(request: RequestMetadata, instance: ExecutionInstance) -> int:
    """Return how many experts the model has per layer, as far as its name tells; 0: none, or unknown."""
    size = model_size_from_name(request.model_name or instance.model_name)
    return size.expert_count if size is not None else 0
