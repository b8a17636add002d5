"""Owns the process of an engine: starts it, starts it again when it ends, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sagecp.agent import guard
from sagecp.agent.backoff import Backoff
from sagecp.agent.config import AgentConfig, Supervision
from sagecp.agent.engine_output import OutputPump, open_pump
from sagecp.agent.engine_probe import Observation
from sagecp.core.engine_state import EngineProcess, EngineProcessState
from sagecp.core.types import EngineCondition
from sagecp.log import get_logger

# Beyond the engine's own time to stop, for the kernel to clear up.
_KILL_TIMEOUT_S = 10.0
_LAST_LINES_TIMEOUT_S = 1.0
_CONNECT_TIMEOUT_S = 0.5
# As a shell has it.
_NOT_STARTED = 127


class EngineSupervisor:
    """One engine process after another.

    Args:
        config: Of the agent; its ``supervision`` says what to run.
        on_change: Called when the state of the process changes.

    Attributes:
        process: How the process does.
        gave_up: Why it is not started any more; empty: it is.
    """

    def __init__(self, config: AgentConfig, on_change: Callable[[], None]) -> None:
        assert config.supervision is not None  # noqa: S101 - made only where there is one
        self._supervision: Supervision = config.supervision
        self._address = config.engine
        self._secrets = (config.engine_api_key, *_secrets_of(config.supervision.command))
        self._on_change = on_change
        self._logger = get_logger("sagecp.agent", instance_id=config.effective_instance_id)
        self._backoff = Backoff(
            self._supervision.restart_base_s,
            self._supervision.restart_cap_s,
            draw=lambda: random.uniform(0.5, 1.0),
        )
        self._stop = asyncio.Event()
        self._guard: asyncio.subprocess.Process | None = None
        self._healthy_since_s: float | None = None
        self._ends_in_a_row = 0
        self._task: asyncio.Task[None] | None = None
        self.process = EngineProcess(state=EngineProcessState.STOPPED)
        self.gave_up = ""

    def start(self) -> None:
        """Start the engine, and keep it running in the background."""
        self._task = asyncio.create_task(self._keep_running(), name="engine supervisor")
        self._task.add_done_callback(self._on_end)

    async def stop(self) -> None:
        """End the engine: ask it first, and after the timeout leave it no choice."""
        if self._task is None:
            return
        self._stop.set()
        if self.process.process_id:
            self._become(EngineProcessState.STOPPING)
            self._logger.info("stopping the engine", timeout_s=self._supervision.stop_timeout_s)
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            async with asyncio.timeout(self._supervision.stop_timeout_s + _KILL_TIMEOUT_S):
                await asyncio.shield(self._task)
        except TimeoutError:
            self.kill()  # Its guard does not do its work.
        except asyncio.CancelledError:
            self.kill()  # Told twice to stop: at once, then.
            raise
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.gave_up = f"the engine is not watched over any more: {task.exception()!r}"
            self._on_change()

    def kill(self) -> None:
        """End the engine, and all that it started, at once."""
        if self.process.process_id:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.process_id, signal.SIGKILL)

    def judge(self, seen: Observation) -> Observation:
        """Return what a look at the engine means, given its process; and take note of it.

        An engine that is not healthy yet is loading; and whatever answers while
        there is no process is another program.
        """
        state = self.process.state
        healthy = seen.condition is EngineCondition.HEALTHY
        if state is EngineProcessState.STARTING:
            if not healthy:
                return Observation(EngineCondition.STARTING, "the engine is starting")
            self._become(EngineProcessState.RUNNING)
        elif state is not EngineProcessState.RUNNING:
            return Observation(EngineCondition.UNHEALTHY, self._absence())
        self._note_health(healthy)
        return seen

    def _note_health(self, healthy: bool) -> None:
        """Keep in mind whether the engine was well for long enough; its end may be seen before it is told."""
        now_s = time.monotonic()
        if self._healthy_since_s is not None and now_s - self._healthy_since_s >= self._supervision.stable_s:
            self._ends_in_a_row = 0
            self._backoff.reset()
        if not healthy:
            self._healthy_since_s = None
        elif self._healthy_since_s is None:
            self._healthy_since_s = now_s

    def _absence(self) -> str:
        process = self.process
        if process.state is EngineProcessState.STOPPING:
            return "the engine is being stopped"
        # Without the time of the next start, which would be another reason with every beat.
        return self.gave_up or f"the engine {_describe_end(process.last_exit_code)}"

    async def _keep_running(self) -> None:
        limit = self._supervision.max_restart_count
        while True:
            exit_code, last_lines = await self._run_once()
            self.process = replace(
                self.process, process_id=0, last_exit_code=exit_code, last_log_lines=last_lines
            )
            if self._stop.is_set():
                self._become(EngineProcessState.STOPPED)
                self._logger.info("engine stopped", exit_code=exit_code)
                return
            self._note_health(healthy=False)
            self._ends_in_a_row += 1
            if limit and self._ends_in_a_row > limit:
                self.gave_up = (
                    f"the engine ended {self._ends_in_a_row} times in a row, more than --max-restarts "
                    f"{limit} allows; the last one {_describe_end(exit_code)}"
                )
                self._become(EngineProcessState.STOPPED)
                return
            wait_s = self._backoff.next_wait_s()
            self._logger.warning(
                "the engine ended; starting it again",
                reason=f"the engine {_describe_end(exit_code)}",
                wait_s=round(wait_s, 3),
                restart_count=self.process.restart_count,
                last_line=last_lines[-1] if last_lines else None,
            )
            self._become(EngineProcessState.BACKING_OFF, next_start_time_s=time.time() + wait_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stop.wait()
                self._become(EngineProcessState.STOPPED)
                return
            self.process = replace(self.process, restart_count=self.process.restart_count + 1)

    async def _run_once(self) -> tuple[int, tuple[str, ...]]:
        """Run the engine until it ends; return its exit code and last lines."""
        supervision = self._supervision
        if supervision.owns_port and await self._is_taken():
            # What answers there is not the engine, which would end over it: after a while, or never.
            text = f"another program listens on {self._address.url} already"
            self._logger.error("the engine is not started", reason=text)
            return _NOT_STARTED, (text,)
        status_fd, status_write_fd = os.pipe()
        pump, output_fd = open_pump(supervision.log_file, self._secrets)
        self._become(EngineProcessState.STARTING, start_time_s=time.time())
        try:
            self._guard = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                str(Path(guard.__file__)),
                str(status_write_fd),
                f"{supervision.stop_timeout_s:g}",
                *supervision.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=output_fd,
                stderr=output_fd,
                pass_fds=(status_write_fd,),
                # Ctrl-C is for the agent, which then stops everything in order.
                start_new_session=True,
            )
        except OSError as error:
            os.close(status_fd)
            self._logger.error("no process can be started for the engine", reason=str(error))
            return _NOT_STARTED, ()
        finally:
            os.close(status_write_fd)
            os.close(output_fd)
        if self._stop.is_set() and self._guard.stdin is not None:
            self._guard.stdin.close()
        exit_code = await self._follow(status_fd)
        await self._guard.wait()
        self._guard = None
        return exit_code, await asyncio.to_thread(_finish, pump)

    async def _is_taken(self) -> bool:
        """Return whether somebody listens where the engine will."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(self._address.host, self._address.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def _follow(self, status_fd: int) -> int:
        """Take note of what the guard tells; return the engine's exit code."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader),
            os.fdopen(status_fd, "rb", buffering=0),  # Closed by the transport.
        )
        exit_code: int | None = None
        try:
            async for line in reader:
                word, _, rest = line.decode("utf-8", "replace").strip().partition(" ")
                if word == "started":
                    self.process = replace(self.process, process_id=int(rest))
                    self._logger.info("engine started", process_id=int(rest))
                    self._on_change()
                elif word == "exited":
                    exit_code = int(rest)
                elif word == "failed":
                    self._logger.error("the engine cannot be started", reason=rest)
                    exit_code = _NOT_STARTED
        finally:
            transport.close()
        if exit_code is None:
            # The guard itself was killed: the kernel ends the engine, this ends what it started.
            self.kill()
            return -signal.SIGKILL
        return exit_code

    def _become(
        self,
        state: EngineProcessState,
        *,
        start_time_s: float | None = None,
        next_start_time_s: float | None = None,
    ) -> None:
        self.process = replace(
            self.process,
            state=state,
            start_time_s=start_time_s or self.process.start_time_s,
            next_start_time_s=next_start_time_s,
        )
        self._on_change()


def _finish(pump: OutputPump) -> tuple[str, ...]:
    return pump.finish(_LAST_LINES_TIMEOUT_S)


def _describe_end(exit_code: int | None) -> str:
    """Say how a process ended: "ended with exit code 1", "was ended by SIGKILL"."""
    if exit_code is None:
        return "has not been started"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def _secrets_of(command: tuple[str, ...]) -> list[str]:
    """Return what a command line says that nobody else should read: its keys."""
    found: list[str] = []
    for index, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name.startswith("-") and name.lstrip("-").replace("_", "-") in {"api-key", "hf-token"}:
            found += [value] if equals else [command[index + 1]] if index + 1 < len(command) else []
    return found
