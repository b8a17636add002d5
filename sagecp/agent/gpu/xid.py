"""Critical errors (XID) that the driver reports of GPUs, as they come."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sagecp.agent.gpu.nvml import GpuLostError, Nvml
from sagecp.core.gpu import XidError

if TYPE_CHECKING:
    from sagecp.agent.gpu.devices import OpenGpu

# For how long the driver's own word of a loss, and what NVML answers, are the same event.
_SAME_LOSS_S = 60.0
_MAX_ERROR_COUNT = 8
_MAX_GPU_COUNT = 256
# At most this many are taken in at one reading; the rest waits for the next.
_MAX_EVENT_COUNT = 64


class XidLog:
    """The latest critical errors of each GPU since the agent started.

    They are fetched whenever GPUs are read, by the same thread: a beat could not tell of an
    error before the next reading anyway, and a thread that waits in the driver could neither
    be stopped nor share NVML with the readings without a lock.

    Args:
        wall_clock: Unix seconds.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._errors: dict[str, deque[tuple[XidError, int | None]]] = {}
        self._event_set: Any = None
        self._uuids: dict[int, str] = {}

    def watch(self, nvml: Nvml, gpus: list[OpenGpu]) -> None:
        """Listen to GPUs, besides those listened to already. Where the driver cannot, nothing is heard."""
        if self._event_set is None:
            self._event_set = nvml.open_event_set()
        if self._event_set is None:
            return
        for gpu in gpus:
            if gpu.chip is not None and gpu.chip.address not in self._uuids:
                self._uuids[gpu.chip.address] = gpu.chip_key
                # A lost GPU is listened to again when the driver is opened anew.
                with contextlib.suppress(GpuLostError):
                    nvml.register_xid_events(gpu.chip, self._event_set)

    def collect(self, nvml: Nvml) -> None:
        """Take in what the driver reported since the last time."""
        if self._event_set is None:
            return
        for _ in range(_MAX_EVENT_COUNT):
            event = nvml.next_xid(self._event_set)
            if event is None:
                return
            uuid = self._uuids.get(event.handle.address, "")
            if not uuid:
                # Not by the pointer that this GPU was registered by.
                with contextlib.suppress(GpuLostError):
                    uuid = nvml.text("nvmlDeviceGetUUID", event.handle)
            if uuid:
                self.add(uuid, event.code, event.instance_id)

    def add(self, uuid: str, code: int, instance_id: int | None = None) -> None:
        """Note an error of a GPU.

        Args:
            uuid: The whole GPU.
            code: The error's number.
            instance_id: Of which part of it. ``None``: of all.
        """
        if uuid not in self._errors and len(self._errors) >= _MAX_GPU_COUNT:
            return
        errors = self._errors.setdefault(uuid, deque(maxlen=_MAX_ERROR_COUNT))
        errors.append((XidError(code, self._wall_clock()), instance_id))

    def add_lost(self, uuid: str, code: int) -> None:
        """Note that a GPU does not answer any more, unless the driver itself said so just now."""
        errors = self._errors.get(uuid)
        if errors and errors[-1][0].code == code:
            age_s = self._wall_clock() - errors[-1][0].time_s
            if age_s < _SAME_LOSS_S:
                return
        self.add(uuid, code)

    def errors_of(self, uuid: str, instance_id: int | None = None) -> tuple[XidError, ...]:
        """Return the errors of a GPU, or of one part of it, the latest last."""
        return tuple(
            error
            for error, part in self._errors.get(uuid, ())
            if instance_id is None or part is None or part == instance_id
        )

    def close(self, nvml: Nvml) -> None:
        """Stop listening; what was heard stays known."""
        event_set, self._event_set = self._event_set, None
        self._uuids.clear()
        if event_set is not None:
            nvml.free_event_set(event_set)
