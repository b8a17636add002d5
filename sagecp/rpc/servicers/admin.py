"""`AdminService`: for operators."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from sagecp.core.errors import FieldViolation, InvalidRequestError, NotImplementedYetError
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import RequestPriority
from sagecp.rpc.convert.admin import metrics_to_proto, status_to_proto
from sagecp.rpc.convert.common import check_enum
from sagecp.rpc.convert.scheduling import change_from_proto, parameters_to_proto, settings_to_proto
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.monitor import DEFAULT_WINDOW_S, LONGEST_WINDOW_S, MetricsKey
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.v1 import admin_service_pb2_grpc, metrics_pb2, request_pb2, scheduling_pb2
from sagecp.wire.times import duration, seconds_of, timestamp

Context = grpc.aio.ServicerContext[Any, Any]

MAX_GROUPS = 1000


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Answers `AdminService` from a manager."""

    def __init__(self, manager: ControlPlaneManager) -> None:
        self._manager = manager

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        """Return how the fleet does."""
        violations: list[FieldViolation] = []
        window_s = seconds_of(request.window) if request.HasField("window") else DEFAULT_WINDOW_S
        if not 1.0 <= window_s <= LONGEST_WINDOW_S:
            violations.append(FieldViolation("window", f"is {window_s:g} s; must be 1 s to 1 hour"))
        priority = None
        if check_enum("priority", request.priority, request_pb2.RequestPriority.DESCRIPTOR, violations):
            priority = RequestPriority(request.priority)
        check_enum("group_by", request.group_by, metrics_pb2.MetricsDimension.DESCRIPTOR, violations)
        if violations:
            raise InvalidRequestError(violations)
        match = MetricsKey(request.model, request.instance_id, request.tenant_id, priority)
        snapshot = metrics_pb2.MetricsSnapshot(
            snapshot_time=timestamp(time.time()),
            window=duration(window_s),
            overall=metrics_to_proto(self._manager.get_metrics(window_s, match)),
        )
        for value, group in self._groups(request.group_by, match):
            # A thousand groups take a while, and tokens must not wait for them.
            await asyncio.sleep(0)
            snapshot.groups.add(
                value=value, metrics=metrics_to_proto(self._manager.get_metrics(window_s, group))
            )
        return pb.GetMetricsResponse(snapshot=snapshot)

    def _groups(self, dimension: int, match: MetricsKey) -> list[tuple[str, MetricsKey]]:
        """Return the values of a dimension that pass the filter, each with the filter for it alone."""
        if dimension == metrics_pb2.METRICS_DIMENSION_UNSPECIFIED:
            return []
        found: dict[str, MetricsKey] = {}
        for key in self._manager.monitor.combinations():
            if not match.matches(key):
                continue
            model, instance_id, tenant_id = match.model, match.instance_id, match.tenant_id
            priority = match.priority
            if dimension == metrics_pb2.METRICS_DIMENSION_MODEL:
                value = model = key.model
            elif dimension == metrics_pb2.METRICS_DIMENSION_INSTANCE:
                value = instance_id = key.instance_id
            elif dimension == metrics_pb2.METRICS_DIMENSION_TENANT:
                value = tenant_id = key.tenant_id
            else:
                priority = key.priority
                value = priority.name if priority is not None else ""
            if value:
                found[value] = MetricsKey(model, instance_id, tenant_id, priority)
        return sorted(found.items())[:MAX_GROUPS]

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Return the state of the control plane."""
        manager = self._manager
        return status_to_proto(
            manager.get_status(),
            self._config(manager.scheduling_settings()),
            manager.scheduler.policy_in_force,
            manager.prediction_accuracy(),
        )

    async def GetSchedulingConfig(
        self, request: pb.GetSchedulingConfigRequest, context: Context
    ) -> pb.GetSchedulingConfigResponse:
        """Return the configuration in force, and what it could be."""
        manager = self._manager
        *earlier, current = manager.scheduling_versions()
        return pb.GetSchedulingConfigResponse(
            config=self._config(current),
            parameters=parameters_to_proto(current.values),
            history=[self._config(settings) for settings in reversed(earlier)],
            policy_in_force=manager.scheduler.policy_in_force,
            policy_reason=manager.why_policy(),
            available_scheduling_policies=SCHEDULING_POLICIES.names,
            available_routing_strategies=ROUTING_STRATEGIES.names,
            available_load_balancers=LOAD_BALANCERS.names,
        )

    async def WatchMetrics(self, request: pb.WatchMetricsRequest, context: Context) -> None:  # type: ignore[override]
        """Send metrics again and again. Not in this version."""
        raise NotImplementedYetError("WatchMetrics is not implemented by this version; poll GetMetrics")

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        """Return what happened of late. Not in this version."""
        raise NotImplementedYetError("ListEvents is not implemented by this version")

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Context) -> None:  # type: ignore[override]
        """Send what happens. Not in this version."""
        raise NotImplementedYetError("WatchEvents is not implemented by this version")

    async def UpdateSchedulingConfig(
        self, request: pb.UpdateSchedulingConfigRequest, context: Context
    ) -> pb.UpdateSchedulingConfigResponse:
        """Change the configuration as a whole, or only say what it would be."""
        change = change_from_proto(request)
        manager = self._manager
        if request.validate_only:
            settings = manager.preview_scheduling(change)
        else:
            settings = manager.update_scheduling(change)
        return pb.UpdateSchedulingConfigResponse(config=self._config(settings))

    def _config(self, settings: SchedulingSettings) -> scheduling_pb2.SchedulingConfig:
        return settings_to_proto(settings, self._manager.settings_time(settings))

    async def PlanParallelism(
        self, request: pb.PlanParallelismRequest, context: Context
    ) -> pb.PlanParallelismResponse:
        """Say how to spread a model over GPUs. Not in this version."""
        raise NotImplementedYetError("PlanParallelism is not implemented by this version")
