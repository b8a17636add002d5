"""What an agent says of an engine, and how it follows the control plane's wishes."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from sagecp.agent import engine_probe
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2
from tests.rpc.agent.peers import ControlPlane, Engine, Log, Start


async def test_it_registers_what_it_found(start: Start, control_plane: ControlPlane) -> None:
    before_us = time.time_ns() // 1000
    agent = start(labels={"rack": "r7"}, usd_per_gpu_hour=2.5, max_concurrent_request_count=12)
    request = await control_plane.until(
        lambda: control_plane.registrations and control_plane.registrations[0]
    )
    assert before_us <= request.incarnation <= time.time_ns() // 1000
    assert request.agent_version
    spec = request.spec
    assert spec.instance_id == "engine-1"
    assert spec.engine_url == agent.config.engine_url
    assert (spec.model_name, list(spec.model_aliases)) == ("tiny", ["adapter"])
    assert spec.max_context_token_count == 8192
    assert spec.key_value_token_capacity == 9216
    assert spec.max_concurrent_request_count == 12
    assert spec.engine_kind == instance_pb2.ENGINE_KIND_VLLM
    assert spec.engine_version == "0.32.0"
    assert spec.usd_per_gpu_hour == 2.5
    assert dict(spec.labels) == {"rack": "r7"}
    assert spec.host_id == socket.gethostname()
    sizes = spec.parallel_sizes
    assert (sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.data_parallel_size) == (1, 1, 1)
    assert sizes.expert_parallel_size == 1


async def test_it_says_which_facts_it_did_not_find(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    start(tensor_parallel_size=4)
    await control_plane.until(lambda: control_plane.registrations)
    found = next(event for event in log if event["event"] == "engine found")
    # The process that listens is this test, no vLLM: only the ranks could be counted.
    assert found["not_discovered"] == ["max_sequence_count", "pipeline_parallel_size", "expert_parallel"]
    assert found["sources"] == {"data_parallel_size": "metrics", "tensor_parallel_size": "flag"}
    assert control_plane.registrations[0].spec.parallel_sizes.tensor_parallel_size == 4


async def test_an_engine_in_developer_mode_tells_its_sizes(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    engine.server_info = {
        "vllm_config": {
            "parallel_config": {
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 3,
                "data_parallel_size": 4,
                "enable_expert_parallel": True,
            },
            "scheduler_config": {"max_num_seqs": 16},
        }
    }
    start(pipeline_parallel_size=1)
    await control_plane.until(lambda: control_plane.registrations)
    spec = control_plane.registrations[0].spec
    sizes = spec.parallel_sizes
    assert (sizes.tensor_parallel_size, sizes.data_parallel_size, sizes.expert_parallel_size) == (2, 4, 8)
    assert sizes.pipeline_parallel_size == 1, "a flag wins"
    assert spec.max_concurrent_request_count == 64, "every rank has a batch of its own"


@pytest.mark.parametrize(
    "settings",
    [
        {"version": {"version": "0.1.0", "engine": "sagecp-sim"}},
        {"version": {"version": "0.1.0+sim"}},
        {"version": {"version": "1", "simulated": True}},
        {"models": [{"id": "tiny", "owned_by": "simulated"}]},
    ],
)
async def test_a_simulated_engine_is_registered_as_one(
    start: Start, engine: Engine, control_plane: ControlPlane, settings: dict[str, Any]
) -> None:
    for name, value in settings.items():
        setattr(engine, name, value)
    start()
    await control_plane.until(lambda: control_plane.beats)
    assert control_plane.registrations[0].spec.engine_kind == instance_pb2.ENGINE_KIND_SIMULATED
    assert control_plane.beats[0].gpu_absent_reason == "the engine is simulated: it uses no GPU"


async def test_beats_carry_the_gauges(start: Start, control_plane: ControlPlane) -> None:
    start()
    await control_plane.until(lambda: len(control_plane.beats) >= 4)
    beats = control_plane.beats[:4]
    assert [beat.sequence for beat in beats] == [1, 2, 3, 4]
    assert control_plane.stream_count == 1
    beat = beats[0]
    assert beat.instance_id == "engine-1"
    assert beat.incarnation == control_plane.registrations[0].incarnation
    assert abs(beat.agent_time.ToNanoseconds() / 1e9 - time.time()) < 30
    assert beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY
    assert beat.engine == instance_pb2.EngineGauges(
        running_request_count=6,
        waiting_request_count=9,
        key_value_cache_usage=1.0,
        prefix_cache_query_token_count=28529,
        prefix_cache_hit_token_count=23552,
        prompt_token_count=28528,
        generation_token_count=12992,
        preemption_count=2,
        finished_request_count=25,
        sleeping=False,
        max_key_value_cache_usage=1.0,
        loaded_lora_adapters=["adapter"],
    )
    assert bool(beat.gpus) != bool(beat.gpu_absent_reason)
    assert not beat.goodbye


async def test_gauges_that_cannot_be_read_are_absent(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    engine.metrics = None
    start()
    await control_plane.until(lambda: len(control_plane.beats) >= 2)
    beat = control_plane.beats[-1]
    assert not beat.HasField("engine")
    assert beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY
    engine.metrics = "vllm:num_requests_running 0\n"
    beat = await control_plane.until(
        lambda: control_plane.beats[-1].HasField("engine") and control_plane.beats[-1]
    )
    assert beat.engine.HasField("running_request_count"), "zero is known"
    assert not beat.engine.HasField("waiting_request_count")


async def test_the_control_plane_sets_the_pace(start: Start, control_plane: ControlPlane) -> None:
    control_plane.interval_s = 0.001
    start()
    started_s = time.monotonic()
    await control_plane.until(lambda: len(control_plane.beats) >= 11)
    # Ten intervals, each at least 0.05 s less a tenth.
    assert time.monotonic() - started_s >= 10 * 0.05 * 0.9 - 0.05


async def test_the_pace_never_risks_the_lease(start: Start, control_plane: ControlPlane, log: Log) -> None:
    control_plane.lease_s = 0.6
    start(interval_s=60.0)
    await control_plane.until(lambda: len(control_plane.beats) >= 3)
    registered = next(event for event in log if event["event"] == "registered")
    assert registered["interval_s"] == pytest.approx(0.2)
    assert any("--interval" in event["event"] for event in log if event["log_level"] == "warning")


async def test_requests_to_abort_reach_the_engine(
    start: Start, engine: Engine, control_plane: ControlPlane
) -> None:
    start()
    await control_plane.until(lambda: control_plane.beats)
    control_plane.abort_request_ids = ["r-1"]
    await engine.until(lambda: engine.aborted)
    assert {"cmpl-r-1-0", "chatcmpl-r-1"} <= set(engine.aborted[0])
    assert all("r-1" in name for name in engine.aborted[0])


async def test_an_engine_that_cannot_abort_is_reported_once(
    start: Start,
    control_plane: ControlPlane,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_probe, "ABORT_PATHS", ("/inference/v1/abort_requests",))
    start()
    for _ in range(3):
        beat_count = len(control_plane.beats)
        control_plane.abort_request_ids = ["r-1"]
        await control_plane.until_beats(beat_count + 3)
    warnings = [event for event in log if event["event"] == "cannot abort requests"]
    assert len(warnings) == 1
    assert "VLLM_SERVER_DEV_MODE" in warnings[0]["reason"]


async def test_a_drain_and_its_end_are_in_the_log_once(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    def news() -> list[str]:
        return [event["desired_state"] for event in log if "desired_state" in event]

    start()
    await control_plane.until_beats(2)
    assert news() == [], "to serve is no news"
    control_plane.desired_state = pb.DESIRED_STATE_DRAINED
    await control_plane.until_beats(len(control_plane.beats) + 3)
    control_plane.desired_state = pb.DESIRED_STATE_SERVING
    await control_plane.until_beats(len(control_plane.beats) + 3)
    assert news() == ["DESIRED_STATE_DRAINED", "DESIRED_STATE_SERVING"]
    assert any("drains this instance" in event["event"] for event in log)
