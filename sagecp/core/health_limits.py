"""When an instance is kept out of the rotation, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.errors import FieldViolation


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthLimits:
    """Bounds of the health of instances. Times in seconds.

    The first four are Envoy's outlier detection (``consecutive_5xx``,
    ``base_ejection_time``, ``max_ejection_time``) with a larger share, because a
    fleet of engines is small; the last two are the thresholds at which
    Kubernetes stops to evict (``unhealthy-zone-threshold``, more than two nodes).

    Attributes:
        failure_limit: Failures in a row after which an instance is ejected.
        base_ejection_s: How long the first ejection lasts; the next in a row last a multiple.
        max_ejection_s: The longest.
        max_ejected_share: Of the instances of a model, how many may be out at once.
        probe_success_count: Probes in a row that must be answered before an instance returns.
        probe_interval_s: Between those, and before the first of a stalled instance.
        max_probe_interval_s: Longest time between the probes of a stalled instance.
        stall_timeout_s: An engine that has work and shows no progress for so long is stalled.
        base_hold_down_s: An instance that falls out again soon after it returned stays out
            for at least so long, and twice as long each further time.
        max_hold_down_s: The longest such time.
        quiet_s: After so long without falling out, the next time is a first one.
        fail_static_share: When this part of the leases ends together, instances stay
            where they are.
        fail_static_instance_count: In fewer instances than this, that says nothing.
        gpu_fault_clear_s: What is wrong with a GPU must be gone for so long to be over.
        gpu_throttle_s: A GPU whose clocks are reduced for so long, for heat or want of
            power, has a fault.
        gpu_missing_beat_count: A GPU that is in so many heartbeats in a row no more is gone.
    """

    failure_limit: int = 5
    base_ejection_s: float = 30.0
    max_ejection_s: float = 300.0
    max_ejected_share: float = 0.5
    probe_success_count: int = 2
    probe_interval_s: float = 1.0
    max_probe_interval_s: float = 30.0
    stall_timeout_s: float = 10.0
    base_hold_down_s: float = 5.0
    max_hold_down_s: float = 60.0
    quiet_s: float = 60.0
    fail_static_share: float = 0.55
    fail_static_instance_count: int = 3
    gpu_fault_clear_s: float = 60.0
    gpu_throttle_s: float = 30.0
    gpu_missing_beat_count: int = 3

    def violations(self) -> list[FieldViolation]:
        """Return what is wrong with them beyond the signs of single numbers."""
        found = [
            FieldViolation(name, f"is {getattr(self, name):g}; must be at most 1, it is a share")
            for name in ("max_ejected_share", "fail_static_share")
            if getattr(self, name) > 1.0
        ]
        if 0.0 < self.fail_static_share < 0.5:
            found.append(
                FieldViolation(
                    "fail_static_share",
                    f"is {self.fail_static_share:g}; must be at least 0.5: it ends when half are back",
                )
            )
        for low, high in (
            ("base_ejection_s", "max_ejection_s"),
            ("base_hold_down_s", "max_hold_down_s"),
            ("probe_interval_s", "max_probe_interval_s"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                found.append(FieldViolation(high, f"is {most:g}, less than {low} ({least:g}); raise it"))
        return found
