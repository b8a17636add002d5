"""NVML as this agent asks it: an answer, or ``None`` where the driver or the GPU has none.

Three kinds of trouble are told apart. What a driver lacks, or a GPU refuses, leaves one figure
unknown and is not asked again for a while. A GPU that is lost says nothing at all. A driver that
is gone leaves nothing to ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sagecp.agent.gpu.ownership import GpuProcess
from sagecp.agent.gpu.report import GpuAbsentError

# What a GPU refuses may change with its mode (MIG, ECC), which somebody has to change.
_REFUSAL_RETRY_S = 300.0
# Far more than GPUs have figures: when they are so many, they are asked for anew.
_MAX_REFUSAL_COUNT = 20_000
# With it, an answer of NVML that is about a whole GPU instead of a part of it.
NO_INSTANCE = 0xFFFFFFFF


# What the driver itself reports of GPUs that NVML calls lost, and of those that it wants reset.
GPU_LOST_CODE = 79
_RESET_REQUIRED_CODE = 143


class GpuLostError(Exception):
    """The GPU does not answer any more: it fell off the bus, or waits for a reset.

    Args:
        message: The driver's.
        xid_code: The critical error that this is.
    """

    def __init__(self, message: str, xid_code: int = GPU_LOST_CODE) -> None:
        super().__init__(message)
        self.xid_code = xid_code


@dataclass(frozen=True, slots=True)
class Handle:
    """NVML's pointer to a GPU, or to a part of one."""

    pointer: Any
    address: int


@dataclass(frozen=True, slots=True)
class XidEvent:
    """A critical error of a GPU as NVML tells it; ``instance_id``: of which part, ``None``: of all."""

    code: int
    handle: Handle
    instance_id: int | None


