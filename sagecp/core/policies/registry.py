"""Scheduling policies by name."""

from __future__ import annotations

from sagecp.core.policies.adaptive import AdaptivePolicy
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.policies.cost_optimized import CostOptimizedPolicy
from sagecp.core.policies.fifo import FifoPolicy
from sagecp.core.policies.priority import PriorityPolicy
from sagecp.core.policies.slo_aware import SloAwarePolicy
from sagecp.core.registry import Registry

SCHEDULING_POLICIES: Registry[SchedulingPolicy] = Registry(
    "scheduling policy",
    [
        (AdaptivePolicy.name, AdaptivePolicy),
        (CostOptimizedPolicy.name, CostOptimizedPolicy),
        (FifoPolicy.name, FifoPolicy),
        (PriorityPolicy.name, PriorityPolicy),
        (SloAwarePolicy.name, SloAwarePolicy),
    ],
)
