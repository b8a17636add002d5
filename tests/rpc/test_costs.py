"""Costs over the wire: of requests, of tenants and models, and of instances, from real sockets to a table."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from sagecp.cli import instance_details, metrics_view, requests_view
from sagecp.client import convert
from sagecp.core.config import SchedulerConfig
from sagecp.core.prices import GpuPrices
from sagecp.core.types import PriceSource, RequestMetadata, RequestStatus, SamplingParameters
from sagecp.runtime.store.memory import MemoryStore
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from sagecp.v1 import admin_service_pb2, fleet_service_pb2, inference_service_pb2, metrics_pb2, request_pb2
from tests.support.rpc_rig import MODEL, WAIT_S, Rig, read_all, running_rig
from tests.support.waiting import until

PRICES = GpuPrices(usd_per_gpu_hour={"H100": 3600.0}, default_usd_per_gpu_hour=7200.0)
"""A dollar, and two, per second: what a test costs can be read."""


@contextlib.asynccontextmanager
async def site(prices: GpuPrices = PRICES, count: int = 1) -> AsyncIterator[Rig]:
    """Run a server with simulated engines, on H100s."""
    async with contextlib.AsyncExitStack() as stack:
        rig = await stack.enter_async_context(
            running_rig(scripted=False, scheduler=SchedulerConfig(prices=prices), store=MemoryStore())
        )
        for number in range(count):
            engine = await stack.enter_async_context(
                EngineServer(
                    EngineServerConfig(
                        model_names=(MODEL,),
                        profile="fixed",
                        time_to_first_token_s=0.001,
                        inter_token_s=0.002,
                    )
                )
            )
            spec = rig.spec(f"e{number}")
            spec.engine_url, spec.gpu_name, spec.gpu_count = engine.base_url, "NVIDIA H100 80GB HBM3", 1
            await rig.instances.RegisterInstance(
                fleet_service_pb2.RegisterInstanceRequest(spec=spec), timeout=WAIT_S
            )
        await until(lambda: all(each.state.name == "READY" for each in rig.manager.instances()))
        yield rig


async def ended(rig: Rig, tenant_id: str, request_id: str, tokens: int) -> RequestStatus:
    await rig.manager.submit_request(
        RequestMetadata(
            request_id=request_id,
            model_name=MODEL,
            prompt="hello",
            tenant_id=tenant_id,
            max_tokens=tokens,
            sampling=SamplingParameters(ignore_eos=True),
        )
    )
    return await rig.manager.wait_request(request_id)


async def metrics(rig: Rig, dimension: metrics_pb2.MetricsDimension.ValueType) -> Any:
    response = await rig.admin.GetMetrics(
        admin_service_pb2.GetMetricsRequest(group_by=dimension), timeout=WAIT_S
    )
    return response.snapshot


async def shown(rig: Rig, request_id: str) -> request_pb2.Request:
    response = await rig.inference.GetRequest(
        inference_service_pb2.GetRequestRequest(request_id=request_id), timeout=WAIT_S
    )
    request: request_pb2.Request = response.request
    return request


async def test_costs_add_up_from_requests_to_tenants_models_and_instances() -> None:
    async with site(count=2) as rig:
        by_tenant: dict[str, float] = {}
        for number in range(9):
            tenant_id = f"t{number % 3}"
            status = await ended(rig, tenant_id, f"r{number}", 4 + number)
            assert status.cost is not None
            assert status.cost.actual_usd is not None
            assert 0.0 < status.cost.predicted_p10_usd <= status.cost.predicted_p90_usd
            # A dollar per second of its own time at most.
            assert status.end_time_s is not None
            assert status.dispatch_time_s is not None
            assert 0.0 < status.cost.actual_usd <= status.end_time_s - status.dispatch_time_s + 1e-6
            by_tenant[tenant_id] = by_tenant.get(tenant_id, 0.0) + status.cost.actual_usd
        snapshot = await metrics(rig, metrics_pb2.METRICS_DIMENSION_TENANT)
        assert {each.value: each.metrics.cost_usd for each in snapshot.groups} == pytest.approx(by_tenant)
        total_usd = sum(by_tenant.values())
        assert snapshot.overall.cost_usd == pytest.approx(total_usd)
        tokens = sum(4 + number for number in range(9))
        assert snapshot.overall.usd_per_million_output_tokens == pytest.approx(1e6 * total_usd / tokens)
        (group,) = (await metrics(rig, metrics_pb2.METRICS_DIMENSION_MODEL)).groups
        assert (group.value, group.metrics.cost_usd) == (MODEL, pytest.approx(total_usd))
        instances = (await metrics(rig, metrics_pb2.METRICS_DIMENSION_INSTANCE)).groups
        now = rig.manager.now()
        for each in instances:
            meter = rig.manager.instance(each.value).meter
            assert each.metrics.cost_usd == pytest.approx(meter.busy_usd(now))
        families = {
            family.name: family.samples
            for family in text_string_to_metric_families((await rig.server.exporter.render()).decode())
        }
        for name in ("sagecp_request_cost_usd", "sagecp_tenant_cost_usd", "sagecp_instance_busy_cost_usd"):
            assert sum(sample.value for sample in families[name]) == pytest.approx(total_usd), name
        tenants = {each.labels["tenant"]: each.value for each in families["sagecp_tenant_cost_usd"]}
        assert tenants == pytest.approx(by_tenant)
        assert sum(each.value for each in families["sagecp_instance_idle_cost_usd"]) > 0.0
        covered = {each.labels["quantity"] for each in families["sagecp_prediction_coverage_ratio"]}
        assert covered == {"cost"}


async def test_a_request_shows_what_it_costs_while_it_runs_and_waits(rig: Rig) -> None:
    engine = await rig.add_engine("e1", limit=1)
    for name in ("running", "waiting"):
        await rig.submit(name)
    assert not (await shown(rig, "running")).HasField("cost"), "nobody said what a GPU costs"
    async with running_rig(scheduler=SchedulerConfig(prices=PRICES)) as priced:
        engine = await priced.add_engine("e1", limit=1)
        assert not (await priced.submit("running")).HasField("cost"), "submitting does not wait for it"
        await priced.submit("waiting")
        call = await engine.next_call()
        call.send("a")
        await until(lambda: priced.manager.scheduler.find_request("running").delivered)  # type: ignore[union-attr]
        running, waiting = await shown(priced, "running"), await shown(priced, "waiting")
        assert running.cost.actual_usd > 0.0
        assert running.cost.predicted_p50_usd > 0.0
        assert not waiting.cost.HasField("actual_usd")
        assert waiting.cost.predicted_p50_usd > 0.0
        listed = await priced.inference.ListRequests(inference_service_pb2.ListRequestsRequest())
        assert [each.cost.predicted_p50_usd > 0.0 for each in listed.requests] == [True, True]
        explained = await priced.inference.ExplainRequest(
            inference_service_pb2.ExplainRequestRequest(request_id="running")
        )
        assert explained.request.cost.predicted_p50_usd == running.cost.predicted_p50_usd
        cost = convert.request_status(running).cost
        assert cost is not None
        assert cost.actual_usd == running.cost.actual_usd


async def test_the_last_message_of_a_stream_says_what_it_cost() -> None:
    async with site() as rig:
        output = await read_all(rig.generate("r", sampling=request_pb2.SamplingParameters(max_tokens=8)))
        assert output.terminal.request.cost.actual_usd > 0.0


async def test_the_price_in_force_is_shown_with_where_it_comes_from() -> None:
    async with site() as rig:
        await ended(rig, "t", "r", 4)
        response = await rig.instances.GetInstance(
            fleet_service_pb2.GetInstanceRequest(instance_id="e0"), timeout=WAIT_S
        )
        assert not response.instance.spec.HasField("usd_per_gpu_hour")
        instance = convert.instance(response.instance)
        assert instance.price is not None
        assert (instance.price.usd_per_gpu_hour, instance.price.source) == (3600.0, PriceSource.GPU_KIND)
        assert instance.price.busy_usd > 0.0
        assert instance.price.idle_usd > 0.0
        with CliRunner().isolation() as (out, *_):
            instance_details.show_one(response.instance, "table")
            text = out.getvalue().decode()
        assert "3600 USD per GPU and hour, configured for its kind of GPU; $" in text


async def test_tables_show_costs_where_there_are_prices() -> None:
    async with site() as rig:
        await ended(rig, "alice", "r", 16)
        snapshot = await metrics(rig, metrics_pb2.METRICS_DIMENSION_TENANT)
        with CliRunner().isolation() as (out, *_):
            metrics_view.show(snapshot, "tenant", "table")
            requests_view.show_one(await shown(rig, "r"), "table")
            text = out.getvalue().decode()
    assert "of requests that ended in the window, $" in text
    assert "$/MTOK" in text
    assert "predicted $" in text


async def test_what_a_request_cost_outlasts_a_restart() -> None:
    store = MemoryStore()
    config = SchedulerConfig(prices=PRICES)
    async with running_rig(scheduler=config, store=store) as rig:
        engine = await rig.add_engine()
        engine.automatic = lambda call: call.answer("a", "b")
        await rig.submit("r")
        await rig.manager.wait_request("r")
        before = (await shown(rig, "r")).cost
        assert before.actual_usd > 0.0
    async with running_rig(scheduler=config, store=store) as rig:
        assert (await shown(rig, "r")).cost == before
