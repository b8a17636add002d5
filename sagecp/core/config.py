"""Bounds and names of the core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sagecp.core.health_limits import HealthLimits
from sagecp.core.prices import GpuPrices
from sagecp.core.shedding import ClassShares


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds and names of the core.

    Attributes:
        scheduling_policy: A name of `core.policies.registry`.
        routing_strategy: A name of `core.router.registry`.
        load_balancer: Likewise; used by the ``load_balanced`` strategy.
        parameters: Values of parameters of the three that differ from their defaults.
        max_queued_request_count: Most requests that may wait.
        max_queued_bytes: Most prompt bytes that may wait.
        queue_shares: How much of either each class of requests may fill.
        max_instance_count: Most instances that may be registered.
        default_concurrency_limit: Most requests on an instance that does not say its own.
        max_attempt_count: Most attempts per request.
        queue_timeout_s: Longest wait of a request without a deadline of its own.
        lease_duration_s: How long an instance with an agent lives without a heartbeat.
        lost_retention_s: How long a LOST instance stays listed.
        health: When instances are kept out of the rotation, and for how long.
        prices: Of GPUs whose instances state none.
        seed: Of the core's random generator.
    """

    scheduling_policy: str = "adaptive"
    routing_strategy: str = "load_balanced"
    load_balancer: str = "predicted_latency"
    parameters: Mapping[str, float] = field(default_factory=dict)
    max_queued_request_count: int = 100_000
    max_queued_bytes: int = 1 << 30
    queue_shares: ClassShares = field(default_factory=ClassShares)
    max_instance_count: int = 20_000
    default_concurrency_limit: int = 256
    max_attempt_count: int = 3
    queue_timeout_s: float = 600.0
    lease_duration_s: float = 6.0
    lost_retention_s: float = 600.0
    health: HealthLimits = field(default_factory=HealthLimits)
    prices: GpuPrices = field(default_factory=GpuPrices)
    seed: int = 0
