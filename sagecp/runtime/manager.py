"""The control plane as a library: feeds the core what happens and does what it decides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping

from sagecp.config import EngineConfig, RuntimeConfig
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import (
    RequestFailedError,
    RequestIdConflictError,
    ShuttingDownError,
)
from sagecp.core.fleet import InstanceRecord
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.scheduler import Scheduler
from sagecp.core.settings import SchedulingSettings, SettingsChange
from sagecp.core.types import (
    ControlPlaneStatus,
    ExecutionInstance,
    PerformanceMetrics,
    RequestMetadata,
    RequestPriority,
    RequestStatus,
    SchedulingDecision,
)
from sagecp.core.validation import check_instance, check_request
from sagecp.runtime.control_loop import ControlLoop, EventListener
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.engines.request_body import body_violations
from sagecp.runtime.executor import ClientFactory, ExecutionCoordinator
from sagecp.runtime.monitor import DEFAULT_WINDOW_S, MetricsKey, Monitor
from sagecp.runtime.policy_evaluation import PolicyEvaluator
from sagecp.runtime.requests import Reading, RequestHandle, RequestTable, fingerprint
from sagecp.version import __version__

logger = logging.getLogger(__name__)

POSITION_QUEUE_LIMIT = 10_000
"""In a longer queue of its model nobody is told a request's position."""


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
    ) -> None:
        base = scheduler or SchedulerConfig()
        self.runtime_config = runtime or RuntimeConfig()
        self.scheduler = Scheduler(
            dataclasses.replace(
                base,
                scheduling_policy=scheduling_policy or base.scheduling_policy,
                routing_strategy=routing_strategy or base.routing_strategy,
                load_balancer=load_balancer or base.load_balancer,
            )
        )
        self.coordinator = ExecutionCoordinator(engine, client_factory)
        self.monitor = Monitor(enabled=enable_monitoring)
        self._loop = ControlLoop(
            self.scheduler,
            self.coordinator,
            self.monitor,
            self.runtime_config,
            clock,
            policy_evaluator,
            on_event,
        )
        self._enable_monitoring = enable_monitoring
        self._clock = clock
        self._start_s = clock()
        self._accepting = False

    # -- life ----------------------------------------------------------------------

    async def start(self) -> None:
        """Start the loops and take requests. Idempotent."""
        if not self._loop.running:
            self._accepting = True
            self._loop.start(monitoring=self._enable_monitoring)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those that were accepted; return whether all ended."""
        self._accepting = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._loop.idle.wait()
        return self._loop.idle.is_set()

    async def stop(self) -> None:
        """End every request that is left as FAILED, stop the loops, close all connections. Idempotent."""
        self._accepting = False
        await self._loop.stop()
        await self.coordinator.close()

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
        handle, _ = self.accept(request)
        return handle.status(self._queue_position(handle))

    def accept(self, request: RequestMetadata, *, checked: bool = False) -> tuple[RequestHandle, bool]:
        """Accept a request and return its handle, and whether it is new. Errors: as `submit_request`.

        Args:
            request: What is asked.
            checked: Its fields were checked already.
        """
        if not checked:
            check_request(request, body_violations(request))
        if request.request_id:
            digest = fingerprint(request)
            known = self._loop.requests.find(request.request_id)
            if known is not None:
                if known.fingerprint != digest:
                    raise RequestIdConflictError(request.request_id)
                return known, False
        else:
            request = dataclasses.replace(request, request_id=f"req-{secrets.token_hex(10)}")
            digest = b""
        if not self._accepting:
            raise ShuttingDownError("the control plane does not take requests; it is stopping or not started")
        return self._loop.submit(request, digest), True

    async def get_request_status(self, request_id: str) -> RequestStatus:
        """Return what is known of a request.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        return self.status_of(self._loop.requests.get(request_id))

    def status_of(self, handle: RequestHandle) -> RequestStatus:
        """Return what is known of a request, from its handle."""
        return handle.status(self._queue_position(handle))

    async def cancel_request(self, request_id: str, cause: str = "") -> tuple[RequestStatus, bool]:
        """Stop a request and the engine's work for it.

        Returns:
            The request in its terminal state, and whether this call ended it.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = self._loop.requests.get(request_id)
        cancelled = not handle.state.is_terminal
        if cancelled:
            self._loop.feed(ev.RequestCancelled(request_id, cause))
        return handle.status(None), cancelled

    async def wait_request(self, request_id: str) -> RequestStatus:
        """Return a request once it has ended.

        Raises:
            RequestNotFoundError: It is not known, or no longer.
        """
        handle = self._loop.requests.get(request_id)
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
        handle = self._loop.requests.get(request_id)
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

    def _queue_position(self, handle: RequestHandle) -> int | None:
        record, queue = handle.record, self.scheduler.queue
        # To count those ahead takes a look at each, while everything else waits.
        line = queue.line(record.model)
        if not record.queued or line is None or len(line) > POSITION_QUEUE_LIMIT:
            return None
        return queue.position(record, self._clock())

    # -- fleet ---------------------------------------------------------------------

    def register_instance(self, instance: ExecutionInstance, incarnation: int = 0) -> None:
        """Add an instance, or replace an older incarnation of it.

        Args:
            instance: What it is.
            incarnation: 0 for an instance without an agent: the control plane
                probes its health itself.

        Raises:
            InvalidRequestError: Names every bad field.
            StaleIncarnationError: A newer incarnation is registered.
            FleetFullError: The bound on instances is reached.
        """
        check_instance(instance)
        self._loop.feed(ev.InstanceRegistered(instance, incarnation))
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

    def heartbeat(self, beat: ev.HeartbeatReceived) -> None:
        """Take an agent's report.

        Raises:
            InstanceNotFoundError: Register first.
            StaleIncarnationError: A newer incarnation is registered.
        """
        self._loop.feed(beat)

    def drain_instance(self, instance_id: str, *, undo: bool = False) -> None:
        """Stop new work for an instance, or undo that.

        Raises:
            InstanceNotFoundError: It is not registered.
            IllegalTransitionError: Undone without a drain.
        """
        self._loop.feed(ev.DrainRequested(instance_id, undo))

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

    def get_metrics(
        self, window_s: float = DEFAULT_WINDOW_S, match: MetricsKey | None = None
    ) -> PerformanceMetrics:
        """Return how the fleet does, or the part of it that passes a filter."""
        match = match or MetricsKey()
        everything = match == MetricsKey()
        queued = len(self.scheduler.queue) if everything else 0
        active = self.scheduler.active_count if everything else 0
        for record in () if everything else self.scheduler.requests():
            metadata = record.metadata
            instance_id = "" if record.queued else record.instance_id
            if match.matches(MetricsKey(record.model, instance_id, metadata.tenant_id, metadata.priority)):
                queued += record.queued
                active += not record.queued
        gpus = [
            gpu
            for instance in self.scheduler.fleet
            if (not match.instance_id or match.instance_id == instance.instance_id)
            and (not match.model or match.model in instance.spec.served_models)
            for gpu in instance.gpus
        ]
        return self.monitor.metrics(
            self._clock(),
            active_count=active,
            queued_count=queued,
            gpus=gpus,
            window_s=window_s,
            match=match,
        )

    def get_status(self) -> ControlPlaneStatus:
        """Return the state of the control plane."""
        scheduler = self.scheduler
        by_priority = dict.fromkeys(RequestPriority, 0)
        for record in scheduler.queue:
            by_priority[record.metadata.priority] += 1
        now = self._clock()
        settings = scheduler.settings.current
        return ControlPlaneStatus(
            version=__version__,
            start_time_s=self.wall_time(self._start_s),
            uptime_s=now - self._start_s,
            accepting=self._accepting,
            scheduling_policy=settings.scheduling_policy,
            routing_strategy=settings.routing_strategy,
            load_balancer=settings.load_balancer,
            config_version=settings.version,
            policy_reason=self.why_policy(),
            instance_count_by_state={s.name: n for s, n in scheduler.fleet.count_by_state().items() if n},
            queued_count_by_model=scheduler.queue.count_by_model(),
            queued_count_by_priority={p.name: n for p, n in by_priority.items() if n},
            active_requests=scheduler.active_count,
            queued_requests=len(scheduler.queue),
            queue_capacity=scheduler.queue.max_request_count,
            event_loop_lag_s=self.monitor.event_loop_lag_s,
            models=scheduler.fleet.models(),
            recent_faults=self.monitor.recent_faults(),
        )
