"""Programs started by tests: each in a process group of its own, each ended for certain."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
# The command as installed beside the interpreter that runs the tests.
SAGECP = Path(sys.executable).with_name("sagecp")


class Program:
    """A running program, with what it has printed so far.

    Standard output and error are read together, by a thread, so that the program
    never waits for a full pipe and a test can wait for a line.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log_file: Path | None = None,
    ) -> None:
        self.name = name
        arguments = [str(part) for part in command]
        if setpriv := shutil.which("setpriv"):
            # If the test run itself is killed, the program is told to stop.
            arguments = [setpriv, "--pdeathsig", "TERM", *arguments]
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self._log_file = log_file
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder or ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log_file.open("w")) if self._log_file else None
            for line in self.process.stdout:
                if log is not None:
                    log.write(line)
                    log.flush()
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "\n".join(self._lines)

    def wait_for_line(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Return the first match in a printed line.

        Raises:
            AssertionError: The program ended, or the time passed, without it; shows what it printed.
        """
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if match := expression.search(line):
                        return match
                seen = len(self._lines)
                remaining = deadline - time.monotonic()
                if self._closed or remaining <= 0:
                    break
                self._changed.wait(remaining)
        how = "ended" if self._closed else f"did not within {timeout_s:g} s"
        raise AssertionError(f"{self.name} was to print {pattern!r} and {how}; it printed:\n{self.tail()}")

    def tail(self, count: int = 60) -> str:
        """Return the last lines printed."""
        with self._changed:
            return "\n".join(self._lines[-count:])

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the program and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end and return the exit status."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} did not end within {timeout_s:g} s; it printed:\n{self.tail()}"
            ) from None
        self._reader.join(5)
        return status

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ask the program to end, and end it and its children for certain."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        self.signal_group(signal.SIGKILL)
        status = self.process.wait(10)
        self._reader.join(5)
        return status


def require(tool: str, why: str) -> Path:
    """Return where a tool is; without it the test is skipped, or fails where everything is required."""
    beside = ROOT / ".venv-proto" / "bin" / tool
    found = str(beside) if beside.exists() else shutil.which(tool)
    if found is None:
        message = f"{tool} is not installed: {why}"
        if os.environ.get("SAGECP_TEST_REQUIRE_ALL"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Return different loopback ports that are free now, for programs that cannot take port 0.

    Below the range that Linux hands out by itself: a program that takes half a
    minute to listen would find a port of that range taken by some connection.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def eventually(
    probe: Callable[[], T], accept: Callable[[T], bool], *, timeout_s: float, interval_s: float = 0.05
) -> T:
    """Ask for a value of another process until it is acceptable; that cannot be awaited as an event.

    Raises:
        AssertionError: It never was; shows the last value.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if accept(value):
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout_s:g} s; the last value was {value!r}")
        time.sleep(interval_s)
