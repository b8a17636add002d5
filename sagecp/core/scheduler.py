"""The brain: one state machine over requests and instances.

:meth:`Scheduler.handle` is the only thing that changes state. Events go in,
effects come out; the runtime performs the effects and feeds what happens back
as new events. The simulator uses the same door with a virtual clock.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from typing import Any

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.deadlines import DeadlineHeap
from sagecp.core.errors import (
    ErrorReason,
    Failure,
    ModelNotFoundError,
    RequestIdConflictError,
    RequestNotFoundError,
    SageError,
)
from sagecp.core.fleet import Fleet, InstanceRecord
from sagecp.core.instance_lifecycle import InstanceLifecycle
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.router.registry import make_strategy
from sagecp.core.types import (
    FailoverMode,
    InstanceState,
    RequestState,
    SchedulingDecision,
)

# Most requests that others pass in one dispatch because they wait for a better
# instance: the bound on what a fleet with a failing engine costs each event.
_STEP_OVER_LIMIT = 32


class Scheduler:
    """Decides which request runs where, and when.

    Not thread-safe; one event loop owns it.

    Args:
        config: Bounds and names.

    Raises:
        UnknownNameError: A name of the configuration is not known.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._random = random.Random(config.seed)
        self._policy = SCHEDULING_POLICIES.get(config.scheduling_policy)()
        self._strategy = make_strategy(config.routing_strategy, config.load_balancer, self._random)
        self.scheduling_policy = config.scheduling_policy
        self.routing_strategy = config.routing_strategy
        self.load_balancer = config.load_balancer
        self.config_version = 1
        self.fleet = Fleet(config.max_instance_count, config.default_concurrency_limit)
        self.queue = RequestQueue(self._policy, config.max_queued_request_count, config.max_queued_bytes)
        self._requests: dict[str, RequestRecord] = {}
        # Deadlines, and the longest wait of requests without one.
        self._deadlines = DeadlineHeap()
        self._instances = InstanceLifecycle(self.fleet, config)
        self._arrival_sequence = 0
        self._dispatch_sequence = 0
        # Exponentially weighted completions per second, for truthful retry delays.
        self._last_completion_s: float | None = None
        self._completion_interval_s = 1.0
        self._handlers: dict[type, Callable[[Any, float, list[fx.Effect]], None]] = {
            ev.RequestArrived: self._on_request_arrived,
            ev.RequestCancelled: self._on_request_cancelled,
            ev.RequestAborted: self._on_request_aborted,
            ev.AttemptProgressed: self._on_attempt_progressed,
            ev.AttemptSucceeded: self._on_attempt_succeeded,
            ev.AttemptFailed: self._on_attempt_failed,
            ev.InstanceRegistered: self._instances.on_registered,
            ev.InstanceDeregistered: self._instances.on_deregistered,
            ev.HeartbeatReceived: self._instances.on_heartbeat,
            ev.HealthProbed: self._instances.on_health_probed,
            ev.DrainRequested: self._instances.on_drain_requested,
            ev.SchedulingConfigured: self._on_scheduling_configured,
            ev.ClockAdvanced: self._on_clock_advanced,
        }

    # -- reading ---------------------------------------------------------------

    def find_request(self, request_id: str) -> RequestRecord | None:
        """Return a live request, or ``None`` when it ended or never was."""
        return self._requests.get(request_id)

    def requests(self) -> Iterable[RequestRecord]:
        """Return every live request, oldest first."""
        return self._requests.values()

    @property
    def active_count(self) -> int:
        """Requests on engines."""
        return len(self._requests) - len(self.queue)

    @property
    def live_count(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def next_timer_s(self) -> float | None:
        """Return when :class:`ClockAdvanced` is next worth sending, or ``None``."""
        deadline_s = self._deadlines.next_s(self._requests)
        instance_s = self._instances.next_timer_s()
        if deadline_s is None or instance_s is None:
            return instance_s if deadline_s is None else deadline_s
        return min(deadline_s, instance_s)

    # -- the one door ------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Apply one event and return the work it implies, in order.

        Args:
            event: What happened.
            now: Seconds on a monotonic clock; never smaller than before.

        Raises:
            SageError: The event names something unknown or impossible. Nothing has changed.
        """
        effects: list[fx.Effect] = []
        self._handlers[type(event)](event, now, effects)
        if len(self.queue):
            self._dispatch(now, effects)
        return effects

    # -- requests ----------------------------------------------------------------

    def _on_request_arrived(self, event: ev.RequestArrived, now: float, effects: list[fx.Effect]) -> None:
        metadata = event.metadata
        if metadata.request_id in self._requests:
            raise RequestIdConflictError(metadata.request_id)
        try:
            model = self._resolve_model(metadata.model_name)
            record = RequestRecord(metadata, model, self._arrival_sequence + 1, now)
            self.queue.check_room(record.size_bytes, self._retry_after_s())
        except SageError as error:
            effects.append(fx.RequestRejected(metadata.request_id, error))
            return
        self._arrival_sequence += 1
        self._requests[metadata.request_id] = record
        self.queue.push(record)
        self._watch(record, now)
        effects.append(fx.RequestAccepted(record))

    def _on_request_cancelled(self, event: ev.RequestCancelled, now: float, effects: list[fx.Effect]) -> None:
        record = self._requests.get(event.request_id)
        if record is None:
            raise RequestNotFoundError(event.request_id)
        cause = f": {event.cause}" if event.cause else ""
        failure = Failure(ErrorReason.REQUEST_CANCELLED, f"the request was cancelled{cause}")
        self._end(record, RequestState.CANCELLED, failure, effects)

    def _on_request_aborted(self, event: ev.RequestAborted, now: float, effects: list[fx.Effect]) -> None:
        record = self._requests.get(event.request_id)
        if record is not None:
            self._end(record, RequestState.FAILED, event.failure, effects)

    def _on_attempt_progressed(
        self, event: ev.AttemptProgressed, now: float, effects: list[fx.Effect]
    ) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None or record.delivered:
            return
        record.delivered = True
        record.machine.to(RequestState.RUNNING)
        if record.first_token_s is None:
            record.first_token_s = now

    def _on_attempt_succeeded(self, event: ev.AttemptSucceeded, now: float, effects: list[fx.Effect]) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None:
            return
        instance = self.fleet.find(record.instance_id)
        if instance is not None and record.dispatch_s is not None:
            instance.completed_request_count += 1
            ttft_s = None if record.first_token_s is None else record.first_token_s - record.dispatch_s
            tokens_per_choice = event.output_token_count / record.metadata.choice_count
            instance.learn(now - record.dispatch_s, ttft_s, tokens_per_choice)
        self._note_completion(now)
        self._end(record, RequestState.SUCCEEDED, None, effects, attempt_over=True)

    def _on_attempt_failed(self, event: ev.AttemptFailed, now: float, effects: list[fx.Effect]) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None:
            return
        instance = self.fleet.find(record.instance_id)
        if instance is not None and event.counts_against_engine:
            instance.failed_attempt_count += 1
        if instance is not None and event.engine_down:
            self._instances.on_unreachable(instance, event.failure.message, effects)
        mode = record.metadata.failover_mode
        # Continuing from delivered tokens needs a journal of them, which this core does not keep yet.
        if (
            not event.retryable
            or record.delivered
            or mode is FailoverMode.FAIL
            or record.epoch >= self.config.max_attempt_count
        ):
            self._end(record, RequestState.FAILED, event.failure, effects, attempt_over=True)
            return
        self.fleet.release(record)
        record.excluded_instance_ids.add(record.instance_id)
        record.machine.to(RequestState.QUEUED)
        self.queue.push(record)
        if record.deadline_s is None:
            self._watch(record, now)
        effects.append(fx.RequestRequeued(record, event.failure))
        if instance is not None:
            self._instances.finish_drain(instance, effects)

    def _current(self, request_id: str, epoch: int) -> RequestRecord | None:
        """Return the request if this attempt is still its present one: late news is no news."""
        record = self._requests.get(request_id)
        return record if record is not None and record.epoch == epoch and not record.queued else None

    def _end(
        self,
        record: RequestRecord,
        state: RequestState,
        failure: Failure | None,
        effects: list[fx.Effect],
        *,
        attempt_over: bool = False,
    ) -> None:
        """End a request; its attempt, if it is on an engine, is aborted unless it is over."""
        waited = record.queued
        if waited:
            self.queue.remove(record)
        elif not attempt_over:
            effects.append(fx.AbortAttempt(record.request_id, record.epoch, record.instance_id))
        record.machine.to(state)
        del self._requests[record.request_id]
        effects.append(fx.RequestEnded(record, state, failure))
        # Last: releasing the place may complete a drain, which is news of its own.
        instance = None if waited else self.fleet.release(record)
        if instance is not None:
            self._instances.finish_drain(instance, effects)

    def _resolve_model(self, model: str) -> str:
        if self.fleet.serves(model):
            return model
        only = self.fleet.only_model()
        if not model and only is not None:
            return only
        raise ModelNotFoundError(model, self.fleet.models())

    def _retry_after_s(self) -> float:
        """Return when a place in the queue should be free: one completion frees one place."""
        return min(60.0, max(0.1, self._completion_interval_s))

    def _note_completion(self, now: float) -> None:
        if self._last_completion_s is not None:
            interval_s = now - self._last_completion_s
            self._completion_interval_s += 0.1 * (interval_s - self._completion_interval_s)
        self._last_completion_s = now

    # -- dispatch ----------------------------------------------------------------

    def _dispatch(self, now: float, effects: list[fx.Effect]) -> None:
        """Send out every request that an instance has room for, the most urgent first.

        The order holds over all models, because one instance may serve several.
        Within a model nobody overtakes a request that is only too big for the
        room there is, or it would never have its turn.
        """
        queue, fleet = self.queue, self.fleet
        heads = [head for head in map(queue.head, queue.models()) if head and fleet.is_open(head[2].model)]
        heapq.heapify(heads)
        stepped_over: list[str] = []
        while heads:
            record = heapq.heappop(heads)[2]
            model = record.model
            candidates = fleet.with_room_for(record)
            if not candidates:
                continue
            preferred = self._prefer_untried(record, candidates)
            if preferred:
                self._place(record, preferred, now, effects)
            elif len(stepped_over) < _STEP_OVER_LIMIT:
                queue.step_over(model)
                stepped_over.append(model)
            else:
                continue
            head = queue.head(model)
            if head is not None:
                heapq.heappush(heads, head)
        for model in stepped_over:
            queue.step_back(model)

    def _prefer_untried(
        self, record: RequestRecord, candidates: list[InstanceRecord]
    ) -> list[InstanceRecord]:
        """Return the candidates that lost no attempt of the request, or all if there is nothing better.

        None at all means that better instances are only busy: the request
        waits for one rather than go back, and others may pass it.
        """
        excluded = record.excluded_instance_ids
        if not excluded:
            return candidates
        untried = [i for i in candidates if i.instance_id not in excluded]
        if not untried and not any(
            i.state is InstanceState.READY and i.instance_id not in excluded
            for i in self.fleet.serving(record.model)
        ):
            return candidates
        return untried

    def _place(
        self, record: RequestRecord, candidates: list[InstanceRecord], now: float, effects: list[fx.Effect]
    ) -> None:
        placement = self._strategy.place(record, candidates)
        instance = self.fleet.get(placement.instance_id)
        record.epoch += 1
        decision = SchedulingDecision(
            request_id=record.request_id,
            epoch=record.epoch,
            instance_id=placement.instance_id,
            decision_time_s=now,
            queue_wait_s=now - record.arrival_s,
            scheduling_policy=self.scheduling_policy,
            routing_strategy=self.routing_strategy,
            load_balancer=self.load_balancer,
            config_version=self.config_version,
            reason=f"{self._policy.explain(record)}; {placement.reason}",
            candidates=placement.scores,
            candidate_count=len(candidates),
        )
        self.queue.remove(record)
        record.machine.to(RequestState.DISPATCHED)
        record.instance_id = placement.instance_id
        record.dispatch_s = now
        record.expire_s = record.deadline_s
        record.delivered = False
        record.decisions.append(decision)
        self._dispatch_sequence += 1
        instance.take(record, self._dispatch_sequence)
        self.fleet.settle(instance)
        effects.append(fx.DispatchAttempt(record, record.epoch, placement.instance_id, decision))

    # -- configuration and time ----------------------------------------------------

    def _on_scheduling_configured(
        self, event: ev.SchedulingConfigured, now: float, effects: list[fx.Effect]
    ) -> None:
        # Both first: a bad name must leave everything as it is.
        policy = SCHEDULING_POLICIES.get(event.scheduling_policy)()
        strategy = make_strategy(event.routing_strategy, event.load_balancer, self._random)
        self._policy, self._strategy = policy, strategy
        self.scheduling_policy = event.scheduling_policy
        self.routing_strategy = event.routing_strategy
        self.load_balancer = event.load_balancer
        self.config_version += 1
        self.queue.reorder(policy)

    def _on_clock_advanced(self, event: ev.ClockAdvanced, now: float, effects: list[fx.Effect]) -> None:
        self._instances.advance(now, effects)
        for record in self._deadlines.pop_due(now, self._requests):
            self._expire(record, effects)

    def _watch(self, record: RequestRecord, now: float) -> None:
        """Make sure that a request which enters the queue does not wait for ever."""
        expire_s = record.deadline_s if record.deadline_s is not None else now + self.config.queue_timeout_s
        record.expire_s = expire_s
        self._deadlines.add(expire_s, record.request_id, self._requests)

    def _expire(self, record: RequestRecord, effects: list[fx.Effect]) -> None:
        if record.deadline_s is not None:
            message = f"the deadline of {(record.deadline_s - record.arrival_s) * 1000:.0f} ms passed"
            where = "while it waited" if record.queued else f"while it ran on {record.instance_id}"
            message = f"{message} {where}"
        else:
            message = (
                f"it waited {self.config.queue_timeout_s:g} s "
                f"and no instance that serves {record.model!r} had room"
            )
        self._end(record, RequestState.EXPIRED, Failure(ErrorReason.DEADLINE_EXCEEDED, message), effects)
