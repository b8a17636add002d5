"""The scheduler against everything at once: random events, and what must hold after each.

The machine keeps its own books from the effects alone and compares them with
the scheduler's after every step. At the end it finishes all work, looks for
anything left over, and replays the log of events into a second scheduler,
which must do exactly the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.dispatcher import STEP_OVER_LIMIT
from sagecp.core.engine_state import KvCacheUpdate
from sagecp.core.errors import ErrorReason, Failure, InfeasibleError, SageError
from sagecp.core.failover import ENGINE_KILL_LIMIT
from sagecp.core.fair_line import FairLine
from sagecp.core.instance_health import Outage
from sagecp.core.instance_record import KEY_VALUE_USAGE_LIMIT, InstanceRecord
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.policy_replay import PolicyScore
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.receipts import RECEIPT_CANDIDATE_LIMIT, run_again
from sagecp.core.request import RequestRecord
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.scheduler import Scheduler
from sagecp.core.service_books import LaneKey, lane_key, tenant_of
from sagecp.core.settings import SettingsChange
from sagecp.core.slo_line import SloLine
from sagecp.core.states import INSTANCE_TRANSITIONS
from sagecp.core.types import (
    EngineCondition,
    EngineGauges,
    FailoverMode,
    InstanceState,
    PromptDigest,
    RequestMetadata,
    RequestPriority,
    RequestState,
    SamplingParameters,
)
from sagecp.core.waiting_line import KeyedLine, WaitingLine
from tests.support.core_world import (
    ENGINE_FAILED,
    LOST_CONNECTION,
    REJECTED,
    STEP_TIME,
    full_text,
    make_instance,
)

MODELS = ("m1", "m2", "alias")
INSTANCE_IDS = ("a", "b", "c")
# Prefills of a few thousand tokens take longer than the window: gates close.
SLOW = StepTimeParameters(
    overhead_s=0.01,
    memory_base_s=0.06,
    memory_per_token_s=60e-6,
    compute_base_s=0.02,
    compute_per_token_s=300e-6,
    context_per_token_s=5e-7,
    attention_per_token_pair_s=1e-8,
)
# What is drawn from, by hypothesis and by chance.
INSTANCE_CHOICES: dict[str, list[Any]] = {
    "model": ["m1", "m1", "m1", "m1", "m2", "alias"],
    "model_aliases": [(), ("alias",), ("m1", "m2")],
    "limit": [None, 1, 3, 8],
    "capacity": [None, None, None, 60, 200],
    "max_context_token_count": [None, None, 32],
    "step_time": [None, STEP_TIME, SLOW, SLOW, SLOW],
    "usd_per_gpu_hour": [None, 0.5, 4.0],
}
REQUEST_CHOICES: dict[str, list[Any]] = {
    "priority": list(RequestPriority),
    "prompt": [(0, False), (40, False), (400, False), (400, True), (3000, True), (3000, True)],
    "slo_deadline_ms": [None, None, 3000.0, 30000.0],
    "ttft_slo_ms": [None, None, None, 50.0, 2000.0],
    "tpot_slo_ms": [None, None, 20.0, 200.0],
    "cost_budget": [None, None, None, None, 1e-5, 10.0],
    "failover_mode": [FailoverMode.DEFAULT, *FailoverMode],
    "tenant_id": ["", "small", "large", "large"],
    "user_id": ["", "ann", "bob"],
    "session_id": ["", "", "talk"],
    "max_tokens": [16, 16, 16, None],
    "choice_count": [1, 1, 1, 3],
}
SETTINGS_CHOICES: dict[str, list[Any]] = {
    "scheduling_policy": ["", *SCHEDULING_POLICIES.names * 3, "no-such-policy"],
    # Most often the pair that may wait for a better instance.
    "routing_strategy": [*[""] * 4, *ROUTING_STRATEGIES.names, *["load_balanced"] * 8, "no-such-strategy"],
    "load_balancer": [*[""] * 4, *LOAD_BALANCERS.names, *["predicted_latency"] * 8, "no-such-balancer"],
    "parameters": [
        {},
        {},
        {"dispatch.prefill_window_s": 0.05, "dispatch.patience": 0.5},
        {"dispatch.prefill_window_s": 3600.0},
        {"dispatch.patience": 10.0, "admission.refuse_infeasible": 0.0},
        {"slo_aware.work_weight": 0.0, "slo_aware.best_effort_share": 0.5, "objectives.tpot_s": 0.02},
        {"slo_aware.demote_probability": 0.01, "objectives.ttft_base_s": 0.1},
        {"priority.boost_high_s": 1.0, "affinity.load_bound": 1.0},
        {"no-such.parameter": 1.0},
        {"dispatch.patience": math.nan},
        {"slo_aware.best_effort_share": 1.0},
    ],
    "reset_parameters": [False, False, False, True],
    "expected_version": [0, 0, 0, 0, 0, 0, 1, 10_000],
    "revert_to_version": [0, 0, 0, 0, 0, 0, 1, 2, 10_000],
}


def any_of(choices: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


INSTANCE = any_of(INSTANCE_CHOICES)
CONDITION = st.sampled_from([*[EngineCondition.HEALTHY] * 4, *EngineCondition])
REQUEST_IDS = [f"r{number}" for number in range(150)]
CHOICE = st.integers(0, 11)
QUEUE_TIMEOUT_S = 20.0
LEASE_S = 6.0
RETENTION_S = 15.0
MAX_ATTEMPTS = 3
# In ten seconds: a gate whose engine is late opens after twice the time, again and again.
MOST_WAKE_UPS = 300


@dataclass(frozen=True)
class Move:
    """What happens to an attempt."""

    kind: str
    failure: Failure = ENGINE_FAILED
    retryable: bool = True
    engine_down: bool = False
    token_count: int = 0
    cannot_continue: str = ""
    engine_died: bool = False
    counts: bool = True


MOVE = st.one_of(
    st.builds(Move, st.sampled_from(["progress", "succeed", "succeed"])),
    st.builds(
        Move,
        st.just("fail"),
        st.sampled_from([LOST_CONNECTION, ENGINE_FAILED, REJECTED]),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([False, False, True]),
        st.sampled_from([1, 5, 300]),
        st.sampled_from(["", "", "it uses tools"]),
        st.booleans(),
        st.sampled_from([True, True, False]),
    ),
)


@dataclass
class Live:
    """What the machine knows of an accepted request, from effects alone."""

    record: RequestRecord
    wait_since_s: float
    running_on: str = ""
    # Counts the engines that had the instance's name: this one's was the present.
    engine_number: int = 0
    charged: bool = False
    epoch: int = 0
    delivered: bool = False
    has_output: bool = False
    token_count: int = 0
    lost_count: int = 0
    lost_on: set[str] = field(default_factory=set)


def pick(names: list[str], choice: int) -> str:
    return names[choice % len(names)]


def room(instance: InstanceRecord, request: RequestRecord) -> bool:
    """The rule for room, said once more in other words than the fleet's."""
    if instance.state is not InstanceState.READY:
        return False
    held = list(instance.in_flight.values())
    if not held:
        return True
    if instance.gate_closed:
        return False
    usage = instance.gauges.key_value_cache_usage if instance.gauges else None
    if len(held) >= instance.concurrency_limit or (usage is not None and usage >= KEY_VALUE_USAGE_LIMIT):
        return False
    capacity = instance.spec.key_value_token_capacity
    return capacity is None or sum(map(instance.token_need, [*held, request])) <= capacity


def token_limit(instance: InstanceRecord) -> float:
    """Most tokens that one request can have on an instance, as far as is known."""
    spec = instance.spec
    return min(spec.key_value_token_capacity or math.inf, spec.max_context_token_count or math.inf)


