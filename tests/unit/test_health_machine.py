"""The health of a fleet against everything at once: failures, silence, probes, beats, broken GPUs, restarts.

The machine keeps its own books from the effects, and checks after every step
what must hold whatever happens; at the end, that everything that is out is
probed, and comes back when it answers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.gpu import GpuReading, XidError
from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_health import PROBE_ANSWER_TIMEOUT_S, Outage
from sagecp.core.instance_lifecycle import DISPROOF_S
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import EngineCondition, InstanceState
from tests.support.core_world import STEP_TIME, arrive, beat, fail, healthy, probe

READY, LOST = InstanceState.READY, InstanceState.LOST
LEASE_S = 6.0
LIMITS = HealthLimits()
# Name, and other names that are served.
INSTANCES = {"a": (), "b": (), "c": ("alias",), "d": ("alias",)}
ID = st.sampled_from(sorted(INSTANCES))
CONDITION = st.sampled_from([EngineCondition.HEALTHY] * 3 + [EngineCondition.UNHEALTHY])


class HealthMachine(RuleBasedStateMachine):
    @initialize(agents=st.integers(0, 4), share=st.sampled_from([0.1, 0.5, 1.0]))
    def begin(self, agents: int, share: float) -> None:
        self.limits = HealthLimits(max_ejected_share=share)
        self.scheduler = Scheduler(
            SchedulerConfig(
                load_balancer="least_connections",
                lease_duration_s=LEASE_S,
                lost_retention_s=1e9,
                default_concurrency_limit=50,
                parameters={"dispatch.prefill_window_s": 3600.0},
                health=self.limits,
            )
        )
        self.now = 0.0
        self.number = 0
        self.fail_static = False
        self.asked: set[str] = set()
        self.falls: dict[str, list[float]] = {name: [] for name in INSTANCES}
        self.back_s: dict[str, float] = {}
        # Falls that a call is the only witness of, with what was known before.
        self.doubtful: dict[str, tuple[list[float], float]] = {}
        # What the driver has reported of each GPU since its agent started.
        self.errors: dict[str, tuple[XidError, ...]] = dict.fromkeys(INSTANCES, ())
        for number, name in enumerate(INSTANCES):
            self.join(name, incarnation=int(number < agents))

    def join(self, name: str, incarnation: int) -> None:
        self.feed(healthy(name, incarnation=incarnation, model_aliases=INSTANCES[name], step_time=STEP_TIME))

    def beat(
        self, name: str, condition: EngineCondition = EngineCondition.HEALTHY, **gauges: Any
    ) -> ev.HeartbeatReceived:
        reading = GpuReading(index=0, uuid=f"GPU-{name}", xid_errors=self.errors[name])
        incarnation = self.scheduler.fleet.get(name).incarnation
        return dataclasses.replace(beat(name, incarnation, condition, **gauges), gpus=(reading,))

    def feed(self, event: ev.Event) -> None:
        for effect in self.scheduler.handle(event, self.now):
            if isinstance(effect, fx.ProbeEngine):
                assert self.scheduler.fleet.get(effect.instance_id).health.outage is not None
                self.asked.add(effect.instance_id)
            elif isinstance(effect, fx.FailStaticChanged):
                assert effect.active is not self.fail_static
                self.fail_static = effect.active
            elif isinstance(effect, fx.InstanceChanged):
                self.book_change(effect, event)
            elif isinstance(effect, fx.InterruptAttempt):
                instance = self.scheduler.fleet.get(effect.instance_id)
                assert instance.health.outage is Outage.STALLED
                assert instance.state is not READY

    def book_change(self, effect: fx.InstanceChanged, event: ev.Event) -> None:
        name = effect.instance_id
        instance = self.scheduler.fleet.get(name)
        fleet = self.scheduler.fleet
        broken = instance.health.outage is None and effect.reason == instance.health.gpu_fault
        if effect.previous is READY and (broken or instance.health.outage is Outage.EJECTED):
            for model in instance.spec.served_models:
                ready_count = fleet.ready_count(model)
                assert ready_count, "the last instance was ejected"
                out_count = sum(
                    each.health.is_out and each.state is InstanceState.UNHEALTHY
                    for each in fleet.serving(model)
                )
                share = self.limits.max_ejected_share
                assert out_count <= max(1.0, share * (ready_count + out_count)), "too many are out"
        if effect.state is LOST and self.fail_static:
            assert instance.unreachable or instance.condition is EngineCondition.UNHEALTHY
        if effect.previous is READY and effect.state is not InstanceState.DRAINING:
            before = list(self.falls[name]), self.back_s.get(name, -math.inf)
            self.note_fall(name)
            if isinstance(event, ev.AttemptFailed) and instance.unreachable:
                self.doubtful[name] = before
        elif effect.state is READY:
            assert self.now >= self.earliest_return_s(name, alone=self.is_alone(name)), "held too short"
            self.back_s[name] = self.now

    def note_fall(self, name: str) -> None:
        falls = self.falls[name]
        quiet_since_s = max(falls[-1] if falls else -math.inf, self.back_s.get(name, -math.inf))
        if self.now - quiet_since_s >= LIMITS.quiet_s:
            falls.clear()
        falls.append(self.now)
        self.doubtful.pop(name, None)

    def is_alone(self, name: str) -> bool:
        models = self.scheduler.fleet.get(name).spec.served_models
        others = [each for each in self.scheduler.fleet if each.instance_id != name and each.state is READY]
        return any(all(model not in each.spec.served_models for each in others) for model in models)

    def earliest_return_s(self, name: str, *, alone: bool) -> float:
        """The rule for hold-downs, in other words."""
        falls = self.falls[name]
        if len(falls) < 2:
            return -math.inf
        hold_s = LIMITS.base_hold_down_s
        for _ in falls[2:]:
            hold_s = min(LIMITS.max_hold_down_s, hold_s * 2)
        return falls[-1] + (min(hold_s, LIMITS.base_hold_down_s) if alone else hold_s)

    # -- what happens ------------------------------------------------------------

    @rule(count=st.integers(1, 12), outcome=st.sampled_from(["fail", "fail", "refuse", "succeed", "run"]))
    def requests(self, count: int, outcome: str) -> None:
        """Requests run, and end alike, wherever they are."""
        for _ in range(count):
            self.number += 1
            self.feed(arrive(f"r{self.number}", "alias" if self.number % 5 == 0 else "m"))
        if outcome == "run":
            return
        for record in list(self.scheduler.requests()):
            if record.queued:
                self.feed(ev.RequestCancelled(record.request_id))
            elif outcome == "succeed":
                self.feed(ev.AttemptSucceeded(record.request_id, record.epoch, 1))
            else:
                counts = outcome == "fail"
                self.feed(
                    fail(record.request_id, record.epoch, retryable=False, counts_against_engine=counts)
                )

    @rule(name=ID, count=st.integers(1, 8), down=st.booleans())
    def one_fails(self, name: str, count: int, down: bool) -> None:
        for record in list(self.scheduler.fleet.get(name).in_flight.values())[:count]:
            self.feed(fail(record.request_id, record.epoch, retryable=False, engine_down=down))

    @rule(name=ID, silent_s=st.sampled_from([5.0, 10.0, 40.0]))
    def is_silent(self, name: str, silent_s: float) -> None:
        self.feed(ev.EngineSilent(name, silent_s))

    @rule(name=ID, condition=CONDITION, generated=st.sampled_from([None, 5, 5, 6]))
    def beats(self, name: str, condition: EngineCondition, generated: int | None) -> None:
        instance = self.scheduler.fleet.get(name)
        if instance.incarnation:
            gauges = {} if generated is None else {"running_request_count": 1}
            gauges |= {} if generated is None else {"generation_token_count": generated}
            self.feed(self.beat(name, condition, **gauges))

    @rule(name=ID, code=st.sampled_from([79, 94, 63, 13]))
    def gpu_breaks(self, name: str, code: int) -> None:
        """The driver reports an error, grave or not."""
        if self.scheduler.fleet.get(name).incarnation:
            self.errors[name] = (*self.errors[name], XidError(code, self.now))[-8:]
            self.feed(self.beat(name))

    @rule(name=ID, condition=CONDITION)
    def is_probed(self, name: str, condition: EngineCondition) -> None:
        instance = self.scheduler.fleet.get(name)
        if not instance.is_probed:
            return
        if instance.unreachable and condition is EngineCondition.HEALTHY and name in self.doubtful:
            before = self.doubtful.pop(name)
            if self.now - self.falls[name][-1] < DISPROOF_S:
                self.falls[name], self.back_s[name] = before
        self.feed(probe(name, condition))

    @rule(name=ID, answered=st.sampled_from([True, True, False]))
    def generation_is_probed(self, name: str, answered: bool) -> None:
        """Asked for, or not."""
        self.asked.discard(name)
        self.feed(ev.EngineProbed(name, answered, "" if answered else "no token"))

    @rule(name=ID)
    def agent_restarts(self, name: str) -> None:
        instance = self.scheduler.fleet.get(name)
        if not instance.incarnation:
            return
        before, held_s = instance.state, self.earliest_return_s(name, alone=self.is_alone(name))
        starts = before in {READY, InstanceState.STARTING}
        if starts or (before is not LOST and self.now < held_s):
            self.note_fall(name)
        self.errors[name] = ()
        self.join(name, instance.incarnation + 1)

    @rule(name=ID, undo=st.booleans())
    def is_drained(self, name: str, undo: bool) -> None:
        instance = self.scheduler.fleet.get(name)
        if undo is (instance.drain is not None):
            self.feed(ev.DrainRequested(name, undo=undo, force=not undo))

    @rule(duration_s=st.sampled_from([0.3, 1.0, 5.0, 31.0, 70.0]), beating=st.sets(ID))
    def time_passes(self, duration_s: float, beating: set[str]) -> None:
        """Timer by timer, as the runtime does it; some agents beat meanwhile."""
        end_s = self.now + duration_s
        while self.now < end_s:
            step_s = min(end_s, self.now + 1.0)
            next_s = self.scheduler.next_timer_s()
            self.now = max(self.now, step_s if next_s is None else min(step_s, next_s))
            for name in sorted(beating):
                instance = self.scheduler.fleet.get(name)
                if instance.incarnation and instance.state is not LOST:
                    self.feed(self.beat(name, instance.condition))
            self.look_at_clock()

    @rule(gap_s=st.sampled_from([2.0, 60.0]))
    def stands_still(self, gap_s: float) -> None:
        self.look_at_clock()
        lost = {each.instance_id for each in self.scheduler.fleet if each.state is LOST}
        self.now += gap_s
        self.feed(ev.ClockSkipped(gap_s))
        self.look_at_clock()
        assert {each.instance_id for each in self.scheduler.fleet if each.state is LOST} == lost

    def look_at_clock(self) -> None:
        self.feed(ev.ClockAdvanced())
        next_s = self.scheduler.next_timer_s()
        assert next_s is None or next_s > self.now, "the timer would fire again at once, for ever"

    # -- what always holds -------------------------------------------------------

    @invariant()
    def who_is_ready_may_work(self) -> None:
        for instance in self.scheduler.fleet:
            if instance.state is READY:
                assert not instance.health.is_out
                assert not any(fault.quarantines for fault in instance.gpu_faults)
                assert not instance.unreachable
                assert instance.drain is None
            if instance.keeps_state:
                assert instance.state is not LOST
                assert instance.incarnation

    @invariant()
    def who_is_out_will_be_probed(self) -> None:
        next_s = self.scheduler.next_timer_s()
        for instance in self.scheduler.fleet:
            health = instance.health
            if health.outage is None:
                assert health.probe_s == math.inf
            else:
                longest_s = max(LIMITS.max_ejection_s, PROBE_ANSWER_TIMEOUT_S)
                assert health.probe_s <= self.now + longest_s
                assert next_s is not None
                assert next_s <= health.probe_s

    # -- the end -----------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for record in list(self.scheduler.requests()):
            self.feed(ev.RequestCancelled(record.request_id))
        self.asked.clear()
        for name in INSTANCES:
            if self.errors[name]:
                self.agent_restarts(name)
        end_s = self.now + 400.0
        while self.now < end_s:
            self.now += 0.5
            for instance in list(self.scheduler.fleet):
                if instance.drain is not None:
                    self.feed(ev.DrainRequested(instance.instance_id, undo=True))
                if instance.is_probed:
                    self.feed(probe(instance.instance_id))
                if instance.incarnation:
                    self.feed(self.beat(instance.instance_id))
            self.look_at_clock()
            for name in sorted(self.asked):
                self.feed(ev.EngineProbed(name, answered=True))
            self.asked.clear()
        assert [each.state for each in self.scheduler.fleet] == [READY] * len(INSTANCES)
        assert not self.fail_static
        assert not any(each.gpu_faults for each in self.scheduler.fleet)
        assert not self.scheduler._instances._returns
        assert self.scheduler._instances.health.next_timer_s() is None


TestHealthMachine = HealthMachine.TestCase
TestHealthMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
