"""What is known of an engine's GPUs at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.gpu import GpuDevice, GpuReading

# Most GPUs reported of one engine: the contract's bound.
MAX_GPU_COUNT = 64


class GpuAbsentError(Exception):
    """There are no GPUs to read; the text says why."""


@dataclass(frozen=True, slots=True)
class GpuReport:
    """Readings, or the reason why there are none.

    Attributes:
        readings: How each GPU does.
        absent_reason: Empty where there are readings.
        devices: What each GPU is, in the order of the readings.
        chosen_by: What decided that these are the engine's GPUs.
        are_selected: They are the engine's alone, not merely all of this host.
    """

    readings: tuple[GpuReading, ...] = ()
    absent_reason: str = ""
    devices: tuple[GpuDevice, ...] = ()
    chosen_by: str = ""
    are_selected: bool = False
