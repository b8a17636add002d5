"""Which GPUs are an engine's, as far as can be said before the GPUs are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagecp.agent.gpu.report import GpuAbsentError

CHOSEN_BY_PROCESSES = "the engine's processes"
CHOSEN_BY_NOBODY = "nobody: all of this host"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuChoice:
    """Which GPUs to read. Without anything said: all of the host.

    Attributes:
        selection: Indices in PCI order, or UUIDs, which may be cut short as CUDA
            allows. ``None``: nobody named any. Empty: none of them.
        selected_by: Who named them, for messages.
        engine_process_id: The engine's process on this host. Where nobody named
            GPUs, those that it or its descendants hold memory of are its GPUs.
        fallback: As ``selection``, as long as no GPU is found by process.
        fallback_by: As ``selected_by``, for ``fallback``.
        absent_reason: Why there is nothing to read at all. Empty: there may be.
    """

    selection: tuple[str, ...] | None = None
    selected_by: str = ""
    engine_process_id: int | None = None
    fallback: tuple[str, ...] | None = None
    fallback_by: str = ""
    absent_reason: str = ""

    @property
    def named(self) -> tuple[str, ...] | None:
        """What is read unless processes tell better; ``None``: all."""
        return self.fallback if self.selection is None else self.selection

    @property
    def named_by(self) -> str:
        """Who says so."""
        if self.named is None:
            return CHOSEN_BY_NOBODY
        return (self.fallback_by if self.selection is None else self.selected_by) or "the selection"


def is_gpu_name(entry: str) -> bool:
    """Return whether an entry is an index, or the beginning of a UUID."""
    return entry.isascii() and (entry.isdigit() or entry.startswith(("GPU-", "MIG-")))


def parse_visible_devices(value: str) -> tuple[str, ...]:
    """Read a list such as ``CUDA_VISIBLE_DEVICES``: up to its first bad entry, as CUDA does."""
    chosen: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if not is_gpu_name(entry):
            break
        chosen.append(entry)
    return tuple(dict.fromkeys(chosen))


def find_named(entry: str, named_by: str, uuids_by_index: Sequence[tuple[int, str]]) -> int:
    """Return the index of the GPU that an entry of a selection means.

    Args:
        entry: An index, or a UUID or its beginning.
        named_by: Where the entry stands, for messages.
        uuids_by_index: The GPUs of this host.

    Raises:
        GpuAbsentError: It means none, or several.
    """
    if entry.isdigit():
        if any(index == int(entry) for index, _ in uuids_by_index):
            return int(entry)
        raise GpuAbsentError(
            f"GPU {entry} of {named_by} does not exist: this host has {len(uuids_by_index)}, from 0"
        )
    matching = [index for index, uuid in uuids_by_index if uuid.startswith(entry)]
    if len(matching) != 1:
        raise GpuAbsentError(
            f"{entry} of {named_by} names {'no' if not matching else 'more than one'} GPU of this host"
        )
    return matching[0]
