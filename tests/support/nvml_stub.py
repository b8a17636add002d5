"""A stand-in for the NVIDIA driver's library: nvml_stub.c, compiled once and loaded in its place."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pynvml
import pytest

from tests.support.processes import ROOT, require

SOURCE = Path(__file__).with_name("nvml_stub.c")


@functools.cache
def library_folder(*, old: bool = False) -> Path:
    """Return a folder with the compiled ``libnvidia-ml.so.1``.

    Args:
        old: Of an old driver, without what came later.
    """
    gcc = require("gcc", "it compiles the stand-in for libnvidia-ml.so.1")
    folder = Path(tempfile.mkdtemp(prefix="nvml-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [str(gcc), "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    command += ["-DOLD"] if old else []
    result = subprocess.run(
        [*command, "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


class NvmlStub:
    """The stand-in, loaded into this process. See nvml_stub.c for its commands."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(library_folder() / "libnvidia-ml.so.1"))
        self.library.stub_calls.restype = ctypes.c_ulonglong

    def control(self, *commands: str) -> None:
        """Carry out commands."""
        assert self.library.stub_control("\n".join(commands).encode()) == 0, commands

    @property
    def call_count(self) -> int:
        """Questions about GPUs so far."""
        return int(self.library.stub_calls())


def load_stub(monkeypatch: pytest.MonkeyPatch, *commands: str) -> NvmlStub:
    """Put the stand-in in the driver's place for one test, in this process, and carry out commands."""
    stub = NvmlStub()
    # As if it had been found by its name; functions that were looked up in another one are not used.
    monkeypatch.setattr(pynvml, "nvmlLib", stub.library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    stub.control("gpus 2", *commands)
    return stub


def run_with_library(folder: Path, script: str, *commands: str) -> str:
    """Return what a Python program prints that finds its libraries in a folder.

    Args:
        folder: Searched first.
        script: The program.
        *commands: For the stand-in, if it is there.
    """
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": str(ROOT),
            "STUB_NVML": "\n".join(commands),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


class ManualClock:
    """Seconds that pass when they are told to."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
