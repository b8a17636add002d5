"""What GPUs can do at best, from their makers' public data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NVLINK_4, _NVLINK_3, _PCIE_4, _PCIE_5 = 900.0, 600.0, 64.0, 128.0


@dataclass(frozen=True, slots=True)
class GpuSpecification:
    """Peak rates of one kind of GPU.

    Attributes:
        words: Words of its name as NVML gives it, in lower case, that tell it from others.
        memory_gb_per_s: Memory bandwidth, 10^9 bytes per second.
        dense_tflops: bf16 (older GPUs: fp16) matrix products without sparsity, 10^12 per second.
        link_gb_per_s: To other GPUs of the host, both directions together.
    """

    words: tuple[str, ...]
    memory_gb_per_s: float
    dense_tflops: float
    link_gb_per_s: float


# The first whose words are all in the name counts: special ones stand first.
_SPECIFICATIONS = (
    GpuSpecification(("gb200",), 8000, 2500, 1800),
    GpuSpecification(("b200",), 8000, 2250, 1800),
    GpuSpecification(("h200", "nvl"), 4800, 836, _NVLINK_4),
    GpuSpecification(("h200",), 4800, 989, _NVLINK_4),
    GpuSpecification(("gh200",), 4000, 989, _NVLINK_4),
    GpuSpecification(("h100", "pcie"), 2000, 756, _PCIE_5),
    GpuSpecification(("h100", "nvl"), 3900, 835, 600),
    GpuSpecification(("h100",), 3350, 989, _NVLINK_4),
    GpuSpecification(("h800",), 3350, 989, 400),
    GpuSpecification(("h20",), 4000, 148, _NVLINK_4),
    GpuSpecification(("a100", "pcie", "40gb"), 1555, 312, _PCIE_4),
    GpuSpecification(("a100", "pcie"), 1935, 312, _PCIE_4),
    GpuSpecification(("a100", "40gb"), 1555, 312, _NVLINK_3),
    GpuSpecification(("a100",), 2039, 312, _NVLINK_3),
    GpuSpecification(("a800",), 2039, 312, 400),
    GpuSpecification(("l40s",), 864, 362, _PCIE_4),
    GpuSpecification(("l40",), 864, 181, _PCIE_4),
    GpuSpecification(("l4",), 300, 121, _PCIE_4),
    GpuSpecification(("a10g",), 600, 70, _PCIE_4),
    GpuSpecification(("a10",), 600, 125, _PCIE_4),
    GpuSpecification(("a30",), 933, 165, _PCIE_4),
    GpuSpecification(("a40",), 696, 150, _PCIE_4),
    GpuSpecification(("rtx", "a6000"), 768, 155, _PCIE_4),
    GpuSpecification(("rtx", "6000", "ada"), 960, 364, _PCIE_4),
    GpuSpecification(("rtx", "5090"), 1792, 210, _PCIE_5),
    GpuSpecification(("rtx", "4090"), 1008, 165, _PCIE_4),
    GpuSpecification(("rtx", "3090"), 936, 71, _PCIE_4),
    GpuSpecification(("v100",), 900, 125, 300),
    GpuSpecification(("t4",), 320, 65, 32),
)


def find_gpu(gpu_name: str) -> GpuSpecification | None:
    """Return the data sheet of a GPU by the name NVML gives it.

    ``None`` when it is not known, or is a MIG slice: those have a share of the
    rates that the name does not tell.
    """
    words = set(re.split(r"[^a-z0-9]+", gpu_name.lower()))
    if "mig" in words:
        return None
    return next((gpu for gpu in _SPECIFICATIONS if words.issuperset(gpu.words)), None)