class Nvml:
    """An open driver. Not safe for several threads at once.

    Args:
        module: The Python package ``pynvml``.
        clock: Monotonic seconds.
    """

    def __init__(self, module: Any, clock: Callable[[], float] = time.monotonic) -> None:  # noqa: ANN401
        self.module = module
        self._clock = clock
        self._lacking: set[str] = set()
        self._refused_until_s: dict[tuple[Any, ...], float] = {}

    @classmethod
    def open(cls, clock: Callable[[], float] = time.monotonic) -> Nvml:
        """Load the driver's library and start it.

        Raises:
            GpuAbsentError: There is none; says why.
        """
        try:
            import pynvml
        except ImportError:
            raise GpuAbsentError(
                "the Python package nvidia-ml-py is not installed; install sagecp with its 'agent' extra"
            ) from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise GpuAbsentError("no NVIDIA driver: libnvidia-ml.so.1 was not found") from None
        except pynvml.NVMLError as error:
            raise GpuAbsentError(f"NVML did not start: {error}") from None
        return cls(pynvml, clock)

    def close(self) -> None:
        """Let go of the driver."""
        with contextlib.suppress(self.module.NVMLError):
            self.module.nvmlShutdown()

    def device_count(self) -> int:
        """Return how many GPUs the driver has.

        Raises:
            GpuAbsentError: It does not say.
        """
        try:
            return int(self.module.nvmlDeviceGetCount())
        except self.module.NVMLError as error:
            raise GpuAbsentError(f"NVML did not list its GPUs: {error}") from None

    def handle_at(self, index: int) -> Handle | None:
        """Return a GPU by its index; ``None``: it is not ours to see.

        Raises:
            GpuLostError: It is lost.
        """
        return self._handle("nvmlDeviceGetHandleByIndex", index)

    def handle_of(self, uuid: str) -> Handle | None:
        """Return a GPU, or a part of one, by its whole UUID; ``None``: there is none.

        Raises:
            GpuLostError: It is lost.
        """
        return self._handle("nvmlDeviceGetHandleByUUID", uuid)

    def parent_of(self, part: Handle) -> Handle | None:
        """Return the GPU that a part (MIG device) is of; ``None``: it is none's."""
        return self._handle("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", part.pointer)

    def _handle(self, function: str, argument: Any) -> Handle | None:  # noqa: ANN401
        pointer = self._call((function,), argument)
        return None if pointer is None else Handle(pointer, ctypes.addressof(pointer.contents))

    def ask(self, function: str, handle: Handle, *arguments: Any) -> Any:  # noqa: ANN401 - as NVML answers
        """Call a function for a GPU; ``None``: this driver lacks it or this GPU cannot say.

        Raises:
            GpuLostError: The GPU is lost.
            GpuAbsentError: The driver was unloaded.
        """
        return self._ask((function, handle.address, *arguments), handle.pointer, *arguments)

    def ask_between(self, function: str, one: Handle, other: Handle, *arguments: int) -> int | None:
        """Call a function for two GPUs, as :meth:`ask` does for one."""
        key = (function, one.address, other.address, *arguments)
        value = self._ask(key, one.pointer, other.pointer, *arguments)
        return None if value is None else int(value)

    def _ask(self, key: tuple[Any, ...], *arguments: Any) -> Any:  # noqa: ANN401
        if key[0] in self._lacking:
            return None
        if self._refused_until_s and self._refused_until_s.get(key, 0.0) > self._clock():
            return None
        return self._call(key, *arguments)

    def _call(self, key: tuple[Any, ...], *arguments: Any) -> Any:  # noqa: ANN401
        nvml, function = self.module, key[0]
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError_FunctionNotFound, AttributeError):
            # Looking a symbol up in vain costs more than the answer is worth. The Python
            # package may be the one without it.
            self._lacking.add(function)
        except nvml.NVMLError_GpuIsLost as error:
            raise GpuLostError(str(error)) from None
        except nvml.NVMLError_ResetRequired as error:
            raise GpuLostError(str(error), _RESET_REQUIRED_CODE) from None
        except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
            raise GpuAbsentError("the NVIDIA driver was unloaded") from None
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_InvalidArgument):
            if len(key) > 1:
                if len(self._refused_until_s) >= _MAX_REFUSAL_COUNT:
                    self._refused_until_s.clear()
                self._refused_until_s[key] = self._clock() + _REFUSAL_RETRY_S
        except nvml.NVMLError:
            pass
        return None

    def text(self, function: str, handle: Handle) -> str:
        """Return a text; empty: unknown."""
        value = self.ask(function, handle)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else (value or "")

    def number(self, function: str, handle: Handle, *arguments: int) -> int | None:
        """Return a number that is not negative; ``None``: unknown."""
        value = self.ask(function, handle, *arguments)
        return int(value) if value is not None and value >= 0 else None

    def fields(self, handle: Handle, field_ids: tuple[int, ...]) -> list[int | None]:
        """Return values of NVML's numbered fields; ``None``: unknown."""
        answer = self.ask("nvmlDeviceGetFieldValues", handle, field_ids)
        if answer is None:
            return [None] * len(field_ids)
        return [self._field(value) for value in answer]

    def _field(self, answer: Any) -> int | None:  # noqa: ANN401
        nvml = self.module
        if answer.nvmlReturn != nvml.NVML_SUCCESS:
            return None
        names = {
            nvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
            nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
            nvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
        }
        name = names.get(answer.valueType)
        value = None if name is None else int(getattr(answer.value, name))
        return value if value is not None and value >= 0 else None

    def pci_bus_id(self, handle: Handle) -> str:
        """Return the address on the PCI bus, such as ``00000000:17:00.0``; empty: unknown."""
        return _bus_id(self.ask("nvmlDeviceGetPciInfo", handle))

    def nvlink_peer(self, handle: Handle, link: int) -> tuple[int | None, str]:
        """Return what is at the other end of an NVLink: its type as NVML numbers it, and its PCI address."""
        return (
            self.number("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link),
            _bus_id(self.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)),
        )

    def processes(self, handle: Handle) -> tuple[GpuProcess, ...] | None:
        """Return who computes on a GPU; ``None``: unknown."""
        answer = self.ask("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        if answer is None:
            # The name before driver 510; its answers look the same.
            answer = self.ask("nvmlDeviceGetComputeRunningProcesses_v2", handle)
        if answer is None:
            return None
        return tuple(GpuProcess(int(each.pid), each.usedGpuMemory) for each in answer)

    def open_event_set(self) -> Any:  # noqa: ANN401 - an opaque pointer
        """Return a new set of events; ``None``: this driver has none."""
        return self._call(("nvmlEventSetCreate",))

    def register_xid_events(self, handle: Handle, event_set: Any) -> None:  # noqa: ANN401
        """Have a GPU's critical errors come to a set, where the driver can.

        Raises:
            GpuLostError: The GPU is lost.
        """
        wanted = self.module.nvmlEventTypeXidCriticalError
        supported = self.number("nvmlDeviceGetSupportedEventTypes", handle)
        if supported is None or supported & wanted:
            key = ("nvmlDeviceRegisterEvents", handle.address)
            self._ask(key, handle.pointer, wanted, event_set)

    def next_xid(self, event_set: Any) -> XidEvent | None:  # noqa: ANN401 - an opaque pointer
        """Return a critical error that waits in a set; ``None``: there is none now."""
        nvml = self.module
        try:
            event = nvml.nvmlEventSetWait_v2(event_set, 0)
        except (nvml.NVMLError, AttributeError):
            return None
        if not (event.device and event.eventType & nvml.nvmlEventTypeXidCriticalError):
            return None
        handle = Handle(event.device, ctypes.addressof(event.device.contents))
        part = None if event.gpuInstanceId == NO_INSTANCE else int(event.gpuInstanceId)
        return XidEvent(int(event.eventData), handle, part)

    def free_event_set(self, event_set: Any) -> None:  # noqa: ANN401 - an opaque pointer
        """Give a set of events back."""
        with contextlib.suppress(self.module.NVMLError):
            self.module.nvmlEventSetFree(event_set)


def _bus_id(pci_info: Any) -> str:  # noqa: ANN401 - as NVML answers
    if pci_info is None:
        return ""
    value = pci_info.busId
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