def least_limit(request: RequestRecord, serving: list[InstanceRecord]) -> int:
    """What an instance must hold to be one for a request: its prompt and a token, if any READY one can."""
    certain = request.prompt_token_count + 1
    ready = [each for each in serving if each.state is InstanceState.READY]
    return certain if any(token_limit(each) >= certain for each in ready) else 0


def takers(request: RequestRecord, serving: list[InstanceRecord]) -> set[str]:
    """The instances that could take a request now, in other words than the fleet's."""
    least = least_limit(request, serving)
    return {i.instance_id for i in serving if room(i, request) and token_limit(i) >= least}


def kinds_of(records: Iterable[RequestRecord]) -> Counter[tuple[str, str, int]]:
    return Counter((each.model, each.metadata.tenant_id, each.metadata.priority.value) for each in records)


def blocks_of(token_count: int, choice: int) -> tuple[int, ...]:
    """Hashes of blocks of 16 tokens: even choices share their first half, odd ones all."""
    count = token_count // 16
    if choice % 2:
        return tuple(range(count))
    return (*range(count // 2), *range(10_000 * (choice + 1), 10_000 * (choice + 1) + count - count // 2))


def heads_of(line: WaitingLine, now: float) -> Iterator[RequestRecord]:
    """Walk through a line as the dispatcher does, and leave it as it was."""
    try:
        for _ in range(len(line)):
            head = line.head(now)
            if head is None:
                return
            yield head
            line.step_over()
    finally:
        line.step_back()


def was_looked_at(line: FairLine) -> bool:
    """Whether a look at its head leaves it as it is: the first one decides where newcomers stand."""
    return not any(lane.newcomers for lane in line._lanes.values())


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(SCHEDULING_POLICIES.names),
        strategy=st.sampled_from(ROUTING_STRATEGIES.names),
        balancer=st.sampled_from(LOAD_BALANCERS.names),
        queue_limit=st.sampled_from([100, 100, 3]),
        byte_limit=st.sampled_from([1 << 20, 1 << 20, 900]),
        fleet=st.lists(st.tuples(INSTANCE, CONDITION), min_size=1, max_size=3),
        start_s=st.sampled_from([0.0, 1e7, 1.7e9]),
    )
    def begin(
        self,
        policy: str,
        strategy: str,
        balancer: str,
        queue_limit: int,
        byte_limit: int,
        fleet: list[tuple[dict[str, Any], EngineCondition]],
        start_s: float,
    ) -> None:
        self.config = SchedulerConfig(
            scheduling_policy=policy,
            routing_strategy=strategy,
            load_balancer=balancer,
            max_queued_request_count=queue_limit,
            max_queued_bytes=byte_limit,
            max_instance_count=len(INSTANCE_IDS),
            default_concurrency_limit=2,
            max_attempt_count=MAX_ATTEMPTS,
            queue_timeout_s=QUEUE_TIMEOUT_S,
            lease_duration_s=LEASE_S,
            lost_retention_s=RETENTION_S,
        )
        self.scheduler = Scheduler(self.config)
        # Large times are coarse: a host that has been up for long, or seconds since 1970.
        self.now = start_s
        self.log: list[tuple[ev.Event, float]] = []
        self.texts: list[str] = []
        self.live: dict[str, Live] = {}
        self.accepted_count = self.ended_count = 0
        self.states: dict[str, InstanceState] = {}
        self.lost_since: dict[str, float] = {}
        self.engine_numbers: Counter[str] = Counter()
        self.asked_evaluation_id = 0
        self.interrupted: set[tuple[str, int]] = set()
        self.leases: dict[str, float] = {}
        self.fail_static = False
        self.probed_ids: set[str] = set()
        self.version = 1
        for instance_id, (kind, condition) in zip(INSTANCE_IDS, fleet, strict=False):
            self.join(instance_id, 1, kind, condition)

    # -- feeding, and the books -----------------------------------------------------

    def feed(self, event: ev.Event) -> list[fx.Effect]:
        self.log.append((event, self.now))
        before = self.snapshot()
        restarts = isinstance(event, ev.HeartbeatReceived) and self.tells_of_restart(event)
        try:
            effects = self.scheduler.handle(event, self.now)
        except SageError as error:
            self.texts.append(f"{type(error).__name__}: {error}")
            assert self.snapshot() == before, "an event that was refused changed something"
            return []
        if restarts and isinstance(event, ev.HeartbeatReceived):
            self.engine_numbers[event.instance_id] += 1
        # Records change later: say now what they are now.
        self.texts.extend(map(full_text, effects))
        for position, effect in enumerate(effects):
            self.book(effect, event, effects[:position])
        if isinstance(event, ev.InstanceRegistered) and not any(
            isinstance(effect, fx.InstanceChanged) for effect in effects
        ):
            self.book_quiet_registration(event)
        return effects

    def tells_of_restart(self, event: ev.HeartbeatReceived) -> bool:
        """Whether a counter that runs from the engine's start went back."""
        instance = self.scheduler.fleet.find(event.instance_id)
        counts = [
            gauges.prompt_token_count
            for gauges in (instance.gauges if instance else None, event.gauges)
            if gauges is not None and gauges.prompt_token_count is not None
        ]
        return len(counts) == 2 and counts[1] < counts[0]

    def snapshot(self) -> object:
        scheduler = self.scheduler
        return (
            {r.request_id: (r.state, r.epoch, r.queued, r.expire_s) for r in scheduler.requests()},
            {
                i.instance_id: (id(i), i.state, str(i.drain), i.in_flight_count, i.lease_expire_s)
                for i in scheduler.fleet
            },
            (len(scheduler.queue), scheduler.queue.size_bytes, scheduler.queue.work_s),
            (scheduler.settings.current, scheduler.policy_in_force, scheduler.next_timer_s()),
        )

    def book(self, effect: fx.Effect, event: ev.Event, earlier: list[fx.Effect]) -> None:
        match effect:
            case fx.RequestAccepted(record):
                assert record.request_id not in self.live
                assert isinstance(event, ev.RequestArrived)
                self.accepted_count += 1
                self.live[record.request_id] = Live(record, self.now)
            case fx.RequestRejected(request_id, error):
                assert request_id not in self.live
                assert isinstance(event, ev.RequestArrived)
                if error.reason is ErrorReason.INFEASIBLE:
                    self.book_refusal(event.metadata, error)
                else:
                    assert error.reason in {ErrorReason.QUEUE_FULL, ErrorReason.MODEL_NOT_FOUND}
            case fx.DispatchAttempt(record, epoch, instance_id):
                self.book_dispatch(record, epoch, instance_id, effect)
            case fx.AbortAttempt(request_id, epoch, instance_id):
                live = self.live[request_id]
                assert (live.running_on, live.epoch) == (instance_id, epoch)
                assert not isinstance(event, (ev.AttemptSucceeded, ev.AttemptFailed)), "it was over"
            case fx.InterruptAttempt(request_id, epoch, instance_id):
                self.book_interruption(effect)
            case fx.RequestRequeued(record):
                live = self.live[record.request_id]
                assert isinstance(event, ev.AttemptFailed)
                assert event.retryable
                assert live.running_on
                mode = record.metadata.failover_mode
                assert mode is not FailoverMode.FAIL
                if live.has_output:
                    assert not event.cannot_continue, "output of two attempts would be mixed"
                    assert mode is not FailoverMode.RESTART
                live.lost_count += event.counts
                assert live.lost_count < MAX_ATTEMPTS
                assert record.engine_kill_count < ENGINE_KILL_LIMIT
                assert record.output_token_count == live.token_count, "the next goes on after what there is"
                live.lost_on.add(live.running_on)
                live.running_on, live.wait_since_s = "", self.now
            case fx.RequestEnded(record, state, failure):
                self.book_end(record, state, failure, event, earlier)
            case fx.InstanceChanged(instance_id, state, previous):
                if previous is None:
                    assert isinstance(event, ev.InstanceRegistered)
                    self.engine_numbers[instance_id] += 1
                else:
                    assert self.states[instance_id] is previous
                    assert state in INSTANCE_TRANSITIONS[previous]
                    self.book_health(instance_id, state, previous)
                self.states[instance_id] = state
                self.lost_since.pop(instance_id, None)
                if state is InstanceState.LOST:
                    assert self.leases.pop(instance_id) <= self.now, "lost before its lease ended"
                    self.lost_since[instance_id] = self.now
            case fx.InstanceRemoved(instance_id):
                if not isinstance(event, ev.InstanceDeregistered):
                    assert self.now >= self.lost_since[instance_id] + RETENTION_S, "forgotten too early"
                del self.states[instance_id]
                self.leases.pop(instance_id, None)
                self.lost_since.pop(instance_id, None)
            case fx.ProbeEngine(instance_id):
                assert self.scheduler.fleet.get(instance_id).health.outage is not None
                self.probed_ids.add(instance_id)
            case fx.FailStaticChanged(active):
                assert active is not self.fail_static
                self.fail_static = active
            case fx.SettingsChanged(changed):
                assert isinstance(event, ev.SchedulingConfigured)
                assert changed is self.scheduler.settings.current
                self.version += 1
                assert changed.version == self.version
            case fx.EvaluatePolicies(replay):
                assert self.scheduler.settings.current.scheduling_policy == "adaptive"
                assert self.scheduler.policy_in_force in replay.candidates
                assert replay.evaluation_id > self.asked_evaluation_id
                self.asked_evaluation_id = replay.evaluation_id
            case fx.PolicySwitched(previous_policy, policy, why):
                assert isinstance(event, ev.PoliciesEvaluated)
                assert previous_policy != policy
                assert self.scheduler.policy_in_force == policy
                assert self.scheduler.why_policy() == why

    def book_quiet_registration(self, event: ev.InstanceRegistered) -> None:
        """An agent restarted again, while its instance is held back for restarts."""
        instance = self.scheduler.fleet.get(event.instance.instance_id)
        assert instance.incarnation == event.incarnation
        assert instance.state is self.states[instance.instance_id] is InstanceState.STARTING
        self.engine_numbers[instance.instance_id] += 1

    def book_health(self, instance_id: str, state: InstanceState, previous: InstanceState) -> None:
        """An instance that leaves the rotation does so for a reason, and one that returns has none left."""
        instance = self.scheduler.fleet.get(instance_id)
        if state is InstanceState.READY:
            assert instance.health.outage is None
            assert not instance.unreachable
        if state is InstanceState.LOST and self.fail_static:
            assert instance.unreachable or instance.condition is EngineCondition.UNHEALTHY
        if previous is InstanceState.READY and instance.health.outage is Outage.EJECTED:
            for model in instance.spec.served_models:
                assert self.scheduler.fleet.ready_count(model), "the last one was ejected"

    def book_interruption(self, effect: fx.InterruptAttempt) -> None:
        live = self.live[effect.request_id]
        assert (live.running_on, live.epoch) == (effect.instance_id, effect.epoch)
        self.interrupted.add((effect.request_id, effect.epoch))
        if effect.counts:
            instance = self.scheduler.fleet.get(effect.instance_id)
            assert instance.health.outage is Outage.STALLED
            assert instance.state is not InstanceState.READY
            return
        # Moved on purpose: because its instance drains, and the time it was given is over.
        assert not effect.must_stop
        assert live.record.metadata.failover_mode is not FailoverMode.FAIL
        instance = self.scheduler.fleet.get(effect.instance_id)
        assert instance.drain is not None
        assert instance.drain.grace_end_s is not None
        assert instance.drain.grace_end_s <= self.now, "moved too early"
        assert self.scheduler.fleet.ready_count(live.record.model), "moved to nowhere"

    def book_refusal(self, metadata: RequestMetadata, error: SageError) -> None:
        assert isinstance(error, InfeasibleError)
        assert metadata.slo_deadline_ms is not None or metadata.cost_budget is not None
        assert error.retry_after_s is None or 0.1 <= error.retry_after_s <= 60.0
        if "deadline_s" in error.metadata:
            assert metadata.slo_deadline_ms == float(error.metadata["deadline_s"]) * 1000.0
            assert float(error.metadata["predicted_finish_s"]) > float(error.metadata["deadline_s"])
        else:
            assert metadata.cost_budget is not None
            assert float(error.metadata["predicted_cost_usd"]) > metadata.cost_budget

    def book_dispatch(
        self, record: RequestRecord, epoch: int, instance_id: str, effect: fx.DispatchAttempt
    ) -> None:
        live = self.live[record.request_id]
        assert not live.running_on, "dispatched twice at once"
        assert epoch == live.epoch + 1
        live.running_on, live.epoch, live.delivered = instance_id, epoch, False
        live.engine_number = self.engine_numbers[instance_id]
        live.charged = effect.decision.policy_in_force == "priority"
        instance = self.scheduler.fleet.get(instance_id)
        assert instance.state is InstanceState.READY
        assert instance.drain is None, "work for an instance that drains"
        assert record.model in instance.spec.served_models
        here = sum(other.running_on == instance_id for other in self.live.values())
        assert here == 1 or here <= instance.concurrency_limit, "more than the limit"
        if instance_id in live.lost_on:
            serving = self.scheduler.fleet.serving(record.model)
            least = least_limit(record, serving)
            better = [
                other.instance_id
                for other in serving
                if other.state is InstanceState.READY
                and other.instance_id not in live.lost_on
                and token_limit(other) >= least
            ]
            assert not better, f"went back to {instance_id} although {better} may work"
        decision = effect.decision
        assert (decision.request_id, decision.epoch, decision.instance_id) == (
            record.request_id,
            epoch,
            instance_id,
        )
        assert run_again(decision) == (instance_id, decision.candidates), "the receipt is not the decision"
        assert decision.inputs is not None
        [row] = [row for row in decision.inputs.candidates if row.instance_id == instance_id]
        assert row.is_open
        open_count = sum(row.is_open for row in decision.inputs.candidates)
        if len(decision.inputs.candidates) < RECEIPT_CANDIDATE_LIMIT:
            assert decision.candidate_count == open_count
        else:
            assert decision.candidate_count >= open_count
        assert decision.config_version == self.version
        assert record.decisions[-1] is decision
        assert len(record.decisions) == epoch

    def book_end(
        self,
        record: RequestRecord,
        state: RequestState,
        failure: Failure | None,
        event: ev.Event,
        earlier: list[fx.Effect],
    ) -> None:
        live = self.live.pop(record.request_id)  # KeyError: ended twice, or never accepted
        self.ended_count += 1
        assert record is live.record
        assert state.is_terminal
        assert (failure is None) == (state is RequestState.SUCCEEDED)
        aborted = any(
            isinstance(effect, fx.AbortAttempt) and effect.request_id == record.request_id
            for effect in earlier
        )
        over = isinstance(event, (ev.AttemptSucceeded, ev.AttemptFailed))
        assert aborted == (bool(live.running_on) and not over)
        if state is RequestState.EXPIRED:
            deadline_s = record.deadline_s
            if deadline_s is None:
                assert not live.running_on
                assert self.now >= live.wait_since_s + QUEUE_TIMEOUT_S, "expired too early"
            else:
                assert self.now >= deadline_s, "expired too early"

    # -- requests -------------------------------------------------------------------

    @rule(
        choice=CHOICE,
        taken=st.sampled_from([False] * 7 + [True]),
        count=st.sampled_from([1, 2, 5, 8]),
        model_choice=CHOICE,
        fields=any_of(REQUEST_CHOICES),
    )
    def arrive(self, choice: int, taken: bool, count: int, model_choice: int, fields: dict[str, Any]) -> None:
        """A few alike arrive. Ids of ended requests are used again, now and then one that is live."""
        model = pick([*self.scheduler.fleet.models() * 3, "", "unknown"], model_choice)
        fields = dict(fields)
        size, digested = fields.pop("prompt")
        fields["sampling"] = SamplingParameters(n=fields.pop("choice_count"))
        if digested:
            fields["prompt_digest"] = PromptDigest(size, blocks_of(size, choice), 16)
        for _ in range(count):
            known = taken and bool(self.live)
            free = [request_id for request_id in REQUEST_IDS if request_id not in self.live]
            request_id = pick(sorted(self.live) if known else free, choice)
            metadata = RequestMetadata(
                request_id=request_id, model_name=model, prompt="x" * min(size, 400), **fields
            )
            assert bool(self.feed(ev.RequestArrived(metadata))) != known

    @precondition(lambda self: self.live)
    @rule(choice=CHOICE, abort=st.booleans())
    def give_up(self, choice: int, abort: bool) -> None:
        request_id = pick(sorted(self.live), choice)
        if abort:
            self.feed(ev.RequestAborted(request_id, Failure(ErrorReason.ENGINE_TIMEOUT, "given up")))
        else:
            self.feed(ev.RequestCancelled(request_id, "nobody reads it"))
        assert request_id not in self.live
        # Once more: it is refused, or ignored.
        assert not self.feed(ev.RequestCancelled(request_id))
        assert not self.feed(ev.RequestAborted(request_id, REJECTED))

    def running(self) -> list[str]:
        return sorted(request_id for request_id, live in self.live.items() if live.running_on)

    @precondition(lambda self: self.running())
    @rule(moves=st.lists(st.tuples(CHOICE, MOVE), min_size=1, max_size=4))
    def attempts_move(self, moves: list[tuple[int, Move]]) -> None:
        for choice, move in moves:
            running = self.running()
            if not running:
                return
            request_id = pick(running, choice)
            live = self.live[request_id]
            if move.kind == "progress":
                live.delivered = live.has_output = True
                # Its prefill is done: there may be room for others.
                effects = self.feed(ev.AttemptProgressed(request_id, live.epoch))
                # And what is out of time is never started.
                expired = [effect for effect in effects if isinstance(effect, fx.RequestEnded)]
                assert all(effect.state is RequestState.EXPIRED for effect in expired)
                assert len(effects) - len(expired) == sum(
                    isinstance(effect, (fx.DispatchAttempt, fx.AbortAttempt)) for effect in effects
                )
                assert request_id not in self.live or live.record.state is RequestState.RUNNING
            elif move.kind == "succeed":
                self.feed(ev.AttemptSucceeded(request_id, live.epoch, live.token_count + 16))
                assert request_id not in self.live
            else:
                if live.delivered:
                    live.token_count += move.token_count
                event = ev.AttemptFailed(
                    request_id,
                    live.epoch,
                    move.failure,
                    move.retryable,
                    move.engine_down,
                    output_token_count=live.token_count,
                    cannot_continue=move.cannot_continue,
                    engine_died=move.engine_died,
                    counts=move.counts,
                )
                self.feed(event)
                assert request_id not in self.live or move.retryable

    @precondition(lambda self: self.live)
    @rule(
        choice=CHOICE,
        epoch_offset=st.sampled_from([-1, 1]),
        kind=st.sampled_from(["progress", "success", "failure"]),
    )
    def stale_news(self, choice: int, epoch_offset: int, kind: str) -> None:
        """News of an attempt that is not the present one changes nothing at all."""
        # Any event is a look at gates that were to open meanwhile.
        self.look_at_clock()
        if not self.live:
            return
        request_id = pick(sorted(self.live), choice)
        live = self.live[request_id]
        # The last attempt of a request that waits again is over, too.
        epoch = live.epoch + epoch_offset if live.running_on else live.epoch
        before = self.snapshot()
        event: ev.Event
        if kind == "progress":
            event = ev.AttemptProgressed(request_id, epoch)
        elif kind == "success":
            event = ev.AttemptSucceeded(request_id, epoch, 16)
        else:
            event = ev.AttemptFailed(request_id, epoch, LOST_CONNECTION, True, engine_down=True)
        assert not self.feed(event)
        assert self.snapshot() == before

    # -- instances ------------------------------------------------------------------

    @rule(
        instance_id=st.sampled_from([*INSTANCE_IDS, *INSTANCE_IDS, "one-too-many"]),
        incarnation=st.sampled_from([0, 1, 2, 3]),
        kind=INSTANCE,
        condition=CONDITION,
    )
    def register(
        self, instance_id: str, incarnation: int, kind: dict[str, Any], condition: EngineCondition
    ) -> None:
        self.join(instance_id, incarnation, kind, condition)

    def join(
        self, instance_id: str, incarnation: int, kind: dict[str, Any], condition: EngineCondition
    ) -> None:
        instance = make_instance(instance_id, **kind)
        before = self.scheduler.fleet.find(instance_id)
        self.feed(ev.InstanceRegistered(instance, incarnation, condition))
        if self.scheduler.fleet.find(instance_id) is not before:
            self.leases.pop(instance_id, None)
            if incarnation:
                self.leases[instance_id] = self.now + LEASE_S

    @precondition(lambda self: len(self.states) > 1)
    @rule(choice=CHOICE, incarnation=st.sampled_from([0, 0, 1, 2]))
    def deregister(self, choice: int, incarnation: int) -> None:
        self.feed(ev.InstanceDeregistered(pick(sorted(self.states), choice), incarnation))

    @precondition(lambda self: self.states)
    @rule(
        choice=CHOICE,
        incarnation_offset=st.sampled_from([0, 0, 0, 0, 0, -1, 1]),
        condition=CONDITION,
        usage=st.sampled_from([None, None, 0.5, 0.99]),
        running_count=st.sampled_from([None, 0, 1, 2]),
        waiting_count=st.sampled_from([None, 0, 0, 2]),
        computed_count=st.sampled_from([None, 0, 1000]),
        has_gauges=st.booleans(),
    )
    def heartbeat(
        self,
        choice: int,
        incarnation_offset: int,
        condition: EngineCondition,
        usage: float | None,
        running_count: int | None,
        waiting_count: int | None,
        computed_count: int | None,
        has_gauges: bool,
    ) -> None:
        instance = self.scheduler.fleet.get(pick(sorted(self.states), choice))
        gauges = EngineGauges(
            key_value_cache_usage=usage,
            running_request_count=running_count,
            waiting_request_count=waiting_count,
            prompt_token_count=computed_count,
        )
        incarnation = max(0, instance.incarnation + incarnation_offset)
        self.feed(
            ev.HeartbeatReceived(
                instance.instance_id, incarnation, condition, gauges=gauges if has_gauges else None
            )
        )
        if incarnation == instance.incarnation:
            self.leases[instance.instance_id] = self.now + LEASE_S

    @precondition(lambda self: self.states)
    @rule(
        choice=CHOICE,
        sequence_offset=st.sampled_from([1, 1, 1, 0, 2]),
        reset=st.sampled_from([False, False, True]),
        stored=st.tuples(st.integers(0, 400), CHOICE),
        removed=st.tuples(st.integers(0, 400), CHOICE),
    )
    def cache_report(
        self,
        choice: int,
        sequence_offset: int,
        reset: bool,
        stored: tuple[int, int],
        removed: tuple[int, int],
    ) -> None:
        """An engine tells of prompts that it has cached, and of ends of prompts that it has not any more."""
        instance = self.scheduler.fleet.get(pick(sorted(self.states), choice))
        kept, gone = blocks_of(*stored), blocks_of(*removed)
        update = KvCacheUpdate(
            1 if reset else instance.kv_cache_sequence + sequence_offset,
            reset,
            kept,
            tuple(block for block in reversed(gone[len(gone) // 2 :]) if block not in kept),
        )
        self.feed(
            ev.HeartbeatReceived(
                instance.instance_id, instance.incarnation, instance.condition, kv_cache_update=update
            )
        )
        assert self.scheduler.prefixes.match_one(instance.instance_id, kept) == len(kept)
        self.leases[instance.instance_id] = self.now + LEASE_S

    @precondition(lambda self: self.running())
    @rule(choice=CHOICE, counts_anew=st.booleans(), count=st.integers(0, 2))
    def engine_restarts(self, choice: int, counts_anew: bool, count: int) -> None:
        """An engine restarts under what runs on it, and gets the same prompts again."""
        old = self.live[pick(self.running(), choice)]
        instance = self.scheduler.fleet.find(old.running_on)
        if instance is None or instance.state is InstanceState.LOST:
            return
        if counts_anew:
            for counter in (1000, 0):
                gauges = EngineGauges(prompt_token_count=counter)
                self.feed(
                    ev.HeartbeatReceived(
                        instance.instance_id, instance.incarnation, EngineCondition.HEALTHY, gauges=gauges
                    )
                )
            self.leases[instance.instance_id] = self.now + LEASE_S
        else:
            incarnation = instance.incarnation + 1
            self.feed(ev.InstanceRegistered(instance.spec, incarnation, EngineCondition.HEALTHY))
            self.leases[instance.instance_id] = self.now + LEASE_S
        for request_id in [each for each in REQUEST_IDS if each not in self.live][:count]:
            metadata = dataclasses.replace(old.record.metadata, request_id=request_id)
            self.feed(ev.RequestArrived(metadata))

    @precondition(lambda self: self.running())
    @rule(choice=CHOICE, silent_s=st.sampled_from([2.0, 10.0, 31.0]))
    def engine_is_silent(self, choice: int, silent_s: float) -> None:
        instance_id = self.live[pick(self.running(), choice)].running_on
        self.feed(ev.EngineSilent(instance_id, silent_s))

    @precondition(lambda self: self.probed_ids)
    @rule(choice=CHOICE, answered=st.sampled_from([True, True, False]))
    def engine_is_probed(self, choice: int, answered: bool) -> None:
        instance_id = pick(sorted(self.probed_ids), choice)
        self.probed_ids.discard(instance_id)
        self.feed(ev.EngineProbed(instance_id, answered, "" if answered else "no token"))

    @rule(gap_s=st.sampled_from([1.5, 30.0]))
    def clock_skips(self, gap_s: float) -> None:
        self.now += gap_s
        self.feed(ev.ClockSkipped(gap_s))
        self.leases = {instance_id: lease_s + gap_s for instance_id, lease_s in self.leases.items()}
        self.look_at_clock()

    @rule(instance_id=st.sampled_from(INSTANCE_IDS), what=st.one_of(CONDITION, st.booleans()))
    def probe_or_drain(self, instance_id: str, what: EngineCondition | bool) -> None:
        if isinstance(what, EngineCondition):
            self.feed(ev.HealthProbed(instance_id, what))
        else:
            self.feed(ev.DrainRequested(instance_id, undo=what, force=True))

    @rule(
        choice=CHOICE,
        incarnation_offset=st.sampled_from([None, None, None, 0, 0, -1, 1]),
        grace_s=st.sampled_from([0.0, 0.0, 0.1, 3.0, None]),
        force=st.booleans(),
        undo=st.sampled_from([False, False, False, True]),
    )
    def drain(
        self, choice: int, incarnation_offset: int | None, grace_s: float | None, force: bool, undo: bool
    ) -> None:
        """An operator drains an instance, changes the order, repeats it, or takes it back."""
        busy = [self.live[request_id].running_on for request_id in self.running()]
        instance_id = pick(busy or list(INSTANCE_IDS), choice)
        instance = self.scheduler.fleet.find(instance_id)
        incarnation = 0
        if instance is not None and incarnation_offset is not None:
            incarnation = max(0, instance.incarnation + incarnation_offset)
        self.feed(ev.DrainRequested(instance_id, undo, incarnation, grace_s, force, "maintenance"))
        if instance is None or incarnation not in {0, instance.incarnation}:
            return
        if undo:
            assert instance.drain is None
        elif instance.drain is None:
            assert not force, "force is refused by nobody"
        else:
            assert instance.drain.grace_s == grace_s
            before = self.snapshot()
            assert not self.feed(ev.DrainRequested(instance_id, grace_s=grace_s))
            assert self.snapshot() == before, "a repetition changed something"

    @precondition(lambda self: self.interrupted)
    @rule(count=st.integers(1, 8), token_count=st.sampled_from([0, 1, 5]))
    def interrupted_attempts_come_back(self, count: int, token_count: int) -> None:
        """What was to be stopped was; some had ended before, and others are left to run on."""
        for request_id, epoch in sorted(self.interrupted)[:count]:
            self.interrupted.discard((request_id, epoch))
            live = self.live.get(request_id)
            if live is None or not live.running_on or live.epoch != epoch:
                continue
            live.token_count += token_count if live.delivered else 0
            instance = self.scheduler.fleet.find(live.running_on)
            order = instance.drain if instance is not None else None
            moved_count = order.moved_request_count if order is not None else 0
            self.feed(
                ev.AttemptFailed(
                    request_id,
                    epoch,
                    Failure(ErrorReason.SHUTTING_DOWN, "moved"),
                    retryable=True,
                    counts_against_engine=False,
                    output_token_count=live.token_count,
                    counts=False,
                )
            )
            if order is not None and request_id in order.asked_request_ids and request_id in self.live:
                assert order.moved_request_count == moved_count + 1

    # -- configuration and time --------------------------------------------------------

    @rule(fields=any_of(SETTINGS_CHOICES))
    def configure(self, fields: dict[str, Any]) -> None:
        """Change the settings; a change with anything wrong in it is refused as a whole."""
        before = self.version
        effects = self.feed(ev.SchedulingConfigured(SettingsChange(**fields)))
        assert bool(effects) == (self.version == before + 1)
        names = (fields["scheduling_policy"], fields["routing_strategy"], fields["load_balancer"])
        if any(name.startswith("no-such") for name in names) and not fields["revert_to_version"]:
            assert not effects

    @rule(offset=st.sampled_from([0, 0, 0, -1, 1]), favourite=st.sampled_from(SCHEDULING_POLICIES.names))
    def policies_are_evaluated(self, offset: int, favourite: str) -> None:
        """Scores come in, of the last replay or of another, asked for or not."""
        before = self.scheduler.policy_in_force
        scores = tuple(
            PolicyScore(
                policy=name,
                attainment=0.9 if name == favourite else 0.5,
                token_weighted_attainment=0.5,
                usd_per_good=0.01,
            )
            for name in SCHEDULING_POLICIES.names
            if name != "adaptive"
        )
        self.feed(ev.PoliciesEvaluated(self.asked_evaluation_id + offset, scores))
        if offset or self.scheduler.settings.current.scheduling_policy != "adaptive":
            assert self.scheduler.policy_in_force == before

    @rule(
        jump_s=st.sampled_from([0.001, 0.1, 0.5, 2.0, 7.0, 25.0]),
        alive=st.sampled_from([True, True, True, False]),
        tell=st.sampled_from([True, True, True, False]),
    )
    def time_passes(self, jump_s: float, alive: bool, tell: bool) -> None:
        """Time passes; the agents beat meanwhile, or do not, and the scheduler is told, or is not yet."""
        end_s = self.now + jump_s
        while alive and self.now < end_s:
            self.now = min(end_s, self.now + LEASE_S / 2)
            for instance_id in sorted(self.leases):
                instance = self.scheduler.fleet.get(instance_id)
                self.feed(ev.HeartbeatReceived(instance_id, instance.incarnation, instance.condition))
                self.leases[instance_id] = self.now + LEASE_S
        self.now = end_s
        if tell:
            self.look_at_clock()

    @rule()
    def wake_up(self) -> None:
        """Exactly what the runtime does: advance to the next timer and not a moment later."""
        next_s = self.scheduler.next_timer_s()
        if next_s is not None:
            self.now = max(self.now, next_s)
            self.look_at_clock()

    @rule()
    def sleep_from_timer_to_timer(self) -> None:
        """Nothing happens but timers: they lead somewhere."""
        end_s = self.now + 10.0
        for _ in range(MOST_WAKE_UPS):
            next_s = self.scheduler.next_timer_s()
            if next_s is None or next_s > end_s:
                return
            self.now = max(self.now, next_s)
            self.look_at_clock()
        raise AssertionError("timers go on and on while no time passes")

    def look_at_clock(self) -> None:
        self.feed(ev.ClockAdvanced())
        next_s = self.scheduler.next_timer_s()
        assert next_s is None or next_s > self.now, "the timer would fire again at once, for ever"
        for live in self.live.values():
            assert live.record.deadline_s is None or live.record.deadline_s > self.now
            if live.record.deadline_s is None and not live.running_on:
                assert self.now < live.wait_since_s + QUEUE_TIMEOUT_S
        for instance_id, lease_s in self.leases.items():
            kept = self.scheduler.fleet.get(instance_id).keeps_state
            assert kept or lease_s > self.now, f"the lease of {instance_id} ended and nobody noticed"
        for instance_id, lost_s in self.lost_since.items():
            assert self.now < lost_s + RETENTION_S, f"{instance_id} should be forgotten by now"
        for instance in self.scheduler.fleet:
            if instance.drain is not None and instance.drain.next_move_s is not None and instance.in_flight:
                assert self.now < instance.drain.next_move_s, "nobody looked for what is to be moved"

    # -- what always holds -------------------------------------------------------------

    @invariant()
    def requests_are_accounted_for(self) -> None:
        scheduler = self.scheduler
        assert self.accepted_count == self.ended_count + len(self.live)
        assert {r.request_id for r in scheduler.requests()} == set(self.live)
        waiting = {request_id for request_id, live in self.live.items() if not live.running_on}
        queued = list(scheduler.queue)
        assert sorted(record.request_id for record in queued) == sorted(waiting)
        assert len(scheduler.queue) == len(waiting)
        assert scheduler.queue.size_bytes == sum(record.size_bytes for record in queued)
        assert scheduler.queue.work_s == pytest.approx(sum(record.work_s for record in queued), abs=1e-6)
        by_model: dict[str, int] = {}
        for record in queued:
            by_model[record.model] = by_model.get(record.model, 0) + 1
        assert scheduler.queue.count_by_model() == by_model
        assert dict(scheduler.queue.kinds.items()) == kinds_of(queued)
        assert scheduler.live_count == len(self.live)
        assert scheduler.active_count == len(self.live) - len(waiting)
        for request_id, live in self.live.items():
            record = live.record
            assert scheduler.find_request(request_id) is record
            assert record.epoch == live.epoch
            assert record.queued == (not live.running_on)
            assert record.delivered == live.delivered or record.queued
            assert record.excluded_instance_ids == live.lost_on
            expected = RequestState.RUNNING if live.delivered else RequestState.DISPATCHED
            assert record.state is (expected if live.running_on else RequestState.QUEUED)

    @invariant()
    def work_is_accounted_for_where_it_runs(self) -> None:
        fleet = self.scheduler.fleet
        assert {instance.instance_id: instance.state for instance in fleet} == self.states
        gone = fleet._departed
        assert not gone.keys() & self.states.keys()
        assert all(instance.in_flight for instance in gone.values())
        assert list(fleet.holders()) == [*fleet, *gone.values()]
        by_instance: dict[str, set[str]] = {}
        for request_id, live in self.live.items():
            if live.running_on:
                by_instance.setdefault(live.running_on, set()).add(request_id)
        assert by_instance.keys() <= self.states.keys() | gone.keys()
        for instance in (*fleet, *gone.values()):
            assert set(instance.in_flight) == by_instance.get(instance.instance_id, set())
            assert instance.in_flight_count == len(instance.in_flight)
            assert dict(instance.in_flight_kinds.items()) == kinds_of(instance.in_flight.values())
            needs = [instance.token_need(record) for record in instance.in_flight.values()]
            assert instance.reserved_token_count == sum(needs)
            assert 1 <= instance.concurrency_limit <= instance.configured_limit
            if instance.state is InstanceState.DRAINING:
                assert instance.in_flight, "it has nothing left: it is DRAINED"
            if instance.state is InstanceState.DRAINED:
                assert not instance.in_flight, "drained means that nothing is in flight"
            if instance.state in {InstanceState.DRAINING, InstanceState.DRAINED}:
                assert instance.drain is not None or instance.instance_id in gone
            if instance.drain is not None:
                assert instance.state in {
                    InstanceState.DRAINING,
                    InstanceState.DRAINED,
                    InstanceState.LOST,
                }

    @invariant()
    def indexes_agree_with_the_records(self) -> None:
        fleet = self.scheduler.fleet
        served = {model for instance in fleet for model in instance.spec.served_models}
        assert fleet.models() == tuple(sorted(served))
        primary = {instance.spec.model_name for instance in fleet}
        assert fleet.only_model() == (min(primary) if len(primary) == 1 else None)
        for model in MODELS:
            assert {i.instance_id for i in fleet.serving(model)} == {
                i.instance_id for i in fleet if model in i.spec.served_models
            }
            for size in (0, 400):
                request = RequestRecord(
                    RequestMetadata(request_id="any", prompt="x" * size, max_tokens=16), model, 0, self.now
                )
                assert {i.instance_id for i in fleet.with_room_for(request)} == takers(
                    request, fleet.serving(model)
                )

    @invariant()
    def loads_agree_with_what_runs(self) -> None:
        fleet, now = self.scheduler.fleet, self.last_s()
        for instance in (*fleet, *fleet._departed.values()):
            load = instance.load
            # What an engine that restarted held before is not counted.
            assert load._prefills.keys() <= instance.in_flight.keys()
            assert load._decodes.keys() <= instance.in_flight.keys()
            assert not any(self.live[request_id].delivered for request_id in load._prefills)
            assert all(self.live[request_id].delivered for request_id in load._decodes)
            backlog_s = load.backlog_s(now)
            assert 0.0 <= backlog_s < math.inf
            assert load._prefills or backlog_s == 0.0
            assert 0.0 <= load.prefill_share(now) <= 1.0
            assert 0.0 <= load.context_token_count(now) < math.inf
        timer_s = self.scheduler.next_timer_s()
        for instance in fleet:
            if instance.gate_closed and instance.in_flight:
                assert any(
                    time_s == instance.gate_opens_s and record is instance
                    for time_s, _, record in fleet._openings
                ), f"nothing will open the gate of {instance.instance_id}"
                assert not len(self.scheduler.queue) or (
                    timer_s is not None and timer_s <= instance.gate_opens_s
                )

    @invariant()
    def engine_time_is_metered_of_what_runs(self) -> None:
        fleet, now = self.scheduler.fleet, self.last_s()
        for instance in (*fleet, *fleet._departed.values()):
            meter = instance.meter
            assert meter._pending.keys() | meter._decodes.keys() == instance.in_flight.keys()
            assert not meter._pending.keys() & meter._decodes.keys()
            assert all(self.live[request_id].delivered for request_id in meter._decodes)
            busy_s = meter.busy_s(now)
            spent_s = sum(meter.spent_s(request_id, now) for request_id in instance.in_flight)
            assert 0.0 <= spent_s <= busy_s * (1.0 + 1e-9) + 1e-6
            assert meter.idle_s(now) >= 0.0
        assert all(instance.meter.usd_per_hour == instance.usd_per_hour for instance in fleet)

    @invariant()
    def books_balance(self) -> None:
        """Whoever runs under a charge has one that is not settled, on its own tenant's account."""
        books = self.scheduler.service_books
        charged = [live.record for live in self.live.values() if live.running_on and live.charged]
        assert books._charges.keys() == {record.request_id for record in charged}
        running: Counter[tuple[LaneKey, str]] = Counter()
        for record in charged:
            charge = books._charges[record.request_id]
            assert 0.0 < charge.cost_s == record.cost_s < math.inf
            running[lane_key(record), tenant_of(record)] += 1
            assert books._accounts[lane_key(record), tenant_of(record)] is charge.account
        assert running == Counter({key: each.running_count for key, each in books._accounts.items()})
        assert all(0.0 <= each.floor_s <= each.standing_s < math.inf for each in books._accounts.values())
        for live in self.live.values():
            assert (live.record.cost_s > 0.0) == bool(live.running_on)

    @invariant()
    def pins_are_those_of_running_prompts(self) -> None:
        """What runs on the present engine pins its blocks, and nothing else does."""
        prefixes = self.scheduler.prefixes
        assert not any(live.record.pinned_block_count for live in self.live.values() if not live.running_on)
        assert prefixes._caches.keys() == self.states.keys()
        for instance_id, cache in prefixes._caches.items():
            assert cache.pins == Counter(
                block
                for live in self.live.values()
                if live.running_on == instance_id and live.engine_number == self.engine_numbers[instance_id]
                for block in live.record.digest.block_hashes
            )
            assert not cache.pins.keys() & cache.evictable.keys()
            assert not cache.reported.keys() & cache.evictable.keys()
            reported_alone = len(cache.reported.keys() - cache.pins.keys())
            assert cache.block_count == len(cache.pins) + len(cache.evictable) + reported_alone
            assert len(cache.pins) + len(cache.evictable) <= max(cache.capacity, len(cache.pins))
        assert len(prefixes) == sum(cache.block_count for cache in prefixes._caches.values())
        assert prefixes._masks.keys() == {
            block
            for cache in prefixes._caches.values()
            for block in (*cache.pins, *cache.evictable, *cache.reported)
        }

    @invariant()
    def lines_are_in_order(self) -> None:
        now = self.last_s()
        for _, line in self.scheduler.queue.lines():
            if isinstance(line, FairLine):
                # A place in the line is asked for at any time, and changes nothing: the replay does not ask.
                positions = [line.position(each, now) for each in itertools.islice(line, 3)]
                assert all(0 <= position < len(line) for position in positions), positions
                if was_looked_at(line):
                    self.fair_line_is_in_order(line, now)
                continue
            assert isinstance(line, (KeyedLine, SloLine))
            key = line._key
            lanes: list[list[RequestRecord]] = [[], []]
            for record in line:
                lanes[isinstance(line, SloLine) and record.demoted].append(record)
            lanes[0].sort(key=lambda record: (key(record), record.sequence))
            lanes[1].sort(key=lambda record: (record.arrival_s, record.sequence))
            assert [line.position(record, now) for record in (*lanes[0], *lanes[1])] == list(range(len(line)))
            assert line.head(now) in [lane[0] for lane in lanes if lane]

    def fair_line_is_in_order(self, line: FairLine, now: float) -> None:
        """The oldest, aged, says which class goes first, and a tenant's own go by arrival."""
        heads = list(heads_of(line, now))
        assert {record.request_id for record in heads} == {record.request_id for record in line}
        shares: dict[tuple[RequestPriority, str], list[tuple[float, int]]] = {}
        for record in heads:
            age = (record.arrival_s, record.sequence)
            shares.setdefault((record.metadata.priority, tenant_of(record)), []).append(age)
        assert all(ages == sorted(ages) for ages in shares.values())
        oldest = min(
            line,
            key=lambda record: (
                record.arrival_s - line._lanes[record.metadata.priority].boost_s,
                record.sequence,
            ),
        )
        assert heads[0].metadata.priority is oldest.metadata.priority

    def last_s(self) -> float:
        """When the scheduler was last told anything: it knows of no later time."""
        return self.log[-1][1]

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Whoever is next and could run, runs; requests that wait for a better instance may be passed."""
        scheduler, now = self.scheduler, self.last_s()
        for model, line in scheduler.queue.lines():
            serving = scheduler.fleet.serving(model)
            if isinstance(line, FairLine) and not was_looked_at(line):
                assert not any(takers(record, serving) for record in line), "nobody looked"
                continue
            kept_from = math.inf
            for record in itertools.islice(heads_of(line, now), STEP_OVER_LIMIT + 1):
                awaited = scheduler.fleet.find(record.waits_for)
                waits = record.wait_until_s > now and awaited is not None and awaited.gate_closed
                if not (waits and awaited is not None and awaited.state is InstanceState.READY):
                    least = least_limit(record, serving)
                    limits = {i.instance_id: token_limit(i) for i in serving}
                    free = {
                        each
                        for each in takers(record, serving)
                        if limits[each] < kept_from or kept_from == math.inf
                    }
                    if not free:
                        # What could hold it is kept for it; others may have the rest.
                        kept_from = min(kept_from, least)
                        if not any(i.is_open and token_limit(i) < kept_from for i in serving):
                            break
                        if isinstance(line, FairLine):
                            break
                        continue
                    excluded = record.excluded_instance_ids
                    assert free <= excluded, f"{record.request_id} could run on {free}"
                    assert any(
                        i.state is InstanceState.READY
                        and i.instance_id not in excluded
                        and token_limit(i) >= least
                        for i in serving
                    ), f"{record.request_id} waits for an instance that does not exist"
                if isinstance(line, FairLine):
                    # Whoever is behind may have been behind somebody else at the last look.
                    break

    # -- the end -------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.finish_everything()
        self.requests_are_accounted_for()
        self.work_is_accounted_for_where_it_runs()
        self.nothing_is_left()
        self.replay_is_the_same()

    def finish_everything(self) -> None:
        while running := self.running():
            for request_id in running:
                self.feed(ev.AttemptSucceeded(request_id, self.live[request_id].epoch))
        for request_id in sorted(self.live):
            self.feed(ev.RequestCancelled(request_id))

    def nothing_is_left(self) -> None:
        scheduler = self.scheduler
        assert not self.live
        assert self.accepted_count == self.ended_count
        assert scheduler.live_count == scheduler.active_count == len(scheduler.queue) == 0
        assert scheduler.queue.size_bytes == 0
        assert scheduler.queue.work_s == 0.0
        assert not scheduler.queue._lines
        assert not scheduler.fleet._departed
        assert all(i.in_flight_count == i.reserved_token_count == 0 for i in scheduler.fleet)
        assert not any(i.gate_closed for i in scheduler.fleet)
        assert not any(i.load.prefill_count or i.load.decode_count for i in scheduler.fleet)
        assert not any(cache.pins for cache in scheduler.prefixes._caches.values())
        assert not scheduler.service_books._charges
        while (next_s := scheduler.next_timer_s()) is not None:
            self.now = next_s
            self.look_at_clock()
            while self.probed_ids:
                self.engine_is_probed(0, answered=True)
        assert not any(each.health.outage for each in scheduler.fleet)
        assert not scheduler._instances._returns
        assert not scheduler._deadlines._heap
        assert not scheduler._instances._forgets
        assert not scheduler._drains._timers
        assert not scheduler.fleet._leases
        assert scheduler.fleet.next_opening_s() is None
        for instance_id in sorted(self.states):
            self.feed(ev.InstanceDeregistered(instance_id))
        assert len(scheduler.fleet) == 0
        assert not scheduler.fleet._by_model
        assert not scheduler.fleet._open_by_model
        assert not scheduler.fleet._primary_counts
        assert len(scheduler.prefixes) == 0

    def replay_is_the_same(self) -> None:
        again = Scheduler(self.config)
        texts: list[str] = []
        for event, now in self.log:
            try:
                texts.extend(map(full_text, again.handle(event, now)))
            except SageError as error:
                texts.append(f"{type(error).__name__}: {error}")
        assert texts == self.texts


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    # Explaining a failure traces every line, which takes minutes here.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def chosen(draw: random.Random, choices: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: draw.choice(values) for name, values in choices.items()}


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES.names)
def test_long_busy_life(policy: str) -> None:
    """The same machine under sustained load: hypothesis prefers short lives, and shrinks them.

    Each policy meets every strategy with every balancer.
    """
    draw = random.Random(policy)
    machine = SchedulerMachine()

    def condition() -> EngineCondition:
        conditions: list[EngineCondition] = [*[EngineCondition.HEALTHY] * 12, *EngineCondition]
        return draw.choice(conditions)

    def move() -> Move:
        return Move(
            draw.choice(["progress", "progress", "succeed", "succeed", "fail", "fail"]),
            draw.choice([LOST_CONNECTION, ENGINE_FAILED, REJECTED]),
            retryable=draw.random() < 0.8,
            engine_down=draw.random() < 0.2,
            token_count=draw.choice([1, 5, 300]),
            cannot_continue=draw.choice(["", "", "it uses tools"]),
            engine_died=draw.random() < 0.3,
            counts=draw.random() < 0.7,
        )

    def arrive() -> None:
        machine.arrive(
            choice=draw.randrange(150),
            taken=draw.random() < 0.05,
            count=draw.randint(1, 6),
            model_choice=draw.randrange(12),
            fields=chosen(draw, REQUEST_CHOICES),
        )

    def attempts_move() -> None:
        machine.attempts_move([(draw.randrange(12), move()) for _ in range(4)])

    def heartbeat() -> None:
        if machine.states:
            machine.heartbeat(
                choice=draw.randrange(12),
                incarnation_offset=draw.choice([0] * 8 + [-1, 1]),
                condition=condition(),
                usage=draw.choice([None, None, 0.5, 0.99]),
                running_count=draw.choice([None, 0, 1, 2]),
                waiting_count=draw.choice([None, 0, 0, 2]),
                computed_count=draw.choice([None, 0, 1000]),
                has_gauges=draw.random() < 0.7,
            )

    def live_only() -> None:
        if machine.live:
            machine.give_up(draw.randrange(12), draw.random() < 0.5)
        if machine.live:
            machine.stale_news(
                draw.randrange(12), draw.choice([-1, 1]), draw.choice(["progress", "success", "failure"])
            )

    def fleet_changes() -> None:
        instance_id = draw.choice(INSTANCE_IDS)
        known = machine.scheduler.fleet.find(instance_id)
        incarnation = max(0, (known.incarnation if known else 1) + draw.choice([-1, 0, 1, 1]))
        machine.register(instance_id, incarnation, chosen(draw, INSTANCE_CHOICES), condition())
        machine.probe_or_drain(draw.choice(INSTANCE_IDS), condition())
        if len(machine.states) > 2:
            machine.deregister(draw.randrange(12), draw.choice([0, 1]))

    def time_passes() -> None:
        jump_s = draw.choice([0.001, 0.01, 0.1, 0.1, 0.5, 2.0, 7.0, 25.0])
        machine.time_passes(jump_s, alive=draw.random() < 0.9, tell=draw.random() < 0.7)

    def drain() -> None:
        """With work to move, and somebody to take it over, more often than not."""
        for number in range(len(machine.states)):
            machine.heartbeat(number, 0, EngineCondition.HEALTHY, None, None, None, None, has_gauges=False)
        arrive()
        attempts_move()
        machine.drain(
            draw.randrange(12),
            draw.choice([None, None, None, 0, -1, 1]),
            draw.choice([0.0, 0.0, 0.1, 3.0, None]),
            draw.random() < 0.5,
            draw.random() < 0.2,
        )
        draw.choice([machine.wake_up, attempts_move])()
        if machine.interrupted:
            machine.interrupted_attempts_come_back(draw.randint(1, 8), draw.choice([0, 5]))

    def repair() -> None:
        while machine.probed_ids:
            machine.engine_is_probed(0, answered=True)
        for instance in list(machine.scheduler.fleet):
            if instance.unreachable:
                machine.feed(ev.HealthProbed(instance.instance_id, EngineCondition.HEALTHY))
            if instance.drain is not None:
                machine.feed(ev.DrainRequested(instance.instance_id, undo=True))

    def configure() -> None:
        """Change parameters, or try to."""
        machine.configure(
            chosen(draw, SETTINGS_CHOICES)
            | {
                "scheduling_policy": policy,
                "routing_strategy": "",
                "load_balancer": "",
                "revert_to_version": 0,
            }
        )

    def evaluate() -> None:
        favourite = draw.choice(["slo_aware", "priority", "cost_optimized"])
        for _ in range(2):
            machine.policies_are_evaluated(draw.choice([0, 0, 0, 1]), favourite)

    def restart() -> None:
        if machine.running():
            machine.engine_restarts(draw.randrange(12), draw.random() < 0.5, draw.randint(1, 3))

    steps = [
        arrive,
        attempts_move,
        heartbeat,
        time_passes,
        machine.wake_up,
        drain,
        repair,
        fleet_changes,
        live_only,
        configure,
        evaluate,
        machine.sleep_from_timer_to_timer,
        restart,
    ]
    closed_count = 0
    combinations = list(itertools.product(ROUTING_STRATEGIES.names, LOAD_BALANCERS.names))
    combinations += [("load_balanced", "predicted_latency")] * 10
    draw.shuffle(combinations)
    machine.begin(
        policy,
        *combinations[0],
        queue_limit=draw.choice([10, 100]),
        byte_limit=1 << 20,
        fleet=[(chosen(draw, INSTANCE_CHOICES), EngineCondition.HEALTHY) for _ in INSTANCE_IDS],
        start_s=draw.choice([0.0, 1.7e9]),
    )
    for strategy, balancer in combinations:
        change = SettingsChange(
            scheduling_policy=policy, routing_strategy=strategy, load_balancer=balancer, reset_parameters=True
        )
        assert machine.feed(ev.SchedulingConfigured(change))
        for missing in sorted(set(INSTANCE_IDS) - machine.states.keys()):
            machine.join(missing, 1, chosen(draw, INSTANCE_CHOICES), EngineCondition.HEALTHY)
        repair()
        for _ in range(20):
            draw.choices(steps, weights=[10, 14, 6, 4, 4, 3, 4, 1, 1, 1, 1, 1, 2])[0]()
            machine.requests_are_accounted_for()
            machine.work_is_accounted_for_where_it_runs()
            machine.indexes_agree_with_the_records()
            machine.loads_agree_with_what_runs()
            machine.engine_time_is_metered_of_what_runs()
            machine.books_balance()
            machine.pins_are_those_of_running_prompts()
            machine.lines_are_in_order()
            machine.nobody_waits_for_nothing()
            closed_count += sum(i.gate_closed for i in machine.scheduler.fleet)
    dispatch_count = sum(text.startswith("DispatchAttempt") for text in machine.texts)
    requeue_count = sum(text.startswith("RequestRequeued") for text in machine.texts)
    machine.teardown()
    # Otherwise the run proves little.
    assert dispatch_count > 150
    assert requeue_count > 10
    assert closed_count > 10
