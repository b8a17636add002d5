"""How GPUs of one host reach each other and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sagecp.agent.gpu.nvml import GpuLostError, Handle, Nvml
from sagecp.core.gpu import GpuLink, GpuLinkKind

if TYPE_CHECKING:
    from sagecp.agent.gpu.devices import OpenGpu

# For each NVLink of a GPU, what is at its other end: a PCI address, or _SWITCH. Empty: unknown.
LinkEnds = tuple[str, ...]

# NVLinks are asked for by number until a GPU says that there are no more.
_MAX_LINK_COUNT = 36
_SWITCH = "switch"
# nvmlDeviceGetTopologyCommonAncestor, by the values of nvmlGpuTopologyLevel_t.
_ANCESTORS = {
    0: GpuLinkKind.SAME_BOARD,
    10: GpuLinkKind.PCI_SWITCH,
    20: GpuLinkKind.PCI_SWITCHES,
    30: GpuLinkKind.HOST_BRIDGE,
    40: GpuLinkKind.NUMA_NODE,
    50: GpuLinkKind.SYSTEM,
}


def nvlink_ends(nvml: Nvml, handle: Handle) -> LinkEnds:
    """Return what is at the other end of each NVLink of a GPU, whether the link works or not."""
    ends: list[str] = []
    for link in range(_MAX_LINK_COUNT):
        if nvml.number("nvmlDeviceGetNvLinkState", handle, link) is None:
            break
        kind, address = nvml.nvlink_peer(handle, link)
        ends.append(_SWITCH if kind == nvml.module.NVML_NVLINK_DEVICE_TYPE_SWITCH else address.lower())
    return tuple(ends)


def links_between(nvml: Nvml, gpus: Sequence[OpenGpu]) -> list[tuple[GpuLink, ...]]:
    """Return for each GPU how it reaches each of the others.

    GPUs that no link joins directly, but that both have links to switches, reach each other by
    NVLink unless the driver says that they do not: the switches of a host are one fabric.
    """
    count = len(gpus)
    found: list[list[GpuLink]] = [[] for _ in gpus]
    for first in range(count):
        for second in range(first + 1, count):
            kind, link_count = _way_between(nvml, gpus[first], gpus[second])
            if kind is not GpuLinkKind.UNKNOWN:
                found[first].append(GpuLink(gpus[second].uuid, kind, link_count))
                found[second].append(GpuLink(gpus[first].uuid, kind, link_count))
    return [tuple(links) for links in found]


def _way_between(nvml: Nvml, first: OpenGpu, second: OpenGpu) -> tuple[GpuLinkKind, int]:
    if first.chip is None or second.chip is None or not (first.uuid and second.uuid):
        return GpuLinkKind.UNKNOWN, 0
    if first.chip_uuid == second.chip_uuid:
        # Two parts of one GPU.
        return GpuLinkKind.SAME_BOARD, 0
    # Either end may be the one that the driver knows.
    direct = max(
        first.link_ends.count(second.pci_bus_id.lower()) if second.pci_bus_id else 0,
        second.link_ends.count(first.pci_bus_id.lower()) if first.pci_bus_id else 0,
    )
    if direct:
        return GpuLinkKind.NVLINK, direct
    try:
        if _SWITCH in first.link_ends and _SWITCH in second.link_ends:
            status = nvml.ask_between(
                "nvmlDeviceGetP2PStatus", first.chip, second.chip, nvml.module.NVML_P2P_CAPS_INDEX_NVLINK
            )
            if status in {None, nvml.module.NVML_P2P_STATUS_OK}:
                return GpuLinkKind.NVLINK, 0
        level = nvml.ask_between("nvmlDeviceGetTopologyCommonAncestor", first.chip, second.chip)
    except GpuLostError:
        return GpuLinkKind.UNKNOWN, 0
    return _ANCESTORS.get(-1 if level is None else level, GpuLinkKind.UNKNOWN), 0


def read_numa_node(nvml: Nvml, chip: Handle, pci_bus_id: str, sys: Path = Path("/sys")) -> int | None:
    """Return the NUMA node that a GPU is attached to; ``None``: unknown, or the host has one.

    NVML's own nvmlDeviceGetNumaNodeId is another thing: the node that the GPU's memory is,
    on machines where it is one.
    """
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        # The kernel writes the domain with four digits, NVML with eight.
        node = int((sys / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
    except (OSError, ValueError):
        return _numa_node_by_affinity(nvml, chip)
    return node if node >= 0 else None


def _numa_node_by_affinity(nvml: Nvml, chip: Handle) -> int | None:
    words = nvml.ask("nvmlDeviceGetMemoryAffinity", chip, 1, nvml.module.NVML_AFFINITY_SCOPE_NODE)
    if words is None or int(words[0]).bit_count() != 1:
        return None
    return int(words[0]).bit_length() - 1
