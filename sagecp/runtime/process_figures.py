"""What the server's own process takes of its machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STATM = Path("/proc/self/statm")


def cpu_seconds() -> float:
    """Return the CPU time of the process since it started, of all its threads."""
    return time.process_time()


def resident_memory_bytes() -> int:
    """Return the memory of the process; 0 where that is not told."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
