"""Models, GPUs and plans, as the planner's tests make them."""

from __future__ import annotations

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.known_models import find_model
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig

LLAMA_8B = ModelDescription(
    name="meta-llama/Llama-3.1-8B",
    architecture="LlamaForCausalLM",
    layer_count=32,
    hidden_size=4096,
    intermediate_size=14336,
    attention_head_count=32,
    key_value_head_count=8,
    head_size=128,
    value_head_size=128,
    vocabulary_size=128256,
    max_context_token_count=131072,
)


def known_model(name: str) -> ModelDescription:
    """Return a model that is known by its name."""
    model = find_model(name)
    assert model is not None, name
    return model


def pool(
    gpus: int = 8, nodes: int = 1, gpu: str = "H100-SXM-80GB", usd_per_gpu_hour: float | None = None
) -> GpuPool:
    """Return nodes of GPUs."""
    return GpuPool(
        gpu=require_gpu(gpu), gpus_per_node_count=gpus, node_count=nodes, usd_per_gpu_hour=usd_per_gpu_hour
    )


def config(
    tensor: int = 1, pipeline: int = 1, data: int = 1, expert: int = 1, replicas: int = 1
) -> ParallelismConfig:
    """Return the sizes of a plan."""
    return ParallelismConfig(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel_size=expert,
        replica_count=replicas,
    )
