"""Scheduling policies by name."""

from __future__ import annotations

from sagecp.core.policies.adaptive import AdaptivePolicy
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.policies.fifo import FifoPolicy
from sagecp.core.registry import Registry

SCHEDULING_POLICIES: Registry[SchedulingPolicy] = Registry(
    "scheduling policy",
    [
        (AdaptivePolicy.name, AdaptivePolicy),
        (FifoPolicy.name, FifoPolicy),
    ],
    planned=("priority", "slo_aware", "cost_optimized"),
)
