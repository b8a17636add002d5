"""Keeps an eye on the GPUs of one engine without ever waiting for a driver that hangs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ClassVar

import structlog

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts
from sagecp.agent.gpu.choice import GpuChoice, parse_visible_devices
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.report import GpuReport

_TIMEOUT_S = 0.5


class GpuWatch:
    """The GPUs of one engine.

    Args:
        probe: Reads them. Nobody else may.
        logger: Is told which GPUs are the engine's, and why it is thought so.

    Attributes:
        report: What the GPUs said last.
        known: What they said when they last said anything, of the GPUs chosen now.
    """

    def __init__(self, probe: GpuProbe, logger: structlog.typing.FilteringBoundLogger) -> None:
        self._probe = probe
        self._logger = logger
        self._thread: _Thread | None = None
        self._reading: asyncio.Future[GpuReport] | None = None
        self._choice: GpuChoice | None = None
        self._trouble = ""
        self._logged: tuple[str, tuple[int, ...]] | None = None
        self.report = GpuReport()
        self.known = GpuReport()

    def choose(self, choice: GpuChoice) -> None:
        """Watch other GPUs from the next reading on; the same choice changes nothing."""
        if choice != self._choice:
            self._choice = choice
            self.known = GpuReport()
            # A reading that is still made is of other GPUs.
            self._reading = None
            self._probe.choose(choice)

    async def read(self) -> None:
        """Ask the GPUs. A driver that hangs does not hold up the caller for long."""
        if self._probe.is_resting:
            self.report = self._probe.read()
            return
        if self._reading is None:
            if self._thread is None:
                self._thread = _Thread.shared()
            self._reading = asyncio.wrap_future(self._thread.submit(self._probe.read))
        done, _ = await asyncio.wait({self._reading}, timeout=_TIMEOUT_S)
        if not done:
            self.report = GpuReport(absent_reason="the NVIDIA driver does not answer")
            return
        reading, self._reading = self._reading, None
        try:
            self.report = reading.result()
        except Exception as error:
            # Whatever a driver does: the agent is there for the engine.
            self.report = GpuReport(absent_reason=f"the GPUs could not be read: {error!r}")
            if self.report.absent_reason != self._trouble:
                self._logger.exception("the GPUs could not be read", exc_info=error)
            self._trouble = self.report.absent_reason
        if self.report.readings:
            self.known = self.report
            self._log_choice(self.report)

    def close(self) -> None:
        """Let go of the driver, as soon as it answers."""
        if self._thread is not None:
            self._thread.finish(self._probe.close)
            self._thread = None

    def _log_choice(self, report: GpuReport) -> None:
        indices = tuple(reading.index for reading in report.readings)
        if self._logged != (report.chosen_by, indices):
            self._logged = (report.chosen_by, indices)
            self._logger.info("GPUs chosen", gpus=list(indices), gpus_chosen_by=report.chosen_by)


class _Thread:
    """A thread for a driver that blocks: one call at a time, in order, of all engines of this agent.

    Unlike an executor's it does not keep the process alive when a call never returns.
    """

    current: ClassVar[_Thread | None] = None

    @classmethod
    def shared(cls) -> _Thread:
        """Return the thread of this process; each caller ends its part by :meth:`finish`."""
        if cls.current is None:
            cls.current = cls()
        cls.current.user_count += 1
        return cls.current

    def __init__(self) -> None:
        self.user_count = 0
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="nvml", daemon=True).start()

    def submit(self, function: Callable[[], GpuReport]) -> Future[GpuReport]:
        """Have a function called."""
        future: Future[GpuReport] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is raised where the answer is wanted
                future.set_exception(error)

        self._calls.put(call)
        return future

    def finish(self, function: Callable[[], None]) -> None:
        """Have a function called, and end with the last user."""
        self._calls.put(function)
        self.user_count -= 1
        if not self.user_count:
            self._calls.put(None)
            type(self).current = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def choose_gpus(
    config: AgentConfig,
    facts: EngineFacts,
    supervised_process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> GpuChoice:
    """Decide which GPUs are the engine's.

    Those that the configuration names; else those that the engine was given; else those that its
    processes hold memory of; else those that this agent was given; else all of this host.

    Args:
        config: What the agent was told.
        facts: What the engine is.
        supervised_process_id: The engine's process, where the agent started it.
        environment: The agent's environment.
    """
    process_id = supervised_process_id or facts.process_id
    if config.gpus is not None:
        return GpuChoice(selection=config.gpus, selected_by="--gpus", engine_process_id=process_id)
    if facts.simulated:
        return GpuChoice(absent_reason="the engine is simulated: it uses no GPU")
    if not facts.is_local:
        return GpuChoice(
            absent_reason=f"the engine runs on another host, {config.engine.host}; run its agent there"
        )
    if facts.visible_devices is not None:
        return GpuChoice(
            selection=parse_visible_devices(facts.visible_devices),
            selected_by="the engine's CUDA_VISIBLE_DEVICES",
            engine_process_id=process_id,
        )
    own = environment.get("CUDA_VISIBLE_DEVICES")
    return GpuChoice(
        engine_process_id=process_id,
        fallback=None if own is None else parse_visible_devices(own),
        fallback_by="CUDA_VISIBLE_DEVICES",
    )
