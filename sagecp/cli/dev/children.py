"""Child processes that end with their parent, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence

_PR_SET_PDEATHSIG = 1
_KEPT_LINES = 30
# Far beyond any log line; a longer one is cut, never fatal.
_LINE_LIMIT = 1 << 20


class ChildEndedError(Exception):
    """A child ended while something was expected of it.

    Attributes:
        child: Which.
    """

    def __init__(self, child: Child) -> None:
        super().__init__(f"{child.name} ended with status {child.returncode}")
        self.child = child


class Child:
    """One `sagecp` command as a process of its own.

    It has its own session, so that Ctrl-C reaches the parent alone, which then
    stops everything in order; and the kernel kills it if the parent dies.

    Args:
        name: For people.
        arguments: Of `sagecp`.
        on_line: Gets the name and every line of output.
    """

    def __init__(self, name: str, arguments: Sequence[str], on_line: Callable[[str, str], None]) -> None:
        self.name = name
        self._arguments = list(arguments)
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiters: list[tuple[re.Pattern[str], asyncio.Future[str]]] = []
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def pid(self) -> int:
        """Process id; 0 before the start."""
        return 0 if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or ``None`` while it runs."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Start it and begin to read its output."""
        parent = os.getpid()
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:  # The parent died before it could be said.
                    os._exit(1)

        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sagecp",
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=die_with_parent,
            limit=_LINE_LIMIT,
        )
        self._reader = asyncio.get_running_loop().create_task(self._read(), name=f"output of {self.name}")

    async def _read(self) -> None:
        assert self._process is not None  # noqa: S101 - started
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # Longer than the limit: the reader has dropped it.
                continue
            if not raw:
                break
            line = raw.decode(errors="replace").rstrip("\n")
            self.last_lines.append(line)
            self._on_line(self.name, line)
            for pattern, found in self._waiters:
                match = pattern.search(line)
                if match and not found.done():
                    found.set_result(match[1])
        await self._process.wait()
        for _, found in self._waiters:
            if not found.done():
                found.set_exception(ChildEndedError(self))

    async def says(self, pattern: str) -> str:
        """Return the first group of the first line that matches. Ask before the start.

        Raises:
            ChildEndedError: It ended without saying so.
        """
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiters.append((re.compile(pattern), found))
        return await found

    async def ended(self) -> int:
        """Wait for its end and its last output; return the exit status."""
        assert self._process is not None  # noqa: S101 - started
        if self._reader is not None:
            await asyncio.shield(self._reader)
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; end it for certain after a while, with whatever it started."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), timeout_s)
        self.kill()
        await process.wait()
        if self._reader is not None:
            # A grandchild could hold the pipe open: not waited for without end.
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(self._reader, 1.0)

    def kill(self) -> None:
        """End it and its session at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
