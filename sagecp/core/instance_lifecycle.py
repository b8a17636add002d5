"""How instances come, go, and follow their engines, agents, leases and operators."""

from __future__ import annotations

import heapq

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.drain_order import DrainOrder
from sagecp.core.engine_orders import check_capability
from sagecp.core.engine_state import EngineCapability
from sagecp.core.errors import StaleIncarnationError
from sagecp.core.fail_static import FailStatic
from sagecp.core.fleet import Fleet
from sagecp.core.health_book import HealthBook
from sagecp.core.instance_health import HoldDown
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.prompt_digest import BLOCK_TOKEN_COUNT as DIGEST_BLOCK_TOKENS
from sagecp.core.types import EngineCondition, EngineGauges, InstanceState

DISPROOF_S = 1.0
"""A call that found nobody is disproved by a probe that finds somebody within this time."""
SLEEPS = "its engine sleeps, and takes work when it is awake"
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
        config: Lease, retention and hold-down times.

    Attributes:
        health: Which instances are out although their engines say that they are well.
    """

    def __init__(self, fleet: Fleet, prefixes: PrefixIndex, config: SchedulerConfig) -> None:
        self._fleet = fleet
        self._prefixes = prefixes
        self._config = config
        self.health = HealthBook(fleet, config.health, self._bar, self._settle)
        self._fail_static = FailStatic(fleet, config.health, config.lease_duration_s)
        # (time, instance id): when a LOST instance is forgotten.
        self._forgets: list[tuple[float, str]] = []
        # By instance id, the last to fall last. Outlasts registrations: to leave and come back is a fall.
        self._hold_downs: dict[str, HoldDown] = {}
        # (time, instance id): when those that are held back may return.
        self._returns: list[tuple[float, str]] = []

    def on_registered(self, event: ev.InstanceRegistered, now: float, effects: list[fx.Effect]) -> None:
        """An instance joins, or a newer incarnation replaces an older one."""
        previous = self._fleet.find(event.instance.instance_id)
        if previous is not None and not self._was_restarted(previous, event.incarnation, now):
            previous = None
        record = self._fleet.add(event.instance, event.incarnation, now)
        record.agent_version = event.agent_version
        if previous is not None:
            self._note_fall(record.instance_id, now)
        record.health.forget_progress(now)
        self.health.probe_soon(record, now)
        # A new registration may mean a new engine: its cache is taken for empty.
        self._expect_empty_cache(record)
        # An agent in a restart loop would have the same written down many times a second.
        if previous is None or previous.state is not record.state or previous.spec != record.spec:
            effects.append(fx.InstanceChanged(record.instance_id, record.state, None, "registered"))
        if event.incarnation:
            self._fleet.extend_lease(record, now + self._config.lease_duration_s)
        self._follow_condition(record, event.condition, "", now, effects)

    def on_restored(self, event: ev.InstanceRestored, now: float, effects: list[fx.Effect]) -> None:
        """An instance that was registered before a restart is there again, and must show that it lives."""
        self.on_registered(ev.InstanceRegistered(event.instance, event.incarnation), now, effects)
        record = self._fleet.get(event.instance.instance_id)
        record.desired_lora_adapters = event.lora_adapters
        if event.draining:
            record.drain = DrainOrder(now, sleep_level=event.sleep_level)
            self._drain(record, "the drain goes on", effects)

    def on_deregistered(self, event: ev.InstanceDeregistered, now: float, effects: list[fx.Effect]) -> None:
        """An instance leaves."""
        record = self._fleet.get(event.instance_id, event.incarnation)
        if record.incarnation and record.state is InstanceState.READY:
            self._note_fall(record.instance_id, now)
        self._remove(record)
        effects.append(fx.InstanceRemoved(event.instance_id, event.cause or "deregistered"))

    def on_heartbeat(self, event: ev.HeartbeatReceived, now: float, effects: list[fx.Effect]) -> None:
        """An agent reported.

        Raises:
            InstanceNotFoundError: It is not registered, or was not with this newer incarnation.
            StaleIncarnationError: A newer incarnation is registered.
        """
        record = self._fleet.get(event.instance_id, event.incarnation)
        if event.incarnation != record.incarnation:
            raise StaleIncarnationError(event.instance_id, event.incarnation, record.incarnation)
        record.heartbeat_s = now
        self._note_agent(record, event, effects)
        record.gpus = event.gpus
        record.gpu_absent_reason = event.gpu_absent_reason
        if _restarted(record.gauges, event.gauges):
            record.load.forget(now)
            # Closed for the work that the engine has lost.
            self._fleet.open_gate(record)
            # Reports of its cache have said so by themselves, and may be ahead of its gauges.
            self._expect_empty_cache(record, keep_reported=True)
            record.health.forget_progress(now)
            record.gpu_watch.note_engine_restart()
            self.health.probe_soon(record, now)
        record.follow_gauges(event.gauges)
        self._fleet.settle(record)
        self._fleet.extend_lease(record, now + self._config.lease_duration_s)
        record.keeps_state = False
        may_return = self.health.note_gpus(record, event, now, effects)
        self._follow_condition(record, event.condition, event.condition_reason, now, effects)
        if may_return and event.condition is EngineCondition.UNKNOWN:
            self._settle(record, now, effects)
        self.health.note_gauges(record, event.gauges, now, effects)
        self._fail_static.check(now, effects)

    @staticmethod
    def _note_agent(record: InstanceRecord, event: ev.HeartbeatReceived, effects: list[fx.Effect]) -> None:
        """Take what a report says beside the state of engine and GPUs."""
        name = record.instance_id
        if record.clock.note(event.clock_offset_s):
            effects.append(fx.ClockSkewChanged(name, record.clock.offset_s or 0.0, record.clock.skewed))
        previous, process = record.engine_process, event.process
        record.engine_process = process
        if process is not None and (
            previous is None
            or previous.state is not process.state
            or previous.restart_count != process.restart_count
        ):
            effects.append(fx.EngineProcessChanged(name, previous, process))
        if event.order_trouble and event.order_trouble != record.order_trouble:
            effects.append(fx.OrderTroubled(name, event.order_trouble))
        record.order_trouble = event.order_trouble
        if event.refusals:
            record.refused_heartbeat_count += 1
            record.heartbeat_refusal = "; ".join(event.refusals)

    def on_heartbeat_refused(self, event: ev.HeartbeatRefused, now: float, effects: list[fx.Effect]) -> None:
        """A report was refused: it says nothing of the instance, but somebody should know."""
        record = self._fleet.find(event.instance_id)
        if record is not None:
            record.refused_heartbeat_count += 1
            record.heartbeat_refusal = event.why

    def on_lora_adapters_requested(
        self, event: ev.LoraAdaptersRequested, now: float, effects: list[fx.Effect]
    ) -> None:
        """An operator says which LoRA adapters an engine should have. Its agent sees to it.

        Raises:
            InstanceNotFoundError: It is not registered.
            IllegalOrderError: It cannot be told so.
        """
        record = self._fleet.get(event.instance_id)
        if event.adapters is not None:
            check_capability(record.spec, record.incarnation, EngineCapability.LORA)
        record.desired_lora_adapters = event.adapters

    def on_health_probed(self, event: ev.HealthProbed, now: float, effects: list[fx.Effect]) -> None:
        """The control plane asked an engine itself."""
        record = self._fleet.find(event.instance_id)
        if record is not None:
            is_unreachable = event.condition is EngineCondition.UNHEALTHY
            if record.unreachable and not is_unreachable:
                self._take_fall_back(record, now)
            record.unreachable = is_unreachable
            if record.incarnation and record.state is InstanceState.LOST:
                return  # Its agent must come back first: without a lease nobody would notice its end.
            if record.keeps_state and record.unreachable and record.lease_expire_s is None:
                # It is LOST unless it answers, or its agent is back, within the time of a lease.
                self._fleet.extend_lease(record, now + self._config.lease_duration_s)
            self._follow_condition(record, event.condition, event.condition_reason, now, effects)

    def on_clock_skipped(self, event: ev.ClockSkipped, now: float, effects: list[fx.Effect]) -> None:
        """The control plane stood still: no lease ends for beats that it could not hear."""
        for record in self._fleet:
            if record.lease_expire_s is not None:
                self._fleet.extend_lease(record, record.lease_expire_s + event.gap_s)
            record.health.skip(event.gap_s)

    def start_drain(self, record: InstanceRecord, reason: str, effects: list[fx.Effect]) -> None:
        """Carry the order to drain an instance out; a LOST one starts when its agent is back."""
        if record.state is InstanceState.DRAINING:
            record.state_reason = reason
        elif record.state is not InstanceState.LOST:
            self._drain(record, reason, effects)

    def end_drain(self, record: InstanceRecord, now: float, effects: list[fx.Effect]) -> None:
        """Lead an instance whose drain was undone to where its engine's condition would have led."""
        if record.state is InstanceState.LOST:
            return
        why = "drain undone"
        if record.unreachable or record.condition is EngineCondition.UNHEALTHY:
            target = InstanceState.UNHEALTHY
        elif record.condition is EngineCondition.HEALTHY:
            target, unfit = self._target_of_well(record, now)
            why = why if target is InstanceState.READY else unfit
        else:
            target = InstanceState.STARTING
        self._move(record, target, why, now, effects)

    def on_unreachable(
        self, record: InstanceRecord, reason: str, now: float, effects: list[fx.Effect]
    ) -> None:
        """Take an instance that a call could not reach out of the rotation, until a probe reaches it."""
        if record.state is InstanceState.READY:
            record.unreachable = True
            self._move(record, InstanceState.UNHEALTHY, reason, now, effects)
            self._hold_downs[record.instance_id].doubtful = True

    def advance(self, now: float, effects: list[fx.Effect]) -> None:
        """End leases, outages and hold-downs whose time has come, and forget instances that stayed lost."""
        lost_records = self._fail_static.keep(self._fleet.pop_expired(now), now, effects)
        for record in lost_records:
            self._lose(record, now, effects)
        if lost_records:
            self._fail_static.check(now, effects, at_once=True)
        while self._forgets and self._forgets[0][0] <= now:
            forget_s, instance_id = heapq.heappop(self._forgets)
            lost = self._fleet.find(instance_id)
            # It may have come back since, and been lost again later.
            if lost is not None and lost.state is InstanceState.LOST and lost.forget_s == forget_s:
                self._remove(lost)
                effects.append(fx.InstanceRemoved(instance_id, "lost and not seen again"))
        while self._returns and self._returns[0][0] <= now:
            held = self._fleet.find(heapq.heappop(self._returns)[1])
            if held is not None:
                self._settle(held, now, effects)
        self.health.advance(now, effects)

    def next_timer_s(self) -> float | None:
        """Return when :meth:`advance` has something to do, or ``None``."""
        times_s = [self._fleet.next_lease_expiry_s(), self.health.next_timer_s()]
        times_s += [heap[0][0] for heap in (self._forgets, self._returns) if heap]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def _lose(self, record: InstanceRecord, now: float, effects: list[fx.Effect]) -> None:
        if record.state is not InstanceState.LOST:
            reason = f"no heartbeat for {self._config.lease_duration_s:g} s"
            if record.keeps_state:
                reason = "no heartbeat, and its engine does not answer"
            self._move(record, InstanceState.LOST, reason, now, effects)
        record.keeps_state = False
        record.lost_s = now
        record.forget_s = now + self._config.lost_retention_s
        heapq.heappush(self._forgets, (record.forget_s, record.instance_id))

    def _expect_empty_cache(self, record: InstanceRecord, *, keep_reported: bool = False) -> None:
        capacity = record.spec.key_value_token_capacity or UNKNOWN_CAPACITY_TOKENS
        self._prefixes.add_instance(
            record.instance_id, capacity // DIGEST_BLOCK_TOKENS, keep_reported=keep_reported
        )

    def _remove(self, record: InstanceRecord) -> None:
        self._fleet.remove(record)
        self._prefixes.remove_instance(record.instance_id)

    def _drain(self, record: InstanceRecord, reason: str, effects: list[fx.Effect]) -> None:
        if record.state not in {InstanceState.DRAINING, InstanceState.DRAINED}:
            self._step(record, InstanceState.DRAINING, reason, effects)
            self.finish_drain(record, effects)

    def finish_drain(self, record: InstanceRecord, effects: list[fx.Effect]) -> None:
        """Note that an instance is empty, if it was draining and is."""
        if record.state is InstanceState.DRAINING and record.in_flight_count == 0:
            self._step(record, InstanceState.DRAINED, self._why_drained(record), effects)

    @staticmethod
    def _why_drained(record: InstanceRecord) -> str:
        if record.drain is None or not record.drain.sleep_level:
            return "no request is left on it"
        what = "its engine sleeps" if record.sleeping else "its engine is told to sleep"
        return f"no request is left on it, and {what} at level {record.drain.sleep_level}"

    def _follow_condition(
        self,
        record: InstanceRecord,
        condition: EngineCondition,
        reason: str,
        now: float,
        effects: list[fx.Effect],
    ) -> None:
        """Let an instance follow the health of its engine. A drain outlasts health."""
        if condition is not EngineCondition.UNKNOWN:
            record.condition = condition
        if record.drain is not None:
            self._drain(record, "the drain goes on", effects)
            if record.state is InstanceState.DRAINED:
                record.state_reason = self._why_drained(record)
            return
        if condition is EngineCondition.HEALTHY:
            target, why = self._target_of_well(record, now)
        elif condition is EngineCondition.UNHEALTHY:
            target, why = InstanceState.UNHEALTHY, reason or "the engine does not answer"
        elif condition is EngineCondition.STARTING and record.state is not InstanceState.READY:
            target, why = InstanceState.STARTING, reason or "the engine is loading"
        elif record.state is InstanceState.LOST:
            target, why = InstanceState.STARTING, "the agent is back"
        else:
            return
        if record.state is not target:
            self._move(record, target, why, now, effects)
        elif reason or target is InstanceState.UNHEALTHY or condition is EngineCondition.HEALTHY:
            record.state_reason = reason or why

    def _target_of_well(self, record: InstanceRecord, now: float) -> tuple[InstanceState, str]:
        """Return the state of an instance whose engine says that it is well, and why."""
        if record.unreachable:
            return InstanceState.UNHEALTHY, "its agent is well, but calls to its engine find nobody"
        if record.health.outage is not None:
            return InstanceState.UNHEALTHY, record.health.why
        if record.health.gpu_fault:
            return InstanceState.UNHEALTHY, record.health.gpu_fault
        if record.sleeping:
            works = record.state in {InstanceState.READY, InstanceState.UNHEALTHY}
            return InstanceState.UNHEALTHY if works else InstanceState.STARTING, SLEEPS
        held = self._hold_downs.get(record.instance_id)
        if held is not None and record.state is not InstanceState.READY:
            until_s = self._held_until_s(record, held)
            if now < until_s:
                if held.awaited_s != until_s:
                    held.awaited_s = until_s
                    heapq.heappush(self._returns, (until_s, record.instance_id))
                held_s = until_s - held.fall_s
                why = (
                    f"it fell out {held.fall_count} times within a short time, now for {held_s:g} s at least"
                )
                # One step less for each restart of an agent that restarts again and again.
                starts = record.state is InstanceState.STARTING
                return InstanceState.STARTING if starts else InstanceState.UNHEALTHY, why
        return InstanceState.READY, record.health.gpu_warning or "the engine answers"

    def _bar(self, record: InstanceRecord, why: str, now: float, effects: list[fx.Effect]) -> None:
        """Take an instance out of the rotation although its engine may say that it is well."""
        if record.state is InstanceState.READY:
            self._move(record, InstanceState.UNHEALTHY, why, now, effects)
        elif record.state is InstanceState.UNHEALTHY:
            record.state_reason = why

    def _settle(self, record: InstanceRecord, now: float, effects: list[fx.Effect]) -> None:
        """Lead an instance that was kept out to where its engine's condition leads."""
        if record.state in {InstanceState.UNHEALTHY, InstanceState.STARTING}:
            self._follow_condition(record, record.condition, "", now, effects)

    # -- hold-downs --------------------------------------------------------------

    def _was_restarted(self, previous: InstanceRecord, incarnation: int, now: float) -> bool:
        """Whether a registration tells of an agent that restarted beside an engine that serves, or will."""
        if not 0 < previous.incarnation < incarnation:
            return False
        if previous.state in {InstanceState.READY, InstanceState.STARTING}:
            return True
        held = self._hold_downs.get(previous.instance_id)
        return (
            held is not None
            and previous.state is not InstanceState.LOST
            and now < self._held_until_s(previous, held)
        )

    def _held_until_s(self, record: InstanceRecord, held: HoldDown) -> float:
        limits = self._config.health
        until_s = held.until_s(limits)
        if any(self._fleet.ready_count(model) == 0 for model in record.spec.served_models):
            # A wavering instance is better than none.
            until_s = min(until_s, held.fall_s + limits.base_hold_down_s)
        return until_s

    def _take_fall_back(self, record: InstanceRecord, now: float) -> None:
        """A probe found an engine whose port had answered nobody: if only just, that was no fall.

        It counts as a failure of a call, like any other.
        """
        held = self._hold_downs.get(record.instance_id)
        if held is not None and held.doubtful and now - held.fall_s < DISPROOF_S:
            held.take_back()

    def _note_fall(self, instance_id: str, now: float) -> None:
        held = self._hold_downs.pop(instance_id, None) or HoldDown()
        held.note_fall(now, self._config.health)
        self._hold_downs[instance_id] = held
        if len(self._hold_downs) > self._config.max_instance_count:
            del self._hold_downs[next(iter(self._hold_downs))]

    # -- steps -------------------------------------------------------------------

    def _move(
        self, record: InstanceRecord, target: InstanceState, reason: str, now: float, effects: list[fx.Effect]
    ) -> None:
        """Take a step between states that have to do with health."""
        previous = record.state
        self._step(record, target, reason, effects)
        if target is InstanceState.READY:
            held = self._hold_downs.get(record.instance_id)
            if held is not None:
                held.note_return(now)
        elif previous is InstanceState.READY:
            self._note_fall(record.instance_id, now)
            self.health.probe_last_resorts(record, now)

    def _step(
        self, record: InstanceRecord, target: InstanceState, reason: str, effects: list[fx.Effect]
    ) -> None:
        previous = record.state
        record.machine.to(target)
        record.state_reason = reason
        self._fleet.settle(record)
        effects.append(fx.InstanceChanged(record.instance_id, target, previous, reason))
