"""sagecp: a control plane for fleets of vLLM servers.

The names below are the library's public contract. They are imported on first
use, so that ``import sagecp`` (and every command of the CLI) stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sagecp.version import __version__

if TYPE_CHECKING:
    from sagecp.core.errors import SageError
    from sagecp.core.parallelism.optimizer import ParallelismOptimizer
    from sagecp.core.types import (
        ControlPlaneStatus,
        EngineGauges,
        ExecutionInstance,
        FailoverMode,
        GpuReading,
        InstanceState,
        ParallelismType,
        PerformanceMetrics,
        RequestMetadata,
        RequestPriority,
        RequestState,
        RequestStatus,
        SamplingParameters,
        SchedulingDecision,
    )
    from sagecp.runtime.executor import ExecutionCoordinator
    from sagecp.runtime.manager import ControlPlaneManager

_HOMES = {
    "ControlPlaneManager": "sagecp.runtime.manager",
    "ControlPlaneStatus": "sagecp.core.types",
    "EngineGauges": "sagecp.core.types",
    "ExecutionCoordinator": "sagecp.runtime.executor",
    "ExecutionInstance": "sagecp.core.types",
    "FailoverMode": "sagecp.core.types",
    "GpuReading": "sagecp.core.types",
    "InstanceState": "sagecp.core.types",
    "ParallelismOptimizer": "sagecp.core.parallelism.optimizer",
    "ParallelismType": "sagecp.core.types",
    "PerformanceMetrics": "sagecp.core.types",
    "RequestMetadata": "sagecp.core.types",
    "RequestPriority": "sagecp.core.types",
    "RequestState": "sagecp.core.types",
    "RequestStatus": "sagecp.core.types",
    "SageError": "sagecp.core.errors",
    "SamplingParameters": "sagecp.core.types",
    "SchedulingDecision": "sagecp.core.types",
}

__all__ = [
    "ControlPlaneManager",
    "ControlPlaneStatus",
    "EngineGauges",
    "ExecutionCoordinator",
    "ExecutionInstance",
    "FailoverMode",
    "GpuReading",
    "InstanceState",
    "ParallelismOptimizer",
    "ParallelismType",
    "PerformanceMetrics",
    "RequestMetadata",
    "RequestPriority",
    "RequestState",
    "RequestStatus",
    "SageError",
    "SamplingParameters",
    "SchedulingDecision",
    "__version__",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sagecp' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
