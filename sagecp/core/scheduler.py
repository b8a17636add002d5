"""The brain: one state machine over requests and instances.

:meth:`Scheduler.handle` is the only thing that changes state. Events go in,
effects come out; the runtime performs the effects and feeds what happens back
as new events. The simulator uses the same door with a virtual clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.adaptation import AdaptationBook
from sagecp.core.admission import Admission
from sagecp.core.config import SchedulerConfig
from sagecp.core.cost_book import CostBook
from sagecp.core.deadlines import DeadlineHeap
from sagecp.core.dispatcher import Dispatcher
from sagecp.core.drain import DrainBook
from sagecp.core.errors import (
    ErrorReason,
    Failure,
    ModelNotFoundError,
    RequestIdConflictError,
    RequestNotFoundError,
    SageError,
)
from sagecp.core.failover import ending_after_restart, ending_of, restored_record
from sagecp.core.fleet import Fleet
from sagecp.core.instance_lifecycle import InstanceLifecycle
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.kv_cache_reports import KvCacheReports
from sagecp.core.policies.adaptive import AdaptivePolicy
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prediction.learning import learn_output
from sagecp.core.prediction.placement import predict
from sagecp.core.prediction.step_time_accuracy import PlannedStepTime
from sagecp.core.prefill_gates import PrefillGates
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import SettingsHistory
from sagecp.core.types import ExecutionInstance, RequestState, SchedulingDecision
from sagecp.core.waiting_line import WaitingLine


class Scheduler:
    """Decides which request runs where, and when.

    Not thread-safe; one event loop owns it.

    Args:
        config: Bounds and names.
        planned_for: Says which step times were planned for an instance; ``None``: nobody does.

    Raises:
        UnknownNameError: A name of the configuration is not known.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        planned_for: Callable[[ExecutionInstance], PlannedStepTime | None] | None = None,
    ) -> None:
        self.config = config
        self.settings = SettingsHistory(
            config.scheduling_policy, config.routing_strategy, config.load_balancer, config.parameters
        )
        self.book = PredictionBook(planned_for)
        self.fleet = Fleet(
            config.max_instance_count,
            config.default_concurrency_limit,
            self.book,
            config.health,
            config.prices,
        )
        self.prefixes = PrefixIndex()
        self.cache_reports = KvCacheReports(self.prefixes)
        self.queue = RequestQueue(
            self._new_line,
            config.max_queued_request_count,
            config.max_queued_bytes,
            config.queue_shares,
        )
        self.service_books = ServiceBooks()
        self._gates = PrefillGates(self.fleet)
        self._dispatcher = Dispatcher(
            self.fleet,
            self._gates,
            self.queue,
            self.prefixes,
            self.service_books,
            random.Random(config.seed),
            self._start,
        )
        self.adaptation = AdaptationBook()
        self.adaptation.configure(self.settings.current.values, 0.0)
        self._dispatcher.configure(self.settings.current, self.adaptation.verdict)
        self._admission = Admission(self.fleet, self.queue, self.prefixes, self.book, self._dispatcher)
        self.costs = CostBook(self.fleet, self.book)
        self._requests: dict[str, RequestRecord] = {}
        # Deadlines, and the longest wait of requests without one.
        self._deadlines = DeadlineHeap()
        self._instances = InstanceLifecycle(self.fleet, self.prefixes, config)
        self._drains = DrainBook(self.fleet, self.queue, self._instances, config.max_attempt_count)
        self._arrival_sequence = 0
        self._dispatch_sequence = 0
        # Of the event that is being handled.
        self._effects: list[fx.Effect] = []
        self._handlers: dict[type, Callable[[Any, float, list[fx.Effect]], None]] = {
            ev.RequestArrived: self._on_request_arrived,
            ev.RequestsRestored: self._on_requests_restored,
            ev.RequestCancelled: self._on_request_cancelled,
            ev.RequestAborted: self._on_request_aborted,
            ev.AttemptProgressed: self._on_attempt_progressed,
            ev.AttemptSucceeded: self._on_attempt_succeeded,
            ev.AttemptFailed: self._on_attempt_failed,
            ev.InstanceRegistered: self._instances.on_registered,
            ev.InstanceRestored: self._instances.on_restored,
            ev.InstanceDeregistered: self._instances.on_deregistered,
            ev.HeartbeatReceived: self._on_heartbeat,
            ev.HeartbeatRefused: self._instances.on_heartbeat_refused,
            ev.HealthProbed: self._instances.on_health_probed,
            ev.EngineSilent: self._instances.health.on_engine_silent,
            ev.EngineProbed: self._instances.health.on_engine_probed,
            ev.DrainRequested: self._drains.on_drain_requested,
            ev.LoraAdaptersRequested: self._instances.on_lora_adapters_requested,
            ev.SchedulingConfigured: self._on_scheduling_configured,
            ev.PoliciesEvaluated: self._on_policies_evaluated,
            ev.ClockSkipped: self._instances.on_clock_skipped,
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
        times_s = [
            self._deadlines.next_s(self._requests),
            self._instances.next_timer_s(),
            self._drains.next_timer_s(),
        ]
        if len(self.queue):
            times_s.append(self.fleet.next_opening_s())
        if self._adapts:
            times_s.append(self.adaptation.next_timer_s())
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    @property
    def _adapts(self) -> bool:
        return self.settings.current.scheduling_policy == AdaptivePolicy.name

    @property
    def policy_in_force(self) -> str:
        """Name of the policy that orders the queue: ``adaptive`` chooses another's."""
        return self._dispatcher.policy.in_force

    def why_policy(self) -> str:
        """Return why the policy in force is in force."""
        return self._dispatcher.policy.why() or self.settings.current.comment

    @property
    def policy_since_s(self) -> float | None:
        """When the adaptive policy chose the one in force, on the core's clock; ``None``: it did not."""
        return self.adaptation.verdict.since_s if self._adapts else None

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
            # Whatever is handled late must not start work that is out of time.
            self._expire_due(now, effects)
            self._effects = effects
            self._dispatcher.dispatch(now)
        self.fleet.drop_stale_openings()
        return effects

    # -- requests ----------------------------------------------------------------

    def _on_request_arrived(self, event: ev.RequestArrived, now: float, effects: list[fx.Effect]) -> None:
        metadata = event.metadata
        if metadata.request_id in self._requests:
            raise RequestIdConflictError(metadata.request_id)
        try:
            model = self._resolve_model(metadata.model_name)
            # Before anything that costs more: a refusal must stay cheap when there are many.
            size_bytes = self.queue.check_room(metadata, now)
            record = RequestRecord(metadata, model, self._arrival_sequence + 1, now, size_bytes)
            parameters = self.settings.current.values
            self._admission.estimate(record, parameters)
            # Before it may be found infeasible: it is part of the demand, and its objectives are missed.
            self.adaptation.note_arrival(record, now)
            self._admission.check(record, parameters, now)
        except SageError as error:
            self.adaptation.arrivals.note_refused(metadata.request_id)
            effects.append(fx.RequestRejected(metadata.request_id, error))
            return
        self._arrival_sequence += 1
        self._requests[metadata.request_id] = record
        self.queue.push(record)
        self._watch(record, now)
        effects.append(fx.RequestAccepted(record))

    def _on_requests_restored(self, event: ev.RequestsRestored, now: float, effects: list[fx.Effect]) -> None:
        for restored in event.requests:
            if restored.metadata.request_id in self._requests:
                raise RequestIdConflictError(restored.metadata.request_id)
        for restored in event.requests:
            self._restore(restored, now, effects)

    def _restore(self, restored: ev.RestoredRequest, now: float, effects: list[fx.Effect]) -> None:
        self._arrival_sequence += 1
        record = restored_record(restored, self._arrival_sequence)
        self._admission.estimate(record, self.settings.current.values)
        record.go_on_after(restored.output_token_count, now)
        self._requests[record.request_id] = record
        self.queue.push(record)
        self._watch(record, now)
        effects.append(fx.RequestAccepted(record))
        ending = ending_after_restart(record, restored, self.config.max_attempt_count)
        if ending is not None:
            self._end(record, RequestState.FAILED, ending, now, effects)

    def _on_request_cancelled(self, event: ev.RequestCancelled, now: float, effects: list[fx.Effect]) -> None:
        record = self._requests.get(event.request_id)
        if record is None:
            raise RequestNotFoundError(event.request_id)
        cause = f": {event.cause}" if event.cause else ""
        failure = Failure(ErrorReason.REQUEST_CANCELLED, f"the request was cancelled{cause}")
        self._end(record, RequestState.CANCELLED, failure, now, effects)

    def _on_request_aborted(self, event: ev.RequestAborted, now: float, effects: list[fx.Effect]) -> None:
        record = self._requests.get(event.request_id)
        if record is not None:
            self._end(record, RequestState.FAILED, event.failure, now, effects)

    def _on_attempt_progressed(
        self, event: ev.AttemptProgressed, now: float, effects: list[fx.Effect]
    ) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None or record.delivered:
            return
        record.delivered = record.has_output = True
        record.machine.to(RequestState.RUNNING)
        record.attempt_first_token_s = now
        if record.first_token_s is None:
            record.first_token_s = now
        instance = self.fleet.holder(record.instance_id)
        if instance is not None:
            instance.load.note_first_token(record.request_id, now)
            instance.meter.note_first_token(record.request_id, now)
            self._gates.settle(instance, now)
        if event.prompt_block_hashes:
            self.cache_reports.link(record.digest, event.prompt_token_count, event.prompt_block_hashes)
        if record.dispatch_s is not None:
            self.book.accuracy.record("ttft", record.predicted_ttft_s, now - record.dispatch_s)

    def _on_attempt_succeeded(self, event: ev.AttemptSucceeded, now: float, effects: list[fx.Effect]) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None:
            return
        # Of this attempt: what earlier ones produced came to it as part of the prompt.
        tokens = event.output_token_count - record.output_token_count
        instance = self.fleet.find(record.instance_id)
        if instance is not None and record.dispatch_s is not None:
            instance.completed_request_count += 1
            self._instances.health.note_success(instance)
            first_s = record.attempt_first_token_s
            ttft_s = None if first_s is None else first_s - record.dispatch_s
            instance.learn(now - record.dispatch_s, ttft_s, tokens / record.metadata.choice_count)
        learn_output(self.book, record, event, now)
        self._end(record, RequestState.SUCCEEDED, None, now, effects, attempt_over=True, output_tokens=tokens)

    def _on_attempt_failed(self, event: ev.AttemptFailed, now: float, effects: list[fx.Effect]) -> None:
        record = self._current(event.request_id, event.epoch)
        if record is None:
            return
        instance = self.fleet.find(record.instance_id)
        if instance is not None and event.counts_against_engine:
            instance.failed_attempt_count += 1
        self._count_loss(record, event, instance)
        if instance is not None and event.counts_against_engine:
            self._instances.health.note_failure(instance, record, event.failure, now, effects)
        if instance is not None and event.engine_down:
            self._instances.on_unreachable(instance, event.failure.message, now, effects)
        ending = ending_of(
            record,
            event.failure,
            retryable=event.retryable,
            cannot_continue=event.cannot_continue,
            max_attempt_count=self.config.max_attempt_count,
        )
        if ending is not None:
            self._end(record, RequestState.FAILED, ending, now, effects, attempt_over=True)
            return
        self._release(record, now)
        if event.output_token_count:
            record.go_on_after(event.output_token_count, now)
        record.machine.to(RequestState.QUEUED)
        self.queue.push(record)
        if record.deadline_s is None:
            self._watch(record, now)
        effects.append(fx.RequestRequeued(record, event.failure))
        if instance is not None:
            self._drains.note_requeued(instance, record)
            self._instances.finish_drain(instance, effects)

    @staticmethod
    def _count_loss(record: RequestRecord, event: ev.AttemptFailed, instance: InstanceRecord | None) -> None:
        """Note what a lost attempt says of its request."""
        record.excluded_instance_ids |= {record.instance_id}
        record.lost_attempt_count += event.counts
        record.has_output = record.has_output or event.output_token_count > 0
        # Of all that ran there, suspect is what the engine had just begun with, or had to itself.
        alone = instance is not None and instance.in_flight_count == 1 and not instance.unreachable
        if event.engine_died and (alone or not record.delivered):
            record.engine_kill_count += 1

    def _current(self, request_id: str, epoch: int) -> RequestRecord | None:
        """Return the request if this attempt is still its present one: late news is no news."""
        record = self._requests.get(request_id)
        return record if record is not None and record.epoch == epoch and not record.queued else None

    def _end(
        self,
        record: RequestRecord,
        state: RequestState,
        failure: Failure | None,
        now: float,
        effects: list[fx.Effect],
        *,
        attempt_over: bool = False,
        output_tokens: int | None = None,
    ) -> None:
        """End a request; its attempt, if it is on an engine, is aborted unless it is over."""
        waited = record.queued
        self.adaptation.arrivals.note_end(record, state, now, output_tokens)
        if waited:
            self.queue.remove(record)
            self.queue.note_departure(now)
        elif not attempt_over:
            effects.append(fx.AbortAttempt(record.request_id, record.epoch, record.instance_id))
        record.machine.to(state)
        del self._requests[record.request_id]
        effects.append(fx.RequestEnded(record, state, failure))
        # Last: releasing the place may complete a drain, which is news of its own.
        instance = None if waited else self._release(record, now, output_tokens)
        if instance is not None:
            self._instances.finish_drain(instance, effects)

    def _release(
        self, record: RequestRecord, now: float, output_tokens: int | None = None
    ) -> InstanceRecord | None:
        """Free what an attempt held; return its instance, if it is registered.

        Args:
            record: The request.
            now: The time.
            output_tokens: What it produced, when it ran to its end.
        """
        instance = self.fleet.holder(record.instance_id)
        if instance is not None:
            choices = record.metadata.choice_count
            produced = record.expected_output_token_count if output_tokens is None else output_tokens
            instance.load.note_end(
                record.request_id, produced / choices, now, learn=output_tokens is not None and choices == 1
            )
            self.costs.note_attempt_end(record, instance, now, output_tokens)
        if (
            record.pinned_block_count
            # A cache that began anew since holds the same blocks for other requests.
            and self.prefixes.generation(record.instance_id) == record.prefix_generation
        ):
            held = record.digest.block_hashes[: record.pinned_block_count]
            self.prefixes.release(record.instance_id, held)
        record.pinned_block_count = 0
        released = self.fleet.release(record)
        if released is not None:
            self._gates.settle(released, now)
        used_s = record.cost_s
        if output_tokens is not None and record.expected_output_token_count > 0:
            decode_s = record.cost_s - record.work_s
            used_s = record.work_s + decode_s * output_tokens / record.expected_output_token_count
        elif not record.delivered:
            used_s = 0.0
        line = self.queue.line(record.model)
        # The policy that charged it need not be in force any more.
        if self.service_books.settle(record, used_s) and line is not None:
            line.note_settled(record)
        record.cost_s = 0.0
        return released

    def _resolve_model(self, model: str) -> str:
        if self.fleet.serves(model):
            return model
        only = self.fleet.only_model()
        if not model and only is not None:
            return only
        raise ModelNotFoundError(model, self.fleet.models())

    # -- dispatch ----------------------------------------------------------------

    def _start(
        self, record: RequestRecord, instance: InstanceRecord, decision: SchedulingDecision, now: float
    ) -> None:
        """Carry a decision out."""
        inputs = decision.inputs
        assert inputs is not None  # noqa: S101 - the dispatcher always gives them
        row = next(row for row in inputs.candidates if row.instance_id == instance.instance_id)
        predicted = predict(inputs.request, row)
        # The queue drops a line with its last request, which is charged nevertheless.
        line = self.queue.line(record.model)
        self.queue.remove(record)
        self.queue.note_departure(now)
        record.machine.to(RequestState.DISPATCHED)
        record.epoch = decision.epoch
        record.instance_id = instance.instance_id
        record.dispatch_s = now
        record.expire_s = record.deadline_s
        record.delivered = False
        record.attempt_first_token_s = None
        record.wait_until_s = now
        record.predicted_ttft_s = predicted.ttft_s
        record.predicted_tpot_s = predicted.tpot_s
        # Decodes share their steps: each is charged its part of the batch.
        decode_s = inputs.request.output_token_count * predicted.tpot_s / max(1, row.decode_count + 1)
        record.work_s = predicted.work_s
        record.cost_s = predicted.work_s + decode_s * record.metadata.choice_count
        record.decisions.append(decision)
        self.costs.note_dispatch(record, instance, row, predicted, now)
        self._dispatch_sequence += 1
        instance.take(record, self._dispatch_sequence)
        instance.load.note_dispatch(record.request_id, record.prompt_token_count, row.cached_token_count, now)
        if record.digest.block_hashes:
            self._note_prefix(record, instance, now)
        self._dispatcher.strategy.note_dispatch(record, instance.instance_id)
        if line is not None:
            line.note_dispatch(record, record.cost_s)
        self.fleet.settle(instance)
        self._gates.settle(instance, now)
        self._effects.append(fx.DispatchAttempt(record, record.epoch, instance.instance_id, decision))

    def _note_prefix(self, record: RequestRecord, instance: InstanceRecord, now: float) -> None:
        """Expect the prompt in the instance's cache, which decodes take room from."""
        capacity = instance.spec.key_value_token_capacity
        if capacity is not None:
            room = max(0.0, capacity - instance.load.produced_token_count(now))
            self.prefixes.resize(instance.instance_id, int(room) // record.digest.block_token_count)
        record.prefix_generation = self.prefixes.generation(instance.instance_id)
        record.pinned_block_count = self.prefixes.insert(
            instance.instance_id, record.digest.block_hashes, pinned=True
        )

    def _new_line(self) -> WaitingLine:
        return self._dispatcher.policy.new_line()

    def _on_heartbeat(self, event: ev.HeartbeatReceived, now: float, effects: list[fx.Effect]) -> None:
        self._instances.on_heartbeat(event, now, effects)
        if event.kv_cache_update is not None:
            # After the gauges, which may tell that the engine is another.
            self.cache_reports.take(self.fleet.get(event.instance_id), event.kv_cache_update)

    # -- configuration and time ----------------------------------------------------

    def _on_scheduling_configured(
        self, event: ev.SchedulingConfigured, now: float, effects: list[fx.Effect]
    ) -> None:
        # First: a bad name or value must leave everything as it is.
        settings = self.settings.apply(event.change, now)
        self.adaptation.configure(settings.values, now)
        self._reconfigure(now)
        effects.append(fx.SettingsChanged(settings))

    def _reconfigure(self, now: float) -> None:
        """Let the settings and the verdict in force order what waits."""
        self._dispatcher.configure(self.settings.current, self.adaptation.verdict)
        self.queue.reorder(self._dispatcher.policy.new_line)
        for instance in self.fleet:
            self._gates.settle(instance, now)

    def _on_policies_evaluated(
        self, event: ev.PoliciesEvaluated, now: float, effects: list[fx.Effect]
    ) -> None:
        switch = self.adaptation.judge(event.evaluation_id, event.scores, now)
        if switch is not None:
            before, after = switch
            self._reconfigure(now)
            effects.append(fx.PolicySwitched(before.policy, after.policy, after.why))

    def _on_clock_advanced(self, event: ev.ClockAdvanced, now: float, effects: list[fx.Effect]) -> None:
        self._instances.advance(now, effects)
        self._drains.advance(now, effects)
        self._expire_due(now, effects)
        if self._adapts:
            replay = self.adaptation.ask(self.settings.current, self.fleet, now)
            if replay is not None:
                effects.append(fx.EvaluatePolicies(replay))

    def _watch(self, record: RequestRecord, now: float) -> None:
        """Make sure that a request which enters the queue does not wait for ever."""
        expire_s = record.deadline_s if record.deadline_s is not None else now + self.config.queue_timeout_s
        record.expire_s = expire_s
        self._deadlines.add(expire_s, record.request_id, self._requests)

    def _expire_due(self, now: float, effects: list[fx.Effect]) -> None:
        for record in self._deadlines.pop_due(now, self._requests):
            self._expire(record, now, effects)

    def _expire(self, record: RequestRecord, now: float, effects: list[fx.Effect]) -> None:
        if record.deadline_s is not None:
            message = f"the deadline of {(record.deadline_s - record.arrival_s) * 1000:.0f} ms passed"
            where = "while it waited" if record.queued else f"while it ran on {record.instance_id}"
            message = f"{message} {where}"
        else:
            message = (
                f"it waited {self.config.queue_timeout_s:g} s "
                f"and no instance that serves {record.model!r} had room"
            )
        failure = Failure(ErrorReason.DEADLINE_EXCEEDED, message)
        self._end(record, RequestState.EXPIRED, failure, now, effects)
