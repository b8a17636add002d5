"""Everything about one instance, as a person reads it."""

from __future__ import annotations

import time

import pytest

from sagecp.cli.gpu_tables import link_lines, trouble_text
from sagecp.cli.instance_details import show_one
from sagecp.core.gpu import GpuDevice, GpuLink, GpuLinkKind, GpuReading, XidError
from sagecp.v1 import instance_pb2, metrics_pb2


def quantiles(p50_s: float, p99_s: float) -> metrics_pb2.DurationQuantiles:
    return metrics_pb2.DurationQuantiles(sample_count=9, mean_s=1, p50_s=p50_s, p95_s=1, p99_s=p99_s)


def message() -> instance_pb2.Instance:
    spec = instance_pb2.InstanceSpec(
        instance_id="engine-1",
        engine_url="http://10.0.0.7:8000",
        model_name="m",
        engine_version="0.11",
        engine_configuration={"block_size": "16"},
        engine_capabilities=[instance_pb2.ENGINE_CAPABILITY_SLEEP, instance_pb2.ENGINE_CAPABILITY_LORA],
        gpu_devices=[
            instance_pb2.GpuDevice(
                index=index,
                uuid=f"GPU-{index}",
                name="H100",
                numa_node=index,
                total_memory_bytes=80 << 30,
                links=[
                    instance_pb2.GpuLink(
                        peer_uuid=f"GPU-{1 - index}", kind=instance_pb2.GPU_LINK_KIND_NVLINK, nvlink_count=18
                    )
                ],
            )
            for index in range(2)
        ],
    )
    found = instance_pb2.Instance(
        spec=spec,
        state=instance_pb2.INSTANCE_STATE_UNHEALTHY,
        state_reason="XID 79 on GPU 1",
        engine=instance_pb2.EngineGauges(
            running_request_count=2,
            ttft=quantiles(0.25, 0.5),
            inter_token_latency=quantiles(0.01, 0.02),
            loaded_lora_adapters=["sql", "old"],
            running_lora_adapters=["sql"],
        ),
        gpus=[
            instance_pb2.GpuReading(
                index=0, utilization=0.5, used_memory_bytes=60 << 30, total_memory_bytes=80 << 30,
                temperature_celsius=61, power_watts=350, power_limit_watts=700, sm_clock_mhz=1980,
            )
        ],
        gpu_faults=[
            instance_pb2.GpuFault(
                gpu_uuid="GPU-1", gpu_index=1, kind=instance_pb2.GPU_FAULT_KIND_XID,
                message="fell off the bus", quarantines=True,
            )
        ],
        desired_lora_adapters=instance_pb2.LoraAdapters(
            adapters=[
                instance_pb2.LoraAdapter(name="sql", path="/adapters/sql"),
                instance_pb2.LoraAdapter(name="new", path="/adapters/new"),
            ]
        ),
        engine_process=instance_pb2.EngineProcess(
            state=instance_pb2.ENGINE_PROCESS_STATE_BACKING_OFF,
            restart_count=2,
            last_exit_code=-9,
            last_log_lines=["loading", "CUDA out of memory\x1b[2J"],
        ),
        learned=instance_pb2.LearnedPerformance(
            kind="m on H100", observation_count=1000, slowdown=1.25, prefill_tokens_per_second=12_000
        ),
        refused_heartbeat_count=3,
        heartbeat_refusal="the sequence went back",
        agent_version="0.1.0",
    )  # fmt: skip
    found.learned.ttft.FromMilliseconds(100)
    found.learned.step_duration.FromMilliseconds(12)
    found.clock_offset.FromMilliseconds(-1500)
    found.sleep.level = 2
    found.sleep.begin_time.FromSeconds(int(time.time()) - 5)
    found.gpu_faults[0].begin_time.FromSeconds(int(time.time()) - 60)
    return found


def test_everything_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_one(message(), "table")
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for expected in (
        "state UNHEALTHY; XID 79 on GPU 1",
        "settings block_size=16",
        "can sleep, lora",
        "process backing off, started again 2 times, last ended by signal 9",
        "LoRA sql from /adapters/sql: in use",
        "new from /adapters/new: not loaded yet",
        "old: to be unloaded",
        "its clock 1.50 s behind the control plane's",
        "refused 3 heartbeats; the last one: the sequence went back",
        "agent version 0.1.0",
        "time to first token - 250 ms 500 ms 100 ms",
        "time per token - 10.0 ms 20.0 ms 12.0 ms",
        "0 H100 50% 60.0 / 80.0 GiB 61 C 350 / 700 W 1980 MHz 0",
        "1 H100 - - / 80.0 GiB - - - 1",
        "links: nvlink x18 between all of them",
        "last words of the engine's process that ended:",
        "CUDA out of memory[2J",
    ):
        assert expected in lines
    for part in (
        "sleep          not yet asleep, ordered",
        "learned from 1,000 observations",
        "1.25 times as slow",
    ):
        assert part in shown
    assert any(line.startswith("XID 1 ") and line.endswith("ago yes fell off the bus") for line in lines)
    assert "\x1b" not in shown


def test_of_little_only_little_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    spec = instance_pb2.InstanceSpec(instance_id="i", engine_url="http://h:1", model_name="m")
    show_one(instance_pb2.Instance(spec=spec, state=instance_pb2.INSTANCE_STATE_STARTING), "table")
    shown = capsys.readouterr().out
    for absent in ("SPEED", "GPU ", "FAULT", "last words", "process", "LoRA", "its clock", "refused"):
        assert absent not in shown
    assert "engine says    nothing yet" in shown


def test_links_that_differ_are_told_for_each_gpu_the_nearest_first() -> None:
    first = GpuDevice(
        index=0,
        uuid="u0",
        links=(
            GpuLink("u4", GpuLinkKind.SYSTEM),
            GpuLink("u9", GpuLinkKind.UNKNOWN),
            GpuLink("u2", GpuLinkKind.NVLINK, 12),
            GpuLink("u1", GpuLinkKind.NVLINK, 12),
            GpuLink("u3", GpuLinkKind.HOST_BRIDGE),
        ),
    )
    rest = [GpuDevice(index=index, uuid=f"u{index}") for index in range(1, 5)]
    assert link_lines([first, *rest]) == [
        "GPU 0 links: nvlink x12 to 1,2; host bridge to 3; system to 4; unknown to u9"
    ]
    assert link_lines(rest) == []


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (GpuReading(index=0), ""),
        (GpuReading(index=0, corrected_ecc_error_count=5, nvlink_count=18, active_nvlink_count=18), ""),
        (GpuReading(index=0, throttle_reasons=("HW_THERMAL",)), "slowed down: HW_THERMAL"),
        (GpuReading(index=0, uncorrected_ecc_error_count=2), "2 uncorrected memory errors"),
        (GpuReading(index=0, row_remap_pending=True), "bad memory waits for a reset"),
        (
            GpuReading(index=0, row_remap_pending=True, row_remap_failed=True),
            "bad memory, no spare rows left",
        ),
        (GpuReading(index=0, nvlink_count=18, active_nvlink_count=16), "2 of 18 NVLinks down"),
        (GpuReading(index=0, foreign_process_count=1), "1 foreign process holds memory of it"),
    ],
)
def test_trouble(reading: GpuReading, text: str) -> None:
    assert trouble_text(reading) == text


def test_the_last_xid_error() -> None:
    errors = (XidError(13, 1.0), XidError(79, time.time()))
    assert trouble_text(GpuReading(index=0, xid_errors=errors)).startswith("XID 79 0s ago")
