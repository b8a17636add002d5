"""How one GPU does, as NVML tells it."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.agent.gpu.devices import OpenGpu
from sagecp.agent.gpu.nvml import Handle, Nvml
from sagecp.agent.gpu.ownership import GpuShare
from sagecp.core.gpu import GpuReading, XidError

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
class NvlinkState:
    """The NVLinks of a GPU; ``None``: unknown.

    Attributes:
        link_count: Links that it has.
        active_count: Links that work.
        error_count: Replays, recoveries and CRC errors of all of them.
    """

    link_count: int | None = None
    active_count: int | None = None
    error_count: int | None = None


def throttle_names(reasons: int) -> tuple[str, ...]:
    """Return the names of the bits that NVML and DCGM tell throttling by."""
    return tuple(name for bit, name in _CLOCK_REASONS if reasons & bit)


def read_nvlinks(nvml: Nvml, gpu: OpenGpu) -> NvlinkState:
    """Return how the NVLinks of a GPU do. Five calls for each link: too dear for every reading.

    Raises:
        GpuLostError: The GPU is lost.
    """
    if gpu.chip is None or not gpu.link_ends:
        return NvlinkState()
    module, chip = nvml.module, gpu.chip
    links = range(len(gpu.link_ends))
    states = [nvml.number("nvmlDeviceGetNvLinkState", chip, link) for link in links]
    counters = (
        module.NVML_NVLINK_ERROR_DL_REPLAY,
        module.NVML_NVLINK_ERROR_DL_RECOVERY,
        module.NVML_NVLINK_ERROR_DL_CRC_FLIT,
        module.NVML_NVLINK_ERROR_DL_CRC_DATA,
    )
    counts = [
        nvml.number("nvmlDeviceGetNvLinkErrorCounter", chip, link, counter)
        for link in links
        for counter in counters
    ]
    return NvlinkState(len(links), _sum_known(states), _sum_known(counts))


def read_gpu(
    nvml: Nvml,
    gpu: OpenGpu,
    handle: Handle,
    chip: Handle,
    nvlinks: NvlinkState,
    share: GpuShare,
    errors: tuple[XidError, ...],
) -> GpuReading:
    """Return the state of a GPU.

    Of a part (MIG) the driver tells the memory alone. What wears the whole GPU (heat, clocks,
    memory errors) is told of every part; what its parts share out (power) of none.

    Args:
        nvml: The driver.
        gpu: The GPU.
        handle: Its handle.
        chip: The whole GPU's.
        nvlinks: What was last seen of its links.
        share: What was last seen of its processes.
        errors: Its critical errors.

    Raises:
        GpuLostError: The GPU is lost.
        GpuAbsentError: The driver was unloaded.
    """
    module = nvml.module
    utilization = None if gpu.is_part else nvml.ask("nvmlDeviceGetUtilizationRates", chip)
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    milliwatts = None if gpu.is_part else nvml.number("nvmlDeviceGetPowerUsage", chip)
    limit_milliwatts = None if gpu.is_part else nvml.number("nvmlDeviceGetEnforcedPowerLimit", chip)
    reasons = nvml.number("nvmlDeviceGetCurrentClocksEventReasons", chip)
    if reasons is None:
        # The name before driver 535.
        reasons = nvml.number("nvmlDeviceGetCurrentClocksThrottleReasons", chip)
    rows = nvml.ask("nvmlDeviceGetRemappedRows", chip)
    return GpuReading(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        utilization=None if utilization is None else min(utilization.gpu, 100) / 100,
        used_memory_bytes=None if memory is None else memory.used,
        total_memory_bytes=None if memory is None else memory.total,
        temperature_celsius=_temperature(nvml, chip),
        power_watts=None if milliwatts is None else milliwatts / 1000,
        power_limit_watts=None if limit_milliwatts is None else limit_milliwatts / 1000,
        sm_clock_mhz=nvml.number("nvmlDeviceGetClockInfo", chip, module.NVML_CLOCK_SM),
        throttle_reasons=throttle_names(reasons or 0),
        uncorrected_ecc_error_count=_ecc_errors(nvml, chip, module.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        corrected_ecc_error_count=_ecc_errors(nvml, chip, module.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        row_remap_pending=None if rows is None else bool(rows[2]),
        row_remap_failed=None if rows is None else bool(rows[3]),
        xid_errors=errors,
        memory_clock_mhz=nvml.number("nvmlDeviceGetClockInfo", chip, module.NVML_CLOCK_MEM),
        memory_utilization=None if utilization is None else min(utilization.memory, 100) / 100,
        memory_temperature_celsius=_float(nvml.fields(chip, (module.NVML_FI_DEV_MEMORY_TEMP,))[0]),
        nvlink_count=nvlinks.link_count,
        active_nvlink_count=nvlinks.active_count,
        nvlink_error_count=nvlinks.error_count,
        engine_memory_bytes=share.engine_memory_bytes,
        foreign_process_count=share.foreign_process_count,
    )


def read_lost_gpu(gpu: OpenGpu, errors: tuple[XidError, ...]) -> GpuReading:
    """Return the reading of a GPU that does not answer: who it is, and the errors that it had."""
    return GpuReading(index=gpu.index, uuid=gpu.uuid, name=gpu.name, xid_errors=errors)


def _temperature(nvml: Nvml, chip: Handle) -> float | None:
    sensor = nvml.module.NVML_TEMPERATURE_GPU
    celsius = nvml.number("nvmlDeviceGetTemperature", chip, sensor)
    if celsius is None:
        # The older call leaves the library with CUDA 14.
        celsius = nvml.number("nvmlDeviceGetTemperatureV", chip, sensor)
    return _float(celsius)


def _ecc_errors(nvml: Nvml, chip: Handle, kind: int) -> int | None:
    return nvml.number("nvmlDeviceGetTotalEccErrors", chip, kind, nvml.module.NVML_VOLATILE_ECC)


def _sum_known(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)
