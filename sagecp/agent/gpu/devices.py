"""The GPUs of this host, opened for reading, and what never changes about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from sagecp.agent.gpu.choice import find_named
from sagecp.agent.gpu.nvml import GPU_LOST_CODE, GpuLostError, Handle, Nvml
from sagecp.agent.gpu.report import MAX_GPU_COUNT, GpuAbsentError
from sagecp.agent.gpu.topology import LinkEnds, links_between, nvlink_ends, read_numa_node
from sagecp.core.gpu import GpuDevice, GpuLink


@dataclass(slots=True, kw_only=True)
class OpenGpu:
    """A GPU, or a part of one (MIG).

    Attributes:
        index: Of the GPU on this host, for a part too.
        handle: For what is asked of the part. ``None``: it was lost before it could be opened.
        chip: For what is asked of the whole GPU; the same unless it is a part.
        chip_uuid: Identity of the whole GPU.
        instance_id: Which part of the GPU it is. ``None``: it is the whole.
        lost_code: The critical error for which it is not asked any more. ``None``: it answers.
    """

    index: int
    uuid: str
    name: str = ""
    handle: Handle | None
    chip: Handle | None
    chip_uuid: str = ""
    pci_bus_id: str = ""
    instance_id: int | None = None
    link_ends: LinkEnds = field(default_factory=tuple)
    lost_code: int | None = None

    @property
    def key(self) -> str:
        """What tells it from the others of this host."""
        return self.uuid or f"index {self.index}"

    @property
    def chip_key(self) -> str:
        """What tells the whole GPU from the others of this host."""
        return self.chip_uuid or self.key

    @property
    def is_lost(self) -> bool:
        """Whether it did not answer when it was asked last."""
        return self.lost_code is not None

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a GPU."""
        return self.instance_id is not None


def open_every(nvml: Nvml) -> list[OpenGpu]:
    """Return the GPUs of this host, without those that this user may not open.

    Raises:
        GpuAbsentError: There is none.
    """
    count = min(nvml.device_count(), MAX_GPU_COUNT)
    if count == 0:
        raise GpuAbsentError("the NVIDIA driver is loaded and has no GPU")
    found: list[OpenGpu] = []
    for index in range(count):
        try:
            handle = nvml.handle_at(index)
        except GpuLostError as error:
            found.append(OpenGpu(index=index, uuid="", handle=None, chip=None, lost_code=error.xid_code))
            continue
        if handle is not None:
            found.append(_open_gpu(nvml, handle, index))
    if not found:
        raise GpuAbsentError(
            "the NVIDIA driver lets this user open no GPU; run the agent as the engine's user"
        )
    return found


def choose_named(nvml: Nvml, every: list[OpenGpu], named: tuple[str, ...], named_by: str) -> list[OpenGpu]:
    """Return the GPUs that a selection means, in its order.

    Raises:
        GpuAbsentError: An entry means none, or several; or there is no entry.
    """
    if not named:
        raise GpuAbsentError(f"{named_by} hides every GPU")
    known = [(gpu.index, gpu.uuid) for gpu in every]
    chosen: list[OpenGpu] = []
    for entry in named[:MAX_GPU_COUNT]:
        if entry.startswith("MIG-"):
            part = open_part(nvml, entry)
            if part is None:
                raise GpuAbsentError(f"{entry} of {named_by} names no GPU of this host")
            chosen.append(part)
        else:
            index = find_named(entry, named_by, known)
            chosen += [gpu for gpu in every if gpu.index == index]
    return chosen


def describe(nvml: Nvml, chosen: list[OpenGpu], sys: Path = Path("/sys")) -> tuple[GpuDevice, ...]:
    """Return what never changes about GPUs, and how each reaches the others.

    Args:
        nvml: The driver.
        chosen: The GPUs.
        sys: Where the kernel shows its devices.
    """
    links = links_between(nvml, chosen)
    return tuple(_describe(nvml, gpu, links[position], sys) for position, gpu in enumerate(chosen))


def _describe(nvml: Nvml, gpu: OpenGpu, links: tuple[GpuLink, ...], sys: Path) -> GpuDevice:
    known = GpuDevice(index=gpu.index, uuid=gpu.uuid, name=gpu.name, pci_bus_id=gpu.pci_bus_id)
    if gpu.handle is None or gpu.chip is None or gpu.is_lost:
        return known
    try:
        memory = nvml.ask("nvmlDeviceGetMemoryInfo", gpu.handle)
        slowdown = nvml.number(
            "nvmlDeviceGetTemperatureThreshold", gpu.chip, nvml.module.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        )
        return GpuDevice(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            pci_bus_id=gpu.pci_bus_id,
            numa_node=read_numa_node(nvml, gpu.chip, gpu.pci_bus_id, sys),
            total_memory_bytes=None if memory is None else memory.total,
            max_sm_clock_mhz=nvml.number("nvmlDeviceGetMaxClockInfo", gpu.chip, nvml.module.NVML_CLOCK_SM),
            slowdown_temperature_celsius=None if slowdown is None else float(slowdown),
            links=links,
        )
    except GpuLostError:
        return known


def _open_gpu(nvml: Nvml, handle: Handle, index: int) -> OpenGpu:
    gpu = OpenGpu(index=index, uuid="", handle=handle, chip=handle)
    try:
        gpu.uuid = gpu.chip_uuid = nvml.text("nvmlDeviceGetUUID", handle)
        gpu.name = nvml.text("nvmlDeviceGetName", handle)
        gpu.pci_bus_id = nvml.pci_bus_id(handle)
        gpu.link_ends = nvlink_ends(nvml, handle)
    except GpuLostError as error:
        gpu.lost_code = error.xid_code
    return gpu


def open_part(nvml: Nvml, uuid: str) -> OpenGpu | None:
    """Return a part (MIG device) of a GPU by its whole UUID; ``None``: there is none."""
    try:
        handle = nvml.handle_of(uuid)
        chip = None if handle is None else nvml.parent_of(handle)
        if handle is None or chip is None:
            return None
        return OpenGpu(
            index=nvml.number("nvmlDeviceGetIndex", chip) or 0,
            uuid=nvml.text("nvmlDeviceGetUUID", handle) or uuid,
            name=nvml.text("nvmlDeviceGetName", handle),
            handle=handle,
            chip=chip,
            chip_uuid=nvml.text("nvmlDeviceGetUUID", chip),
            pci_bus_id=nvml.pci_bus_id(chip),
            instance_id=nvml.number("nvmlDeviceGetGpuInstanceId", handle) or 0,
        )
    except GpuLostError as error:
        return OpenGpu(index=0, uuid=uuid, handle=None, chip=None, lost_code=error.xid_code)


def find_again(nvml: Nvml, every: list[OpenGpu], before: list[OpenGpu]) -> list[OpenGpu]:
    """Return GPUs of before the driver was opened anew, in their order.

    By identity, as indices move up when a GPU is gone. One that is gone stays listed as lost.
    """
    by_uuid = {gpu.uuid: gpu for gpu in every if gpu.uuid}
    found: list[OpenGpu] = []
    for old in before:
        new = open_part(nvml, old.uuid) if old.is_part else by_uuid.get(old.uuid)
        if new is None and not old.uuid:
            new = next((gpu for gpu in every if gpu.index == old.index), None)
        if new is None:
            new = replace(old, handle=None, chip=None, lost_code=old.lost_code or GPU_LOST_CODE)
        found.append(new)
    return found
