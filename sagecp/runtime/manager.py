"""The control plane as a library: feeds the core what happens and does what it decides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

from sagecp.config import EngineConfig, RuntimeConfig
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.errors import (
    DrainRefusedError,
    FieldViolation,
    IllegalOrderError,
    InvalidRequestError,
    RequestFailedError,
    RequestIdConflictError,
    RequestNotFoundError,
    SageError,
    ShuttingDownError,
)
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.parallelism.fleet_advice import FleetAdvice
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.prediction.step_time_report import StepTimeReport, step_time_reports
from sagecp.core.scheduler import Scheduler
from sagecp.core.settings import SchedulingSettings, SettingsChange
from sagecp.core.types import (
    ControlPlaneStatus,
    Durability,
    ExecutionInstance,
    PerformanceMetrics,
    RequestMetadata,
    RequestStatus,
    SchedulingDecision,
)
from sagecp.core.validation import check_instance, check_request
from sagecp.runtime.control_loop import ControlLoop, EventListener
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.engines.request_body import body_violations, engine_request_id
from sagecp.runtime.event_log import EventLog
from sagecp.runtime.executor import ClientFactory, ExecutionCoordinator
from sagecp.runtime.fleet_metrics import fleet_metrics, gpus_by_instance
from sagecp.runtime.fleet_plans import FleetPlans
from sagecp.runtime.heartbeat_counts import BAD_FIGURE, HeartbeatCounts
from sagecp.runtime.load_file import LoadFile
from sagecp.runtime.load_recorder import ForecastAnswer
from sagecp.runtime.metrics_table import MetricsTable
from sagecp.runtime.monitor import DEFAULT_WINDOW_S, Monitor
from sagecp.runtime.monitor_keys import EVERYTHING, MetricsDimension, MetricsKey
from sagecp.runtime.planner import Planner
from sagecp.runtime.policy_evaluation import PolicyEvaluator
from sagecp.runtime.reports import control_plane_status
from sagecp.runtime.request_observer import RequestObserver
from sagecp.runtime.requests import Reading, RequestHandle, RequestTable, fingerprint
from sagecp.runtime.restart import ended_handle
from sagecp.runtime.store.base import Store, StoreError, StoreStatus
from sagecp.runtime.tracing.base import RequestTracer
from sagecp.version import __version__

logger = logging.getLogger(__name__)

POSITION_QUEUE_LIMIT = 10_000
"""In a longer queue of its model nobody is told a request's position."""
SUBMIT_POSITION_QUEUE_LIMIT = 100
"""Likewise, of who submits: to count those ahead must not cost more than to accept the request."""


def new_request_id() -> str:
    """Return an id for a request whose caller named none."""
    return f"req-{os.urandom(10).hex()}"


