"""The library as its documentation shows it: names, arguments and results that must not change."""

# The snippet is quoted as it stands.
# ruff: noqa: E501

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import textwrap
from collections.abc import AsyncIterator
from typing import Any

import pytest

import sagecp
from sagecp import (
    ControlPlaneManager,
    ControlPlaneStatus,
    ExecutionCoordinator,
    ExecutionInstance,
    ParallelismOptimizer,
    ParallelismType,
    PerformanceMetrics,
    RequestMetadata,
    RequestPriority,
    RequestState,
    RequestStatus,
    SchedulingDecision,
)
from sagecp.core.errors import InvalidRequestError
from sagecp.runtime.engines.base import EngineHealth
from sagecp.sim.engine_server import EngineServer
from sagecp.sim.server_config import EngineServerConfig
from tests.support.waiting import other_tasks, until

# Word for word what the documentation promises.
SNIPPET = """
from sagecp import (ControlPlaneManager, RequestMetadata, RequestPriority, ExecutionInstance,
                    ParallelismType, ParallelismOptimizer, SchedulingDecision, PerformanceMetrics)

cp = ControlPlaneManager(scheduling_policy="adaptive", routing_strategy="load_balanced",
                         load_balancer="predicted_latency", enable_monitoring=True)   # all optional
await cp.start()
cp.register_instance(ExecutionInstance(instance_id="vllm-1", host="localhost", port=8000, model_name="llama-3-70b",
                                       tensor_parallel_size=4, gpu_count=4, gpu_memory_gb=80.0))
await cp.submit_request(RequestMetadata(request_id="req-001", user_id="user-123", priority=RequestPriority.HIGH,
                                        slo_deadline_ms=1000, max_tokens=100))
status = await cp.get_request_status("req-001")
metrics = cp.get_metrics()      # PerformanceMetrics: avg_latency_ms, slo_compliance_rate, ...
status = cp.get_status()
await cp.stop()
"""


@pytest.fixture
async def engine() -> AsyncIterator[EngineServer]:
    """A simulated engine that answers in no time."""
    config = EngineServerConfig(
        model_names=("llama-3-70b",), profile="fixed", time_to_first_token_s=0.0, inter_token_s=0.0
    )
    async with EngineServer(config) as server:
        yield server


def instance(engine: EngineServer) -> ExecutionInstance:
    return ExecutionInstance(
        instance_id="vllm-1",
        host="127.0.0.1",
        port=engine.port,
        model_name="llama-3-70b",
        tensor_parallel_size=4,
        gpu_count=4,
        gpu_memory_gb=80.0,
    )


async def run_snippet(text: str) -> dict[str, Any]:
    """Run lines that may await, and return the names they leave."""
    # Names are imported lazily, so the lines must also work as the first thing a program does.
    body = textwrap.indent(text, "    ") + "\n    return locals()\n"
    names: dict[str, Any] = {}
    exec(compile(f"async def snippet():\n{body}", "<snippet>", "exec"), names)
    found: dict[str, Any] = await names["snippet"]()
    return found


async def test_the_snippet_runs_as_it_stands(engine: EngineServer) -> None:
    text = SNIPPET.replace("port=8000", f"port={engine.port}").replace('"localhost"', '"127.0.0.1"')
    found = await run_snippet(text)
    assert isinstance(found["metrics"], PerformanceMetrics)
    assert isinstance(found["status"], ControlPlaneStatus)
    assert found["metrics"].total_requests == 1
    assert found["status"].models == ("llama-3-70b",)
    assert not any("sagecp" in task.get_name() for task in other_tasks())


async def test_the_snippet_runs_where_no_engine_listens(unused_tcp_port: int) -> None:
    # Whoever tries the first example without an engine gets states and figures, not an exception.
    found = await run_snippet(SNIPPET.replace("port=8000", f"port={unused_tcp_port}"))
    assert found["status"].queued_requests == 1
    assert found["metrics"].completed_requests == 0


async def test_the_request_of_the_snippet_runs_to_its_end(engine: EngineServer) -> None:
    cp = ControlPlaneManager(
        scheduling_policy="adaptive",
        routing_strategy="load_balanced",
        load_balancer="predicted_latency",
        enable_monitoring=True,
    )
    await cp.start()
    try:
        cp.register_instance(instance(engine))
        accepted = await cp.submit_request(
            RequestMetadata(
                request_id="req-001",
                user_id="user-123",
                prompt="Hello",
                priority=RequestPriority.HIGH,
                slo_deadline_ms=30_000,
                max_tokens=100,
            )
        )
        assert isinstance(accepted, RequestStatus)
        assert accepted.state is RequestState.QUEUED
        status = await asyncio.wait_for(cp.wait_request("req-001"), 30)
        assert status.state is RequestState.SUCCEEDED, status.failure
        assert status == await cp.get_request_status("req-001")
        assert (status.user_id, status.priority) == ("user-123", RequestPriority.HIGH)
        assert status.model_name == "llama-3-70b"
        assert status.instance_id == "vllm-1"
        assert 1 <= status.usage.completion_token_count <= 100
        deltas = [delta async for delta in cp.stream_request("req-001")]
        assert sum(delta.token_count for delta in deltas) == status.usage.completion_token_count
        metrics = cp.get_metrics()
        assert metrics.completed_requests == 1
        assert metrics.avg_latency_ms > 0
        assert metrics.slo_compliance_rate == 1.0
        assert cp.get_status().instance_count_by_state == {"READY": 1}
    finally:
        await cp.stop()


