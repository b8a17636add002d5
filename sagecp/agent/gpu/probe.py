"""Reads the GPUs of an engine, from the driver or from a DCGM exporter."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.dcgm import DEFAULT_URL, DcgmExporter
from sagecp.agent.gpu.driver import DriverReader
from sagecp.agent.gpu.report import GpuAbsentError, GpuReport
from sagecp.agent.gpu.xid import XidLog

DCGM_AUTO = "auto"
DCGM_OFF = "off"

# A driver that is not there may be loaded later; asking costs milliseconds.
_RETRY_S = 60.0
# An exporter that somebody named is there, and back soon.
_EXPORTER_RETRY_S = 5.0


class GpuProbe:
    """Reads the GPUs of an engine.

    Calls block for about a millisecond per GPU: run :meth:`read` in a thread.
    Not safe for several threads at once, but for :meth:`choose` and :attr:`is_resting`.

    Args:
        choice: Which GPUs are the engine's.
        dcgm_exporter: ``off``; the URL of an exporter's page to read instead of asking the
            driver; or ``auto``: that of this host, where there is no driver to ask.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
        proc: Where the kernel shows processes.
        sys: Where it shows devices.
    """

    def __init__(
        self,
        choice: GpuChoice | None = None,
        dcgm_exporter: str = DCGM_OFF,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
    ) -> None:
        self._choice = choice or GpuChoice()
        self._clock = clock
        xid_log = XidLog(wall_clock)
        self._driver = DriverReader(xid_log, clock, proc, sys)
        self._exporter: DcgmExporter | None = None
        if dcgm_exporter != DCGM_OFF:
            url = DEFAULT_URL if dcgm_exporter == DCGM_AUTO else dcgm_exporter
            self._exporter = DcgmExporter(url, xid_log, clock)
        self._exporter_was_named = dcgm_exporter not in {DCGM_AUTO, DCGM_OFF}
        self._absent_reason = ""
        self._absent_for: GpuChoice | None = None
        self._retry_at_s = 0.0
        # Until then the exporter is read in place of a driver that is not there.
        self._driver_retry_at_s = 0.0

    def choose(self, choice: GpuChoice) -> None:
        """Read other GPUs from the next reading on. May be called while a reading is made."""
        if choice != self._choice:
            self._choice = choice

    @property
    def is_resting(self) -> bool:
        """Whether :meth:`read` would answer from memory that there is nothing to read."""
        if self._choice.absent_reason:
            return True
        return self._absent_for is self._choice and self._clock() < self._retry_at_s

    def read(self) -> GpuReport:
        """Return what the GPUs say now. Never raises for what a driver does."""
        choice = self._choice
        if choice.absent_reason:
            return GpuReport(absent_reason=choice.absent_reason)
        if self.is_resting:
            return GpuReport(absent_reason=self._absent_reason)
        try:
            report = self._read(choice)
        except GpuAbsentError as error:
            self._driver.close()
            self._absent_reason, self._absent_for = str(error), choice
            self._retry_at_s = self._clock() + (_EXPORTER_RETRY_S if self._exporter_was_named else _RETRY_S)
            return GpuReport(absent_reason=self._absent_reason)
        self._absent_for = None
        return report

    def close(self) -> None:
        """Let go of the driver."""
        self._driver.close()

    def _read(self, choice: GpuChoice) -> GpuReport:
        if choice.selection == ():
            raise GpuAbsentError(f"{choice.named_by} hides every GPU")
        if self._exporter is not None and self._exporter_was_named:
            return self._exporter.read(choice)
        if self._exporter is not None and self._clock() < self._driver_retry_at_s:
            return self._exporter.read(choice)
        if not self._driver.is_open:
            try:
                self._driver.open()
            except GpuAbsentError as no_driver:
                if self._exporter is None:
                    raise
                try:
                    report = self._exporter.read(choice)
                except GpuAbsentError:
                    # Nobody asked for the exporter: that there is no driver is the news.
                    raise no_driver from None
                self._driver_retry_at_s = self._clock() + _RETRY_S
                return report
        return self._driver.read(choice)