class ControlPlaneManager:
    """Admits, orders, places and executes requests on a fleet of engines.

    One event loop owns a manager; it is not thread-safe. All arguments are optional.

    Args:
        scheduling_policy: Order of waiting requests, such as ``adaptive`` or ``fifo``.
        routing_strategy: Choice among instances, such as ``load_balanced``.
        load_balancer: How ``load_balanced`` balances, such as ``predicted_latency``.
        enable_monitoring: Keep samples for quantiles and rates, and watch the event loop.
        scheduler: Bounds of the core; the three names above win over its own.
        runtime: Loops and bounds of the runtime.
        engine: How to talk to engines.
        client_factory: Makes engine clients; the default speaks vLLM's HTTP API.
        clock: Monotonic seconds.
        policy_evaluator: Replays the past for the ``adaptive`` policy; without one
            that stays with ``priority``.
        on_event: Told every event of the core with its answer, for event logs.
        store: Keeps durable requests over restarts; ``None``: none is durable.
        tracer: Makes traces of requests; ``None``: nobody does.
        load_file: Keeps the history of load over restarts; ``None``: it begins anew.
        models: What is known of models, by the name they are served under, for plans and what
            they are held to; public models are known by their names.

    Raises:
        UnknownNameError: A name is not known; lists those that are.
        InvalidRequestError: Names every bad parameter of ``scheduler``.
    """

    def __init__(
        self,
        scheduling_policy: str | None = None,
        routing_strategy: str | None = None,
        load_balancer: str | None = None,
        enable_monitoring: bool = True,
        *,
        scheduler: SchedulerConfig | None = None,
        runtime: RuntimeConfig | None = None,
        engine: EngineConfig | None = None,
        client_factory: ClientFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
        policy_evaluator: PolicyEvaluator | None = None,
        on_event: EventListener | None = None,
        store: Store | None = None,
        tracer: RequestTracer | None = None,
        load_file: LoadFile | None = None,
        models: Mapping[str, ModelDescription] | None = None,
    ) -> None:
        base = scheduler or SchedulerConfig()
        knowledge = ModelKnowledge(models)
        self.runtime_config = runtime or RuntimeConfig()
        self.scheduler = Scheduler(
            dataclasses.replace(
                base,
                scheduling_policy=scheduling_policy or base.scheduling_policy,
                routing_strategy=routing_strategy or base.routing_strategy,
                load_balancer=load_balancer or base.load_balancer,
            ),
            knowledge.planned_for,
        )
        self.coordinator = ExecutionCoordinator(engine, client_factory)
        self.monitor = Monitor(enabled=enable_monitoring, start_s=clock())
        self._loop = ControlLoop(
            self.scheduler,
            self.coordinator,
            self.monitor,
            self.runtime_config,
            clock,
            policy_evaluator,
            on_event,
            store,
            tracer,
            load_file,
        )
        self.planner = Planner()
        """Searches for plans, one question at a time, whoever asks."""
        self._fleet_plans = FleetPlans(self.scheduler, self._loop.load.history, knowledge, self.planner)
        self._store = store
        self._draining_cut_s: float | None = None
        self._enable_monitoring = enable_monitoring
        self._clock = clock
        self._start_s = clock()
        self._accepting = False
        self._heartbeats = HeartbeatCounts(self.runtime_config.heartbeat_interval_s)

    # -- life ----------------------------------------------------------------------

    async def start(self) -> None:
        """Bring back what was accepted before, start the loops, and take requests. Idempotent.

        Raises:
            StoreError: The store cannot be opened, or was damaged: nothing is started.
        """
        if not self._loop.running:
            await self._loop.open_journal()
            await self._loop.load.start()
            self._accepting = True
            self._loop.start(monitoring=self._enable_monitoring)
            self._fleet_plans.start()
            self._loop.reporter.control_plane(f"the control plane started, version {__version__}")

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for those that run; return whether all of them ended.

        Durable requests that wait stay for the next start, and readers are told.
        """
        self._accepting = False
        self._loop.reporter.control_plane("the control plane takes no new requests, and stops")
        self._draining_cut_s = time.time() + timeout_s
        for handle in self._loop.requests.live():
            handle.output.stir()
        self._loop.suspend(running=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._loop.idle.wait()
        return self._loop.idle.is_set()

    async def stop(self) -> None:
        """Stop the loops and close all connections. Idempotent.

        Durable requests that are left go on at the next start; others end as FAILED.
        """
        self._accepting = False
        was_running = self._loop.running
        await self._fleet_plans.stop()
        await self._loop.stop()
        if was_running:
            self._loop.reporter.control_plane("the control plane stopped")
        self._loop.events.close()
        await self.coordinator.close()

    @property
    def draining_cut_s(self) -> float | None:
        """When remaining streams will be cut, in Unix seconds; ``None``: not draining."""
        return self._draining_cut_s

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken."""
        return self._accepting

    # -- requests ------------------------------------------------------------------

    async def submit_request(self, request: RequestMetadata) -> RequestStatus:
        """Accept a request; it runs whether or not anybody reads it.

        A repetition (same id, same content) returns the request as it is.

        Raises:
            InvalidRequestError: Names every bad field.
            ModelNotFoundError: No instance serves the model.
            RequestIdConflictError: The id was used for something else.
            QueueFullError: Too much waits already.
            ShuttingDownError: The control plane is not running.
        """
        handle, _ = await self.accept(request, durable=True)
        return self.status_of(handle, SUBMIT_POSITION_QUEUE_LIMIT, with_cost=False)

    async def accept(
        self, request: RequestMetadata, *, durable: bool, checked: bool = False, fresh_id: bool = False
    ) -> tuple[RequestHandle, bool]:
        """Accept a request and return its handle, and whether it is new. Errors: as `submit_request`.

        Args:
            request: What is asked.
            durable: Whether it survives a restart where it does not say so itself, as far
                as there is a store. Then this returns once that is certain.
            checked: Its fields were checked already.
            fresh_id: Its id was just made by :func:`new_request_id`, so that it repeats nothing.
        """
        if not checked:
            check_request(request, body_violations(request))
        if request.durability is not Durability.DEFAULT:
            durable = request.durability is Durability.DURABLE
            if durable and self._store is None:
                raise StoreError(
                    "this control plane keeps no journal, so that nothing survives its restart; leave the "
                    "durability out, or start it with --journal"
                )
        digest = b""
        if not request.request_id:
            request = dataclasses.replace(request, request_id=new_request_id())
        elif not fresh_id:
            digest = fingerprint(request)
            known = await self._find(request.tenant_id, request.request_id)
            if known is not None:
                if known.fingerprint != digest:
                    raise RequestIdConflictError(request.request_id)
                await self._certain(known)
                return known, False
        if not self._accepting:
            raise ShuttingDownError(
                "the control plane does not take requests; it is stopping or not started", retry_after_s=1.0
            )
        handle = self._loop.submit(request, digest, durable=durable and self._store is not None)
        await self._certain(handle)
        return handle, True

    @staticmethod
    async def _certain(handle: RequestHandle) -> None:
        """Return once a request is accepted for certain."""
        if handle.accepted is not None:
            await handle.accepted.wait()

    async def find_request(self, tenant_id: str, request_id: str) -> RequestHandle:
        """Return a request, from the store if it ended longer ago.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = await self._find(tenant_id, request_id)
        if handle is None:
            raise RequestNotFoundError(request_id)
        return handle

    async def _find(self, tenant_id: str, request_id: str) -> RequestHandle | None:
        handle = self._loop.requests.find(request_id)
        store = self._store
        if handle is not None or store is None or not store.may_have_ended(tenant_id, request_id):
            return handle
        ended = await store.find_ended(tenant_id, request_id)
        # It may have been asked for twice meanwhile, or used anew.
        handle = self._loop.requests.find(request_id)
        if handle is None and ended is not None:
            handle = ended_handle(ended, self._loop.wall_offset_s)
            self._loop.requests.add(handle)
            self._loop.requests.note_ended(handle, self._clock())
        return handle

    async def get_request_status(self, request_id: str) -> RequestStatus:
        """Return what is known of a request.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        return self.status_of(await self.find_request("", request_id))

    def status_of(
        self, handle: RequestHandle, position_limit: int | None = None, *, with_cost: bool = True
    ) -> RequestStatus:
        """Return what is known of a request, from its handle.

        Args:
            handle: The request.
            position_limit: In longer queues its position is not counted; 0: in none.
            with_cost: Whether to say what it costs while it has not ended, too.
        """
        limit = POSITION_QUEUE_LIMIT if position_limit is None else position_limit
        cost = None
        if with_cost and not handle.state.is_terminal and not handle.suspended:
            cost = self.scheduler.costs.cost_of(handle.record, self._clock())
        return handle.status(self._queue_position(handle, limit), cost)

    async def cancel_request(self, request_id: str, cause: str = "") -> tuple[RequestStatus, bool]:
        """Stop a request and the engine's work for it.

        Returns:
            The request in its terminal state, and whether this call ended it.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = self._loop.requests.find(request_id) or await self.find_request("", request_id)
        cancelled = not handle.state.is_terminal
        if cancelled:
            self._loop.feed(ev.RequestCancelled(request_id, cause))
        # A durable request's end is told once it is certain.
        await handle.ended.wait()
        return handle.status(None), cancelled

    async def wait_request(self, request_id: str) -> RequestStatus:
        """Return a request once it has ended.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = await self.find_request("", request_id)
        await handle.ended.wait()
        return handle.status(None)

    async def stream_request(self, request_id: str, from_token_index: int = 0) -> AsyncIterator[EngineDelta]:
        """Yield the output of a request: what exists, then what arrives.

        Ends when the request succeeded.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
            TokenIndexOutOfRangeError: The index is ahead of the stream.
            TooManyStreamsError: Too many read it already.
            RequestFailedError: The request ended otherwise; carries its failure.
        """
        handle = await self.find_request("", request_id)
        output = handle.output
        cursor = output.seek(from_token_index)
        with self.reading(handle):
            while True:
                while cursor < len(output.deltas):
                    cursor += 1
                    yield output.deltas[cursor - 1]
                if output.closed:
                    break
                await output.wait_beyond(cursor)
        if handle.failure is not None:
            raise RequestFailedError(handle.failure)

    def reading(self, handle: RequestHandle) -> Reading:
        """Count a reader of a request while the context is open.

        Raises:
            TooManyStreamsError: Too many read it already.
        """
        return Reading(handle, self.runtime_config.max_streams_per_request)

    def decisions_of(self, handle: RequestHandle) -> tuple[SchedulingDecision, ...]:
        """Return one receipt per dispatch of a request."""
        return tuple(handle.record.decisions)

    def recent_decisions(self) -> tuple[SchedulingDecision, ...]:
        """Return the receipts of the latest dispatches, the latest last."""
        return tuple(self._loop.recent_decisions)

    def _queue_position(self, handle: RequestHandle, limit: int) -> int | None:
        record, queue = handle.record, self.scheduler.queue
        # To count those ahead takes a look at each, while everything else waits.
        line = queue.line(record.model)
        if not record.queued or line is None or len(line) > limit:
            return None
        return queue.position(record, self._clock())

    # -- fleet ---------------------------------------------------------------------

    def register_instance(
        self, instance: ExecutionInstance, incarnation: int = 0, agent_version: str = ""
    ) -> None:
        """Add an instance, or replace an older incarnation of it.

        Args:
            instance: What it is.
            incarnation: 0 for an instance without an agent: the control plane
                probes its health itself.
            agent_version: For operators; ``""``: unknown.

        Raises:
            InvalidRequestError: Names every bad field.
            StaleIncarnationError: A newer incarnation is registered.
            FleetFullError: The bound on instances is reached.
        """
        check_instance(instance)
        self._loop.feed(ev.InstanceRegistered(instance, incarnation, agent_version=agent_version))
        if incarnation == 0:
            self._loop.health.probe_soon(instance.instance_id)

    def deregister_instance(self, instance_id: str, incarnation: int = 0, cause: str = "") -> int:
        """Remove an instance; return how many requests still run on it.

        Raises:
            InstanceNotFoundError: It is not registered.
            StaleIncarnationError: A newer incarnation is registered.
        """
        in_flight_count = self.scheduler.fleet.get(instance_id, incarnation).in_flight_count
        self._loop.feed(ev.InstanceDeregistered(instance_id, incarnation, cause))
        return in_flight_count

    def issue_lease_token(self, instance_id: str, incarnation: int) -> bytes:
        """Return the secret by which the heartbeats of a registration just made show whose they are."""
        return self._loop.lease_tokens.issue(instance_id, incarnation)

    def heartbeat(self, beat: ev.HeartbeatReceived, lease_token: bytes | None = None) -> None:
        """Take an agent's report.

        Args:
            beat: The report.
            lease_token: What it carried to show whose it is; ``b""``: nothing; ``None``: it
                needs to show nothing.

        Raises:
            InstanceNotFoundError: Register first.
            StaleIncarnationError: A newer incarnation is registered.
            PermissionDeniedError: It carries another token than its registration.
        """
        if lease_token is not None:
            record = self.scheduler.fleet.get(beat.instance_id, beat.incarnation)
            # That of another incarnation is refused below, and must not come to own a token here.
            if record.incarnation == beat.incarnation:
                self._loop.lease_tokens.check(beat.instance_id, beat.incarnation, lease_token)
        self._loop.feed(beat)
        self._heartbeats.note_taken(self._clock())
        if beat.refusals:
            self._note_refusal(beat.instance_id, BAD_FIGURE, "; ".join(beat.refusals))

    def refuse_heartbeat(self, instance_id: str, error: SageError) -> None:
        """Note that a report was refused as a whole."""
        self._loop.feed(ev.HeartbeatRefused(instance_id, error.message))
        self._note_refusal(instance_id, error.reason.name, error.message)

    def _note_refusal(self, instance_id: str, reason: str, why: str) -> None:
        self._heartbeats.refused_counts[reason] += 1
        # However many ids somebody invents, all of them are nobody's.
        name = instance_id if self.scheduler.fleet.find(instance_id) is not None else ""
        self._loop.reporter.heartbeat_refused(name, reason, why, self._clock())

    def orphans(self, instance_id: str, engine_request_ids: Iterable[str]) -> list[str]:
        """Return those of an engine's requests that the control plane does not have there.

        Args:
            instance_id: The instance, registered.
            engine_request_ids: What runs on its engine, by the ids that attempts were sent with.
        """
        record = self.scheduler.fleet.get(instance_id)
        known = {engine_request_id(each.request_id, each.epoch) for each in record.in_flight.values()}
        return [engine_id for engine_id in engine_request_ids if engine_id not in known]

    def sleep_instance(
        self,
        instance_id: str,
        level: int = 1,
        *,
        wake: bool = False,
        incarnation: int = 0,
        grace_s: float | None = None,
        force: bool = False,
        cause: str = "",
    ) -> None:
        """Drain an instance and have its engine sleep, or wake it up so that it takes work again.

        Args:
            instance_id: The instance.
            level: 1: weights go to the host's memory. 2: weights are dropped.
            wake: Undo it; without an order to sleep that changes nothing.
            incarnation: As for :meth:`drain_instance`; the rest likewise.
            grace_s: See ``incarnation``.
            force: See ``incarnation``.
            cause: See ``incarnation``.

        Raises:
            InvalidRequestError: There is no such level.
            IllegalOrderError: The engine cannot sleep, or nobody could tell it.
            InstanceNotFoundError: As :meth:`drain_instance`; the rest likewise.
            StaleIncarnationError: See there.
            DrainRefusedError: See there.
        """
        if level not in {1, 2}:
            raise InvalidRequestError([FieldViolation("level", f"is {level}; must be 1 or 2")])
        order = "waking up" if wake else f"sleep at level {level}"
        self._order(
            ev.DrainRequested(
                instance_id, wake, incarnation, grace_s, force, cause, level if not wake else 1
            ),
            order,
        )

    def set_lora_adapters(self, instance_id: str, adapters: Iterable[LoraAdapter] | None) -> None:
        """Say which LoRA adapters an engine should have loaded. Its agent sees to it.

        Args:
            instance_id: The instance.
            adapters: All of them; ``None``: what is loaded stays.

        Raises:
            InstanceNotFoundError: It is not registered.
            IllegalOrderError: The engine cannot load any while it runs, or nobody could tell it.
        """
        wanted = None if adapters is None else tuple(adapters)
        names = "any" if wanted is None else ", ".join(each.name for each in wanted) or "none"
        self._order(ev.LoraAdaptersRequested(instance_id, wanted), f"LoRA adapters ({names})")

    def _order(self, event: ev.DrainRequested | ev.LoraAdaptersRequested, order: str) -> None:
        """Give an order, have it survive a restart, and tell operators what became of it."""
        cause = event.cause if isinstance(event, ev.DrainRequested) else ""
        try:
            self._loop.feed(event)
        except (DrainRefusedError, IllegalOrderError) as error:
            self._loop.reporter.ordered(event.instance_id, order, refusal=error.message)
            raise
        self._loop.reporter.ordered(event.instance_id, order, cause=cause)
        self._loop.keep_instance(event.instance_id)

    def drain_instance(
        self,
        instance_id: str,
        *,
        undo: bool = False,
        incarnation: int = 0,
        grace_s: float | None = None,
        force: bool = False,
        cause: str = "",
    ) -> None:
        """Stop new work for an instance, or undo that. It is DRAINED once nothing runs on it any more.

        A repetition changes nothing; another grace time counts from then on.

        Args:
            instance_id: The instance.
            undo: Take work again.
            incarnation: Which one is meant; 0: whichever is registered.
            grace_s: After this time, requests still running there go on elsewhere, as far as
                they can; 0: at once; ``None``: never.
            force: Even if the rest of the fleet could not carry the load.
            cause: Why, for the record.

        Raises:
            InstanceNotFoundError: It is not registered.
            StaleIncarnationError: A newer incarnation is registered.
            DrainRefusedError: The rest of the fleet could not carry the load; says what is missing.
        """
        order = "undoing the drain" if undo else "drain"
        self._order(ev.DrainRequested(instance_id, undo, incarnation, grace_s, force, cause), order)

    async def journal_written(self) -> None:
        """Return once everything that happened so far survives a restart, as far as it can for now."""
        if self._store is not None:
            # In trouble it writes later, and says so to operators.
            with contextlib.suppress(StoreError):
                await self._store.flush()

    @property
    def events(self) -> EventLog:
        """What happened to the fleet of late."""
        return self._loop.events

    @property
    def requests(self) -> RequestTable:
        """Every request that can still be asked about. For reading only."""
        return self._loop.requests

    def instance(self, instance_id: str) -> InstanceRecord:
        """Return one instance. For reading only.

        Raises:
            InstanceNotFoundError: It is not registered.
        """
        return self.scheduler.fleet.get(instance_id)

    def instances(self) -> list[InstanceRecord]:
        """Return every instance. For reading only."""
        return list(self.scheduler.fleet)

    def wall_time(self, time_s: float) -> float:
        """Return the Unix time of a time on the core's clock."""
        return time_s + self._loop.wall_offset_s

    # -- scheduling settings ---------------------------------------------------------

    def scheduling_settings(self) -> SchedulingSettings:
        """Return the settings in force."""
        return self.scheduler.settings.current

    def scheduling_versions(self) -> tuple[SchedulingSettings, ...]:
        """Return the settings that can be gone back to, oldest first; the last are in force."""
        return self.scheduler.settings.versions()

    def update_scheduling(self, change: SettingsChange) -> SchedulingSettings:
        """Change how requests are ordered and placed; return the settings now in force.

        Waiting requests are put in the new order and none is lost; those on
        engines run on.

        Raises:
            UnknownNameError: One of the names is not known.
            InvalidRequestError: Names every bad field.
            SettingsVersionError: Another version is in force than the one expected, or
                the one to go back to is not kept.
        """
        self._loop.feed(ev.SchedulingConfigured(change))
        return self.scheduler.settings.current

    def preview_scheduling(self, change: SettingsChange) -> SchedulingSettings:
        """Return what the settings would be after a change. Errors: as :meth:`update_scheduling`."""
        return self.scheduler.settings.preview(change, self._clock())

    def settings_time(self, settings: SchedulingSettings) -> float:
        """Return the Unix time at which settings came into force; the first did when this object was made."""
        return self.wall_time(self._start_s if settings.version == 1 else settings.update_s)

    def why_policy(self) -> str:
        """Return since when and why the policy in force is in force."""
        why, since_s = self.scheduler.why_policy(), self.scheduler.policy_since_s
        if since_s is None:
            return why
        since = dt.datetime.fromtimestamp(self.wall_time(since_s), dt.UTC)
        return f"since {since:%H:%M:%S} UTC: {why}"

    # -- reports -------------------------------------------------------------------

    def prediction_accuracy(self) -> Mapping[str, QuantityAccuracy]:
        """Return how right recent predictions were, by quantity of which any were compared."""
        return self.scheduler.book.accuracy.summary()

    def step_time_accuracy(self) -> tuple[StepTimeReport, ...]:
        """Return how each kind of present instances keeps to its planned step times."""
        return step_time_reports(self.scheduler.fleet)

    def get_metrics(
        self, window_s: float = DEFAULT_WINDOW_S, match: MetricsKey = EVERYTHING
    ) -> PerformanceMetrics:
        """Return how the fleet does, or the part of it that passes a filter."""
        return self.metrics_tables(window_s, match)[0].metrics(0)

    def metrics_tables(
        self,
        window_s: float = DEFAULT_WINDOW_S,
        match: MetricsKey = EVERYTHING,
        dimension: MetricsDimension | None = None,
    ) -> tuple[MetricsTable, MetricsTable | None]:
        """Return how the fleet does, as one group and by group, both of one time.

        Args:
            window_s: Of rates and quantiles.
            match: The filter.
            dimension: What to group by; ``None``: there is no second table.
        """
        asked = (self.scheduler, self.monitor, self._clock(), window_s, match)
        gpus = gpus_by_instance(self.scheduler, match)
        overall = fleet_metrics(*asked, None, gpus)
        return overall, None if dimension is None else fleet_metrics(*asked, dimension, gpus)

    def fleet_advice(self) -> tuple[FleetAdvice, ...]:
        """Return what the planner thinks of how each model is spread over its GPUs."""
        return self._fleet_plans.advice()

    async def forecast_load(
        self, horizon_s: float = 3600.0, model: str = "", tenant_id: str = ""
    ) -> ForecastAnswer:
        """Forecast the load and cost of the next hours; empty names: of all models and tenants.

        Raises:
            InvalidRequestError: Nothing was ever counted of the model or the tenant.
        """
        return await self._loop.load.forecast(model, tenant_id, horizon_s)

    def now(self) -> float:
        """Return the time on the core's clock."""
        return self._clock()

    @property
    def heartbeat_counts(self) -> HeartbeatCounts:
        """How many heartbeats were taken and refused. For reading only."""
        return self._heartbeats

    def observe_requests(self, observer: RequestObserver) -> None:
        """Have an observer told what happens to requests from now on, in place of an earlier one."""
        self._loop.request_observer = observer

    def store_status(self) -> StoreStatus | None:
        """Return how the store does; ``None``: there is none."""
        return None if self._store is None else self._store.status()

    def get_status(self) -> ControlPlaneStatus:
        """Return the state of the control plane."""
        now = self._clock()
        return control_plane_status(
            self.scheduler,
            self.monitor,
            self._loop.events,
            start_time_s=self.wall_time(self._start_s),
            uptime_s=now - self._start_s,
            accepting=self._accepting,
            policy_reason=self.why_policy(),
            loops=(*self._loop.loop_statuses(), self._heartbeats.runs.status(self.wall_time(0.0))),
            heartbeats=self._heartbeats,
        )
