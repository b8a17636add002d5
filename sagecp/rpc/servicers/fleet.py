"""`FleetService`: for agents and operators."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from sagecp.core.errors import (
    ErrorReason,
    FieldViolation,
    InvalidRequestError,
    SageError,
    ShuttingDownError,
)
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.types import InstanceState
from sagecp.rpc.convert.fleet import (
    grace_from_proto,
    instance_from_proto,
    instance_to_proto,
    states_from_proto,
    wanted_adapters_from_proto,
)
from sagecp.rpc.convert.heartbeat import heartbeat_from_proto
from sagecp.rpc.servicers.paging import page_size, page_token, position_of
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2
from sagecp.wire.engine import adapters_to_proto
from sagecp.wire.times import duration

Context = grpc.aio.ServicerContext[Any, Any]

MAX_HEARTBEAT_BYTES = 64 << 10
MAX_VERSION_LENGTH = 64
VIEWS_AT_ONCE = 50


class HeartbeatTooLargeError(SageError):
    """A beat is beyond the bound that keeps thousands of agents cheap."""

    reason = ErrorReason.MESSAGE_TOO_LARGE


class FleetServicer(fleet_service_pb2_grpc.FleetServiceServicer):
    """Answers `FleetService` from a manager."""

    def __init__(self, manager: ControlPlaneManager) -> None:
        self._manager = manager
        self._heartbeat_tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._interval = duration(manager.runtime_config.heartbeat_interval_s)

    def close_heartbeats(self) -> None:
        """End every heartbeat stream, so that a stopping server need not wait for its agents."""
        self._closing = True
        for task in self._heartbeat_tasks:
            task.cancel()

    async def RegisterInstance(
        self, request: pb.RegisterInstanceRequest, context: Context
    ) -> pb.RegisterInstanceResponse:
        """Add an instance."""
        instance = instance_from_proto(request.spec)
        self._manager.register_instance(
            instance, request.incarnation, request.agent_version[:MAX_VERSION_LENGTH]
        )
        response = pb.RegisterInstanceResponse(
            instance=self._view(self._manager.instance(instance.instance_id)),
            lease_duration=duration(self._manager.scheduler.config.lease_duration_s),
            heartbeat_interval=self._interval,
            lease_token=self._manager.issue_lease_token(instance.instance_id, request.incarnation)
            if request.incarnation
            else b"",
        )
        if not request.incarnation:
            # Nobody would register it again after a restart.
            await self._manager.journal_written()
        return response

    async def DeregisterInstance(
        self, request: pb.DeregisterInstanceRequest, context: Context
    ) -> pb.DeregisterInstanceResponse:
        """Remove an instance."""
        count = self._manager.deregister_instance(
            request.instance_id, request.incarnation, request.cause[:256]
        )
        await self._manager.journal_written()
        return pb.DeregisterInstanceResponse(in_flight_request_count=count)

    async def GetInstance(self, request: pb.GetInstanceRequest, context: Context) -> pb.GetInstanceResponse:
        """Return an instance."""
        return pb.GetInstanceResponse(instance=self._view(self._manager.instance(request.instance_id)))

    async def ListInstances(
        self, request: pb.ListInstancesRequest, context: Context
    ) -> pb.ListInstancesResponse:
        """Return a page of the fleet, by id."""
        violations: list[FieldViolation] = []
        states = states_from_proto("states", list(request.states), violations)
        size = page_size(request.page_size, violations)
        after = position_of("instance", request.page_token, violations)
        if violations:
            raise InvalidRequestError(violations)
        labels = dict(request.labels).items()
        # A token holds the last id of the page before: it survives every change of the fleet.
        matching = sorted(
            (
                record
                for record in self._manager.instances()
                if record.instance_id > after
                and (not states or record.state in states)
                and (not request.model or request.model in record.spec.served_models)
                and (not request.host_id or request.host_id == record.spec.host_id)
                and (not labels or labels <= record.spec.labels.items())
            ),
            key=lambda record: record.instance_id,
        )
        page = matching[:size]
        instances = []
        for number, record in enumerate(page):
            if number % VIEWS_AT_ONCE == VIEWS_AT_ONCE - 1:
                # A long page takes a while, and tokens must not wait for it.
                await asyncio.sleep(0)
            instances.append(self._view(record))
        return pb.ListInstancesResponse(
            instances=instances,
            next_page_token=page_token("instance", page[-1].instance_id) if len(matching) > size else "",
        )

    async def DrainInstance(
        self, request: pb.DrainInstanceRequest, context: Context
    ) -> pb.DrainInstanceResponse:
        """Stop new work for an instance, or undo that."""
        self._manager.drain_instance(
            request.instance_id,
            undo=request.undo,
            incarnation=request.incarnation,
            grace_s=grace_from_proto(request),
            force=request.force,
            cause=request.cause[:256],
        )
        response = pb.DrainInstanceResponse(instance=self._view(self._manager.instance(request.instance_id)))
        await self._manager.journal_written()
        return response

    async def SleepInstance(
        self, request: pb.SleepInstanceRequest, context: Context
    ) -> pb.SleepInstanceResponse:
        """Drain an instance and have its engine sleep, or wake it up."""
        self._manager.sleep_instance(
            request.instance_id,
            request.level or 1,
            wake=request.wake,
            incarnation=request.incarnation,
            grace_s=grace_from_proto(request),
            force=request.force,
            cause=request.cause[:256],
        )
        response = pb.SleepInstanceResponse(instance=self._view(self._manager.instance(request.instance_id)))
        await self._manager.journal_written()
        return response

    async def SetLoraAdapters(
        self, request: pb.SetLoraAdaptersRequest, context: Context
    ) -> pb.SetLoraAdaptersResponse:
        """Say which LoRA adapters an engine should have loaded."""
        adapters = wanted_adapters_from_proto(request.adapters) if request.HasField("adapters") else None
        self._manager.set_lora_adapters(request.instance_id, adapters)
        response = pb.SetLoraAdaptersResponse(
            instance=self._view(self._manager.instance(request.instance_id))
        )
        await self._manager.journal_written()
        return response

    async def Heartbeat(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]
        """Take beats and acknowledge each."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - handlers run in tasks
        self._heartbeat_tasks.add(task)
        try:
            while True:
                beat = await context.read()
                if beat is grpc.aio.EOF:
                    return
                self._take(beat)
                if beat.goodbye:
                    return
                await context.write(self._answer(beat))
        except asyncio.CancelledError:
            if not self._closing:
                raise
            # We ended it, not the agent: without a status the stream would stay open until the port closes.
            task.uncancel()
            raise ShuttingDownError("the control plane is shutting down; connect again") from None
        finally:
            self._heartbeat_tasks.discard(task)

    def _take(self, beat: pb.HeartbeatRequest) -> None:
        """Take a beat.

        Raises:
            SageError: It is refused as a whole, which is counted.
        """
        try:
            size = beat.ByteSize()
            if size > MAX_HEARTBEAT_BYTES:
                raise HeartbeatTooLargeError(
                    f"the heartbeat has {size} bytes; {MAX_HEARTBEAT_BYTES} are allowed"
                )
            self._manager.heartbeat(heartbeat_from_proto(beat, time.time()), beat.lease_token)
        except SageError as error:
            self._manager.refuse_heartbeat(beat.instance_id, error)
            raise

    def _answer(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        """Return what the instance of a beat should be."""
        record = self._manager.instance(beat.instance_id)
        response = pb.HeartbeatResponse(
            instance_id=beat.instance_id,
            acknowledged_sequence=beat.sequence,
            desired_state=pb.DESIRED_STATE_SERVING,
            next_interval=self._interval,
        )
        if beat.active_request_ids:
            response.abort_request_ids.extend(
                self._manager.orphans(beat.instance_id, beat.active_request_ids)
            )
        if record.drain is not None:
            response.desired_state = pb.DESIRED_STATE_DRAINED
            if record.drain.sleep_level and record.state is InstanceState.DRAINED:
                response.desired_state = pb.DESIRED_STATE_ASLEEP
                response.sleep_level = record.drain.sleep_level
        if record.desired_lora_adapters is not None:
            response.desired_lora_adapters.CopyFrom(adapters_to_proto(record.desired_lora_adapters))
        return response

    def _view(self, record: InstanceRecord) -> instance_pb2.Instance:
        return instance_to_proto(record, self._manager.wall_time(0.0), self._manager.now())
