"""Drives an engine model with the real clock: one callback per step, no task."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import TokenOutput

# Event loop timers count whole milliseconds; a step that is due within this runs now.
_EARLY_S = 0.0005


class EngineLoop:
    """Finishes steps when they are due and hands their tokens on.

    Args:
        model: The engine.
        deliver: Takes the tokens of every step. It may add and abort requests.

    Attributes:
        paused: Steps begin and do not end; call :meth:`wake` after a change.
        asleep: No step begins; likewise.
    """

    def __init__(self, model: EngineModel, deliver: Callable[[list[TokenOutput]], None]) -> None:
        self._model = model
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.Handle | None = None
        self._due_s = 0.0
        self._stopped = False
        self.paused = False
        self.asleep = False

    def now(self) -> float:
        """Return the engine's time, in seconds."""
        return time.monotonic()

    def wake(self) -> None:
        """Take notice of a request that was added or aborted."""
        if self._stopped:
            return
        if self.asleep:
            self._cancel()
            return
        now = time.monotonic()
        due_s = self._model.begin_step(now)
        if due_s is None or self.paused:
            self._cancel()
        elif self._handle is None or due_s != self._due_s:
            self._cancel()
            self._schedule(due_s, now)

    def stop(self) -> None:
        """Never run another step: what an engine that froze or died does."""
        self._stopped = True
        self._cancel()

    def _schedule(self, due_s: float, now: float) -> None:
        self._due_s = due_s
        if due_s - now <= _EARLY_S:
            self._handle = self._loop.call_soon(self._run)
        else:
            self._handle = self._loop.call_later(due_s - now, self._run)

    def _run(self) -> None:
        self._handle = None
        now = time.monotonic()
        if self._due_s - now > _EARLY_S:
            self._schedule(self._due_s, now)
            return
        self._deliver(self._model.finish_step(max(now, self._due_s)))
        self.wake()

    def _cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
