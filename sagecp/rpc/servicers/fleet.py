"""`FleetService`: for agents and operators."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from sagecp.core.errors import (
    ErrorReason,
    FieldViolation,
    InvalidRequestError,
    NotImplementedYetError,
    SageError,
    ShuttingDownError,
)
from sagecp.core.instance_record import InstanceRecord
from sagecp.rpc.convert.fleet import (
    grace_from_proto,
    heartbeat_from_proto,
    instance_from_proto,
    instance_to_proto,
    states_from_proto,
)
from sagecp.rpc.servicers.paging import page_size, page_token, position_of
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc, instance_pb2
from sagecp.wire.times import duration

Context = grpc.aio.ServicerContext[Any, Any]

MAX_HEARTBEAT_BYTES = 64 << 10


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
        self._manager.register_instance(instance, request.incarnation)
        response = pb.RegisterInstanceResponse(
            instance=self._view(self._manager.instance(instance.instance_id)),
            lease_duration=duration(self._manager.scheduler.config.lease_duration_s),
            heartbeat_interval=self._interval,
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
        # A token holds the last id of the page before: it survives every change of the fleet.
        matching = sorted(
            (
                record
                for record in self._manager.instances()
                if record.instance_id > after
                and (not states or record.state in states)
                and (not request.model or request.model in record.spec.served_models)
            ),
            key=lambda record: record.instance_id,
        )
        page = matching[:size]
        return pb.ListInstancesResponse(
            instances=[self._view(record) for record in page],
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
        """Have an engine sleep, or wake up. Not in this version."""
        raise NotImplementedYetError("SleepInstance is not implemented by this version")

    async def SetLoraAdapters(
        self, request: pb.SetLoraAdaptersRequest, context: Context
    ) -> pb.SetLoraAdaptersResponse:
        """Say which LoRA adapters an engine should have loaded. Not in this version."""
        raise NotImplementedYetError("SetLoraAdapters is not implemented by this version")

    async def Heartbeat(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]
        """Take beats and acknowledge each."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - handlers run in tasks
        self._heartbeat_tasks.add(task)
        manager = self._manager
        try:
            while True:
                beat = await context.read()
                if beat is grpc.aio.EOF:
                    return
                if beat.ByteSize() > MAX_HEARTBEAT_BYTES:
                    raise HeartbeatTooLargeError(
                        f"the heartbeat has {beat.ByteSize()} bytes; {MAX_HEARTBEAT_BYTES} are allowed"
                    )
                manager.heartbeat(heartbeat_from_proto(beat))
                if beat.goodbye:
                    return
                await context.write(
                    pb.HeartbeatResponse(
                        instance_id=beat.instance_id,
                        acknowledged_sequence=beat.sequence,
                        desired_state=self._desired_state(beat.instance_id),
                        next_interval=self._interval,
                        abort_request_ids=manager.orphans(beat.instance_id, beat.active_request_ids)
                        if beat.active_request_ids
                        else (),
                    )
                )
        except asyncio.CancelledError:
            if not self._closing:
                raise
            # We ended it, not the agent: without a status the stream would stay open until the port closes.
            task.uncancel()
            raise ShuttingDownError("the control plane is shutting down; connect again") from None
        finally:
            self._heartbeat_tasks.discard(task)

    def _desired_state(self, instance_id: str) -> pb.DesiredState.ValueType:
        is_drained = self._manager.instance(instance_id).drain is not None
        return pb.DESIRED_STATE_DRAINED if is_drained else pb.DESIRED_STATE_SERVING

    def _view(self, record: InstanceRecord) -> instance_pb2.Instance:
        return instance_to_proto(record, self._manager.wall_time(0.0))
