"""The client: one object per control plane, its calls as coroutines with plain values."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Self, Unpack

from google.protobuf.duration_pb2 import Duration

from sagecp.client import convert
from sagecp.client.connection import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, Connection
from sagecp.client.errors import StreamLostError, invalid_argument
from sagecp.client.event_watch import WatchedEvent, watch_events
from sagecp.client.metrics_watch import watch_metrics
from sagecp.client.requests import request_spec
from sagecp.client.retry import RetryPolicy
from sagecp.client.streaming import EventStream, TokenStream
from sagecp.client.values import (
    Cancelled,
    Choice,
    Chunk,
    Completion,
    Explanation,
    Instance,
    Metrics,
    Registration,
    RequestOptions,
    Submitted,
    TlsOptions,
)
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.errors import FieldViolation
from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent
from sagecp.core.types import (
    ControlPlaneStatus,
    ExecutionInstance,
    InstanceState,
    RequestPriority,
    RequestState,
    RequestStatus,
)
from sagecp.v1 import (
    admin_service_pb2,
    event_pb2,
    fleet_service_pb2,
    inference_service_pb2,
    instance_pb2,
    metrics_pb2,
    request_pb2,
)
from sagecp.wire.engine import adapters_to_proto
from sagecp.wire.events import event_from_proto
from sagecp.wire.times import seconds_of

_PAGE_SIZE = 200


class SageClient:
    """Talks to one control plane.

        async with SageClient("127.0.0.1:50051") as client:
            async for chunk in client.generate("Tell me a story", max_tokens=32):
                print(chunk.text, end="", flush=True)

    Every request gets an id before it is sent, so that a call that is repeated
    after a lost connection is recognised and never runs twice.

    Args:
        target: Host and port of the control plane.
        tls: Options, ``True`` for TLS with gRPC's own authorities, ``None`` for plaintext.
        token: Bearer token. Refused in plaintext to another host.
        timeout_s: How long a unary call may take. Streams have no limit unless
            their own call gives one.
        retry: When calls are repeated; `NO_RETRY` for never.

    Raises:
        ValueError: The target or the TLS options are not usable.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: TlsOptions | bool | None = None,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.connection = Connection(target, tls=tls, token=token, timeout_s=timeout_s, retry=retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; streams in progress end."""
        await self.connection.close()

    # Requests

    async def submit(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Submitted:
        """Hand in a request and return at once; it runs whether or not anybody reads it.

        Args:
            prompt: Plain text; or give ``messages``, ``token_ids`` or ``openai``.
            **options: See `RequestOptions`.

        Raises:
            ClientError: The request was refused, or the server not reached.
        """
        spec = request_spec(prompt, options)
        response = await self.connection.unary(
            self.connection.inference.Submit,
            inference_service_pb2.SubmitRequest(spec=spec),
            request_id=spec.request_id,
            admission=True,
        )
        status = convert.request_status(response.request)
        return Submitted(status.request_id, status, response.created)

    def stream(
        self,
        request_id: str,
        *,
        from_token_index: int = 0,
        cancel_on_disconnect: bool = False,
        timeout_s: float | None = None,
    ) -> TokenStream:
        """Read the output of a request: what exists already, then what arrives.

        After a lost connection the stream goes on where it stopped, without a
        gap or a repetition.

        Args:
            request_id: The request.
            from_token_index: Index of the first token wanted; a piece that
                holds it comes whole when its tokens cannot be told apart.
            cancel_on_disconnect: Cancel the request when this stream is left.
            timeout_s: For the whole stream; ``None``: no limit.
        """
        return TokenStream(
            EventStream(
                self.connection,
                request_id,
                from_token_index=from_token_index,
                cancel_on_disconnect=cancel_on_disconnect,
                timeout_s=timeout_s,
            )
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        detach: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> TokenStream:
        """Hand in a request and read its output.

        Args:
            prompt: Plain text; or give ``messages``, ``token_ids`` or ``openai``.
            detach: Let the request run on when the stream is left or its
                connection lost, and resume after a lost connection. Without
                it, leaving cancels the request, and so does losing the
                connection.
            timeout_s: For the whole stream; ``None``: no limit.
            **options: See `RequestOptions`.

        Raises:
            InvalidArgumentError: A value does not fit its field.
        """
        spec = request_spec(prompt, options)
        return TokenStream(
            EventStream(self.connection, spec.request_id, spec=spec, survive=detach, timeout_s=timeout_s)
        )

    async def complete(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Hand in a request and return its whole output.

        Cancelling the coroutine cancels the request.

        Raises:
            RequestFailedError: The request ended without success.
            ClientError: The request was refused, or the connection was lost.
        """
        chunks: list[Chunk] = []
        async with self.generate(prompt, timeout_s=timeout_s, **options) as stream:
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401 - the stream's end is read below
        end = stream.end
        if end is None:
            raise StreamLostError(
                "the stream ended without saying how the request ended",
                request_id=stream.request_id,
                next_token_index=stream.next_token_index,
            )
        choices = _choices(chunks)
        return Completion(
            request_id=end.request_id,
            text=choices[0].text,
            finish_reason=end.finish_reason,
            usage=end.usage,
            instance_id=end.instance_id,
            choices=choices,
            status=end.status,
            openai_events=tuple(event for chunk in chunks for event in chunk.openai_events),
        )

    async def get_request(self, request_id: str) -> RequestStatus:
        """Return what is known of a request.

        Raises:
            NotFoundError: It is not known, or no longer.
        """
        response = await self.connection.unary(
            self.connection.inference.GetRequest,
            inference_service_pb2.GetRequestRequest(request_id=request_id),
            request_id=request_id,
        )
        return convert.request_status(response.request)

    async def list_requests(
        self,
        *,
        states: Iterable[RequestState] = (),
        model: str = "",
        instance_id: str = "",
        user_id: str = "",
        session_id: str = "",
        page_size: int = _PAGE_SIZE,
    ) -> AsyncIterator[RequestStatus]:
        """Yield requests, newest first, page after page as they are needed."""
        query = inference_service_pb2.ListRequestsRequest(
            page_size=page_size,
            states=[request_pb2.RequestState.ValueType(state.value) for state in states],
            model=model,
            instance_id=instance_id,
            user_id=user_id,
            session_id=session_id,
        )
        while True:
            page = await self.connection.unary(self.connection.inference.ListRequests, query)
            for message in page.requests:
                yield convert.request_status(message)
            if not page.next_page_token:
                return
            query.page_token = page.next_page_token

    async def cancel(self, request_id: str, cause: str = "") -> Cancelled:
        """Stop a request and the engine's work for it; harmless for one that has ended.

        Args:
            request_id: The request.
            cause: Why, for the record.
        """
        response = await self.connection.unary(
            self.connection.inference.CancelRequest,
            inference_service_pb2.CancelRequestRequest(request_id=request_id, cause=cause),
            request_id=request_id,
        )
        return Cancelled(convert.request_status(response.request), response.cancelled)

    async def explain(self, request_id: str) -> Explanation:
        """Return why a request went where it went."""
        response = await self.connection.unary(
            self.connection.inference.ExplainRequest,
            inference_service_pb2.ExplainRequestRequest(request_id=request_id),
            request_id=request_id,
        )
        return Explanation(
            convert.request_status(response.request),
            tuple(convert.decision(each) for each in response.decisions),
        )

    # Fleet

    async def register_instance(self, instance: ExecutionInstance, *, incarnation: int = 0) -> Registration:
        """Add an instance to the fleet, or replace an older incarnation of it.

        Args:
            instance: What it is. Its ``api_key`` is not sent: the control
                plane has its own ways to a key.
            incarnation: 0 for an instance without an agent, which the control
                plane probes itself.
        """
        response = await self.connection.unary(
            self.connection.fleet.RegisterInstance,
            fleet_service_pb2.RegisterInstanceRequest(
                spec=convert.instance_spec(instance), incarnation=incarnation
            ),
        )
        return Registration(
            instance=convert.instance(response.instance),
            lease_duration_s=seconds_of(response.lease_duration),
            heartbeat_interval_s=seconds_of(response.heartbeat_interval),
        )

    async def deregister_instance(self, instance_id: str, *, incarnation: int = 0, cause: str = "") -> int:
        """Remove an instance; return how many requests are still on it. They go on to their end."""
        response = await self.connection.unary(
            self.connection.fleet.DeregisterInstance,
            fleet_service_pb2.DeregisterInstanceRequest(
                instance_id=instance_id, incarnation=incarnation, cause=cause
            ),
            # A second execution would report an instance that is already gone.
            repeatable=False,
        )
        return response.in_flight_request_count

    async def drain_instance(
        self,
        instance_id: str,
        *,
        undo: bool = False,
        grace_s: float | None = None,
        force: bool = False,
        incarnation: int = 0,
        cause: str = "",
    ) -> Instance:
        """Stop new work for an instance, or undo that; it is ``DRAINED`` once nothing runs there.

        A repetition changes nothing; another grace time counts from the call.

        Args:
            instance_id: The instance.
            undo: Take work again.
            grace_s: After this time, requests still running there go on elsewhere, as
                far as they can; 0: at once; ``None``: never.
            force: Even if the rest of the fleet could not carry the load.
            incarnation: Which one is meant; 0: whichever is registered.
            cause: Why, for the record.

        Raises:
            NotFoundError: It is not registered.
            ConflictError: The rest of the fleet could not carry the load (``DRAIN_REFUSED``),
                or a newer incarnation is registered.
            InvalidArgumentError: A value does not fit its field.
        """
        query = fleet_service_pb2.DrainInstanceRequest(
            instance_id=instance_id, undo=undo, force=force, incarnation=incarnation, cause=cause
        )
        if grace_s is not None:
            query.grace_period.CopyFrom(_given_duration("grace_period", grace_s))
        response = await self.connection.unary(self.connection.fleet.DrainInstance, query)
        return convert.instance(response.instance)

    async def get_instance(self, instance_id: str) -> Instance:
        """Return an instance.

        Raises:
            NotFoundError: It is not registered.
        """
        response = await self.connection.unary(
            self.connection.fleet.GetInstance, fleet_service_pb2.GetInstanceRequest(instance_id=instance_id)
        )
        return convert.instance(response.instance)

    async def sleep_instance(
        self,
        instance_id: str,
        *,
        wake: bool = False,
        level: int = 1,
        grace_s: float | None = None,
        force: bool = False,
        incarnation: int = 0,
        cause: str = "",
    ) -> Instance:
        """Drain an instance and have its engine sleep, so that its GPU memory is free; or undo that.

        Args:
            instance_id: The instance.
            wake: Wake up, and take work again.
            level: 1: weights go to the host's memory. 2: weights are dropped.
            grace_s: As for :meth:`drain_instance`; the rest likewise.
            force: See ``grace_s``.
            incarnation: See ``grace_s``.
            cause: See ``grace_s``.

        Raises:
            NotFoundError: It is not registered.
            ConflictError: The engine cannot sleep (``ILLEGAL_STATE``), the rest of the fleet could
                not carry the load (``DRAIN_REFUSED``), or a newer incarnation is registered.
            InvalidArgumentError: A value does not fit its field.
        """
        query = fleet_service_pb2.SleepInstanceRequest(
            instance_id=instance_id,
            wake=wake,
            level=0 if wake else level,
            force=force,
            incarnation=incarnation,
            cause=cause,
        )
        if grace_s is not None:
            query.grace_period.CopyFrom(_given_duration("grace_period", grace_s))
        response = await self.connection.unary(self.connection.fleet.SleepInstance, query)
        return convert.instance(response.instance)

    async def set_lora_adapters(self, instance_id: str, adapters: Iterable[LoraAdapter] | None) -> Instance:
        """Say which LoRA adapters an engine should have loaded; its agent sees to it.

        Args:
            instance_id: The instance.
            adapters: All of them, others are unloaded; ``None``: the order that there was ends,
                and what is loaded stays.

        Raises:
            NotFoundError: It is not registered.
            ConflictError: The engine cannot load any while it runs.
            InvalidArgumentError: A value does not fit its field.
        """
        query = fleet_service_pb2.SetLoraAdaptersRequest(instance_id=instance_id)
        if adapters is not None:
            query.adapters.CopyFrom(adapters_to_proto(tuple(adapters)))
        response = await self.connection.unary(self.connection.fleet.SetLoraAdapters, query)
        return convert.instance(response.instance)

    async def list_instances(
        self,
        *,
        states: Iterable[InstanceState] = (),
        model: str = "",
        host_id: str = "",
        labels: Mapping[str, str] | None = None,
        page_size: int = _PAGE_SIZE,
    ) -> AsyncIterator[Instance]:
        """Yield the fleet by instance id, page after page as they are needed."""
        query = fleet_service_pb2.ListInstancesRequest(
            page_size=page_size,
            states=[instance_pb2.InstanceState.ValueType(state.value) for state in states],
            model=model,
            host_id=host_id,
            labels=labels,
        )
        while True:
            page = await self.connection.unary(self.connection.fleet.ListInstances, query)
            for message in page.instances:
                yield convert.instance(message)
            if not page.next_page_token:
                return
            query.page_token = page.next_page_token

    # Control plane

    async def get_metrics(
        self,
        *,
        window_s: float | None = None,
        group_by: str = "",
        model: str = "",
        instance_id: str = "",
        tenant_id: str = "",
        priority: RequestPriority | None = None,
    ) -> Metrics:
        """Return how the fleet does.

        Args:
            window_s: Of rates and quantiles; default: 5 minutes.
            group_by: ``model``, ``instance``, ``tenant`` or ``priority``.
            model: Only this one; likewise the other filters.
            instance_id: See ``model``.
            tenant_id: See ``model``.
            priority: See ``model``.
        """
        query = _metrics_query(window_s, group_by, model, instance_id, tenant_id, priority)
        response = await self.connection.unary(self.connection.admin.GetMetrics, query)
        return convert.metrics(response.snapshot)

    def watch_metrics(
        self,
        *,
        interval_s: float = 5.0,
        window_s: float | None = None,
        group_by: str = "",
        model: str = "",
        instance_id: str = "",
        tenant_id: str = "",
        priority: RequestPriority | None = None,
    ) -> AsyncGenerator[Metrics]:
        """Yield how the fleet does at every interval, for ever; a lost connection is made again.

        Who takes longer than the interval misses what would have come meanwhile.

        Args:
            interval_s: How often, at least 0.1.
            window_s: As for :meth:`get_metrics`; the rest likewise.
            group_by: See ``window_s``.
            model: See ``window_s``.
            instance_id: See ``window_s``.
            tenant_id: See ``window_s``.
            priority: See ``window_s``.

        Raises:
            ClientError: The call was refused, or the control plane is away for too long.
        """
        query = admin_service_pb2.WatchMetricsRequest(
            query=_metrics_query(window_s, group_by, model, instance_id, tenant_id, priority),
            interval=_given_duration("interval", interval_s),
        )
        return watch_metrics(self.connection, query)

    async def list_events(
        self,
        *,
        min_severity: EventSeverity | None = None,
        kinds: Iterable[EventKind] = (),
        instance_id: str = "",
        page_size: int = _PAGE_SIZE,
    ) -> AsyncIterator[FleetEvent]:
        """Yield what happened of late, newest first, page after page as they are needed.

        Args:
            min_severity: This one and above; ``None``: all.
            kinds: Only these; empty: all.
            instance_id: Only of this instance; ``""``: all.
            page_size: Events per call.
        """
        query = admin_service_pb2.ListEventsRequest(
            page_size=page_size, filter=_event_filter(min_severity, kinds, instance_id)
        )
        while True:
            page = await self.connection.unary(self.connection.admin.ListEvents, query)
            for message in page.events:
                yield event_from_proto(message)
            if not page.next_page_token:
                return
            query.page_token = page.next_page_token

    def watch_events(
        self,
        *,
        after_sequence: int | None = None,
        min_severity: EventSeverity | None = None,
        kinds: Iterable[EventKind] = (),
        instance_id: str = "",
    ) -> AsyncGenerator[WatchedEvent]:
        """Yield what happens, for ever; a lost connection is made again.

        Args:
            after_sequence: Begin with what happened since this number, as far as it is kept;
                ``None``: with what happens from now on.
            min_severity: As for :meth:`list_events`; the rest likewise.
            kinds: See ``min_severity``.
            instance_id: See ``min_severity``.

        Raises:
            ClientError: The call was refused, or the control plane is away for too long.
        """
        query = admin_service_pb2.WatchEventsRequest(
            after_sequence=after_sequence, filter=_event_filter(min_severity, kinds, instance_id)
        )
        return watch_events(self.connection, query)

    async def plan_parallelism(
        self, request: admin_service_pb2.PlanParallelismRequest
    ) -> admin_service_pb2.PlanParallelismResponse:
        """Ask how to spread a model over GPUs; question and answer are the contract's own messages.

        Raises:
            InvalidArgumentError: Names every bad field.
            OverloadedError: Too many are asking; says when to ask again.
        """
        return await self.connection.unary(self.connection.admin.PlanParallelism, request)

    async def forecast_load(
        self, model: str = "", tenant_id: str = "", horizon_s: float = 3600.0
    ) -> admin_service_pb2.ForecastLoadResponse:
        """Ask what load and cost the next hours will probably bring; empty names: of all.

        Raises:
            InvalidArgumentError: The horizon is out of range, or nothing was ever counted of the
                model or tenant; names those that are known.
        """
        request = admin_service_pb2.ForecastLoadRequest(
            model=model, tenant_id=tenant_id, horizon=_given_duration("horizon", horizon_s)
        )
        return await self.connection.unary(self.connection.admin.ForecastLoad, request)

    async def get_status(self) -> ControlPlaneStatus:
        """Return the state of the control plane."""
        response = await self.connection.unary(
            self.connection.admin.GetStatus, admin_service_pb2.GetStatusRequest()
        )
        return convert.control_plane_status(response)


def _event_filter(
    min_severity: EventSeverity | None, kinds: Iterable[EventKind], instance_id: str
) -> admin_service_pb2.EventFilter:
    severity = event_pb2.EVENT_SEVERITY_UNSPECIFIED
    if min_severity is not None:
        severity = event_pb2.EventSeverity.ValueType(min_severity.value)
    return admin_service_pb2.EventFilter(
        min_severity=severity,
        kinds=[event_pb2.EventKind.ValueType(kind.value) for kind in kinds],
        instance_id=instance_id,
    )


def _metrics_query(
    window_s: float | None,
    group_by: str,
    model: str,
    instance_id: str,
    tenant_id: str,
    priority: RequestPriority | None,
) -> admin_service_pb2.GetMetricsRequest:
    query = admin_service_pb2.GetMetricsRequest(model=model, instance_id=instance_id, tenant_id=tenant_id)
    if window_s is not None:
        query.window.CopyFrom(_given_duration("window", window_s))
    if group_by:
        name = f"METRICS_DIMENSION_{group_by.upper()}"
        with contextlib.suppress(ValueError):
            query.group_by = metrics_pb2.MetricsDimension.Value(name)
        if not query.group_by:
            raise invalid_argument(
                [FieldViolation("group_by", f"is {group_by!r}; choose model, instance, tenant or priority")]
            )
    if priority is not None:
        query.priority = request_pb2.RequestPriority.ValueType(priority.value)
    return query


def _given_duration(field: str, seconds: float) -> Duration:
    duration = Duration()
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError):
        raise invalid_argument([FieldViolation(field, f"is {seconds!r}, which does not fit")]) from None
    return duration


def _choices(chunks: list[Chunk]) -> tuple[Choice, ...]:
    """Return what the pieces of each choice add up to; at least one choice."""
    count = max((chunk.choice_index for chunk in chunks), default=0) + 1
    result = []
    for index in range(count):
        mine = [chunk for chunk in chunks if chunk.choice_index == index]
        last = next((chunk for chunk in reversed(mine) if chunk.finish_reason), Chunk(""))
        result.append(
            Choice(
                "".join(chunk.text for chunk in mine),
                tuple(token_id for chunk in mine for token_id in chunk.token_ids),
                last.finish_reason,
                last.stop_reason,
            )
        )
    return tuple(result)
