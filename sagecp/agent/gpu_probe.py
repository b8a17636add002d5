"""What the GPUs say, through NVML, and why they say nothing where they do not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sagecp.core.types import GpuReading

# Most GPUs reported: a heartbeat has a bounded size.
MAX_GPU_COUNT = 256
# A driver that is not there may be loaded later; asking costs milliseconds.
_RETRY_S = 60.0

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by the names NVML gives them.
_CLOCK_REASONS = (
    (0x001, "GpuIdle"),
    (0x002, "ApplicationsClocksSetting"),
    (0x004, "SwPowerCap"),
    (0x008, "HwSlowdown"),
    (0x010, "SyncBoost"),
    (0x020, "SwThermalSlowdown"),
    (0x040, "HwThermalSlowdown"),
    (0x080, "HwPowerBrakeSlowdown"),
    (0x100, "DisplayClockSetting"),
    (0x200, "BoardLimit"),
    (0x400, "Reliability"),
)


@dataclass(frozen=True, slots=True)
class GpuReport:
    """Readings, or the reason why there are none."""

    readings: tuple[GpuReading, ...] = ()
    absent_reason: str = ""


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU, or a part of one (MIG), with what never changes about it."""

    handle: Any
    index: int
    uuid: str
    name: str


class _AbsentError(Exception):
    """There are no GPUs to read; the text says why."""


def parse_visible_devices(value: str) -> tuple[str, ...]:
    """Read a list such as ``CUDA_VISIBLE_DEVICES``: up to its first bad entry, as CUDA does."""
    chosen: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if not (entry.isascii() and (entry.isdigit() or entry.startswith(("GPU-", "MIG-")))):
            break
        chosen.append(entry)
    return tuple(dict.fromkeys(chosen))


