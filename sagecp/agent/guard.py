"""Runs an engine, and ends it together with the agent. A program of its own.

    python guard.py STATUS_FD STOP_TIMEOUT_S COMMAND...

Engines have processes of their own, and one that is killed leaves them behind, with the GPU's
memory. So the engine gets a process group, and between it and the agent stands this process,
which holds on to nothing else: when its standard input ends, because the agent closes it or is
gone, it asks the group to end, and ends it for certain after the timeout; when the engine
ends, so does what it leaves behind: its group, and on Linux processes that left the group as
well. Signals to the guard itself change nothing. It tells on STATUS_FD, a line each: ``started
PID``, ``exited CODE`` (negative: the signal that ended it), or ``failed REASON``.

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

# Of prctl(2): PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER.
_DEATH_SIGNAL_OPTION = 1
_ADOPT_OPTION = 36
# What a signal of this kind does not end in so long hangs in the kernel.
_LEFTOVERS_TIMEOUT_S = 5.0
_POLL_S = 0.02


def main(arguments: list[str]) -> int:
    """Run until the engine has ended. Returns the exit status of the guard."""
    status_fd, stop_timeout_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # A handler, unlike SIG_IGN, is not inherited.
    # What loses its parent becomes a child of this process, instead of the first one's.
    _control_process(_ADOPT_OPTION, 1)
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
    exit_code = engine.wait()
    _end_leftovers()
    _tell(status_fd, f"exited {exit_code}")
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


def _end_leftovers() -> None:
    """End and reap every process that the engine has left to this one, and then what those leave."""
    deadline_s = time.monotonic() + _LEFTOVERS_TIMEOUT_S
    own_id = os.getpid()
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{own_id}/children") as listed:  # noqa: PTH123 - pathlib takes 10 ms
                children = [int(word) for word in listed.read().split()]
            for process_id in children:
                os.kill(process_id, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_POLL_S)


def _end_with_parent() -> None:
    """Have the kernel end the engine should the guard be killed. Runs in the new process."""
    _control_process(_DEATH_SIGNAL_OPTION, signal.SIGKILL)


def _control_process(option: int, value: int) -> None:
    """Call prctl(2), where there is one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


def _signal_group(process_id: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, number)


def _tell(status_fd: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(status_fd, line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
