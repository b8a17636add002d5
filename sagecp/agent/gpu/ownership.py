"""Whose a process is that holds memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A chain of parents that is longer is no engine's.
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU.

    Attributes:
        process_id: As this host's process namespace has it; another namespace's where
            the driver tells those.
        memory_bytes: What it holds there. ``None``: unknown.
    """

    process_id: int
    memory_bytes: int | None


class ProcessFamily:
    """The engine's process and its descendants.

    Asked upwards from the few processes that hold a GPU: to go down the tree, every process
    of a host would have to be read, which takes tens of milliseconds where there are many.

    A worker whose parents died is adopted by another process and not found any more.

    Args:
        ancestor_id: The engine's process.
        proc: Where processes are listed.
    """

    def __init__(self, ancestor_id: int, proc: Path = Path("/proc")) -> None:
        self._ancestor_id = ancestor_id
        self._proc = str(proc)

    def has(self, process_id: int) -> bool:
        """Return whether a process is the engine's, as far as this host shows."""
        for _ in range(_MAX_DEPTH):
            if process_id == self._ancestor_id:
                return True
            if process_id <= 1:
                return False
            process_id = self._parent_of(process_id)
        return False

    def _parent_of(self, process_id: int) -> int:
        try:
            # Path.read_text takes twice as long.
            with open(f"{self._proc}/{process_id}/stat", "rb") as file:  # noqa: PTH123
                # The name before it may hold anything, parentheses too.
                return int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return 0  # It ended, or is another namespace's.


@dataclass(frozen=True, slots=True)
class GpuShare:
    """How a GPU is shared; ``None``: unknown.

    Attributes:
        engine_memory_bytes: Held by the engine.
        foreign_process_count: Processes that hold memory and are not the engine's.
        engine_process_count: Processes that are.
    """

    engine_memory_bytes: int | None = None
    foreign_process_count: int | None = None
    engine_process_count: int = 0


def share_of(processes: tuple[GpuProcess, ...], family: ProcessFamily) -> GpuShare:
    """Return how a GPU is shared between the engine and others."""
    own = [process.memory_bytes for process in processes if family.has(process.process_id)]
    known = [memory for memory in own if memory is not None]
    return GpuShare(
        engine_memory_bytes=sum(known) if len(known) == len(own) else None,
        foreign_process_count=len(processes) - len(own),
        engine_process_count=len(own),
    )