async def test_every_kind_of_prompt_is_taken(engine: EngineServer) -> None:
    cp = ControlPlaneManager()
    await cp.start()
    try:
        cp.register_instance(instance(engine))
        for request in (
            RequestMetadata(request_id="text", prompt="hello", max_tokens=3),
            RequestMetadata(
                request_id="chat", messages=({"role": "user", "content": "hello"},), max_tokens=3
            ),
            RequestMetadata(request_id="ids", prompt_token_ids=(1, 2, 3), max_tokens=3),
        ):
            await cp.submit_request(request)
            status = await asyncio.wait_for(cp.wait_request(request.request_id), 30)
            assert status.state is RequestState.SUCCEEDED, status.failure
            assert status.usage.completion_token_count == 3
    finally:
        await cp.stop()


async def test_cancelling_empties_the_engine() -> None:
    config = EngineServerConfig(
        model_names=("llama-3-70b",), profile="fixed", time_to_first_token_s=0.0, inter_token_s=0.05
    )
    async with EngineServer(config) as engine:
        cp = ControlPlaneManager()
        await cp.start()
        try:
            cp.register_instance(instance(engine))
            await cp.submit_request(RequestMetadata(request_id="r", prompt="x", max_tokens=5000))
            async for _ in cp.stream_request("r"):
                break
            assert engine.model.running_count == 1
            status, cancelled = await cp.cancel_request("r")
            assert (status.state, cancelled) == (RequestState.CANCELLED, True)
            await until(lambda: engine.model.running_count == 0, "the engine is idle", timeout_s=5.0)
        finally:
            await cp.stop()


async def test_the_coordinators_calls(engine: EngineServer) -> None:
    cp = ControlPlaneManager()
    await cp.start()
    try:
        cp.register_instance(instance(engine))
        coordinator = cp.coordinator
        assert isinstance(coordinator, ExecutionCoordinator)
        request = RequestMetadata(request_id="direct", prompt="hello", max_tokens=4)
        decision = SchedulingDecision(request_id="direct", epoch=1, instance_id="vllm-1")
        result = await coordinator.execute_request(request, instance(engine), decision)
        assert result.outcome.finish_reasons == ("length",)
        assert result.outcome.completion_token_count == 4
        assert result.text
        assert len(result.token_ids) == 4
        health = await coordinator.health_check("vllm-1")
        assert isinstance(health, EngineHealth)
        assert health.healthy
        assert health.latency_s > 0
        assert {name: one.healthy for name, one in (await coordinator.health_check_all()).items()} == {
            "vllm-1": True
        }
        metrics = coordinator.get_metrics()
        assert (metrics.started_count, metrics.succeeded_count, metrics.failed_count) == (1, 1, 0)
        assert (metrics.running_count, metrics.instance_count) == (0, 1)
        await engine.stop()
        health = await coordinator.health_check("vllm-1")
        assert not health.healthy
        assert health.detail
    finally:
        await cp.stop()


def test_the_arguments_keep_their_names_and_order() -> None:
    def parameters(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert parameters(ControlPlaneManager)[:4] == [
        "scheduling_policy",
        "routing_strategy",
        "load_balancer",
        "enable_monitoring",
    ]
    assert parameters(ExecutionCoordinator.execute_request)[:3] == ["request", "instance", "decision"]
    assert parameters(ExecutionCoordinator.health_check) == ["instance_id"]
    assert parameters(ExecutionCoordinator.health_check_all) == []
    assert parameters(ExecutionCoordinator.get_metrics) == []
    assert parameters(ParallelismOptimizer.select_strategy) == ["request", "instance", "gpu_count"]
    fields = {field.name for field in dataclasses.fields(RequestMetadata)}
    assert fields >= {
        "prompt",
        "messages",
        "prompt_token_ids",
        "cost_budget",
        "parallelism_hint",
        "session_id",
        "ttft_slo_ms",
        "tpot_slo_ms",
    }
    assert {field.name for field in dataclasses.fields(PerformanceMetrics)} >= {
        "avg_latency_ms",
        "slo_compliance_rate",
    }


def test_every_public_name_can_be_imported() -> None:
    for name in sagecp.__all__:
        assert getattr(sagecp, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = sagecp.Nothing


HOST = ExecutionInstance(instance_id="i", host="h", port=1, model_name="m")


@pytest.mark.parametrize("hint", [None, *ParallelismType])
@pytest.mark.parametrize("gpu_count", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_the_optimizer_answers_with_a_strategy_and_a_plan_for_the_gpus_there_are(
    hint: ParallelismType | None, gpu_count: int
) -> None:
    strategy, config = ParallelismOptimizer().select_strategy(
        RequestMetadata(prompt="x", parallelism_hint=hint), HOST, gpu_count
    )
    assert isinstance(strategy, ParallelismType)
    assert config.gpu_count + config.idle_gpu_count == gpu_count
    assert config.rationale


def test_the_optimizer_needs_a_gpu() -> None:
    with pytest.raises(InvalidRequestError, match="at least one GPU"):
        ParallelismOptimizer().select_strategy(RequestMetadata(), HOST, 0)
