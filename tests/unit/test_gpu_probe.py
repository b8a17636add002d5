"""GPU readings and the choice of GPUs, against a stand-in that speaks NVML's own binary interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sagecp.agent.gpu.choice import GpuChoice, parse_visible_devices
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.report import GpuReport
from sagecp.core.gpu import GpuReading
from tests.support.nvml_stub import ManualClock, NvmlStub, library_folder, load_stub, run_with_library

UUID_A = "GPU-a0000000-1111-2222-3333-444444444444"
UUID_B = "GPU-b0000000-1111-2222-3333-444444444444"
PART_A = "MIG-a0000000-1111-2222-3333-444444444444"
PART_B = "MIG-b0000000-1111-2222-3333-444444444444"

# What the dynamic linker finds, in a process of its own: all of the Python package is tested too.
SCRIPT = """
import dataclasses, json
from sagecp.agent.gpu.probe import GpuProbe
probe = GpuProbe()
first, second = probe.read(), probe.read()
assert first == second, (first, second)
probe.close()
print(json.dumps(dataclasses.asdict(first)))
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    return load_stub(monkeypatch)


def selected(*entries: str) -> GpuChoice:
    return GpuChoice(selection=entries, selected_by="--gpus")


def read(choice: GpuChoice | None = None) -> GpuReport:
    probe = GpuProbe(choice)
    try:
        return probe.read()
    finally:
        probe.close()


def test_everything_a_driver_tells(stub: NvmlStub) -> None:
    stub.control("set 0 reasons 68", "fail nvmlDeviceGetUtilizationRates 1 3", "set 1 pending 1")
    report = read()
    assert report.absent_reason == ""
    first, second = report.readings
    assert first == GpuReading(
        index=0,
        uuid=UUID_A,
        name="NVIDIA Stand-In 80GB",
        utilization=0.75,
        used_memory_bytes=1 << 30,
        total_memory_bytes=80 << 30,
        temperature_celsius=61.0,
        power_watts=312.5,
        power_limit_watts=700.0,
        sm_clock_mhz=1980,
        throttle_reasons=("SwPowerCap", "HwThermalSlowdown"),
        # None were counted, which is not the same as unknown.
        uncorrected_ecc_error_count=0,
        corrected_ecc_error_count=5,
        row_remap_pending=False,
        row_remap_failed=False,
        memory_clock_mhz=2619,
        memory_utilization=0.1,
        memory_temperature_celsius=70.0,
    )
    assert second.index == 1
    assert second.utilization is None, "this GPU does not say"
    assert second.memory_utilization is None
    assert second.throttle_reasons == ()
    assert second.used_memory_bytes == 2 << 30
    assert second.row_remap_pending is True


def test_every_figure_may_be_missing_without_the_others(stub: NvmlStub) -> None:
    everything = read().readings[0]
    functions = {
        "nvmlDeviceGetUtilizationRates": {"utilization", "memory_utilization"},
        "nvmlDeviceGetMemoryInfo": {"used_memory_bytes", "total_memory_bytes"},
        "nvmlDeviceGetTemperature": {"temperature_celsius"},
        "nvmlDeviceGetPowerUsage": {"power_watts"},
        "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_watts"},
        "nvmlDeviceGetClockInfo": {"sm_clock_mhz", "memory_clock_mhz"},
        "nvmlDeviceGetTotalEccErrors": {"uncorrected_ecc_error_count", "corrected_ecc_error_count"},
        "nvmlDeviceGetRemappedRows": {"row_remap_pending", "row_remap_failed"},
        "nvmlDeviceGetFieldValues": {"memory_temperature_celsius"},
    }
    # Not supported, no permission, function not found, unknown error.
    for code in (3, 4, 13, 999):
        for function, names in functions.items():
            stub.control("mend", f"fail {function} 0 {code}")
            reading = read().readings[0]
            for name in GpuReading.__dataclass_fields__:
                expected = None if name in names else getattr(everything, name)
                assert getattr(reading, name) == expected, (code, function, name)


def test_what_a_gpu_refuses_is_not_asked_at_every_reading(stub: NvmlStub) -> None:
    clock = ManualClock()
    stub.control("fail nvmlDeviceGetPowerUsage -1 3", "fail nvmlDeviceGetTotalEccErrors -1 4")
    probe = GpuProbe(clock=clock)
    probe.read()
    calls = stub.call_count
    probe.read()
    steady = stub.call_count - calls
    stub.control("mend")
    calls = stub.call_count
    assert probe.read().readings[0].power_watts is None
    assert stub.call_count - calls == steady, "neither is asked"
    clock.pass_time(301)
    assert probe.read().readings[0].power_watts == 312.5, "after a while they are: modes change"
    probe.close()


