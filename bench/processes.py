"""Processes under measurement: started, read from /proc, and ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Measured:
    """A running process.

    Attributes:
        address: Host and port that it serves on.
    """

    process: subprocess.Popen[bytes]
    address: str

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far, user and system, of every thread."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def resident_mib(self) -> float:
        """Return the memory in use now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS in /proc status")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def control_plane(*flags: str) -> Iterator[Measured]:
    """Run `sagecp serve` on a free port until the context ends; without a journal, unless told one."""
    listen = f"127.0.0.1:{(port := free_port())}"
    with _running("serve", "--listen", listen, "--log-level", "warning", "--journal", "off", *flags) as p:
        _wait_for_port(p, port)
        yield Measured(p, f"127.0.0.1:{port}")


@contextlib.contextmanager
def simulated_engine(model: str, *flags: str) -> Iterator[Measured]:
    """Run `sagecp engine-sim` on a free port until the context ends."""
    port = free_port()
    with _running("engine-sim", "--port", str(port), "--model", model, *flags) as p:
        _wait_for_port(p, port)
        _wait_healthy(f"http://127.0.0.1:{port}/health")
        yield Measured(p, f"127.0.0.1:{port}")


@contextlib.contextmanager
def bare_grpc(pace_ms: float) -> Iterator[Measured]:
    """Run `bench.bare_grpc` on a free port until the context ends."""
    port = free_port()
    with _running(str(port), f"{pace_ms:g}", module="bench.bare_grpc") as p:
        _wait_for_port(p, port)
        yield Measured(p, f"127.0.0.1:{port}")


@contextlib.contextmanager
def served_by(module: str, *arguments: str) -> Iterator[Measured]:
    """Run a module with a free port and arguments until the context ends."""
    port = free_port()
    with _running(str(port), *arguments, module=module) as p:
        _wait_for_port(p, port)
        yield Measured(p, f"127.0.0.1:{port}")


@contextlib.contextmanager
def _running(*arguments: str, module: str = "sagecp") -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], port: int, timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} exited with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not listen on {port} within {timeout_s:g} s")


def _wait_healthy(url: str, timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer 200 within {timeout_s:g} s")


def machine() -> str:
    """Return a line about the machine, for reports."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores of {model}, Python {sys.version.split()[0]}"


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print an aligned table, Markdown as well as readable."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for index, row in enumerate([header, *rows]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_side_by_side(figures: Mapping[str, Mapping[str, float]]) -> None:
    """Print what was measured of several as a table: a column each, a row per figure of the first."""
    print_table(
        ("figure", *figures),
        [
            (name, *(f"{each[name]:.2f}" for each in figures.values()))
            for name in next(iter(figures.values()))
        ],
    )


def write_json(path: Path | None, figures: object) -> None:
    """Write figures for later comparison, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
