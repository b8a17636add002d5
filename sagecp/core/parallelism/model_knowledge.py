"""What is known of the models that a fleet serves, and what a plan predicts for its instances."""

from __future__ import annotations

from collections.abc import Mapping

from sagecp.core.gpu_specifications import find_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import USUAL_GPUS_PER_NODE_COUNT, GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig, config_of
from sagecp.core.parallelism.step_model import plan_step_time
from sagecp.core.prediction.step_time_accuracy import PlannedStepTime
from sagecp.core.types import ExecutionInstance


class ModelKnowledge:
    """Finds models by the names that they are served under.

    Args:
        configured: Models by name; they win over those known by name.
    """

    def __init__(self, configured: Mapping[str, ModelDescription] | None = None) -> None:
        self._configured = dict(configured or {})

    def find(self, name: str) -> ModelDescription | None:
        """Return what is known of a model; ``None``: nothing."""
        from sagecp.core.parallelism.known_models import find_model

        return self._configured.get(name) or find_model(name)

    def planned_for(self, spec: ExecutionInstance) -> PlannedStepTime | None:
        """Return the step times that the planner predicts for an instance; ``None``: it knows too little."""
        gpu, model = find_gpu(spec.gpu_name), self.find(spec.model_name)
        if gpu is None or model is None:
            return None
        config = config_of(spec)
        per_node_count = min(USUAL_GPUS_PER_NODE_COUNT, config.gpus_per_replica)
        pool = GpuPool(
            gpu=gpu,
            gpus_per_node_count=per_node_count,
            node_count=-(-config.gpus_per_replica // per_node_count),
        )
        try:
            step = plan_step_time(model, pool, config, EngineOptions())
        except (ValueError, ArithmeticError):
            # Sizes that the model cannot have; an instance may claim anything.
            return None
        return PlannedStepTime(
            # The planner's own formula: no constants follow a mixture of experts.
            step_times=step,
            source=f"planned: {model.name or spec.model_name} as {config} on {gpu.name}",
            lane_count=lane_count_of(config),
        )


def lane_count_of(config: ParallelismConfig) -> int:
    """Return how many batches an instance works on at a time."""
    return config.data_parallel_size * config.pipeline_parallel_size
