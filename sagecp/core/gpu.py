"""GPUs as agents report them: what they are, how they do, and what is wrong with them."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GpuLinkKind(enum.IntEnum):
    """The way between two GPUs of a host, nearest first; numbers equal the contract's."""

    UNKNOWN = 0
    NVLINK = 1
    SAME_BOARD = 2
    PCI_SWITCH = 3
    PCI_SWITCHES = 4
    HOST_BRIDGE = 5
    NUMA_NODE = 6
    SYSTEM = 7


@dataclass(frozen=True, slots=True)
class GpuLink:
    """The way from one GPU to another.

    Attributes:
        nvlink_count: NVLinks between the two; 0: none, or through a switch.
    """

    peer_uuid: str
    kind: GpuLinkKind
    nvlink_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """What never changes about a GPU; ``None`` and empty: unknown."""

    index: int
    uuid: str = ""
    name: str = ""
    pci_bus_id: str = ""
    numa_node: int | None = None
    total_memory_bytes: int | None = None
    max_sm_clock_mhz: int | None = None
    slowdown_temperature_celsius: float | None = None
    links: tuple[GpuLink, ...] = ()


@dataclass(frozen=True, slots=True)
class XidError:
    """A critical error that the driver reported of a GPU.

    Attributes:
        code: As in NVIDIA's list of Xid errors.
        time_s: When the agent heard of it, in Unix seconds of its clock.
    """

    code: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """State of one GPU; ``None`` is unknown, which is not zero. Counts run from the driver's start.

    Attributes:
        utilization: Share of time a kernel ran, 0 to 1.
        throttle_reasons: Why clocks are reduced, as NVML names it.
        row_remap_pending: Bad memory waits for a reset to be replaced by spare rows.
        row_remap_failed: There are no spare rows left.
        xid_errors: Since the agent started, the latest last.
        nvlink_error_count: Replays, recoveries and CRC errors.
        engine_memory_bytes: Held by the engine's own processes.
        foreign_process_count: Processes that hold memory and are not the engine's.
    """

    index: int
    uuid: str = ""
    name: str = ""
    utilization: float | None = None
    used_memory_bytes: int | None = None
    total_memory_bytes: int | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    uncorrected_ecc_error_count: int | None = None
    corrected_ecc_error_count: int | None = None
    row_remap_pending: bool | None = None
    row_remap_failed: bool | None = None
    xid_errors: tuple[XidError, ...] = ()
    memory_clock_mhz: int | None = None
    memory_utilization: float | None = None
    memory_temperature_celsius: float | None = None
    nvlink_count: int | None = None
    active_nvlink_count: int | None = None
    nvlink_error_count: int | None = None
    engine_memory_bytes: int | None = None
    foreign_process_count: int | None = None


class GpuFaultKind(enum.IntEnum):
    """What is wrong with a GPU; numbers equal the contract's."""

    XID = 1
    ECC = 2
    THERMAL = 3
    POWER = 4
    NVLINK = 5
    MISSING = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """Something wrong with a GPU of an instance.

    Attributes:
        message: What is wrong, in a sentence.
        begin_s: Since when: on the core's clock within the core, in Unix seconds outside.
        quarantines: Whether the instance is out of the rotation for it.
    """

    gpu_uuid: str
    gpu_index: int
    kind: GpuFaultKind
    message: str
    begin_s: float
    quarantines: bool = False
