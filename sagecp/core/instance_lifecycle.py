"""How instances come, go, and follow their engines, agents, leases and operators."""

from __future__ import annotations

import heapq

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import IllegalTransitionError
from sagecp.core.fleet import Fleet, InstanceRecord
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.prompt_digest import BLOCK_TOKEN_COUNT as DIGEST_BLOCK_TOKENS
from sagecp.core.types import EngineCondition, EngineGauges, InstanceState

# Cached tokens to expect of an engine that does not say how many fit.
UNKNOWN_CAPACITY_TOKENS = 100_000


def _restarted(before: EngineGauges | None, after: EngineGauges | None) -> bool:
    """Return whether counters that run from an engine's start went back."""
    return (
        before is not None
        and after is not None
        and before.prompt_token_count is not None
        and after.prompt_token_count is not None
        and after.prompt_token_count < before.prompt_token_count
    )


class InstanceLifecycle:
    """Moves instances between their states. The scheduler's half for the fleet.

    Args:
        fleet: The instances.
        prefixes: What is forgotten of an instance that restarts.
        config: Lease and retention times.
    """

    def __init__(self, fleet: Fleet, prefixes: PrefixIndex, config: SchedulerConfig) -> None:
        self._fleet = fleet
        self._prefixes = prefixes
        self._config = config
        # (time, instance id): when a LOST instance is forgotten.
        self._forgets: list[tuple[float, str]] = []

    def on_registered(self, event: ev.InstanceRegistered, now: float, effects: list[fx.Effect]) -> None:
        """An instance joins, or a newer incarnation replaces an older one."""
        record = self._fleet.add(event.instance, event.incarnation, now)
        # A new registration may mean a new engine: its cache is taken for empty.
        self._prefixes.remove_instance(record.instance_id)
        capacity = event.instance.key_value_token_capacity or UNKNOWN_CAPACITY_TOKENS
        self._prefixes.add_instance(record.instance_id, capacity // DIGEST_BLOCK_TOKENS)
        effects.append(fx.InstanceChanged(record.instance_id, record.state, None, "registered"))
        if event.incarnation:
            self._fleet.extend_lease(record, now + self._config.lease_duration_s)
        self._follow_condition(record, event.condition, "", effects)

    def on_deregistered(self, event: ev.InstanceDeregistered, now: float, effects: list[fx.Effect]) -> None:
        """An instance leaves."""
        record = self._fleet.get(event.instance_id, event.incarnation)
        self._remove(record)
        effects.append(fx.InstanceRemoved(event.instance_id, event.cause or "deregistered"))

    def on_heartbeat(self, event: ev.HeartbeatReceived, now: float, effects: list[fx.Effect]) -> None:
        """An agent reported."""
        record = self._fleet.get(event.instance_id, event.incarnation)
        record.heartbeat_s = now
        record.gpus = event.gpus
        record.gpu_absent_reason = event.gpu_absent_reason
        if _restarted(record.gauges, event.gauges):
            record.load.forget(now)
            # Closed for the work that the engine has lost.
            self._fleet.open_gate(record)
            self._prefixes.remove_instance(record.instance_id)
            capacity = record.spec.key_value_token_capacity or UNKNOWN_CAPACITY_TOKENS
            self._prefixes.add_instance(record.instance_id, capacity // DIGEST_BLOCK_TOKENS)
        record.follow_gauges(event.gauges)
        self._fleet.settle(record)
        self._fleet.extend_lease(record, now + self._config.lease_duration_s)
        self._follow_condition(record, event.condition, event.condition_reason, effects)

    def on_health_probed(self, event: ev.HealthProbed, now: float, effects: list[fx.Effect]) -> None:
        """The control plane asked an engine itself."""
        record = self._fleet.find(event.instance_id)
        if record is not None:
            record.unreachable = event.condition is EngineCondition.UNHEALTHY
            if record.incarnation and record.state is InstanceState.LOST:
                return  # Its agent must come back first: without a lease nobody would notice its end.
            self._follow_condition(record, event.condition, event.condition_reason, effects)

    def on_drain_requested(self, event: ev.DrainRequested, now: float, effects: list[fx.Effect]) -> None:
        """An operator wants no new work on an instance, or wants that undone."""
        record = self._fleet.get(event.instance_id)
        if not event.undo:
            record.drain = True
            # A LOST instance starts to drain when its agent is back.
            if record.state is not InstanceState.LOST:
                self._drain(record, "drain requested", effects)
            return
        if not record.drain:
            raise IllegalTransitionError(
                f"instance {event.instance_id!r}", record.machine.history, InstanceState.READY
            )
        record.drain = False
        if record.state is not InstanceState.LOST:
            if record.unreachable or record.condition is EngineCondition.UNHEALTHY:
                target = InstanceState.UNHEALTHY
            elif record.condition is EngineCondition.HEALTHY:
                target = InstanceState.READY
            else:
                target = InstanceState.STARTING
            self._move(record, target, "drain undone", effects)

    def on_unreachable(self, record: InstanceRecord, reason: str, effects: list[fx.Effect]) -> None:
        """Take an instance that a call could not reach out of the rotation, until a probe reaches it."""
        if record.state is InstanceState.READY:
            record.unreachable = True
            self._move(record, InstanceState.UNHEALTHY, reason, effects)

    def advance(self, now: float, effects: list[fx.Effect]) -> None:
        """End the leases whose time has come, and forget instances that stayed lost."""
        for instance in self._fleet.pop_expired(now):
            if instance.state is not InstanceState.LOST:
                self._move(
                    instance,
                    InstanceState.LOST,
                    f"no heartbeat for {self._config.lease_duration_s:g} s",
                    effects,
                )
            instance.forget_s = now + self._config.lost_retention_s
            heapq.heappush(self._forgets, (instance.forget_s, instance.instance_id))
        while self._forgets and self._forgets[0][0] <= now:
            forget_s, instance_id = heapq.heappop(self._forgets)
            lost = self._fleet.find(instance_id)
            # It may have come back since, and been lost again later.
            if lost is not None and lost.state is InstanceState.LOST and lost.forget_s == forget_s:
                self._remove(lost)
                effects.append(fx.InstanceRemoved(instance_id, "lost and not seen again"))

    def next_timer_s(self) -> float | None:
        """Return when :meth:`advance` has something to do, or ``None``."""
        lease_s = self._fleet.next_lease_expiry_s()
        if not self._forgets:
            return lease_s
        forget_s = self._forgets[0][0]
        return forget_s if lease_s is None else min(lease_s, forget_s)

    def _remove(self, record: InstanceRecord) -> None:
        self._fleet.remove(record)
        self._prefixes.remove_instance(record.instance_id)

    def _drain(self, record: InstanceRecord, reason: str, effects: list[fx.Effect]) -> None:
        if record.state not in {InstanceState.DRAINING, InstanceState.DRAINED}:
            self._move(record, InstanceState.DRAINING, reason, effects)
            self.finish_drain(record, effects)

    def finish_drain(self, record: InstanceRecord, effects: list[fx.Effect]) -> None:
        """Note that an instance is empty, if it was draining and is."""
        if record.state is InstanceState.DRAINING and record.in_flight_count == 0:
            self._move(record, InstanceState.DRAINED, "no request is left on it", effects)

    def _follow_condition(
        self, record: InstanceRecord, condition: EngineCondition, reason: str, effects: list[fx.Effect]
    ) -> None:
        """Let an instance follow the health of its engine. A drain outlasts health."""
        if condition is not EngineCondition.UNKNOWN:
            record.condition = condition
        if record.drain:
            self._drain(record, "the drain goes on", effects)
            return
        if condition is EngineCondition.HEALTHY and record.unreachable:
            target, why = InstanceState.UNHEALTHY, "its agent is well, but calls to its engine find nobody"
        elif condition is EngineCondition.HEALTHY:
            target, why = InstanceState.READY, "the engine answers"
        elif condition is EngineCondition.UNHEALTHY:
            target, why = InstanceState.UNHEALTHY, reason or "the engine does not answer"
        elif condition is EngineCondition.STARTING and record.state is not InstanceState.READY:
            target, why = InstanceState.STARTING, reason or "the engine is loading"
        elif record.state is InstanceState.LOST:
            target, why = InstanceState.STARTING, "the agent is back"
        else:
            return
        if record.state is not target:
            self._move(record, target, why, effects)
        elif reason:
            record.state_reason = reason

    def _move(
        self, record: InstanceRecord, target: InstanceState, reason: str, effects: list[fx.Effect]
    ) -> None:
        previous = record.state
        record.machine.to(target)
        record.state_reason = reason
        self._fleet.settle(record)
        effects.append(fx.InstanceChanged(record.instance_id, target, previous, reason))
