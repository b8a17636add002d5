"""The GPUs of an engine as the driver tells them: which they are, and how they do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from sagecp.agent.gpu.choice import CHOSEN_BY_PROCESSES, GpuChoice
from sagecp.agent.gpu.devices import OpenGpu, choose_named, describe, find_again, open_every
from sagecp.agent.gpu.nvml import GPU_LOST_CODE, GpuLostError, Nvml
from sagecp.agent.gpu.ownership import GpuProcess, GpuShare, ProcessFamily, share_of
from sagecp.agent.gpu.readings import NvlinkState, read_gpu, read_lost_gpu, read_nvlinks
from sagecp.agent.gpu.report import GpuAbsentError, GpuReport
from sagecp.agent.gpu.xid import XidLog
from sagecp.core.gpu import GpuDevice, GpuReading

# What costs many calls and changes rarely is asked for so often.
_NVLINK_PERIOD_S = 10.0
_PROCESS_PERIOD_S = 5.0
# A GPU that came back is seen only by a driver that was opened anew.
_REOPEN_PERIOD_S = 60.0


class DriverReader:
    """Reads GPUs through NVML. Not safe for several threads at once.

    Args:
        xid_log: Where critical errors are noted.
        clock: Monotonic seconds.
        proc: Where the kernel shows processes.
        sys: Where it shows devices.
    """

    def __init__(self, xid_log: XidLog, clock: Callable[[], float], proc: Path, sys: Path) -> None:
        self._xid_log = xid_log
        self._clock = clock
        self._proc = proc
        self._sys = sys
        self._nvml: Nvml | None = None
        self._every: list[OpenGpu] = []
        self._choice: GpuChoice | None = None
        self._chosen: list[OpenGpu] = []
        self._chosen_by = ""
        self._devices: tuple[GpuDevice, ...] = ()
        self._family_was_seen = False
        self._shares: dict[str, GpuShare] = {}
        self._nvlinks: dict[str, NvlinkState] = {}
        self._processes_at_s = 0.0
        self._nvlinks_at_s = 0.0
        self._reopen_at_s = 0.0
        # Those whose loss was noted, until they answer again.
        self._lost: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether there is a driver."""
        return self._nvml is not None

    def open(self) -> None:
        """Load the driver.

        Raises:
            GpuAbsentError: There is none; says why.
        """
        self._nvml = Nvml.open(self._clock)

    def close(self) -> None:
        """Let go of the driver, and forget which GPUs were read."""
        self._shut()
        self._every, self._chosen, self._choice, self._devices = [], [], None, ()

    def read(self, choice: GpuChoice) -> GpuReport:
        """Return how the chosen GPUs do. Only while it is open.

        Raises:
            GpuAbsentError: There are none, or the driver is gone.
        """
        if any(gpu.is_lost for gpu in self._chosen) and self._clock() >= self._reopen_at_s:
            self._open_again()
        nvml = self._nvml
        if nvml is None:
            raise GpuAbsentError("the NVIDIA driver is not open")
        if choice != self._choice:
            self._choose(nvml, choice)
        if self._clock() >= self._processes_at_s:
            self._look_at_processes(nvml, choice)
        if self._clock() >= self._nvlinks_at_s:
            self._look_at_nvlinks(nvml)
        self._xid_log.collect(nvml)
        return GpuReport(
            readings=tuple(self._read_gpu(nvml, gpu) for gpu in self._chosen),
            devices=self._devices,
            chosen_by=self._chosen_by,
            are_selected=choice.named is not None or self._chosen_by == CHOSEN_BY_PROCESSES,
        )

    def _shut(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            self._xid_log.close(nvml)
            nvml.close()

    def _open_again(self) -> None:
        self._reopen_at_s = self._clock() + _REOPEN_PERIOD_S
        self._shut()
        nvml = self._nvml = Nvml.open(self._clock)
        self._every = []
        with contextlib.suppress(GpuAbsentError):
            self._every = open_every(nvml)
        known = self._devices
        self._take(nvml, find_again(nvml, self._every, self._chosen), self._chosen_by)
        if any(gpu.is_lost for gpu in self._chosen):
            # What never changes about a GPU cannot be asked of a lost one.
            self._devices = known

    def _choose(self, nvml: Nvml, choice: GpuChoice) -> None:
        self._every = self._every or open_every(nvml)
        self._choice, self._chosen, self._chosen_by = choice, [], ""
        self._family_was_seen, self._shares = False, {}
        self._look_at_processes(nvml, choice)
        if not self._chosen:
            chosen = self._every
            if choice.named is not None:
                chosen = choose_named(nvml, self._every, choice.named, choice.named_by)
            self._take(nvml, chosen, choice.named_by)
            self._processes_at_s = 0.0

    def _take(self, nvml: Nvml, gpus: list[OpenGpu], chosen_by: str) -> None:
        self._chosen, self._chosen_by = gpus, chosen_by
        self._devices = describe(nvml, gpus, self._sys)
        self._xid_log.watch(nvml, gpus)
        self._nvlinks_at_s = 0.0

    def _look_at_processes(self, nvml: Nvml, choice: GpuChoice) -> None:
        """Find out who holds memory, and with it which GPUs are the engine's where nobody named them."""
        self._processes_at_s = self._clock() + _PROCESS_PERIOD_S
        if choice.engine_process_id is None:
            return
        is_open_question = choice.selection is None
        family = ProcessFamily(choice.engine_process_id, self._proc)
        shares: dict[str, GpuShare] = {}
        for gpu in self._every if is_open_question else self._chosen:
            processes = _processes(nvml, gpu)
            if processes is not None:
                shares[gpu.key] = share_of(processes, family)
        self._family_was_seen |= any(share.engine_process_count for share in shares.values())
        # Before the engine was seen once, the process ids may as well be another namespace's
        # (the driver's, outside of a container), where nobody would be the engine.
        self._shares = shares if self._family_was_seen else {}
        if is_open_question:
            # None is given up: of a lost GPU, or while a worker is replaced, no process is told.
            known = self._chosen if self._chosen_by == CHOSEN_BY_PROCESSES else []
            keys = {gpu.key for gpu in known}
            found = [
                gpu
                for gpu in self._every
                if gpu.key in shares and shares[gpu.key].engine_process_count and gpu.key not in keys
            ]
            if found:
                held = sorted([*known, *found], key=lambda gpu: gpu.index)
                self._take(nvml, held, CHOSEN_BY_PROCESSES)

    def _look_at_nvlinks(self, nvml: Nvml) -> None:
        self._nvlinks_at_s = self._clock() + _NVLINK_PERIOD_S
        self._nvlinks = {}
        for gpu in self._chosen:
            if gpu.is_lost:
                continue
            with contextlib.suppress(GpuLostError):
                self._nvlinks[gpu.key] = read_nvlinks(nvml, gpu)

    def _read_gpu(self, nvml: Nvml, gpu: OpenGpu) -> GpuReading:
        if gpu.handle is not None and gpu.chip is not None and not gpu.is_lost:
            try:
                reading = read_gpu(
                    nvml,
                    gpu,
                    gpu.handle,
                    gpu.chip,
                    self._nvlinks.get(gpu.key, NvlinkState()),
                    self._shares.get(gpu.key, GpuShare()),
                    self._xid_log.errors_of(gpu.chip_key, gpu.instance_id),
                )
            except GpuLostError as error:
                gpu.lost_code = error.xid_code
                self._reopen_at_s = self._clock() + _REOPEN_PERIOD_S
            else:
                self._lost.discard(gpu.key)
                return reading
        if gpu.key not in self._lost:
            self._lost.add(gpu.key)
            self._xid_log.add_lost(gpu.chip_key, gpu.lost_code or GPU_LOST_CODE)
        return read_lost_gpu(gpu, self._xid_log.errors_of(gpu.chip_key, gpu.instance_id))


def _processes(nvml: Nvml, gpu: OpenGpu) -> tuple[GpuProcess, ...] | None:
    if gpu.handle is None or gpu.is_lost:
        return None
    try:
        return nvml.processes(gpu.handle)
    except GpuLostError:
        return None
