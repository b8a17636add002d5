"""`AdminService` over the wire: figures, state, configuration."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from sagecp.core.prediction.load_history import LoadBucket, bucket_number
from sagecp.runtime.engines.base import EngineFailedError, EngineRejectedError
from sagecp.v1 import admin_service_pb2, fleet_service_pb2, instance_pb2, metrics_pb2, request_pb2
from sagecp.version import __version__
from tests.support.rpc_rig import Rig, failure_of, fields_of
from tests.support.waiting import until

pb = admin_service_pb2
Code = grpc.StatusCode
GIB = 1 << 30


async def test_status_of_an_idle_server(rig: Rig) -> None:
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    assert status.version == __version__
    assert status.accepting
    assert status.HasField("start_time")
    assert status.uptime.ToMilliseconds() < 60_000
    assert status.scheduling.scheduling_policy == "adaptive"
    assert status.scheduling.version == 1
    assert status.queue_capacity == 100_000
    assert not status.models
    assert not status.recent_faults


async def test_status_counts_what_waits_and_runs(rig: Rig) -> None:
    await rig.add_engine("e1", limit=1)
    for number in range(3):
        await rig.submit(f"r{number}", priority=request_pb2.REQUEST_PRIORITY_HIGH)
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    assert dict(status.instance_count_by_state) == {"READY": 1}
    assert dict(status.queued_count_by_model) == {"tiny": 2}
    assert dict(status.queued_count_by_priority) == {"HIGH": 2}
    assert status.active_request_count == 1
    assert list(status.models) == ["tiny"]


async def test_faults_are_shown_and_callers_mistakes_are_not(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("mistake")
    (await engine.next_call()).fail(EngineRejectedError("canary: the prompt was ...", 400))
    await rig.submit("fault")
    call = await engine.next_call()
    call.send("x")
    call.fail(EngineFailedError("out of memory", 500))
    await until(lambda: rig.manager.scheduler.live_count == 0)
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    (fault,) = status.recent_faults
    assert "out of memory" in fault.message
    assert (fault.instance_id, fault.request_id) == ("e1", "fault")
    assert fault.HasField("fault_time")
    assert "canary" not in str(status)


async def test_metrics_of_requests_that_ended(rig: Rig) -> None:
    engine = await rig.add_engine("e1", model="one")
    other = await rig.add_engine("e2", model="two")
    engine.automatic = lambda call: call.answer("a", "b")
    other.automatic = lambda call: call.answer("a")
    deadline = request_pb2.Objectives(end_to_end_deadline=Duration(seconds=60))
    await rig.submit("r1", model="one", objectives=deadline, priority=request_pb2.REQUEST_PRIORITY_HIGH)
    await rig.submit("r2", model="one")
    await rig.submit("r3", model="two")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    response = await rig.admin.GetMetrics(
        pb.GetMetricsRequest(group_by=metrics_pb2.METRICS_DIMENSION_INSTANCE)
    )
    snapshot = response.snapshot
    assert snapshot.window.seconds == 300
    assert snapshot.overall.completed_request_count == 3
    assert snapshot.overall.latency.sample_count == 3
    assert snapshot.overall.latency.p99_s > 0
    assert snapshot.overall.tokens_per_second == pytest.approx(5.0, rel=0.5)
    assert snapshot.overall.slo_compliance_rate == 1.0
    assert not snapshot.overall.HasField("average_gpu_utilization")
    assert {group.value: group.metrics.completed_request_count for group in snapshot.groups} == {
        "e1": 2,
        "e2": 1,
    }
    assert not next(g for g in snapshot.groups if g.value == "e2").metrics.HasField("slo_compliance_rate")


@pytest.mark.parametrize(
    ("dimension", "groups"),
    [
        (metrics_pb2.METRICS_DIMENSION_MODEL, {"one": 2, "two": 1}),
        (metrics_pb2.METRICS_DIMENSION_TENANT, {"default": 3}),
        (metrics_pb2.METRICS_DIMENSION_PRIORITY, {"HIGH": 1, "NORMAL": 2}),
        (metrics_pb2.METRICS_DIMENSION_UNSPECIFIED, {}),
    ],
)
async def test_metrics_by_every_dimension(
    rig: Rig, dimension: metrics_pb2.MetricsDimension.ValueType, groups: dict[str, int]
) -> None:
    for name, model in (("e1", "one"), ("e2", "two")):
        (await rig.add_engine(name, model=model)).automatic = lambda call: call.answer("a")
    await rig.submit("r1", model="one", priority=request_pb2.REQUEST_PRIORITY_HIGH)
    await rig.submit("r2", model="one")
    await rig.submit("r3", model="two")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    response = await rig.admin.GetMetrics(pb.GetMetricsRequest(group_by=dimension))
    found = {group.value: group.metrics.completed_request_count for group in response.snapshot.groups}
    assert found == groups
    filtered = await rig.admin.GetMetrics(pb.GetMetricsRequest(group_by=dimension, model="two"))
    assert filtered.snapshot.overall.completed_request_count == 1
    assert len(filtered.snapshot.groups) == min(1, len(groups))


async def test_gpus_are_summed_over_those_that_report(rig: Rig) -> None:
    gpus = [
        instance_pb2.GpuReading(
            index=0, utilization=0.5, total_memory_bytes=80 * GIB, used_memory_bytes=40 * GIB
        ),
        instance_pb2.GpuReading(index=1),
    ]
    await rig.add_engine("e1", incarnation=5)
    stream = rig.instances.Heartbeat()
    await stream.write(
        fleet_service_pb2.HeartbeatRequest(instance_id="e1", incarnation=5, sequence=1, gpus=gpus)
    )
    await stream.read()
    metrics = (await rig.admin.GetMetrics(pb.GetMetricsRequest())).snapshot.overall
    assert metrics.average_gpu_utilization == 0.5
    assert metrics.total_gpu_memory_gib == 80.0
    assert metrics.used_gpu_memory_gib == 40.0


async def test_a_bad_question_names_every_bad_field(rig: Rig) -> None:
    error = await failure_of(
        rig.admin.GetMetrics(
            pb.GetMetricsRequest(
                window=Duration(seconds=7200),
                group_by=77,  # type: ignore[arg-type]
                priority=88,  # type: ignore[arg-type]
            )
        )
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"window", "group_by", "priority"}


async def test_the_configuration_and_what_could_be_chosen(rig: Rig) -> None:
    response = await rig.admin.GetSchedulingConfig(pb.GetSchedulingConfigRequest())
    assert response.config.routing_strategy == "load_balanced"
    assert response.config.load_balancer == "predicted_latency"
    assert response.config.HasField("update_time")
    assert {"adaptive", "fifo"} <= set(response.available_scheduling_policies)
    assert {"load_balanced", "round_robin", "random"} <= set(response.available_routing_strategies)
    assert "predicted_latency" in response.available_load_balancers


async def test_status_tells_how_the_fleet_is_spread_and_what_would_be_better(rig: Rig) -> None:
    spec = rig.spec("e1", model="llama-3.1-8b")
    spec.gpu_name, spec.gpu_count = "NVIDIA H100 80GB HBM3", 4
    spec.parallel_sizes.tensor_parallel_size = 4
    await rig.instances.RegisterInstance(fleet_service_pb2.RegisterInstanceRequest(spec=spec))
    plans = rig.manager._fleet_plans
    await plans.look()
    (idle,) = (await rig.admin.GetStatus(pb.GetStatusRequest())).fleet_plans
    assert (idle.model, idle.instance_count, idle.gpu_count) == ("llama-3.1-8b", 1, 4)
    assert "there was no traffic of late" in idle.message
    # A bucket with traffic that is over.
    history = rig.manager._loop.load.history
    bucket = LoadBucket(bucket_number(time.time()) - 1, "llama-3.1-8b", "", (600.0, 6e5, 1.8e5, 0.0))
    history.restore([bucket])
    await plans.look()
    (plan,) = (await rig.admin.GetStatus(pb.GetStatusRequest())).fleet_plans
    assert plan.change_advised
    assert plan.gain_ratio > 1.2
    assert plan.recommended.replica_count == 4
    assert plan.recommended.sizes.tensor_parallel_size == 1
    assert len(plan.recommended.commands) == 4
