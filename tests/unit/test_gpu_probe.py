"""GPU readings, against stand-ins for the driver's library that speak NVML's own binary interface.

Each stand-in is compiled from C and found by the dynamic linker under the name
of the real one, in a process of its own: what is tested is all of the probe and
all of the Python package that it uses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagecp.agent.gpu_probe import GpuProbe, parse_visible_devices

ROOT = Path(__file__).parents[2]

# Two GPUs. Functions in OPTIONAL are left out of a library "of an old driver".
SOURCE = r"""
#include <stdio.h>
#include <string.h>
typedef int nvmlReturn_t;
typedef struct { int index; } Device;
static Device devices[2] = {{0}, {1}};
static int running = 0;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) { (void)flags; running = 1; return INIT_RESULT; }
nvmlReturn_t nvmlShutdown(void) { running = 0; return 0; }
const char *nvmlErrorString(nvmlReturn_t result) { return result == 9 ? "Driver Not Loaded" : "Other"; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return running ? 0 : 1; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
  if (index > 1) return 2;
  *device = &devices[index];
  return 0;
}
nvmlReturn_t nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int size) {
  snprintf(uuid, size, "GPU-%c0000000-1111-2222-3333-444444444444", device->index ? 'b' : 'a');
  return 0;
}
nvmlReturn_t nvmlDeviceGetName(Device *device, char *name, unsigned int size) {
  (void)device; snprintf(name, size, "NVIDIA Stand-In 80GB"); return 0;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
  memory->total = 80ULL << 30; memory->used = (unsigned long long)(device->index + 1) << 30;
  memory->free = memory->total - memory->used;
  return 0;
}
#ifdef FULL
nvmlReturn_t nvmlDeviceGetUtilizationRates(Device *device, Utilization *utilization) {
  if (device->index == 1) return 3; /* not supported by this one */
  utilization->gpu = 75; utilization->memory = 10;
  return 0;
}
nvmlReturn_t nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
  (void)device; *celsius = 61; return sensor == 0 ? 0 : 2;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts) {
  (void)device; *milliwatts = 312500; return 0;
}
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned int *milliwatts) {
  (void)device; *milliwatts = 700000; return 0;
}
nvmlReturn_t nvmlDeviceGetClockInfo(Device *device, int type, unsigned int *mhz) {
  (void)device; *mhz = type == 1 ? 1980 : 1; return 0;
}
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
  *reasons = device->index ? 0 : 0x4 | 0x40; return 0;
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(Device *device, int type, int counter, unsigned long long *count) {
  *count = (type == 1 && counter == 0) ? 0 : 99; (void)device; return 0;
}
#else
/* As older drivers have it. */
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) {
  (void)device; *reasons = 0x8; return 0;
}
#endif
"""

SCRIPT = """
import dataclasses, json, sys
from sagecp.agent.gpu_probe import GpuProbe
selection = json.loads(sys.argv[1])
probe = GpuProbe(selection, "--gpus")
first, second = probe.read(), probe.read()
assert first == second, (first, second)
probe.close()
print(json.dumps(dataclasses.asdict(first)))
"""


def build(folder: Path, *definitions: str) -> Path:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed; it compiles the stand-in for libnvidia-ml.so.1")
    source = folder / "nvml.c"
    source.write_text(SOURCE)
    options = [f"-D{definition}" for definition in definitions]
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", *options, "-o", library, source],
        check=True,
        capture_output=True,
    )
    return folder


def read(folder: Path, selection: list[str] | None = None) -> dict[str, Any]:
    """Return the report of a probe in a process that finds the library in ``folder``."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(selection)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("full"), "FULL", "INIT_RESULT=0")


def test_everything_a_driver_tells(full: Path) -> None:
    report = read(full)
    assert report["absent_reason"] == ""
    first, second = report["readings"]
    assert first == {
        "index": 0,
        "uuid": "GPU-a0000000-1111-2222-3333-444444444444",
        "name": "NVIDIA Stand-In 80GB",
        "utilization": 0.75,
        "used_memory_bytes": 1 << 30,
        "total_memory_bytes": 80 << 30,
        "temperature_celsius": 61.0,
        "power_watts": 312.5,
        "power_limit_watts": 700.0,
        "sm_clock_mhz": 1980,
        "throttle_reasons": ["SwPowerCap", "HwThermalSlowdown"],
        # None were counted, which is not the same as unknown.
        "uncorrected_ecc_error_count": 0,
    }
    assert second["index"] == 1
    assert second["utilization"] is None, "this GPU does not say"
    assert second["throttle_reasons"] == []
    assert second["used_memory_bytes"] == 2 << 30


def test_functions_that_a_driver_lacks_leave_their_figures_unknown(tmp_path: Path) -> None:
    report = read(build(tmp_path, "INIT_RESULT=0"))
    assert report["absent_reason"] == ""
    assert len(report["readings"]) == 2
    reading = report["readings"][0]
    assert reading["total_memory_bytes"] == 80 << 30
    assert reading["throttle_reasons"] == ["HwSlowdown"], "from the function's older name"
    for name in (
        "utilization",
        "temperature_celsius",
        "power_watts",
        "power_limit_watts",
        "sm_clock_mhz",
        "uncorrected_ecc_error_count",
    ):
        assert reading[name] is None, name


def test_a_driver_that_is_not_loaded(tmp_path: Path) -> None:
    report = read(build(tmp_path, "FULL", "INIT_RESULT=9"))
    assert report["readings"] == []
    assert report["absent_reason"] == "NVML did not start: Driver Not Loaded"


def test_no_library_at_all(tmp_path: Path) -> None:
    if any(
        Path(folder, "libnvidia-ml.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
    ):
        pytest.skip("this host has an NVIDIA driver")
    report = read(tmp_path)
    assert report == {
        "readings": [],
        "absent_reason": "no NVIDIA driver: libnvidia-ml.so.1 was not found",
    }


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        (["1"], [1]),
        (["1", "0"], [1, 0]),
        (["GPU-b0000000-1111-2222-3333-444444444444"], [1]),
        (["GPU-a"], [0]),
    ],
)
def test_only_selected_gpus_are_read(full: Path, selection: list[str], indices: list[int]) -> None:
    assert [reading["index"] for reading in read(full, selection)["readings"]] == indices


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (["2"], "GPU 2 of --gpus does not exist: this host has 2, from 0"),
        (["GPU-c"], "GPU-c of --gpus names no GPU of this host"),
        (["GPU-"], "GPU- of --gpus names more than one GPU of this host"),
        ([], "--gpus hides every GPU"),
    ],
)
def test_a_selection_that_fits_nothing_says_so(full: Path, selection: list[str], reason: str) -> None:
    assert read(full, selection) == {"readings": [], "absent_reason": reason}


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
    now_s = 0.0
    probe = GpuProbe([], "--gpus", clock=lambda: now_s)
    assert not probe.is_resting
    assert probe.read().absent_reason
    assert probe.is_resting
    now_s = 61.0
    assert not probe.is_resting


def test_a_probe_of_nothing_never_tries() -> None:
    probe = GpuProbe.none("the engine is simulated")
    assert probe.is_resting
    assert probe.read().absent_reason == "the engine is simulated"
