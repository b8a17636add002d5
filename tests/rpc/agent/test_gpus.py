"""What an agent tells a control plane of GPUs."""

from __future__ import annotations

import os

import pytest

from sagecp.agent import engine_facts
from sagecp.agent.gpu import driver
from sagecp.agent.local_engine import EngineArguments, LocalEngine
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2
from tests.rpc.agent.peers import ControlPlane, Log, Start
from tests.support.nvml_stub import NvmlStub, load_stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return load_stub(monkeypatch, "gpus 4")


async def test_beats_carry_what_the_gpus_say(
    start: Start, stub: NvmlStub, control_plane: ControlPlane
) -> None:
    start(gpus=("2",))
    await control_plane.until(lambda: control_plane.beats)
    spec = control_plane.registrations[0].spec
    assert [device.index for device in spec.gpu_devices] == [2]
    assert (spec.gpu_count, spec.gpu_name, spec.gpu_memory_gib) == (1, "NVIDIA Stand-In 80GB", 80.0)
    (reading,) = control_plane.beats[0].gpus
    assert reading.uuid == spec.gpu_devices[0].uuid
    assert (reading.temperature_celsius, reading.corrected_ecc_error_count) == (61.0, 5)
    assert not reading.xid_errors
    stub.control("xid 2 79 -1", "set 2 celsius 95")
    reading = await control_plane.until(
        lambda: control_plane.beats[-1].gpus[0].xid_errors and control_plane.beats[-1].gpus[0]
    )
    assert reading.xid_errors[0].code == 79
    assert reading.temperature_celsius == 95.0
    assert len(control_plane.registrations) == 1


async def test_gpus_that_are_found_later_are_registered_then(
    start: Start, stub: NvmlStub, control_plane: ControlPlane, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_PROCESS_PERIOD_S", 0.05)
    engine = LocalEngine(os.getpid(), EngineArguments(), None)
    monkeypatch.setattr(engine_facts, "find_local_engine", lambda _: engine)
    start()
    await control_plane.until(lambda: control_plane.beats)
    assert [device.index for device in control_plane.registrations[0].spec.gpu_devices] == [0, 1, 2, 3]
    assert control_plane.registrations[0].spec.gpu_count == 1, "nobody knows which of the four"
    # The engine loads, and its process takes memory of a GPU.
    stub.control(f"process 3 {os.getpid()} 4096")

    def found() -> instance_pb2.InstanceSpec | None:
        spec = control_plane.registrations[-1].spec
        return spec if len(spec.gpu_devices) == 1 else None

    spec = await control_plane.until(found)
    assert (spec.gpu_devices[0].index, spec.gpu_count) == (3, 1)

    def told() -> pb.HeartbeatRequest | None:
        beat = control_plane.beats[-1]
        return beat if len(beat.gpus) == 1 else None

    beat = await control_plane.until(told)
    assert (beat.gpus[0].index, beat.gpus[0].engine_memory_bytes) == (3, 4096)
    said = [(event["gpus"], event["gpus_chosen_by"]) for event in log if event["event"] == "GPUs chosen"]
    assert said == [([0, 1, 2, 3], "nobody: all of this host"), ([3], "the engine's processes")]


async def test_without_a_driver_beats_say_so(
    start: Start, stub: NvmlStub, control_plane: ControlPlane
) -> None:
    stub.control("init 12")
    start(dcgm_exporter="off")
    await control_plane.until(lambda: control_plane.beats)
    assert not control_plane.registrations[0].spec.gpu_devices
    reason = control_plane.beats[0].gpu_absent_reason
    assert reason == "no NVIDIA driver: libnvidia-ml.so.1 was not found"
