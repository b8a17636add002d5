"""What GPUs can do at best, from their makers' public data sheets, and what they cost to rent.

Data sheets tell rates with sparsity, which is twice what dense products reach; here they are dense.
Memory is what CUDA reports, because engines take a share of that: NVML tells up to 1 GiB more, since it
counts what the driver keeps for itself (H100: 81,559 MiB, of which CUDA has 79.1 GiB).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from sagecp.core.errors import FieldViolation, InvalidRequestError

_NVLINK_5, _NVLINK_4, _NVLINK_3, _PCIE_4, _PCIE_5 = 1800.0, 900.0, 600.0, 64.0, 128.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpecification:
    """Peak rates, size and price of one kind of GPU.

    Attributes:
        name: Short name, for example ``H100-SXM-80GB``.
        words: Words of its name as NVML gives it, in lower case, that tell it from others.
        memory_gib: What CUDA reports as its whole memory, GiB; it differs by 0.1 between drivers.
        memory_gb_per_s: Memory bandwidth, 10^9 bytes per second.
        dense_tflops: bf16 (older GPUs: fp16) matrix products without sparsity, 10^12 per second.
        eight_bit_tflops: fp8, or where it has none int8, likewise; ``None``: computes in 16 bits.
        four_bit_tflops: fp4, likewise.
        link_gb_per_s: To other GPUs of the host, both directions together.
        fast_link_gpu_count: GPUs of a common host, or rack, that reach each other over NVLink; 1: PCIe only.
        compute_capability: CUDA's number of the architecture: 8.0, 8.9, 9.0, 10.0.
        usd_per_hour: A usual rent of one GPU on demand; prices differ by several times, set your own.
    """

    name: str
    words: tuple[str, ...]
    memory_gib: float
    memory_gb_per_s: float
    dense_tflops: float
    eight_bit_tflops: float | None = None
    four_bit_tflops: float | None = None
    link_gb_per_s: float = _PCIE_4
    fast_link_gpu_count: int = 1
    compute_capability: float = 8.0
    usd_per_hour: float = 1.0


def _gpu(
    name: str,
    words: str,
    memory_gib: float,
    memory_gb_per_s: float,
    tflops: tuple[float, float | None, float | None],
    link_gb_per_s: float,
    fast_link_gpu_count: int,
    compute_capability: float,
    usd_per_hour: float,
) -> GpuSpecification:
    return GpuSpecification(
        name=name,
        words=tuple(words.split()),
        memory_gib=memory_gib,
        memory_gb_per_s=memory_gb_per_s,
        dense_tflops=tflops[0],
        eight_bit_tflops=tflops[1],
        four_bit_tflops=tflops[2],
        link_gb_per_s=link_gb_per_s,
        fast_link_gpu_count=fast_link_gpu_count,
        compute_capability=compute_capability,
        usd_per_hour=usd_per_hour,
    )


# The first whose words are all in the name counts: special ones stand first.
GPU_SPECIFICATIONS = (
    # A rack of 72 is one NVLink domain.
    _gpu("GB200", "gb200", 184.3, 8000, (2500, 5000, 10000), _NVLINK_5, 72, 10.0, 10.0),
    _gpu("B200", "b200", 178.3, 7700, (2250, 4500, 9000), _NVLINK_5, 8, 10.0, 6.0),
    _gpu("H200-NVL", "h200 nvl", 139.8, 4800, (835, 1671, None), _NVLINK_4, 4, 9.0, 3.5),
    _gpu("H200", "h200", 139.8, 4800, (989, 1979, None), _NVLINK_4, 8, 9.0, 3.8),
    _gpu("GH200", "gh200", 94.5, 4000, (989, 1979, None), _NVLINK_4, 1, 9.0, 3.3),
    _gpu("H100-PCIe-80GB", "h100 pcie", 79.1, 2000, (756, 1513, None), _PCIE_5, 1, 9.0, 2.5),
    _gpu("H100-NVL-94GB", "h100 nvl", 93.1, 3900, (835, 1671, None), 600, 2, 9.0, 2.8),
    _gpu("H100-SXM-80GB", "h100", 79.1, 3350, (989, 1979, None), _NVLINK_4, 8, 9.0, 3.0),
    _gpu("H800-PCIe-80GB", "h800 pcie", 79.1, 2000, (756, 1513, None), _PCIE_5, 1, 9.0, 2.5),
    _gpu("H800-80GB", "h800", 79.1, 3350, (989, 1979, None), 400, 8, 9.0, 3.0),
    _gpu("H20-3e-141GB", "h20 3e", 139.8, 4800, (148, 296, None), _NVLINK_4, 8, 9.0, 2.2),
    _gpu("H20-96GB", "h20", 95.1, 4000, (148, 296, None), _NVLINK_4, 8, 9.0, 2.0),
    _gpu("A100-PCIe-40GB", "a100 pcie 40gb", 39.4, 1555, (312, 624, None), _PCIE_4, 1, 8.0, 1.3),
    _gpu("A100-PCIe-80GB", "a100 pcie", 79.2, 1935, (312, 624, None), _PCIE_4, 1, 8.0, 1.6),
    _gpu("A100-SXM-40GB", "a100 40gb", 39.4, 1555, (312, 624, None), _NVLINK_3, 8, 8.0, 1.4),
    _gpu("A100-SXM-80GB", "a100", 79.2, 2039, (312, 624, None), _NVLINK_3, 8, 8.0, 1.8),
    _gpu("A800-PCIe-80GB", "a800 pcie", 79.2, 1935, (312, 624, None), _PCIE_4, 1, 8.0, 1.6),
    _gpu("A800-80GB", "a800", 79.2, 2039, (312, 624, None), 400, 8, 8.0, 1.8),
    _gpu("L40S-48GB", "l40s", 44.4, 864, (362, 733, None), _PCIE_4, 1, 8.9, 1.1),
    _gpu("L40-48GB", "l40", 44.4, 864, (181, 362, None), _PCIE_4, 1, 8.9, 0.9),
    _gpu("L4-24GB", "l4", 22.0, 300, (121, 242, None), _PCIE_4, 1, 8.9, 0.8),
    _gpu("A10G-24GB", "a10g", 22.1, 600, (70, 140, None), _PCIE_4, 1, 8.6, 1.0),
    _gpu("A10-24GB", "a10", 22.0, 600, (125, 250, None), _PCIE_4, 1, 8.6, 0.75),
    _gpu("A30-24GB", "a30", 23.5, 933, (165, 330, None), _PCIE_4, 1, 8.0, 0.9),
    _gpu("A40-48GB", "a40", 44.4, 696, (150, 299, None), _PCIE_4, 1, 8.6, 0.5),
    _gpu("RTX-A6000-48GB", "rtx a6000", 47.5, 768, (155, 310, None), _PCIE_4, 1, 8.6, 0.5),
    _gpu("RTX-6000-Ada-48GB", "rtx 6000 ada", 47.5, 960, (364, 728, None), _PCIE_4, 1, 8.9, 0.8),
    _gpu("RTX-5090-32GB", "rtx 5090", 31.4, 1792, (210, 419, 1676), _PCIE_5, 1, 12.0, 0.7),
    _gpu("RTX-4090-24GB", "rtx 4090", 23.5, 1008, (165, 330, None), _PCIE_4, 1, 8.9, 0.4),
    _gpu("RTX-3090-24GB", "rtx 3090", 23.6, 936, (71, 284, None), _PCIE_4, 1, 8.6, 0.25),
    _gpu("V100-16GB", "v100 16gb", 15.8, 900, (125, None, None), 300, 8, 7.0, 0.4),
    _gpu("V100-32GB", "v100", 31.7, 900, (125, None, None), 300, 8, 7.0, 0.5),
    _gpu("T4-16GB", "t4", 14.6, 320, (65, 130, None), 32, 1, 7.5, 0.35),
)


class UnknownGpuError(InvalidRequestError):
    """No data sheet of a GPU of that name; lists those that there are."""

    def __init__(self, gpu_name: str, field: str = "gpu_name") -> None:
        names = [gpu.name for gpu in GPU_SPECIFICATIONS]
        # Of a typing error in "H100" the full names would be as far away as any.
        by_words = {" ".join(gpu.words): gpu.name for gpu in GPU_SPECIFICATIONS}
        by_words |= {name.lower(): name for name in names}
        near = difflib.get_close_matches(gpu_name.lower(), by_words, 1, 0.5)
        hint = f"; did you mean {by_words[near[0]]}?" if near else "."
        super().__init__(
            [
                FieldViolation(
                    field,
                    f"{gpu_name[:64]!r} is not a GPU that is known{hint} Known are {', '.join(names)}; "
                    "for another, give its memory, bandwidth and FLOP/s",
                )
            ]
        )


def find_gpu(gpu_name: str) -> GpuSpecification | None:
    """Return the data sheet of a GPU by the name NVML gives it, or its short name.

    ``None`` when it is not known, or is a MIG slice or of a laptop: those have a share of
    the rates that the name does not tell.
    """
    words = set(re.split(r"[^a-z0-9]+", gpu_name.lower()))
    if not words.isdisjoint(("mig", "laptop")):
        return None
    return next((gpu for gpu in GPU_SPECIFICATIONS if words.issuperset(gpu.words)), None)


def require_gpu(gpu_name: str, field: str = "gpu_name") -> GpuSpecification:
    """Return the data sheet of a GPU.

    Raises:
        UnknownGpuError: There is none; the message lists those there are.
    """
    gpu = find_gpu(gpu_name)
    if gpu is None:
        raise UnknownGpuError(gpu_name, field)
    return gpu
