"""`AdminService`: for operators."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any

import grpc

from sagecp.core.errors import ShuttingDownError
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.settings import SchedulingSettings
from sagecp.rpc.convert.admin import status_to_proto
from sagecp.rpc.convert.events import event_page_from_proto, filter_from_proto
from sagecp.rpc.convert.forecast import forecast_query_from_proto, forecast_to_proto
from sagecp.rpc.convert.metrics import query_from_proto, watch_from_proto
from sagecp.rpc.convert.scheduling import change_from_proto, parameters_to_proto, settings_to_proto
from sagecp.rpc.servicers.metrics import MetricsSnapshots
from sagecp.rpc.servicers.paging import page_token
from sagecp.rpc.servicers.planning import PlanAnswers
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.v1 import admin_service_pb2_grpc, scheduling_pb2
from sagecp.wire.events import event_to_proto

Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Answers `AdminService` from a manager."""

    def __init__(self, manager: ControlPlaneManager) -> None:
        self._manager = manager
        self._metrics = MetricsSnapshots(manager)
        self._plans = PlanAnswers(manager.planner, manager.scheduler.config.prices.by_kind())

    def close_watches(self) -> None:
        """End every stream of metrics, so that a stopping server need not wait for its readers."""
        self._metrics.close()

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        """Return how the fleet does."""
        response = pb.GetMetricsResponse()
        await self._metrics.fill(query_from_proto(request), response.snapshot)
        return response

    async def WatchMetrics(self, request: pb.WatchMetricsRequest, context: Context) -> None:  # type: ignore[override]
        """Send how the fleet does, again and again."""
        query, interval_s = watch_from_proto(request)
        async with contextlib.aclosing(self._metrics.watch(query, interval_s)) as snapshots:
            async for snapshot in snapshots:
                await context.write(pb.WatchMetricsResponse(snapshot=snapshot))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Return the state of the control plane."""
        manager = self._manager
        return status_to_proto(
            manager.get_status(),
            self._config(manager.scheduling_settings()),
            manager.scheduler.policy_in_force,
            manager.prediction_accuracy(),
            manager.step_time_accuracy(),
            manager.fleet_advice(),
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

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        """Return a page of what happened of late, newest first."""
        wanted, size, before = event_page_from_proto(request)
        # One more, to know whether there is another page. A token holds the last number of its page.
        found = list(islice(self._manager.events.newest_first(wanted, before), size + 1))
        page = found[:size]
        return pb.ListEventsResponse(
            events=map(event_to_proto, page),
            next_page_token=page_token("event", str(page[-1].sequence)) if len(found) > size else "",
        )

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Context) -> None:  # type: ignore[override]
        """Send what happened since a number, then what happens."""
        after = request.after_sequence if request.HasField("after_sequence") else None
        with self._manager.events.watch(filter_from_proto(request.filter), after) as watch:
            # So that the caller knows from when on it misses nothing.
            await context.send_initial_metadata(())
            async for event, skipped_count in watch:
                await context.write(
                    pb.WatchEventsResponse(event=event_to_proto(event), skipped_count=skipped_count)
                )
        raise ShuttingDownError("the control plane is shutting down; connect again")

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
        """Say how to spread a model over GPUs."""
        return await self._plans.answer(request)

    async def ForecastLoad(
        self, request: pb.ForecastLoadRequest, context: Context
    ) -> pb.ForecastLoadResponse:
        """Say what load and what cost the next hours will probably bring."""
        query = forecast_query_from_proto(request)
        answer = await self._manager.forecast_load(query.horizon_s, query.model, query.tenant_id)
        return forecast_to_proto(answer, query.horizon_s)
