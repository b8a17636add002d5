"""What Prometheus is told by a running server."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from sagecp.core.gpu import GpuFault, GpuFaultKind
from sagecp.core.types import RequestMetadata
from sagecp.rpc.telemetry import requests as request_telemetry
from sagecp.rpc.telemetry.families import PIECE_LINES
from sagecp.rpc.telemetry.tenant_labels import OTHER
from tests.support.rpc_rig import MODEL, Rig, running_rig
from tests.support.samples import Samples, samples_of
from tests.support.telemetry_world import (
    AGENT_INSTANCE,
    AGENT_MODEL,
    WAITING_MODEL,
    beat,
    eloquent_rig,
    gpu_reading,
)
from tests.support.waiting import until

NORMAL = (("model", MODEL), ("priority", "NORMAL"))


@pytest.fixture
async def told() -> AsyncIterator[tuple[Rig, Samples]]:
    """A server on which much happened, and what it says."""
    async with eloquent_rig() as rig:
        yield rig, await samples_of(rig)


async def test_requests_are_counted_by_what_became_of_them(told: tuple[Rig, Samples]) -> None:
    _, samples = told
    assert samples["sagecp_requests_accepted_total", *NORMAL] == 3
    assert samples["sagecp_requests_ended_total", *NORMAL, ("reason", ""), ("state", "SUCCEEDED")] == 3
    assert samples["sagecp_requests_refused_total", ("reason", "MODEL_NOT_FOUND")] == 1
    assert samples["sagecp_requests_refused_total", ("reason", "QUEUE_FULL")] == 0
    lost = samples["sagecp_attempts_lost_total", ("model", MODEL), ("reason", "ENGINE_FAILED")]
    assert lost == 1
    assert samples["sagecp_output_tokens_total", *NORMAL] == 9
    assert samples["sagecp_input_tokens_total", *NORMAL] == 21


async def test_durations_and_objectives_are_those_of_the_requests(told: tuple[Rig, Samples]) -> None:
    rig, samples = told
    for name in ("latency", "ttft", "tpot", "queue_wait"):
        assert samples[f"sagecp_request_{name}_seconds_count", *NORMAL] == 3
    latencies_s = [
        handle.end_s - handle.record.arrival_s
        for handle in rig.manager.requests.newest_first()
        if handle.end_s is not None and handle.record.metadata.priority.name == "NORMAL"
    ]
    assert samples["sagecp_request_latency_seconds_sum", *NORMAL] == pytest.approx(sum(latencies_s))
    high = (("model", MODEL), ("objective", "all"), ("outcome", "violated"), ("priority", "HIGH"))
    assert samples["sagecp_slo_requests_total", *high] == 1
    for objective in ("all", "latency", "ttft", "tpot"):
        labels = (("model", MODEL), ("objective", objective), ("outcome", "met"), ("priority", "NORMAL"))
        assert samples["sagecp_slo_requests_total", *labels] == 1


async def test_what_waits_is_counted_by_model_and_priority(told: tuple[Rig, Samples]) -> None:
    _, samples = told
    waiting = (("model", WAITING_MODEL), ("priority", "NORMAL"))
    assert samples["sagecp_queue_requests", *waiting] == 1
    assert samples["sagecp_queue_oldest_age_seconds", *waiting] > 0
    assert samples["sagecp_queue_class_requests", ("priority", "NORMAL")] == 1
    assert samples["sagecp_queue_class_requests", ("priority", "LOW")] == 0
    assert samples["sagecp_queue_size_bytes",] == len("a secret prompt")


async def test_instances_and_gpus_are_shown_as_their_agents_report_them(told: tuple[Rig, Samples]) -> None:
    _, samples = told
    of_instance = (("instance_id", AGENT_INSTANCE), ("model", AGENT_MODEL))
    for name, value in {
        "ready": 0,
        "requests_in_flight": 0,
        "engine_kv_cache_usage_ratio": 0.5,
        "engine_requests_running": 3,
        "engine_prefix_cache_hit_tokens_total": 250,
        "engine_restarts_total": 3,
        "clock_offset_seconds": 7.5,
        "heartbeats_refused_total": 2,
    }.items():
        assert samples[f"sagecp_instance_{name}", *of_instance] == value, name
    assert samples["sagecp_instances", ("model", AGENT_MODEL), ("state", "READY")] == 1
    assert samples["sagecp_instances", ("model", AGENT_MODEL), ("state", "UNHEALTHY")] == 1
    assert samples["sagecp_instance_outage", of_instance[0], ("kind", "gpu_fault"), of_instance[1]] == 1
    second = (("gpu", "1"), ("instance_id", AGENT_INSTANCE))
    for name, value in {
        "utilization_ratio": 0.75,
        "memory_used_bytes": 60 << 30,
        "sm_clock_hertz": 1.98e9,
        "row_remap_pending": 1,
        "ecc_errors_uncorrected_total": 2,
    }.items():
        assert samples[f"sagecp_gpu_{name}", *second] == value, name
    assert samples["sagecp_gpu_xid_errors", *second, ("xid", "31")] == 2
    assert samples["sagecp_gpu_xid_errors", *second, ("xid", "79")] == 1
    assert samples["sagecp_gpu_throttled", *second, ("reason", "SwPowerCap")] == 1
    assert any(key[0] == "sagecp_gpu_fault" and ("kind", "XID") in key for key in samples)


async def test_heartbeats_and_events_are_counted(told: tuple[Rig, Samples]) -> None:
    _, samples = told
    assert samples["sagecp_heartbeats_taken_total",] == 3
    assert samples["sagecp_heartbeats_refused_total", ("reason", "BAD_FIGURE")] == 1
    assert samples["sagecp_heartbeats_refused_total", ("reason", "INSTANCE_NOT_FOUND")] == 1
    registered = (("kind", "INSTANCE_REGISTERED"), ("severity", "INFO"))
    assert samples["sagecp_events_total", *registered] == 5


async def test_nothing_of_a_prompt_and_no_id_of_a_request_is_told() -> None:
    async with eloquent_rig() as rig:
        text = (await rig.server.exporter.render()).decode()
    for secret in ("secret", "retried", "missed", "of-a-tenant"):
        assert secret not in text


async def test_what_is_unknown_is_left_out_instead_of_being_zero(told: tuple[Rig, Samples]) -> None:
    rig, _ = told
    bare = dataclasses.replace(gpu_reading(0), utilization=None, power_watts=None, row_remap_pending=None)
    rig.manager.heartbeat(beat(gauges=None, gpus=(bare,)))
    samples = await samples_of(rig)
    first = (("gpu", "0"), ("instance_id", AGENT_INSTANCE))
    assert ("sagecp_gpu_temperature_celsius", *first) in samples
    for name in ("utilization_ratio", "power_watts", "row_remap_pending"):
        assert (f"sagecp_gpu_{name}", *first) not in samples
    of_instance = (("instance_id", AGENT_INSTANCE), ("model", AGENT_MODEL))
    assert ("sagecp_instance_engine_kv_cache_usage_ratio", *of_instance) not in samples


async def test_an_agent_that_reports_a_gpu_twice_does_not_spoil_the_text(told: tuple[Rig, Samples]) -> None:
    rig, _ = told
    twice = gpu_reading(1, throttle_reasons=("SwPowerCap", "SwPowerCap"))
    rig.manager.heartbeat(beat(gpus=(twice, twice)))
    record = rig.manager.instance(AGENT_INSTANCE)
    fault = GpuFault(gpu_uuid="GPU-1", gpu_index=1, kind=GpuFaultKind.XID, message="Xid 79", begin_s=0.0)
    record.gpu_faults = (fault, dataclasses.replace(fault, message="Xid 48", quarantines=True))
    # Reading fails where a sample is there twice.
    samples = await samples_of(rig)
    labels = (("gpu", "1"), ("instance_id", AGENT_INSTANCE), ("kind", "XID"), ("quarantines", "true"))
    assert samples["sagecp_gpu_fault", *labels] == 1


async def test_the_fleet_may_change_while_it_is_written(told: tuple[Rig, Samples]) -> None:
    rig, _ = told
    for number in range(2 * PIECE_LINES):
        spec = dataclasses.replace(rig.manager.instance(AGENT_INSTANCE).spec, instance_id=f"n{number}")
        rig.manager.register_instance(spec, incarnation=1)

    async def change() -> None:
        for number in range(2 * PIECE_LINES):
            rig.manager.deregister_instance(f"n{number}")
            await asyncio.sleep(0)

    samples, _ = await asyncio.gather(samples_of(rig), change())
    assert sum(1 for key in samples if key[0] == "sagecp_instance_ready") >= 2 * PIECE_LINES
    samples = await samples_of(rig)
    assert sum(1 for key in samples if key[0] == "sagecp_instance_ready") == 5


async def test_series_are_bounded_whatever_names_requests_carry(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_telemetry, "MAX_MODELS", 2)
    models = [f"model-{number}" for number in range(5)]
    for model in models:
        engine = await rig.add_engine(f"e-{model}", model=model)
        engine.automatic = lambda call: call.answer("a")
    for number in range(300):
        await rig.manager.submit_request(
            RequestMetadata(prompt="x", model_name=models[number % 5], tenant_id=f"t{number}", user_id="u")
        )
    await until(lambda: rig.manager.scheduler.live_count == 0, "all ended")
    samples = await samples_of(rig)
    accepted = {
        dict(key[1:])["model"]: n for key, n in samples.items() if key[0] == "sagecp_requests_accepted_total"
    }
    assert accepted == {"model-0": 60, "model-1": 60, OTHER: 180}
    tenants = {
        dict(key[1:])["tenant"]: n
        for key, n in samples.items()
        if key[0] == "sagecp_tenant_requests_ended_total"
    }
    assert len(tenants) == request_telemetry.MAX_TENANTS + 1
    assert tenants[OTHER] == 300 - request_telemetry.MAX_TENANTS
    assert "u" not in {value for key in samples for _, value in key[1:]}


def _get(url: str, **headers: str) -> tuple[int, bytes, str]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return response.status, response.read(), response.headers["Content-Type"]


async def test_the_endpoint_compresses_for_those_who_can_read_it() -> None:
    async with eloquent_rig(metrics_listen="127.0.0.1:0") as rig:
        url = f"http://127.0.0.1:{rig.server.metrics_port}/metrics"
        _, plain, kind = await asyncio.to_thread(_get, url)
        assert kind.startswith("text/plain; version=0.0.4")
        _, packed, _ = await asyncio.to_thread(_get, url, **{"Accept-Encoding": "gzip"})
        assert b"sagecp_build_info" in plain
        assert b"sagecp_build_info" in gzip.decompress(packed)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(_get, url.replace("/metrics", "/else"))


async def test_a_scrape_that_fails_is_answered_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_rig(metrics_listen="127.0.0.1:0") as rig:
        url = f"http://127.0.0.1:{rig.server.metrics_port}/metrics"

        def broken() -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr(rig.manager, "prediction_accuracy", broken)
            with pytest.raises(urllib.error.HTTPError, match="500"):
                await asyncio.to_thread(_get, url)
        status, _, _ = await asyncio.to_thread(_get, url)
        assert status == 200


async def test_scrapes_at_the_same_time_are_all_answered() -> None:
    async with running_rig(metrics_listen="127.0.0.1:0") as rig:
        url = f"http://127.0.0.1:{rig.server.metrics_port}/metrics"
        answers = await asyncio.gather(*(asyncio.to_thread(_get, url) for _ in range(8)))
    assert {status for status, _, _ in answers} == {200}