def test_an_old_driver_and_all_of_the_python_package() -> None:
    report = json.loads(run_with_library(library_folder(old=True), SCRIPT))
    assert report["absent_reason"] == ""
    assert len(report["readings"]) == 2
    reading = report["readings"][0]
    assert reading["total_memory_bytes"] == 80 << 30
    assert reading["throttle_reasons"] == ["HwSlowdown"], "from the function's older name"
    known = {
        "index",
        "uuid",
        "name",
        "used_memory_bytes",
        "total_memory_bytes",
        "throttle_reasons",
        "xid_errors",
    }
    assert {name for name, value in reading.items() if value is not None} == known
    device = report["devices"][0]
    assert device["pci_bus_id"] == "00000000:17:00.0"
    assert (device["max_sm_clock_mhz"], device["slowdown_temperature_celsius"]) == (None, None)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("init 9", "NVML did not start: Driver Not Loaded"),
        ("init 18", "NVML did not start: RM has detected an NVML/RM version mismatch."),
        ("init 12", "no NVIDIA driver: libnvidia-ml.so.1 was not found"),
        ("gpus 0", "the NVIDIA driver is loaded and has no GPU"),
        (
            "fail nvmlDeviceGetHandleByIndex_v2 -1 4",
            "the NVIDIA driver lets this user open no GPU; run the agent as the engine's user",
        ),
        ("fail nvmlDeviceGetCount_v2 -1 999", "NVML did not list its GPUs: Unknown Error"),
    ],
)
def test_a_driver_that_has_nothing_to_tell_says_why(stub: NvmlStub, command: str, reason: str) -> None:
    stub.control(command)
    assert read() == GpuReport(absent_reason=reason)


def test_no_library_at_all(tmp_path: Path) -> None:
    if any(
        Path(folder, "libnvidia-ml.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
    ):
        pytest.skip("this host has an NVIDIA driver")
    report: dict[str, Any] = json.loads(run_with_library(tmp_path, SCRIPT))
    assert report["readings"] == []
    assert report["absent_reason"] == "no NVIDIA driver: libnvidia-ml.so.1 was not found"


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        (["1"], [1]),
        (["1", "0"], [1, 0]),
        ([UUID_B], [1]),
        (["GPU-a"], [0]),
    ],
)
def test_only_selected_gpus_are_read(selection: list[str], indices: list[int]) -> None:
    report = read(selected(*selection))
    assert [reading.index for reading in report.readings] == indices
    assert [device.index for device in report.devices] == indices
    assert (report.chosen_by, report.are_selected) == ("--gpus", True)


@pytest.mark.usefixtures("stub")
def test_without_a_selection_all_are_read_and_that_is_said() -> None:
    report = read()
    assert [reading.index for reading in report.readings] == [0, 1]
    assert (report.chosen_by, report.are_selected) == ("nobody: all of this host", False)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (["2"], "GPU 2 of --gpus does not exist: this host has 2, from 0"),
        (["GPU-c"], "GPU-c of --gpus names no GPU of this host"),
        (["GPU-"], "GPU- of --gpus names more than one GPU of this host"),
        (["MIG-c"], "MIG-c of --gpus names no GPU of this host"),
        ([], "--gpus hides every GPU"),
    ],
)
def test_a_selection_that_fits_nothing_says_so(selection: list[str], reason: str) -> None:
    assert read(selected(*selection)) == GpuReport(absent_reason=reason)


def test_a_gpu_that_this_user_may_not_open_is_left_out(stub: NvmlStub) -> None:
    stub.control("fail nvmlDeviceGetHandleByIndex_v2 0 4")
    assert [reading.uuid for reading in read().readings] == [UUID_B]


def test_parts_of_a_gpu(stub: NvmlStub) -> None:
    stub.control("link 0 0 1 -1")
    report = read(selected(PART_A, PART_B))
    first, second = report.readings
    assert (first.uuid, second.uuid) == (PART_A, PART_B)
    assert first.name == "NVIDIA Stand-In 80GB MIG 1g.10gb"
    assert (first.used_memory_bytes, second.used_memory_bytes) == (1 << 20, 2 << 20), "each has its own"
    assert first.total_memory_bytes == 10 << 30
    assert (first.temperature_celsius, first.sm_clock_mhz) == (61.0, 1980), "of the whole GPU"
    assert first.uncorrected_ecc_error_count == 0
    assert (first.power_watts, first.utilization, first.nvlink_count) == (None, None, None), "shared"
    assert first.index == second.index == 0
    assert [link.peer_uuid for link in report.devices[0].links] == [PART_B]


def test_other_gpus_can_be_chosen_while_the_driver_is_open(stub: NvmlStub) -> None:
    probe = GpuProbe(selected("0"))
    assert [reading.index for reading in probe.read().readings] == [0]
    probe.choose(selected("1"))
    assert [reading.index for reading in probe.read().readings] == [1]
    probe.choose(selected("7"))
    assert "does not exist" in probe.read().absent_reason
    assert probe.is_resting
    probe.choose(selected("0"))
    assert not probe.is_resting, "what was wrong with another choice is not held against this one"
    assert [reading.index for reading in probe.read().readings] == [0]
    probe.close()
    stub.control("init 9")
    assert not probe.is_resting


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,1", ("0", "1")),
        (" 2 , GPU-ab ", ("2", "GPU-ab")),
        ("1,1,0", ("1", "0")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        # CUDA ignores everything after a bad entry.
        ("0,-1,1", ("0",)),
        ("MIG-1,GPU-2", ("MIG-1", "GPU-2")),
    ],
)
def test_lists_of_visible_devices(value: str, expected: tuple[str, ...]) -> None:
    assert parse_visible_devices(value) == expected


def test_an_absent_driver_is_asked_again_only_after_a_while() -> None:
    clock = ManualClock()
    probe = GpuProbe(selected(), clock=clock)
    assert not probe.is_resting
    assert probe.read().absent_reason
    assert probe.is_resting
    clock.pass_time(61)
    assert not probe.is_resting


def test_a_probe_of_nothing_never_tries() -> None:
    probe = GpuProbe(GpuChoice(absent_reason="the engine is simulated"))
    assert probe.is_resting
    assert probe.read().absent_reason == "the engine is simulated"
