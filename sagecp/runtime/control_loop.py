"""Events in, effects out: the loop that joins the core to the world."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import math
import time
from collections import deque
from collections.abc import Callable

from sagecp.config import RuntimeConfig
from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.prediction.step_time_report import look_for_drift
from sagecp.core.request import RequestRecord
from sagecp.core.scheduler import Scheduler
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import InstanceState, LoopStatus, RequestMetadata, RequestState, SchedulingDecision
from sagecp.runtime.attempts import AttemptRunner
from sagecp.runtime.event_log import EventLog
from sagecp.runtime.event_reporter import OVERLOAD_REASONS, EventReporter
from sagecp.runtime.executor import ExecutionCoordinator
from sagecp.runtime.health import EngineProber, HealthLoop
from sagecp.runtime.journal import Journal
from sagecp.runtime.lease_tokens import LeaseTokens
from sagecp.runtime.load_file import LoadFile
from sagecp.runtime.load_recorder import LoadRecorder
from sagecp.runtime.loop_runs import LoopRuns
from sagecp.runtime.monitor import EndedSample, Monitor, objectives_met
from sagecp.runtime.monitor_keys import MetricsKey
from sagecp.runtime.output import OutputLog
from sagecp.runtime.policy_evaluation import PolicyEvaluations, PolicyEvaluator
from sagecp.runtime.prompt_blocks import first_output
from sagecp.runtime.request_observer import RequestObserver
from sagecp.runtime.requests import Acceptance, RequestHandle, RequestTable
from sagecp.runtime.restart import Restorer, StoredRequest, first_sequence, sort_records
from sagecp.runtime.store.base import Store, StoreError
from sagecp.runtime.store.codec import decode_instance
from sagecp.runtime.store.records import InstanceKept
from sagecp.runtime.tracing.base import RequestTracer
from sagecp.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Nothing that an operator should look into; and an engine's refusal may quote the request.
_CALLER_FAULTS = frozenset({ErrorReason.ENGINE_REJECTED, ErrorReason.INVALID_REQUEST})

DRIFT_INTERVAL_S = 5.0
"""How often predictions are compared with what happened."""

RECENT_DECISION_COUNT = 100
"""Receipts that are kept beside those of the requests that are known."""

EventListener = Callable[[float, ev.Event, list[fx.Effect]], None]
"""Called with the time on the core's clock, an event, and the core's answer to it."""


class ControlLoop:
    """Feeds the core what happens and does what it decides.

    Attributes:
        request_observer: Counts what happens to requests; ``None``: nobody does.

    Args:
        scheduler: The core.
        coordinator: Runs attempts.
        monitor: Takes samples of ended requests.
        config: Loops and bounds.
        clock: Monotonic seconds.
        policy_evaluator: Replays the past for the adaptive policy; ``None``: nobody does.
        on_event: Told every event, when it happened and what the core answered, before anything is
            done about it: a recorder, for example. It must not raise.
        store: Keeps durable requests; ``None``: none is durable.
        tracer: Makes traces of requests; ``None``: nobody does.
        load_file: Keeps the history of load over restarts; ``None``: it begins anew.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        coordinator: ExecutionCoordinator,
        monitor: Monitor,
        config: RuntimeConfig,
        clock: Callable[[], float],
        policy_evaluator: PolicyEvaluator | None = None,
        on_event: EventListener | None = None,
        store: Store | None = None,
        tracer: RequestTracer | None = None,
        load_file: LoadFile | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.coordinator = coordinator
        self.monitor = monitor
        self.requests = RequestTable(config.retained_request_count, config.retained_bytes, config.retention_s)
        self.clock = clock
        # Wall time is read once: later steps of the system clock move nothing.
        self.wall_offset_s = time.time() - clock()
        self.events = EventLog(self.wall_clock)
        self.load = LoadRecorder(self.wall_clock, load_file)
        self.reporter = EventReporter(self.events)
        self.lease_tokens = LeaseTokens()
        self._scheduling_runs = LoopRuns("scheduling", config.scheduling_interval_s)
        self._health_runs = LoopRuns("engine_health", config.health_interval_s)
        self._monitoring_runs = LoopRuns("monitoring", config.monitoring_interval_s)
        self._drift_look_s = -math.inf
        self.idle = asyncio.Event()
        self.idle.set()
        self.health = HealthLoop(
            coordinator,
            self._ids_to_probe,
            self.feed,
            config.health_interval_s,
            note=lambda: self._health_runs.note(clock()),
        )
        self._prober = EngineProber(coordinator, self.feed)
        stall_timeout_s = scheduler.config.health.stall_timeout_s
        self._watchdog = Watchdog(coordinator, self._busy_ids, self.feed, stall_timeout_s)
        self._config = config
        self._sequence = first_sequence()
        self.journal = None if store is None else Journal(store, clock, self.wall_offset_s)
        self._attempts = AttemptRunner(coordinator, self.journal, self.feed, clock, tracer)
        self._journal_trouble = ""
        # While requests come back after a restart.
        self._restorer: Restorer | None = None
        self._on_event = on_event
        self.request_observer: RequestObserver | None = None
        self._tracer = tracer
        self.recent_decisions: deque[SchedulingDecision] = deque(maxlen=RECENT_DECISION_COUNT)
        self._evaluations = PolicyEvaluations(policy_evaluator, self.feed)
        self._loops: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def wall_clock(self) -> float:
        """Return Unix seconds, as far as the core's clock went."""
        return self.clock() + self.wall_offset_s

    @property
    def running(self) -> bool:
        """Whether :meth:`start` was called, and :meth:`stop` not yet."""
        return bool(self._loops)

    def loop_statuses(self) -> tuple[LoopStatus, ...]:
        """Return when each periodic loop last ran."""
        runs = (self._scheduling_runs, self._health_runs, self._monitoring_runs)
        return tuple(each.status(self.wall_offset_s) for each in runs)

    def start(self, *, monitoring: bool) -> None:
        """Start the periodic loops."""
        loop = asyncio.get_running_loop()
        self._loops = [
            loop.create_task(self._scheduling_loop(), name="sagecp-scheduling"),
            loop.create_task(self.health.run(), name="sagecp-health"),
            loop.create_task(self._watchdog.run(), name="sagecp-watchdog"),
        ]
        if monitoring:
            watch = self.monitor.watch_event_loop(
                self._config.monitoring_interval_s, lambda: self._monitoring_runs.note(self.clock())
            )
            self._loops.append(loop.create_task(watch, name="sagecp-monitoring"))
        # Leases of instances that registered before the start.
        self._arm_timer(self.clock())

    async def open_journal(self) -> None:
        """Bring back what an earlier process accepted and did not finish.

        Raises:
            StoreError: The store cannot be opened, or was damaged.
        """
        if self.journal is None:
            return
        records = await self.journal.store.open()
        # Nothing of this is garbage, however often the collector looks.
        gc.disable()
        try:
            self._restore(*sort_records(records))
        finally:
            gc.enable()

    def _restore(self, requests: list[StoredRequest], instances: list[InstanceKept]) -> None:
        for kept in instances:
            instance = decode_instance(kept.specification)
            adapters = kept.lora_adapters
            self.feed(
                ev.InstanceRestored(
                    instance,
                    kept.incarnation,
                    kept.draining,
                    kept.sleep_level,
                    None if adapters is None else tuple(LoraAdapter(*each) for each in adapters),
                )
            )
        if not requests or self.journal is None:
            return
        self._restorer = Restorer(self.journal, self.wall_offset_s, self.clock())
        events = tuple(
            self._restorer.event_of(stored, self._new_output(stored.accepted.request_id))
            for stored in requests
        )
        self.feed(ev.RequestsRestored(events))
        self._restorer = None
        logger.info("requests restored", extra={"requests": len(events)})

    def suspend(self, *, running: bool) -> None:
        """Take durable requests out, for a process to come: those that wait, or those that run as well."""
        failure = Failure(ErrorReason.SHUTTING_DOWN, "the control plane stops; the request goes on later")
        for handle in self.requests.live():
            if handle.durable and (running or handle.record.queued):
                handle.suspended = True
                self.feed(ev.RequestAborted(handle.request_id, failure))

    async def stop(self) -> None:
        """End every task; suspend live requests that are durable, and end the others as FAILED."""
        self.suspend(running=True)
        failure = Failure(ErrorReason.SHUTTING_DOWN, "the control plane is shutting down; submit it again")
        for handle in self.requests.live():
            if not handle.suspended:
                self.feed(ev.RequestAborted(handle.request_id, failure))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tasks, self._loops = self._loops, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._prober.stop()
        await self._evaluations.stop()
        await self._attempts.stop()
        if tasks:
            await self.load.stop()
        if self.journal is not None:
            await self.journal.store.close()
        if self._tracer is not None:
            await self._tracer.close()

    def submit(self, request: RequestMetadata, digest: bytes, *, durable: bool) -> RequestHandle:
        """Hand a new request to the core and return its handle.

        A durable one was accepted once ``handle.accepted`` is settled.

        Raises:
            SageError: The core refused it.
        """
        now = self.clock()
        self._perform(self._handle(ev.RequestArrived(request), now), now, digest, durable=durable)
        return self.requests.get(request.request_id)

    def feed(self, event: ev.Event) -> None:
        """Tell the core what happened and do what it wants done.

        Raises:
            SageError: The event names something unknown or impossible.
        """
        now = self.clock()
        self._perform(self._handle(event, now), now)

    def _handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        effects = self.scheduler.handle(event, now)
        if self._on_event is not None:
            self._on_event(now, event, effects)
        if self._tracer is not None:
            self._tracer.on_event(now, event, effects)
        return effects

    def _ids_to_probe(self) -> list[str]:
        return [i.instance_id for i in self.scheduler.fleet if i.is_probed]

    def _busy_ids(self) -> list[str]:
        return [i.instance_id for i in self.scheduler.fleet if i.in_flight_count]

    def _perform(
        self, effects: list[fx.Effect], now: float, digest: bytes = b"", *, durable: bool = False
    ) -> None:
        rejected: fx.RequestRejected | None = None
        for effect in effects:
            if isinstance(effect, fx.DispatchAttempt):
                self._start_attempt(effect, now)
            elif isinstance(effect, fx.RequestEnded):
                self._finish(effect, now)
            elif isinstance(effect, fx.RequestAccepted):
                self._add_handle(effect.record, digest, durable=durable)
            elif isinstance(effect, fx.AbortAttempt):
                handle = self.requests.find(effect.request_id)
                if handle is not None and handle.task is not None:
                    handle.interruption = None
                    handle.task.cancel()
            elif isinstance(effect, fx.InterruptAttempt):
                handle = self.requests.find(effect.request_id)
                if handle is not None:
                    self._attempts.interrupt(handle, effect)
            elif isinstance(effect, fx.RequestRequeued):
                handle = self.requests.get(effect.record.request_id)
                handle.end_attempt(now, effect.failure)
                # The core's record may show the next attempt already.
                lost = handle.attempts[-1]
                if self.request_observer is not None:
                    self.request_observer.attempt_lost(effect.record, effect.failure.reason)
                if self.journal is not None and handle.durable:
                    self.journal.lost(handle, lost.epoch, effect.failure, now)
                self.reporter.attempt_lost(
                    lost.epoch, effect.failure, lost.instance_id, handle.request_id, now
                )
            elif isinstance(effect, fx.InstanceChanged):
                self._on_instance_changed(effect)
            elif isinstance(effect, fx.InstanceRemoved):
                self.coordinator.detach(effect.instance_id)
                if self.journal is not None:
                    self.journal.instance_dropped(effect.instance_id)
                self.lease_tokens.forget(effect.instance_id)
                self.reporter.instance_removed(effect)
                logger.info(
                    "instance removed", extra={"instance_id": effect.instance_id, "reason": effect.reason}
                )
            elif isinstance(
                effect,
                fx.GpuFaultBegan
                | fx.GpuFaultCleared
                | fx.EngineProcessChanged
                | fx.ClockSkewChanged
                | fx.OrderTroubled,
            ):
                self.reporter.agent_reported(effect)
            elif isinstance(effect, fx.ProbeEngine):
                self._prober.probe(effect.instance_id)
            elif isinstance(effect, fx.FailStaticChanged):
                self._on_fail_static_changed(effect)
            elif isinstance(effect, fx.SettingsChanged):
                _log_settings(effect.settings)
                self.reporter.settings_changed(effect.settings)
            elif isinstance(effect, fx.EvaluatePolicies):
                if self.running:
                    self._evaluations.start(effect.replay)
            elif isinstance(effect, fx.PolicySwitched):
                logger.info(
                    "scheduling policy switched",
                    extra={"policy": effect.policy, "previous": effect.previous, "why": effect.why},
                )
                self.reporter.policy_switched(effect)
            else:
                rejected = effect
        self._arm_timer(now)
        if rejected is not None:
            if self.request_observer is not None:
                self.request_observer.refused(rejected.error.reason)
            if rejected.error.reason in OVERLOAD_REASONS:
                self.reporter.overloaded(rejected.error.reason, now)
            raise rejected.error

    def _add_handle(self, record: RequestRecord, digest: bytes, *, durable: bool) -> None:
        request_id = record.request_id
        self.idle.clear()
        if self._restorer is not None:
            self.requests.add(self._restorer.handle_of(record))
            return
        self._sequence += 1
        handle = RequestHandle(
            record, self._new_output(request_id), digest, self._sequence, self.wall_offset_s
        )
        self.requests.add(handle)
        if self.request_observer is not None:
            self.request_observer.accepted(record)
        self.load.note_arrival(record)
        if durable and self.journal is not None:
            handle.durable = True
            accepted = handle.accepted = Acceptance()

            def then(error: StoreError | None) -> None:
                if error is not None:
                    self._take_back(handle, error)
                accepted.settle(error)

            self.journal.accepted(handle, then)

    def _take_back(self, handle: RequestHandle, error: StoreError) -> None:
        """Forget a request that could not be written down: it was never accepted."""
        handle.refused = True
        if self.request_observer is not None:
            self.request_observer.refused(error.reason)
        self.feed(ev.RequestAborted(handle.request_id, error.as_failure()))
        self.requests.forget(handle)

    def _new_output(self, request_id: str) -> OutputLog:
        return OutputLog(functools.partial(self._on_first_output, request_id))

    def _on_first_output(self, request_id: str) -> None:
        handle = self.requests.get(request_id)
        record = handle.record
        reports = self.scheduler.prefixes.is_exact(record.instance_id)
        self.feed(first_output(record, handle.output, engine_reports_cache=reports))

    def _start_attempt(self, effect: fx.DispatchAttempt, now: float) -> None:
        self.recent_decisions.append(effect.decision)
        handle = self.requests.get(effect.record.request_id)
        handle.start_attempt(now)
        instance = self.scheduler.fleet.get(effect.instance_id)
        self._attempts.start(handle, effect, instance.spec, instance.incarnation)

    def _finish(self, effect: fx.RequestEnded, now: float) -> None:
        record = effect.record
        handle = self.requests.get(record.request_id)
        handle.failure = effect.failure
        handle.end_s = now
        handle.end_attempt(now, effect.failure)
        handle.task = None
        if not (handle.suspended or handle.refused):
            self._record_sample(handle, effect.state, now)
        if (
            effect.state is RequestState.FAILED
            and not handle.suspended
            and effect.failure is not None
            and effect.failure.reason not in _CALLER_FAULTS
        ):
            self.reporter.request_failed(effect.failure, record.instance_id, record.request_id, now)
        if self.journal is not None and handle.durable and not (handle.suspended or handle.refused):
            # Output that is on its way to the medium comes too late: what is written with the end is all.
            handle.output.seal()
            # Readers hear of the end when it is certain.
            self.journal.ended(handle, lambda _: _show_end(handle))
        else:
            _show_end(handle)
        self.requests.note_ended(handle, now)
        if self.scheduler.live_count == 0:
            self.idle.set()

    def _record_sample(self, handle: RequestHandle, state: RequestState, now: float) -> None:
        record = handle.record
        metadata = record.metadata
        latency_s = now - record.arrival_s
        ttft_s = None if record.first_token_s is None else record.first_token_s - record.arrival_s
        token_count = handle.usage().completion_token_count
        tpot_s = (latency_s - ttft_s) / (token_count - 1) if ttft_s is not None and token_count > 1 else None
        sample = EndedSample(
            end_s=now,
            key=MetricsKey(record.model, record.instance_id, metadata.tenant_id, metadata.priority),
            state=state,
            latency_s=latency_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            queue_wait_s=(record.dispatch_s if record.dispatch_s is not None else now) - record.arrival_s,
            output_token_count=token_count,
            slo_met=objectives_met(metadata, state, latency_s, ttft_s, tpot_s),
            cost_usd=record.spent_usd,
        )
        self.monitor.record(sample)
        self.load.note_end(record.model, metadata.tenant_id, token_count, record.spent_usd)
        if self.request_observer is not None:
            self.request_observer.ended(handle, sample)

    def _on_instance_changed(self, effect: fx.InstanceChanged) -> None:
        if effect.previous is None:
            record = self.scheduler.fleet.get(effect.instance_id)
            self.coordinator.attach(record.spec)
            if self.journal is not None:
                self.journal.instance_kept(record)
        elif effect.state in {InstanceState.UNHEALTHY, InstanceState.LOST}:
            self.health.probe_soon(effect.instance_id)
        self.reporter.instance_changed(effect)
        logger.info(
            "instance changed",
            extra={
                "instance_id": effect.instance_id,
                "state": effect.state.name,
                "previous": effect.previous.name if effect.previous else "",
                "reason": effect.reason,
            },
        )

    def keep_instance(self, instance_id: str) -> None:
        """Have a change of an instance survive a restart."""
        record = self.scheduler.fleet.find(instance_id)
        if self.journal is not None and record is not None:
            self.journal.instance_kept(record)

    def _look_at_journal(self) -> None:
        """Tell operators when the journal begins to take nothing, and when it does again."""
        trouble = "" if self.journal is None else self.journal.store.status().trouble
        if trouble == self._journal_trouble:
            return
        self._journal_trouble = trouble
        if trouble:
            logger.error("the journal is in trouble", extra={"reason": trouble})
            self.reporter.trouble(f"journal: {trouble}")
        else:
            logger.info("the journal is well again")
            self.reporter.trouble_over("the journal is well again")

    def _look_at_step_times(self) -> None:
        """Tell of kinds of instances that leave their planned step times, or keep to them again."""
        most_drift = self.scheduler.settings.current.values["prediction.step_time_drift"]
        for report in look_for_drift(self.scheduler.fleet, most_drift):
            self.reporter.step_time_drifted(report)

    def _on_fail_static_changed(self, effect: fx.FailStaticChanged) -> None:
        title = "fail static" if effect.active else "fail static is over"
        logger.log(logging.WARNING if effect.active else logging.INFO, title, extra={"reason": effect.why})
        self.reporter.fail_static_changed(effect)

    # -- time ----------------------------------------------------------------------

    def _arm_timer(self, now: float) -> None:
        """Wake up for the core's next deadline or lease, unless an earlier wake-up is set already."""
        next_s = self.scheduler.next_timer_s()
        if next_s is None or not self._loops:
            return
        if self._timer is not None:
            if self._timer_s <= next_s:
                return
            self._timer.cancel()
        self._timer_s = next_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, next_s - now) + 0.001, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._watchdog.check_clock()
        self.feed(ev.ClockAdvanced())

    async def _scheduling_loop(self) -> None:
        """Safety net: everything it does is normally done already, by an event or a timer."""
        while True:
            await asyncio.sleep(self._config.scheduling_interval_s)
            try:
                self._watchdog.check_clock()
                now = self.clock()
                if len(self.scheduler.queue):
                    self._perform(self._handle(ev.ClockAdvanced(), now), now)
                self.requests.drop_old(now)
                self._look_at_journal()
                self.reporter.advance(now)
                self.load.advance()
                if now - self._drift_look_s >= DRIFT_INTERVAL_S:
                    self._drift_look_s = now
                    self.reporter.look_at_predictions(self.scheduler.book.accuracy.summary())
                    self._look_at_step_times()
                self._scheduling_runs.note(now)
            except Exception:
                # A net with a hole is still a net.
                logger.exception("scheduling pass crashed")


def _show_end(handle: RequestHandle) -> None:
    """Let readers and waiters of a request hear of its end."""
    handle.output.close()
    handle.ended.set()


def _log_settings(settings: SchedulingSettings) -> None:
    """Log who changed what: it decides where every later request goes."""
    logger.info(
        "scheduling settings changed",
        extra={
            "version": settings.version,
            "scheduling_policy": settings.scheduling_policy,
            "routing_strategy": settings.routing_strategy,
            "load_balancer": settings.load_balancer,
            "parameters": dict(settings.parameters),
            "comment": settings.comment,
        },
    )
