"""The GPUs that a plan may use."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.gpu_specifications import GpuSpecification

USUAL_GPUS_PER_NODE_COUNT = 8
"""GPUs of a common host; within it they share a fast link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPool:
    """Equal GPUs in equal nodes.

    Attributes:
        gpu: What one of them can do.
        gpus_per_node_count: In each node.
        node_count: Nodes.
        usd_per_gpu_hour: Rent of one GPU; ``None``: the usual one of its kind.
        node_link_gb_per_s: Between nodes, per GPU, one direction. 50: a 400 Gb/s adapter each.
    """

    gpu: GpuSpecification
    gpus_per_node_count: int
    node_count: int = 1
    usd_per_gpu_hour: float | None = None
    node_link_gb_per_s: float = 50.0

    @property
    def gpu_count(self) -> int:
        """GPUs in all."""
        return self.gpus_per_node_count * self.node_count

    @property
    def price_usd(self) -> float:
        """Rent of one GPU for an hour."""
        return self.gpu.usd_per_hour if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour

    def __str__(self) -> str:
        text = f"{self.gpus_per_node_count} x {self.gpu.name}"
        return f"{self.node_count} nodes of {text}" if self.node_count > 1 else text
