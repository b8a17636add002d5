"""When most leases end together, the network of the agents is at fault, not the engines.

Then instances stay where they are, and the control plane asks their engines
itself. Without this, an outage of what watches the fleet would be an outage of
the fleet. Kubernetes stops to evict at the same share, for the same reason.
"""

from __future__ import annotations

from sagecp.core import effects as fx
from sagecp.core.fleet import Fleet
from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.types import EngineCondition, InstanceState

CHECK_INTERVAL_S = 1.0
"""How often to look whether it is over: each look is at every instance."""


class FailStatic:
    """Decides whether instances whose leases end are LOST.

    Begins when leases of ``fail_static_share`` of the instances that have one, and
    of ``fail_static_instance_count`` at least, end within one lease duration. Beats
    are spread over time, so that it is seen in the first lease that ends: those
    that have not been renewed for half their time count as well.

    Ends when more than half beat again, or nobody is left that it keeps. It has no
    longest duration: probes and calls judge the engines as leases did, and go on
    doing so. What has not come back at the end has one more lease.

    Args:
        fleet: The instances.
        limits: Share and count.
        lease_duration_s: Of a lease.
    """

    def __init__(self, fleet: Fleet, limits: HealthLimits, lease_duration_s: float) -> None:
        self._fleet = fleet
        self._limits = limits
        self._lease_duration_s = lease_duration_s
        self._begin_s = self._check_s = 0.0
        self.active = False

    def keep(
        self, expired: list[InstanceRecord], now: float, effects: list[fx.Effect]
    ) -> list[InstanceRecord]:
        """Note whose leases ended now; return those of them that are LOST by it."""
        if not self.active and expired:
            self._begin(expired, now, effects)
        if not self.active:
            return expired
        lost = []
        for record in expired:
            # Nobody's word is left for an engine that does not answer.
            if record.unreachable or record.condition is EngineCondition.UNHEALTHY:
                lost.append(record)
            else:
                record.keeps_state = True
        return lost

    def _begin(self, expired: list[InstanceRecord], now: float, effects: list[fx.Effect]) -> None:
        beating_count, silent_count, lost_count = self._count(now)
        # Without a lease they were not counted, unless they had been kept before.
        silent_count += sum(
            record.state is not InstanceState.LOST and not record.keeps_state for record in expired
        )
        late_count = silent_count + lost_count
        count = beating_count + late_count
        limits = self._limits
        if late_count < limits.fail_static_instance_count or late_count / count < limits.fail_static_share:
            return
        self.active = True
        self._begin_s = now
        self._check_s = now + CHECK_INTERVAL_S
        why = (
            f"heartbeats of {late_count} of {count} instances stopped together; they stay in the rotation "
            "as long as their engines answer the control plane"
        )
        effects.append(fx.FailStaticChanged(True, why))

    def check(self, now: float, effects: list[fx.Effect], *, at_once: bool = False) -> None:
        """End it if most instances beat again, or none is left that it keeps."""
        if not self.active or (now < self._check_s and not at_once):
            return
        self._check_s = now + CHECK_INTERVAL_S
        beating_count, silent_count, lost_count = self._count(now)
        count = beating_count + silent_count + lost_count
        if silent_count and beating_count * 2 <= count:
            return
        self.active = False
        for record in self._fleet:
            if record.keeps_state and record.lease_expire_s is None:
                self._fleet.extend_lease(record, now + self._lease_duration_s)
        why = f"{beating_count} of {count} instances send heartbeats"
        effects.append(fx.FailStaticChanged(False, why))

    def _count(self, now: float) -> tuple[int, int, int]:
        """Return how many instances beat, are late by half a lease or more, and are LOST since about then."""
        late_s = now + self._lease_duration_s / 2
        lost_s = (self._begin_s if self.active else now) - self._lease_duration_s
        beating_count = silent_count = lost_count = 0
        for record in self._fleet:
            if record.state is InstanceState.LOST:
                lost_count += record.lost_s is not None and record.lost_s > lost_s
            elif record.keeps_state:
                silent_count += 1
            elif record.lease_expire_s is not None:
                if record.lease_expire_s <= late_s:
                    silent_count += 1
                else:
                    beating_count += 1
        return beating_count, silent_count, lost_count
