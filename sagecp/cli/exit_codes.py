"""What the exit code of every command means. Documented by `sagecp help exit-codes`."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the whole project."""

    OK = 0
    UNEXPECTED = 1
    INVALID = 2
    UNREACHABLE = 3
    NOT_PERMITTED = 4
    NOT_FOUND_OR_CONFLICT = 5
    REQUEST_FAILED = 6
    DEADLINE = 7
    INTERRUPTED = 130


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "success",
    ExitCode.UNEXPECTED: "unexpected failure: a defect, or a server that failed",
    ExitCode.INVALID: "wrong usage, or refused as invalid",
    ExitCode.UNREACHABLE: "server or engine cannot be reached, or a port is in use",
    ExitCode.NOT_PERMITTED: "not authenticated, or not permitted",
    ExitCode.NOT_FOUND_OR_CONFLICT: "not found, or in conflict with the present state",
    ExitCode.REQUEST_FAILED: "the request failed, was cancelled, or was refused for overload",
    ExitCode.DEADLINE: "a deadline or timeout passed",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}


def table_text() -> str:
    """Return the table as lines for a person."""
    return "\n".join(f"{code.value:>5}  {meaning}" for code, meaning in MEANINGS.items())