class GpuProbe:
    """Reads the GPUs of an engine.

    Calls block for a millisecond or so per GPU: run :meth:`read` in a thread.
    Not safe for several threads at once.

    Args:
        selection: Indices in PCI order, or UUIDs, which may be cut short as CUDA
            allows. ``None``: every GPU. Empty: none.
        selected_by: Where the selection came from, for messages.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        selection: Sequence[str] | None = None,
        selected_by: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._selection = None if selection is None else tuple(selection)
        self._selected_by = selected_by
        self._clock = clock
        self._nvml: Any = None
        self._devices: tuple[_Device, ...] = ()
        self._absent_reason = ""
        self._retry_at_s = 0.0
        self._missing: set[str] = set()

    @classmethod
    def none(cls, reason: str) -> GpuProbe:
        """Return a probe that has nothing to read, for a reason."""
        probe = cls(())
        probe._absent_reason, probe._retry_at_s = reason, float("inf")
        return probe

    @property
    def is_resting(self) -> bool:
        """Whether :meth:`read` would answer from memory that there is nothing to read."""
        return bool(self._absent_reason) and self._clock() < self._retry_at_s

    @property
    def is_selected(self) -> bool:
        """Whether particular GPUs were named."""
        return self._selection is not None

    def read(self) -> GpuReport:
        """Return what the GPUs say now. Never raises for what a driver does."""
        if self.is_resting:
            return GpuReport(absent_reason=self._absent_reason)
        try:
            if self._nvml is None:
                self._open()
            readings = tuple(self._read_device(device) for device in self._devices)
        except _AbsentError as error:
            self.close()
            self._absent_reason = str(error)
            self._retry_at_s = self._clock() + _RETRY_S
            return GpuReport(absent_reason=self._absent_reason)
        self._absent_reason = ""
        return GpuReport(readings)

    def close(self) -> None:
        """Let go of the driver."""
        nvml, self._nvml = self._nvml, None
        self._devices = ()
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _open(self) -> None:
        if self._selection == ():
            raise _AbsentError(
                f"{self._selected_by} hides every GPU" if self._selected_by else "no GPU is selected"
            )
        try:
            import pynvml
        except ImportError:
            raise _AbsentError(
                "the Python package nvidia-ml-py is not installed; install sagecp with its 'agent' extra"
            ) from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise _AbsentError("no NVIDIA driver: libnvidia-ml.so.1 was not found") from None
        except pynvml.NVMLError as error:
            raise _AbsentError(f"NVML did not start: {error}") from None
        self._nvml = pynvml
        try:
            self._devices = tuple(self._find_devices())
        except pynvml.NVMLError as error:
            raise _AbsentError(f"NVML did not list its GPUs: {error}") from None

    def _find_devices(self) -> list[_Device]:
        nvml = self._nvml
        count = min(nvml.nvmlDeviceGetCount(), MAX_GPU_COUNT)
        if count == 0:
            raise _AbsentError("the NVIDIA driver is loaded and has no GPU")
        if self._selection is None:
            return [self._device(nvml.nvmlDeviceGetHandleByIndex(index), index) for index in range(count)]
        every: list[_Device] | None = None
        chosen: list[_Device] = []
        for entry in self._selection[:MAX_GPU_COUNT]:
            if entry.isdigit():
                if int(entry) >= count:
                    raise _AbsentError(
                        f"GPU {entry} of {self._selected_by or 'the selection'} does not exist: "
                        f"this host has {count}, from 0"
                    )
                chosen.append(self._device(nvml.nvmlDeviceGetHandleByIndex(int(entry)), int(entry)))
            elif entry.startswith("MIG-"):
                chosen.append(self._device(nvml.nvmlDeviceGetHandleByUUID(entry), len(chosen)))
            else:
                every = every or [self._device(nvml.nvmlDeviceGetHandleByIndex(i), i) for i in range(count)]
                matching = [device for device in every if device.uuid.startswith(entry)]
                if len(matching) != 1:
                    raise _AbsentError(
                        f"{entry} of {self._selected_by or 'the selection'} names "
                        f"{'no' if not matching else 'more than one'} GPU of this host"
                    )
                chosen += matching
        return chosen

    def _device(self, handle: Any, index: int) -> _Device:  # noqa: ANN401 - an opaque pointer
        return _Device(
            handle=handle,
            index=index,
            uuid=self._ask("nvmlDeviceGetUUID", handle) or "",
            name=self._ask("nvmlDeviceGetName", handle) or "",
        )

    def _ask(self, function: str, handle: Any, *arguments: Any) -> Any:  # noqa: ANN401 - as NVML answers
        """Call a function; ``None`` where this driver lacks it or this GPU cannot say."""
        nvml = self._nvml
        if function in self._missing:
            return None
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError_FunctionNotFound:
            # Looking a symbol up in vain costs more than the answer is worth.
            self._missing.add(function)
        except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
            raise _AbsentError("the NVIDIA driver was unloaded") from None
        except nvml.NVMLError:
            pass
        except AttributeError:
            # A version of the Python package without this function.
            self._missing.add(function)
        return None

    def _read_device(self, device: _Device) -> GpuReading:
        nvml, handle = self._nvml, device.handle
        utilization = self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        temperature = self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
        if temperature is None:
            # The older call leaves the library with CUDA 14.
            temperature = self._ask("nvmlDeviceGetTemperatureV", handle, nvml.NVML_TEMPERATURE_GPU)
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        limit_milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            # The name before driver 535.
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return GpuReading(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            utilization=None if utilization is None else min(utilization.gpu, 100) / 100,
            used_memory_bytes=None if memory is None else memory.used,
            total_memory_bytes=None if memory is None else memory.total,
            temperature_celsius=None if temperature is None else float(temperature),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            power_limit_watts=None if limit_milliwatts is None else limit_milliwatts / 1000,
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            throttle_reasons=tuple(name for bit, name in _CLOCK_REASONS if (reasons or 0) & bit),
            uncorrected_ecc_error_count=self._ask(
                "nvmlDeviceGetTotalEccErrors",
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
        )
