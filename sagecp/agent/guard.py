"""Runs an engine, and ends it together with the agent. A program of its own.

    python guard.py STATUS_FD STOP_TIMEOUT_S COMMAND...

Engines have processes of their own, and one that is killed leaves them behind,
with the GPU's memory. So the engine gets a process group, and between it and the
agent stands this process, which holds on to nothing else: when its standard input
ends, because the agent closes it or is gone, it asks the group to end, and ends it
for certain after the timeout; when the engine ends, so does what is left of its
group. Signals to the guard itself change nothing. It tells on STATUS_FD, a line
each: ``started PID``, ``exited CODE`` (negative: the signal that ended it), or
``failed REASON``.

Standard library only: it starts in a fraction of the time that the agent needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time

_DEATH_SIGNAL_OPTION = 1  # PR_SET_PDEATHSIG of prctl(2).


def main(arguments: list[str]) -> int:
    """Run until the engine has ended. Returns the exit status of the guard."""
    status_fd, stop_timeout_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # A handler, unlike SIG_IGN, is not inherited.
    child_ended, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(notice, warn_on_full_buffer=False)
    try:
        engine = subprocess.Popen(  # noqa: S603 - whoever runs the agent chose the command
            command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - there is no other thread here
        )
    except OSError as error:
        _tell(status_fd, f"failed {error.strerror or error}")
        return 1
    _tell(status_fd, f"started {engine.pid}")
    _wait(engine, child_ended, None)
    if engine.poll() is None:
        _signal_group(engine.pid, signal.SIGTERM)
        _wait(engine, child_ended, time.monotonic() + stop_timeout_s)
    # What the engine leaves behind, or the engine itself if it did not end in time.
    _signal_group(engine.pid, signal.SIGKILL)
    _tell(status_fd, f"exited {engine.wait()}")
    return 0


def _wait(engine: subprocess.Popen[bytes], child_ended: int, deadline_s: float | None) -> None:
    """Return when the engine ends, at the deadline, or without one when standard input ends."""
    with selectors.SelectSelector() as selector:
        selector.register(child_ended, selectors.EVENT_READ)
        if deadline_s is None:
            selector.register(sys.stdin, selectors.EVENT_READ)
        while engine.poll() is None:
            remaining_s = None if deadline_s is None else deadline_s - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return
            for key, _ in selector.select(remaining_s):
                # The agent says nothing: all there is to read is the end.
                if key.fd != child_ended and not os.read(key.fd, 1024):
                    return
                if key.fd == child_ended:
                    os.read(child_ended, 1024)


def _end_with_parent() -> None:
    """Have the kernel end the engine should the guard be killed. Runs in the new process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL_OPTION, signal.SIGKILL)


def _signal_group(process_id: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, number)


def _tell(status_fd: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(status_fd, line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
