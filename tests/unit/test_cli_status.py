"""`sagecp status`: what is said of a busy control plane, and of one that has nothing to say."""

from __future__ import annotations

import pytest

from sagecp.cli import status_view
from sagecp.v1 import admin_service_pb2 as pb


def busy() -> pb.GetStatusResponse:
    status = pb.GetStatusResponse(
        version="0.1.0",
        accepting=True,
        queue_capacity=100_000,
        queued_count_by_model={"llama-3-70b": 120, "qwen": 3, "idle": 0},
        queued_count_by_priority={"CRITICAL": 1, "LOW": 122},
        queued_count_by_tenant={f"tenant-{number}": number for number in range(1, 15)},
        instance_count_by_state={"READY": 3, "LOST": 1, "DRAINED": 0},
        refused_heartbeat_count_by_reason={"BAD_GAUGE": 1, "STALE_INCARNATION": 3},
        heartbeat_count=1_234_567,
        cpu_seconds=12_000,
        resident_memory_bytes=3 << 30,
        models=[f"model-{number}" for number in range(12)],
        policy_in_force="priority",
        policy_reason="a reason of more words than fit beside the name of the policy on a narrow terminal",
        loops=[pb.LoopStatus(name="monitoring", run_count=1_100), pb.LoopStatus(name="heartbeat")],
    )
    status.uptime.FromSeconds(400_000)
    status.lease_duration.FromSeconds(6)
    status.scheduling.scheduling_policy = "adaptive"
    status.scheduling.routing_strategy = "load_balanced"
    status.scheduling.version = 4
    status.loops[0].interval.FromSeconds(5)
    status.loops[0].last_run_time.GetCurrentTime()
    fault = status.recent_faults.add(message="it broke " * 12, instance_id="engine-1", request_id="r" * 40)
    fault.fault_time.GetCurrentTime()
    return status


@pytest.mark.parametrize("width", [80, 200])
def test_everything_is_said_and_fits(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    status_view.show(busy(), "127.0.0.1:50051", "table")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    text = " ".join(shown.split())
    for expected in (
        "control plane 127.0.0.1:50051 SERVING, version 0.1.0",
        "process 3h 20m of CPU (3% of a core), 3,072 MiB of memory",
        "instances 1 LOST, 3 READY",
        "queued 123 of at most 100,000",
        "by model llama-3-70b 120, qwen 3 by",
        "by priority CRITICAL 1, LOW 122",
        "by tenant tenant-14 14, tenant-13 13,",
        "tenant-7 7 and 6 more",
        "order adaptive (priority in force): a reason of more",
        "placement load_balanced (configuration 4)",
        "1,234,567 taken, 4 refused (STALE_INCARNATION 3, BAD_GAUGE 1); a lease is 6.00 s",
        "monitoring 5.00 s 0s ago 1,100",
        "heartbeat 0 s not yet 0",
        "engine-1",
    ):
        assert expected in text


def test_a_server_that_says_little(capsys: pytest.CaptureFixture[str]) -> None:
    status_view.show(pb.GetStatusResponse(), "h:1", "table")
    shown = capsys.readouterr().out
    assert "control plane   h:1 DRAINING" in shown
    for absent in ("process", "LOOP", "PREDICTED", "FAULT", "by tenant", "a lease"):
        assert absent not in shown
